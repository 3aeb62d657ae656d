"""Contract of equivalent rewritings: scales and shifts of every edge at once leave the model's output where it is.

To 1e-12 in true float64 and to 1e-5 in float32, with what training computes equal to what fusing computes bit for
bit, and the identity changing no bit.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import CONFIGS, LIMIT, build, distance, logits
from torch import Tensor

from bitwright.models import Adapter, adapter_for
from bitwright.models.edges import LinearEdge, NormEdge
from bitwright.transforms.equivalence import Rewrite, apply, identity, midpoint_shifts, shiftable

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
SHIFTED = {  # which edges of the real blocks have the biases that a shift needs
    "llama": [],
    "llama-bias": ["value"],
    "qwen2": [],
    "qwen3": ["value"],
    "gemma3": ["value"],
    "falcon": [],
    "falcon-bias": ["norm"],
    "falcon-new": ["norm", "norm"],
    "falcon-serial": [],
    "mixtral": [],
    "qwen3_moe": [],
    "opt": ["norm", "value", "norm"],
    "opt-gelu": [],
    "opt-post-norm": ["value"],
}


def block_tensors(name: str, index: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    prefix = adapter_for(CONFIGS[name]).block_prefix(index)
    stored = build(name).named_parameters()
    return {key.removeprefix(prefix): value.detach().to(dtype) for key, value in stored if key.startswith(prefix)}


def random_rewrite(adapter: Adapter, tensors: dict[str, Tensor], seed: int, requires_grad: bool = False) -> Rewrite:
    random = torch.Generator().manual_seed(seed)

    def normal(width: int) -> Tensor:
        return torch.randn(width, generator=random, dtype=torch.float64)

    scales = [torch.exp(0.5 * normal(edge.width(adapter.shape))) for edge in adapter.edges]
    shifts = [
        normal(edge.width(adapter.shape)) if shiftable(index, adapter, tensors) else None
        for index, edge in enumerate(adapter.edges)
    ]
    for value in (*scales, *shifts):
        if value is not None:
            value.requires_grad_(requires_grad)
    return Rewrite(tuple(scales), tuple(shifts))


@DTYPES
@pytest.mark.parametrize("name", CONFIGS)
def test_random_scales_and_shifts_keep_the_float_output(name: str, dtype: torch.dtype) -> None:
    model, adapter = build(name), adapter_for(CONFIGS[name])
    changed = {}
    for index in range(2):
        tensors = block_tensors(name, index)
        rewritten = apply(random_rewrite(adapter, tensors, seed=index), adapter, tensors)
        assert rewritten.keys() == tensors.keys()
        changed |= {adapter.block_prefix(index) + key: value for key, value in rewritten.items()}
    before = logits(model, {}, dtype)
    assert distance(before, logits(model, changed, dtype)) <= LIMIT[dtype]


@pytest.mark.parametrize("name", SHIFTED)
def test_shifts_alone_keep_the_output_and_half_of_one_does_not(name: str) -> None:
    model, adapter = build(name), adapter_for(CONFIGS[name])
    tensors = block_tensors(name, 0)
    shifts = random_rewrite(adapter, tensors, seed=3).shifts
    kinds = [
        "norm" if isinstance(e, NormEdge) else "value"
        for e, s in zip(adapter.edges, shifts, strict=True)
        if s is not None
    ]
    assert kinds == SHIFTED[name]
    before, prefix = logits(model, {}, torch.float64), adapter.block_prefix(0)
    for index, shift in enumerate(shifts):
        if shift is None:
            continue
        alone = tuple(shift if other == index else None for other in range(len(shifts)))
        rewritten = apply(Rewrite((None,) * len(shifts), alone), adapter, tensors)
        changed = {prefix + key: value for key, value in rewritten.items() if value is not tensors[key]}
        assert sorted(changed) == sorted(f"{prefix}{module}.bias" for module in adapter.edges[index].modules)
        assert distance(before, logits(model, changed, torch.float64)) <= LIMIT[torch.float64]
        producer = f"{prefix}{adapter.edges[index].modules[0]}.bias"
        assert distance(before, logits(model, {producer: changed[producer]}, torch.float64)) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_training_and_fusing_give_the_same_bits(name: str) -> None:
    adapter, tensors = adapter_for(CONFIGS[name]), block_tensors(name, 0, torch.float32)
    trained = apply(random_rewrite(adapter, tensors, seed=1, requires_grad=True), adapter, tensors)
    assert any(value.requires_grad for value in trained.values())
    with torch.no_grad():
        fused = apply(random_rewrite(adapter, tensors, seed=1), adapter, tensors)
    for key, value in fused.items():
        assert same_bits(trained[key].detach(), value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_identity_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    adapter, tensors = adapter_for(CONFIGS[name]), block_tensors(name, 0, dtype)
    for tensor in tensors.values():
        tensor.view(-1)[0] = -0.0
    for key, value in apply(identity(adapter), adapter, tensors).items():
        assert value.dtype == torch.promote_types(dtype, torch.float32) or value is tensors[key]
        assert same_bits(value.to(dtype), tensors[key])
    nothing = Rewrite((None,) * len(adapter.edges), (None,) * len(adapter.edges))
    assert all(value is tensors[key] for key, value in apply(nothing, adapter, tensors).items())


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_every_scale_and_shift(name: str) -> None:
    adapter, tensors = adapter_for(CONFIGS[name]), block_tensors(name, 0)
    rewrite = random_rewrite(adapter, tensors, seed=2, requires_grad=True)
    sources = {key: value.requires_grad_() for key, value in tensors.items()}
    random = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=torch.float64)
    for value in apply(rewrite, adapter, sources).values():
        total = total + (value * torch.randn(value.shape, generator=random, dtype=torch.float64)).sum()
    total.backward()
    for value in (*rewrite.scales, *rewrite.shifts, *sources.values()):
        assert value is None or (value.grad is not None and bool((value.grad != 0).all()))


def test_inputs_are_left_alone_and_strangers_pass_through() -> None:
    adapter, tensors = adapter_for(CONFIGS["opt"]), block_tensors("opt", 0)
    copies = {key: value.clone() for key, value in tensors.items()}
    stranger = torch.ones(3)
    rewritten = apply(random_rewrite(adapter, tensors, seed=0), adapter, {**tensors, "rotary.inv_freq": stranger})
    assert rewritten["rotary.inv_freq"] is stranger
    assert all(same_bits(tensors[key], copies[key]) for key in copies)


def test_shift_comes_before_scale() -> None:
    """By hand: one norm of two channels before one linear."""
    adapter = adapter_for(CONFIGS["opt"])
    adapter = replace(adapter, shape=replace(adapter.shape, hidden=2), edges=(NormEdge("final_layer_norm", ("fc1",)),))
    tensors = {
        "final_layer_norm.weight": torch.tensor([6.0, 8.0]),
        "final_layer_norm.bias": torch.tensor([3.0, 5.0]),
        "fc1.weight": torch.tensor([[1.0, 10.0]]),
        "fc1.bias": torch.tensor([0.5]),
    }
    rewrite = Rewrite((torch.tensor([2.0, 4.0]),), (torch.tensor([1.0, -3.0]),))
    result = {key: value.tolist() for key, value in apply(rewrite, adapter, tensors).items()}
    assert result == {
        "final_layer_norm.weight": [3.0, 2.0],
        "final_layer_norm.bias": [(3 - 1) / 2, (5 + 3) / 4],
        "fc1.weight": [[2.0, 40.0]],
        "fc1.bias": [0.5 + 1 * 1 + 10 * -3],
    }


def test_the_order_of_edges_does_not_matter() -> None:
    adapter, tensors = adapter_for(CONFIGS["opt"]), block_tensors("opt", 0)
    rewrite = random_rewrite(adapter, tensors, seed=4)
    backwards = apply(
        Rewrite(rewrite.scales[::-1], rewrite.shifts[::-1]), replace(adapter, edges=adapter.edges[::-1]), tensors
    )
    for key, value in apply(rewrite, adapter, tensors).items():
        torch.testing.assert_close(backwards[key], value, rtol=1e-12, atol=1e-13)


def test_midpoint_shifts_centre_the_inputs_of_linears() -> None:
    adapter, tensors = adapter_for(CONFIGS["llama-bias"]), block_tensors("llama-bias", 0)
    channels = adapter.shape.heads * adapter.shape.head_dim
    low = {"self_attn.o_proj": -torch.arange(channels).float()}
    high = {"self_attn.o_proj": 3 * torch.arange(channels).float() + 1}
    shifts = midpoint_shifts(adapter, tensors, low, high)
    assert [shift is None for shift in shifts] == [True, True, False, True, True]
    # heads 0, 1 share a key-value head of 8 dims: channels i and i + 8, of which the later has the wider range
    expected = [(3 * (i + 8) + 1 - (i + 8)) / 2 for i in (*range(8), *range(16, 24))]
    assert shifts[2] is not None
    assert shifts[2].tolist() == expected


def one(adapter: Adapter, index: int, value: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(value if index == other else None for other in range(len(adapter.edges)))


def test_refusals() -> None:
    adapter, tensors = adapter_for(CONFIGS["opt"]), block_tensors("opt", 0)
    none = one(adapter, -1, None)
    kinds = [type(edge).__name__ for edge in adapter.edges]
    assert kinds == ["NormEdge", "RotaryEdge", "LinearEdge", "NormEdge", "LinearEdge"]
    assert [shiftable(index, adapter, tensors) for index in range(5)] == [True, False, True, True, False]
    hidden = torch.ones(32)
    with pytest.raises(ValueError, match="cannot be shifted"):
        apply(Rewrite(none, one(adapter, 4, torch.ones(48))), adapter, tensors)
    with pytest.raises(ValueError, match="cannot be shifted"):
        apply(Rewrite(none, one(adapter, 1, hidden)), adapter, tensors)
    unbiased = {key: value for key, value in tensors.items() if key != "fc1.bias"}
    with pytest.raises(ValueError, match=r"cannot be shifted.*fc1\.bias"):
        apply(Rewrite(none, one(adapter, 3, hidden)), adapter, unbiased)
    with pytest.raises(ValueError, match="takes a shift of shape"):
        apply(Rewrite(none, one(adapter, 0, torch.ones(3))), adapter, tensors)
    with pytest.raises(ValueError, match="takes a scale of shape"):
        apply(Rewrite(one(adapter, 0, torch.ones(3)), none), adapter, tensors)
    weightless = {key: value for key, value in tensors.items() if key != "fc1.weight"}
    with pytest.raises(ValueError, match=r"fc1\.weight.*not among the tensors"):
        apply(Rewrite(one(adapter, 3, hidden), none), adapter, weightless)
    with pytest.raises(ValueError, match=r"fc1\.weight.*not among the tensors"):
        apply(Rewrite(none, one(adapter, 3, hidden)), adapter, weightless)
    with pytest.raises(ValueError, match="needed positive"):
        Rewrite((torch.tensor([1.0, 0.0]),), (None,))
    with pytest.raises(ValueError, match="1 scales and 2 shifts"):
        Rewrite((None,), (None, None))
    with pytest.raises(ValueError, match="rewrite of 1 edges"):
        apply(Rewrite((None,), (None,)), adapter, tensors)


def test_an_attention_edge_is_no_activation_edge() -> None:
    """A shift through up -> down would pass the gate: denied although both have biases."""
    adapter, tensors = adapter_for(CONFIGS["llama-bias"]), block_tensors("llama-bias", 0)
    index = adapter.edges.index(LinearEdge("mlp.up_proj", "mlp.down_proj"))
    assert {"mlp.up_proj.bias", "mlp.down_proj.bias"} <= tensors.keys()
    assert not shiftable(index, adapter, tensors)


def same_bits(value: Tensor, other: Tensor) -> bool:
    bits = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}[value.dtype]
    return value.dtype == other.dtype and torch.equal(value.view(bits), other.detach().view(bits))
