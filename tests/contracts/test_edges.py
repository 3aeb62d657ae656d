"""Contract of every edge of every hand-written adapter: the float output of the model does not change.

Checked on the real transformers models with grouped-query attention, RoPE and random biases: to 1e-12 in true
float64 and to 1e-5 in float32.
"""

from __future__ import annotations

import pytest
import torch
from architectures import CONFIGS, LIMIT, build, distance, logits
from torch import Tensor, nn

from bitwright.models import Adapter, adapter_for
from bitwright.models.edges import Edge, Factors, NormEdge, apply_factors, merge_factors

EDGES = [
    pytest.param(name, index, id=f"{name}-{'-'.join(edge.modules)}")
    for name, config in CONFIGS.items()
    for index, edge in enumerate(adapter_for(config).edges)
]


def rescaled(adapter: Adapter, model: nn.Module, edges: tuple[Edge, ...], seed: int) -> dict[str, Tensor]:
    """The tensors of all blocks after random log-normal rescalings, different in every block."""
    torch.manual_seed(seed)
    stored = dict(model.named_parameters())
    changed = {}
    for index in range(2):
        scales = [torch.exp(0.5 * torch.randn(e.width(adapter.shape), dtype=torch.float64)) for e in edges]
        several = [edge.factors(scale, adapter.shape) for edge, scale in zip(edges, scales, strict=True)]
        for key, factors in merge_factors(several).items():
            whole = adapter.block_prefix(index) + key
            if whole in stored:
                changed[whole] = apply_factors(stored[whole], factors)
    return changed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("name", "index"), EDGES)
def test_edge_keeps_the_float_output(name: str, index: int, dtype: torch.dtype) -> None:
    model, adapter = build(name), adapter_for(CONFIGS[name])
    edge = adapter.edges[index]
    changed = rescaled(adapter, model, (edge,), seed=index)
    before = logits(model, {}, dtype)
    assert distance(before, logits(model, changed, dtype)) <= LIMIT[dtype]

    # half of the rescaling must show, or the edge would be tested on nothing
    half = {key: value for key, value in changed.items() if f".{edge.modules[0]}." in f"{key}."}
    assert len(half) in (2, 4)
    assert distance(before, logits(model, half, dtype)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_edges_together_keep_the_float_output(name: str, dtype: torch.dtype) -> None:
    model, adapter = build(name), adapter_for(CONFIGS[name])
    changed = rescaled(adapter, model, adapter.edges, seed=7)
    assert distance(logits(model, {}, dtype), logits(model, changed, dtype)) <= LIMIT[dtype]


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_those_of_the_model(name: str) -> None:
    model, adapter = build(name), adapter_for(CONFIGS[name])
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for index in range(2):
        prefix = adapter.block_prefix(index)
        block = {key.removeprefix(prefix): part for key, part in modules.items() if key.startswith(prefix)}
        linears = [key for key, part in block.items() if isinstance(part, nn.Linear)]
        assert sorted(linears) == sorted(adapter.linears)
        others = [
            key
            for key, part in block.items()
            if key not in linears and any(True for _ in part.parameters(recurse=False))
        ]
        holders = {name.rpartition(".")[0] for name in adapter.stacks}
        assert sorted(others) == sorted({*adapter.norms, *adapter.routers, *holders})
        assert all((prefix + name in parameters) for name in adapter.stacks)
    assert modules[adapter.embedding] is model.get_input_embeddings()
    assert modules[adapter.head] is model.get_output_embeddings()
    outside = {adapter.embedding, adapter.head, *adapter.kept}
    outside |= {adapter.final_norm} if adapter.final_norm else set()
    assert outside <= modules.keys()
    unclaimed = [
        key
        for key in model.state_dict()
        if not key.startswith(f"{adapter.blocks}.") and key.rpartition(".")[0] not in outside
    ]
    assert unclaimed == []
    assert adapter.tied_head == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


def test_post_norm_opt_claims_no_norm_edge() -> None:
    adapter = adapter_for(CONFIGS["opt-post-norm"])
    assert not any(isinstance(edge, NormEdge) for edge in adapter.edges)
    assert adapter.final_norm is None
    assert "model.decoder.project_in" in adapter.kept


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "gemma3", "mixtral"])
def test_gradients_reach_every_scale(name: str) -> None:
    model, adapter = build(name), adapter_for(CONFIGS[name])
    scales = [torch.ones(e.width(adapter.shape), dtype=torch.float64, requires_grad=True) for e in adapter.edges]
    factors = merge_factors(
        [edge.factors(scale, adapter.shape) for edge, scale in zip(adapter.edges, scales, strict=True)]
    )
    total = torch.zeros((), dtype=torch.float64)
    for key, factor in factors.items():
        tensor = model.state_dict().get(adapter.block_prefix(0) + key)
        if tensor is not None:
            total = total + (apply_factors(tensor, factor) * torch.randn_like(tensor)).sum()
    total.backward()
    assert all(scale.grad is not None and (scale.grad != 0).all() for scale in scales)


def test_merging_is_the_same_in_any_order() -> None:
    rows, columns = torch.rand(3), torch.rand(4)
    one, other = {"a.weight": Factors(rows=rows)}, {"a.weight": Factors(rows=rows, columns=columns)}
    tensor = torch.rand(3, 4)
    forward, backward = merge_factors([one, other]), merge_factors([other, one])
    in_turn = apply_factors(apply_factors(tensor, one["a.weight"]), other["a.weight"])
    for merged in (forward, backward):
        torch.testing.assert_close(apply_factors(tensor, merged["a.weight"]), in_turn)
