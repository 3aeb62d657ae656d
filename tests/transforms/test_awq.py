"""AWQ's search: its objective is the output error, it never loses to the identity, and it finds outlier channels."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bitwright.models import Adapter, adapter_for
from bitwright.models.edges import LinearEdge, NormEdge, RotaryEdge
from bitwright.transforms.awq import Awq, search_scales
from bitwright.transforms.equivalence import apply

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
TOKENS = 256


def round_rows(_: str, weight: Tensor) -> Tensor:
    """Four-bit min-max of every row."""
    low, high = weight.amin(dim=-1, keepdim=True), weight.amax(dim=-1, keepdim=True)
    step = (high - low) / 15
    return torch.round((weight - low) / step) * step + low


class Block:
    """A block's tensors and random inputs of its linears, those of one group the same; some channels are loud."""

    def __init__(self, model_type: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64):
        torch.manual_seed(seed)
        self.adapter: Adapter = adapter_for({**SIZES, "model_type": model_type, "num_local_experts": 3})
        shape = self.adapter.shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sizes = {"q_proj": (queries, 32), "k_proj": (keys, 32), "v_proj": (keys, 32), "o_proj": (32, queries)}
        self.tensors = {f"self_attn.{name}.weight": torch.randn(size, dtype=dtype) for name, size in sizes.items()}
        self.tensors |= {f"{name}.weight": torch.rand(32, dtype=dtype) + 0.5 for name in self.adapter.norms}
        readers = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
        if model_type == "mixtral":
            self.tensors |= {"mlp.gate.weight": torch.randn(3, 32, dtype=dtype)}
            self.tensors |= {"mlp.experts.gate_up_proj": torch.randn(3, 96, 32, dtype=dtype)}
            self.tensors |= {"mlp.experts.down_proj": torch.randn(3, 32, 48, dtype=dtype)}
            readers += [("mlp.experts.gate_up_proj",), ("mlp.experts.down_proj",)]
        else:
            feed_forward = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
            self.tensors |= {f"mlp.{n}.weight": torch.randn(s, dtype=dtype) for n, s in feed_forward.items()}
            readers += [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
        self.inputs: dict[str, Tensor] = {}
        for group in readers:
            width = self.weight(group[0]).shape[-1]
            experts = (3,) if group[0].endswith("experts.down_proj") else ()
            loud = torch.exp(1.5 * torch.randn(*experts, 1, width, dtype=dtype))
            mixing = torch.eye(width, dtype=dtype) + 0.1 * torch.randn(width, width, dtype=dtype)
            self.inputs |= dict.fromkeys(group, torch.randn(*experts, TOKENS, width, dtype=dtype) @ mixing * loud)
        self.hessians = {name: x.transpose(-1, -2) @ x / TOKENS for name, x in self.inputs.items()}
        self.mean_abs = {name: x.abs().mean(dim=-2) for name, x in self.inputs.items()}

    def weight(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight" if f"{name}.weight" in self.tensors else name]

    def search(self, settings: Awq | None = None):
        return search_scales(settings or Awq(), self.adapter, self.tensors, self.hessians, self.mean_abs, round_rows)


def output_error(block: Block, names: tuple[str, ...], columns: dict[str, Tensor]) -> float:
    """What the search minimises, the slow way: run the linears on the activations, rounded and not."""
    total = 0.0
    for name in names:
        weight, x = block.weight(name), block.inputs[name]
        rounded = round_rows(name, weight * columns[name]) / columns[name]
        total += float((x @ (rounded - weight).transpose(-1, -2)).square().sum() / TOKENS)
    return total


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_errors_are_those_of_the_outputs(model_type: str) -> None:
    block = Block(model_type)
    rewrite, choices = block.search(Awq(points=5))
    searched = [index for index, edge in enumerate(block.adapter.edges) if not isinstance(edge, RotaryEdge)]
    assert [block.adapter.edges.index(choice.edge) for choice in choices] == searched
    for index, choice in zip(searched, choices, strict=True):
        edge, scale = block.adapter.edges[index], rewrite.scales[index]
        assert scale is not None
        names = tuple(name for name in edge.consumers if name in block.inputs)
        factors = edge.factors(scale.double(), block.adapter.shape)
        columns = {name: factors[edge.consumers[name]].columns for name in names}
        columns = {n: c.unsqueeze(-2) if c.ndim > 1 else c for n, c in columns.items() if c is not None}
        ones = {name: torch.ones(1, dtype=torch.float64) for name in names}
        # no edge here divides the rows of another's consumer before that one is searched
        assert choice.before == pytest.approx(output_error(block, names, ones), rel=1e-6)
        assert choice.after == pytest.approx(output_error(block, names, columns), rel=1e-6)


def test_the_best_exponent_of_the_grid_is_taken() -> None:
    block = Block()
    rewrite, choices = block.search(Awq(points=7, sites=("value",)))
    mean = block.mean_abs["self_attn.o_proj"].reshape(2, 2, 8).mean(dim=1).flatten()  # over the queries of a group
    errors = []
    for point in range(7):
        scale = mean ** (point / 7)
        scale = scale / (scale.max() * scale.min()).sqrt()
        columns = scale.reshape(2, 1, 8).expand(2, 2, 8).flatten()
        errors.append(output_error(block, ("self_attn.o_proj",), {"self_attn.o_proj": columns}))
    best = min(range(7), key=errors.__getitem__)
    assert best > 0
    assert choices[0].exponent == best / 7
    assert choices[0].after == pytest.approx(errors[best], rel=1e-6)
    expected = mean ** (best / 7) / ((mean.max() * mean.min()) ** (best / 7)) ** 0.5
    torch.testing.assert_close(rewrite.scales[2], expected.float())
    assert [scale is None for scale in rewrite.scales] == [True, True, False, True, True]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_worse_than_the_identity(seed: int, dtype: torch.dtype) -> None:
    block = Block(seed=seed)
    block.tensors = {name: tensor.to(dtype) for name, tensor in block.tensors.items()}
    rewrite, choices = block.search()
    assert all(choice.after <= choice.before for choice in choices)
    assert sum(choice.after for choice in choices) < 0.95 * sum(choice.before for choice in choices)
    assert all(scale is None or scale.dtype == torch.float32 for scale in rewrite.scales)


def test_weights_that_round_perfectly_are_left_alone() -> None:
    block = Block()
    rewrite, choices = search_scales(
        Awq(), block.adapter, block.tensors, block.hessians, block.mean_abs, lambda _, weight: weight
    )
    for choice in choices:
        assert (choice.exponent, choice.before, choice.after) == (0.0, 0.0, 0.0)
    assert all(scale is None or bool((scale == 1).all()) for scale in rewrite.scales)


def test_a_planted_outlier_channel_is_scaled_up() -> None:
    block = Block(seed=1)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        x = torch.randn(TOKENS, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        x[:, 5] *= 40
        block.inputs[name], block.hessians[name], block.mean_abs[name] = x, x.T @ x / TOKENS, x.abs().mean(dim=0)
    rewrite, choices = block.search(Awq(sites=("norm",)))
    scale = rewrite.scales[0]
    assert scale is not None
    assert int(scale.argmax()) == 5
    assert float(scale[5]) > 2 * float(scale.median())
    assert choices[0].exponent > 0
    assert choices[0].after < 0.5 * choices[0].before


def test_later_edges_see_what_earlier_ones_did() -> None:
    """A made-up chain of edges: one linear is scaled as a reader, then as a producer, then searched once more."""
    block = Block()
    seen: list[tuple[str, Tensor]] = []

    def record(name: str, weight: Tensor) -> Tensor:
        seen.append((name, weight.clone()))
        return round_rows(name, weight)

    adapter = block.adapter
    chain = (NormEdge("input_layernorm", ("self_attn.o_proj",)), LinearEdge("self_attn.o_proj", "mlp.gate_proj"))
    chained = Adapter(
        model_type="chain",
        blocks="b",
        embedding="e",
        final_norm=None,
        head="h",
        shape=type(adapter.shape)(32, 32, 4, 2, 8),
        shared_inputs=adapter.shared_inputs,
        edges=(*chain, NormEdge("post_attention_layernorm", ("self_attn.o_proj",))),
        norms=adapter.norms,
    )
    rewrite, _ = search_scales(Awq(points=4), chained, block.tensors, block.hessians, block.mean_abs, record)
    first, second, _ = rewrite.scales
    assert first is not None
    assert second is not None
    last = [weight for name, weight in seen if name == "self_attn.o_proj"][4]  # the third edge's first candidate
    expected = block.weight("self_attn.o_proj") * first / second.unsqueeze(1)
    torch.testing.assert_close(last, expected)


def test_a_dead_channel_is_scaled_as_the_faintest_live_one() -> None:
    block = Block()
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        block.mean_abs[name] = block.mean_abs[name].clone()
        block.mean_abs[name][3] = 0
    rewrite, choices = block.search(Awq(sites=("norm",)))
    scale = rewrite.scales[3]
    assert scale is not None
    assert choices[1].exponent > 0
    assert scale[3] == scale.min()
    assert (scale == scale.min()).sum() == 2
    block.mean_abs["mlp.gate_proj"].zero_()
    scale = block.search(Awq(sites=("norm",)))[0].scales[3]
    assert scale is not None
    assert bool((scale == 1).all())


def test_what_stays_in_float_is_not_scored() -> None:
    block = Block()
    del block.hessians["self_attn.k_proj"], block.hessians["self_attn.v_proj"], block.hessians["mlp.down_proj"]
    rewrite, choices = block.search(Awq(points=3))
    assert rewrite.scales[4] is None
    assert [choice.edge for choice in choices] == [block.adapter.edges[index] for index in (0, 2, 3)]
    ones = {"self_attn.q_proj": torch.ones(32, dtype=torch.float64)}
    assert choices[0].before == pytest.approx(output_error(block, ("self_attn.q_proj",), ones), rel=1e-6)
    rewritten = apply(rewrite, block.adapter, block.tensors)
    assert rewritten["self_attn.k_proj.weight"] is not block.tensors["self_attn.k_proj.weight"]


def test_refusals() -> None:
    block = Block()
    block.hessians["self_attn.o_proj"] = torch.eye(3)
    with pytest.raises(ValueError, match=r"self_attn\.o_proj: got a Hessian \[3, 3\]"):
        block.search(Awq(points=1))
    block = Block()
    del block.mean_abs["self_attn.o_proj"]
    with pytest.raises(ValueError, match="no statistic"):
        block.search(Awq(points=1))
    for bad in ({"points": 0}, {"sites": ()}, {"sites": ("query",)}):
        with pytest.raises(ValidationError):
            Awq.model_validate(bad)
