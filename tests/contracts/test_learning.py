"""Contract of what is learned: a block's tensors while learning are those that are stored, to the last bit.

Invariants numbered as in the research notes on OmniQuant; (4) to (6) are about the range and are in `test_ranges.py`,
(1) is in `test_transforms.py`, (8) to (10) need runs and are in `learning/` and `test_pipeline_learned.py`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from architectures import CONFIGS, build
from torch import Tensor

from bitwright.journey import process_row
from bitwright.learning.parameters import FIRST_LOGIT, Learnables, Start
from bitwright.method import Method
from bitwright.models import Adapter, adapter_for
from bitwright.numeric.grid import Grid
from bitwright.numeric.outliers import NoOutliers
from bitwright.numeric.spec import WeightSpec
from bitwright.numeric.straight_through import fake_quantize, straight_through
from bitwright.ranges import AnyRange, Clip, Clipping, Hqq, Minmax, Mse, Ranging
from bitwright.rounding.gptq import Gptq, quantize_gptq
from bitwright.rounding.nearest import quantize_nearest
from bitwright.rows import Row
from bitwright.transforms.equivalence import Rewrite, apply, identity, shiftable
from bitwright.transforms.sites import LARGEST
from bitwright.walk import decoded_tensors

NAMES = ["llama", "llama-bias", "qwen3", "gemma3", "falcon-new", "opt"]
EVERY = frozenset({"clip", "scale", "shift", "weight"})
SPECS = [WeightSpec(bits=bits, group_size=16) for bits in range(2, 9)] + [
    WeightSpec(bits=3, group_size=20),
    WeightSpec(bits=4),
    WeightSpec(bits=3, group_size=16, symmetric=True),
    WeightSpec(bits=2, symmetric=True),
    WeightSpec(bits=3, group_size=16, zero="float"),
    WeightSpec(bits=4, group_size=16, scale_dtype="bfloat16"),
]


def block(name: str) -> tuple[Adapter, dict[str, Tensor]]:
    adapter = adapter_for(CONFIGS[name])
    prefix = adapter.block_prefix(0)
    stored = build(name).named_parameters()
    return adapter, {k.removeprefix(prefix): v.detach().float() for k, v in stored if k.startswith(prefix)}


def start(name: str, spec: WeightSpec | None, settings: AnyRange | None = None) -> tuple[Adapter, Start]:
    adapter, tensors = block(name)
    shifts = tuple(
        torch.zeros(edge.width(adapter.shape)) if shiftable(index, adapter, tensors) else None
        for index, edge in enumerate(adapter.edges)
    )
    rewrite = replace(identity(adapter), shifts=shifts)
    specs = {} if spec is None else dict.fromkeys(adapter.linears, spec)
    return adapter, Start(tensors, specs, settings or Clip(), rewrite)


@torch.no_grad()
def moved(learnables: Learnables, seed: int = 0) -> Learnables:
    """With all parameters somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    spread = {"clip": 1.5, "scale": 0.4, "shift": 0.3, "weight": 0.3}
    for kind, group in learnables.groups.items():
        for value in group.values():
            value.add_(spread[kind] * torch.randn(value.shape, generator=generator))
    learnables.bound()
    return learnables


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
@pytest.mark.parametrize("name", ["llama-bias", "opt"])
def test_2_weights_while_learning_are_those_that_a_reader_decodes(name: str, spec: WeightSpec) -> None:
    adapter, begin = start(name, spec)
    learnables = moved(Learnables(begin, adapter, EVERY))
    assert all(learnables.groups.values())
    trained = learnables.quantized()
    assert trained[f"{adapter.linears[0]}.weight"].requires_grad
    with torch.no_grad():
        fused = learnables.fused()
    for linear in adapter.linears:
        weight, clipping = fused[f"{linear}.weight"], learnables.clipping(linear)
        assert clipping is not None
        clipping = Clipping(clipping.upper.detach(), clipping.lower.detach())
        row = Row(
            f"{linear}.weight",
            tuple(weight.shape),
            torch.float32,
            "quantize",
            "default",
            0,
            spec=spec,
            method=Method(range=Clip()),
        )
        outcome = process_row(row, weight, {"tensor": row.tensor}, None, clipping)
        stored = decoded_tensors([row], outcome.parts, [outcome.record])[row.tensor]
        # equal but for the sign of zeros, which integers do not have
        assert torch.equal(stored, trained[row.tensor].detach())
    for key in fused.keys() - {f"{linear}.weight" for linear in adapter.linears}:
        assert torch.equal(trained[key].detach(), fused[key])


@pytest.mark.parametrize("name", NAMES)
def test_2_on_every_architecture(name: str) -> None:
    spec = WeightSpec(bits=3, group_size=16)
    adapter, begin = start(name, spec)
    learnables = moved(Learnables(begin, adapter, EVERY), seed=1)
    trained = learnables.quantized()
    with torch.no_grad():
        for linear in adapter.linears:
            ranging = Ranging(spec, Clip(), learnables.clipping(linear))
            rounded = quantize_nearest(learnables.fused()[f"{linear}.weight"], None, ranging, NoOutliers())
            assert torch.equal(rounded.dequantize(), trained[f"{linear}.weight"].detach())


@pytest.mark.parametrize("order", ["natural", "activation", "grouped"])
@pytest.mark.parametrize("groups", ["static", "updated"])
@pytest.mark.parametrize("group_size", [16, 20, None])
def test_shares_go_with_their_groups_through_error_feedback(order, groups, group_size: int | None) -> None:
    """Independent inputs leave nothing to feed back, so codes are the nearest ones on the clipped grids."""
    if (order, groups) == ("activation", "updated"):
        return
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 72, generator=generator)
    matrix = torch.diag(torch.rand(72, dtype=torch.float64, generator=generator) + 0.1)
    spec = WeightSpec(bits=3, group_size=group_size)
    shape = (24, spec.groups(72))
    clipping = Clipping(*(0.4 + 0.6 * torch.rand(shape, generator=generator) for _ in range(2)))
    ranging = Ranging(spec, Clip(), clipping)
    settings = Gptq(order=order, groups=groups, importance="none")
    found = quantize_gptq(weight, matrix, ranging, NoOutliers(), settings).q
    expected = quantize_nearest(weight, None, ranging, NoOutliers())
    assert torch.equal(found.dequantize(), expected.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_3_with_nothing_to_quantize_everything_on_changes_no_bit(name: str) -> None:
    adapter, begin = start(name, None)
    learnables = Learnables(begin, adapter, EVERY)
    assert learnables.groups["scale"]
    for tensors in (learnables.fused(), learnables.quantized()):
        assert tensors.keys() == begin.tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(value.detach().view(torch.int32), begin.tensors[key].view(torch.int32))


@pytest.mark.parametrize("name", NAMES)
def test_12_folding_in_float32_is_that_in_float64(name: str) -> None:
    adapter, begin = start(name, WeightSpec(bits=3, group_size=16))
    learnables = moved(Learnables(begin, adapter, frozenset({"scale", "shift"})), seed=2)
    now = learnables.rewrite()
    double = Rewrite(*(tuple(None if v is None else v.detach().double() for v in side) for side in vars(now).values()))
    exact = apply(double, adapter, {key: value.double() for key, value in begin.tensors.items()})
    for key, value in learnables.fused().items():
        assert value.dtype == torch.float32
        # a bias that takes a shift is a sum over the columns; every other tensor a product of a few factors
        size = exact[key].abs().amax() if key.endswith(".bias") else exact[key].abs()
        assert bool(((value.detach().double() - exact[key]).abs() <= 8 * 2.0**-24 * size + 1e-30).all()), key


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
def test_gradients_reach_every_parameter_and_are_finite(spec: WeightSpec) -> None:
    adapter, begin = start("opt", spec)
    learnables = moved(Learnables(begin, adapter, EVERY), seed=3)
    generator = torch.Generator().manual_seed(4)
    total = torch.zeros(())
    for value in learnables.quantized().values():
        total = total + (value * torch.randn(value.shape, generator=generator)).sum()
    total.backward()
    for kind, group in learnables.groups.items():
        for name, leaf in group.items():
            assert leaf.grad is not None, (kind, name)
            assert bool(leaf.grad.isfinite().all()), (kind, name)
            assert float((leaf.grad != 0).float().mean()) > 0.3, (kind, name)


@pytest.mark.parametrize("settings", [Minmax(), Mse(), Hqq()], ids=lambda s: s.name)
@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_and_weights_are_learned_over_any_range(settings: AnyRange, symmetric: bool) -> None:
    spec = WeightSpec(bits=3, group_size=16, symmetric=symmetric)
    adapter, begin = start("opt", spec, settings)
    learnables = moved(Learnables(begin, adapter, EVERY), seed=5)
    assert not learnables.groups["clip"]
    trained = learnables.quantized()
    sum(value.square().sum() for value in trained.values()).backward()
    leaves = [leaf for group in learnables.groups.values() for leaf in group.values()]
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in leaves)
    with torch.no_grad():
        for linear in adapter.linears:
            weight = learnables.fused()[f"{linear}.weight"]
            rounded = quantize_nearest(weight, None, Ranging(spec, settings), NoOutliers())
            assert torch.equal(rounded.dequantize(), trained[f"{linear}.weight"].detach())


def test_gradients_through_minmax_do_not_pass_through_half_precision() -> None:
    """A gradient of 1e-12 would vanish there, one of 1e8 be infinite."""
    adapter, begin = start("llama", WeightSpec(bits=3, group_size=16), Minmax())
    grads = []
    for size in (1.0, 2.0**-40, 2.0**26):
        learnables = Learnables(begin, adapter, frozenset({"scale"}))
        (size * sum(value.square().sum() for value in learnables.quantized().values())).backward()
        grads.append(torch.cat([leaf.grad / size for leaf in learnables.groups["scale"].values()]))
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_learning_begins_with_what_was_found() -> None:
    spec = WeightSpec(bits=3, group_size=16)
    adapter, begin = start("llama", spec)
    first, second = adapter.linears[:2]
    upper = torch.full((32, 2), 0.7)
    upper[0, 0] = 1.0  # no logit is as large
    found = Clipping(upper, torch.full((32, 2), 0.55))
    begin = replace(begin, clipping={first: found})
    learnables = Learnables(begin, adapter, frozenset({"clip"}))
    now, other = learnables.clipping(first), learnables.clipping(second)
    assert now is not None
    assert other is not None
    # to within a rounding of 1: shares of 1 must begin as min-max, and others where the codes they were chosen for are
    torch.testing.assert_close(now.upper, upper, rtol=0, atol=2.0**-23)
    torch.testing.assert_close(now.lower, found.lower, rtol=0, atol=2.0**-23)
    assert now.upper[0, 0] == 1
    now.upper.sum().backward()
    slopes = learnables.groups["clip"][f"{first}.upper"].grad
    assert slopes is not None
    torch.testing.assert_close(slopes, upper.clamp(max=0.99) * (1 - upper.clamp(max=0.99)))
    torch.testing.assert_close(other.upper, torch.full_like(other.upper, 1 / (1 + math.exp(-FIRST_LOGIT))))
    fixed = Learnables(begin, adapter, frozenset({"scale"}))
    assert fixed.clipping(first) is found
    assert fixed.clipping(second) is None
    assert not fixed.groups["clip"]


def test_scales_begin_exactly_where_the_transform_left_them() -> None:
    adapter, begin = start("opt", WeightSpec(bits=3, group_size=16))
    generator = torch.Generator().manual_seed(7)
    scales = tuple(torch.rand(scale.shape, generator=generator) + 0.1 for scale in begin.rewrite.scales)
    begin = replace(begin, rewrite=replace(begin.rewrite, scales=scales))
    fused = Learnables(begin, adapter, EVERY).fused()
    for key, value in apply(begin.rewrite, adapter, begin.tensors).items():
        assert torch.equal(fused[key], value)


def test_only_what_is_asked_for_is_learned() -> None:
    adapter, begin = start("opt", WeightSpec(bits=3, group_size=16))
    begin = replace(begin, rewrite=replace(begin.rewrite, scales=(None, *begin.rewrite.scales[1:])))
    for kinds in itertools.chain.from_iterable(itertools.combinations(sorted(EVERY), n) for n in range(5)):
        learnables = Learnables(begin, adapter, frozenset(kinds))
        assert {kind for kind, group in learnables.groups.items() if group} == set(kinds)
    assert "0" not in Learnables(begin, adapter, EVERY).groups["scale"]


def test_states_are_copies_and_come_back_exactly() -> None:
    adapter, begin = start("opt", WeightSpec(bits=3, group_size=16))
    learnables = moved(Learnables(begin, adapter, EVERY))
    state, before = learnables.state(), learnables.quantized()
    moved(learnables, seed=9)
    assert not torch.equal(learnables.quantized()["fc1.weight"], before["fc1.weight"])
    learnables.restore(state)
    assert all(torch.equal(value, before[key]) for key, value in learnables.quantized().items())


def test_bounds() -> None:
    adapter, begin = start("opt", WeightSpec(bits=3, group_size=16))
    learnables = Learnables(begin, adapter, EVERY)
    with torch.no_grad():
        for group in learnables.groups.values():
            for value in group.values():
                value.fill_(1e3)
    learnables.bound()
    assert all(bool((offset == 0.5).all()) for offset in learnables.groups["weight"].values())
    for scale in learnables.rewrite().scales:
        assert scale is not None
        torch.testing.assert_close(scale, torch.full_like(scale, LARGEST))


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
def test_fake_quantization_is_decoding_of_codes(spec: WeightSpec) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(24, 40, generator=generator)
    grid = Ranging(spec, Clip(), Clipping(*(torch.full((24, spec.groups(40)), 0.6) for _ in range(2)))).fit(weight)
    found = fake_quantize(weight, grid.scale, grid.zero, spec)
    assert torch.equal(found.view(torch.int32), grid.decode(grid.encode(weight)).view(torch.int32))


def test_gradients_pass_rounding_and_stop_at_the_ends_of_the_range() -> None:
    spec = WeightSpec(bits=2, scale_dtype="float32")
    weight = torch.tensor([[-3.0, -1.4, -0.6, 0.2, 1.9, 7.0]], requires_grad=True)
    grid = Grid(torch.ones(1, 1), torch.ones(1, 1), spec)
    result = fake_quantize(weight, grid.scale, grid.zero, spec)
    assert result.tolist() == [[-1.0, -1.0, -1.0, 0.0, 2.0, 2.0]]
    result.sum().backward()
    assert weight.grad is not None
    # -1.4 rounds to a code of the range, so the clamp does not hold it back
    assert weight.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]
    value, of = torch.tensor([5.0]), torch.tensor([2.0], requires_grad=True)
    out = straight_through(value, of)
    (3 * out).backward()
    assert out.item() == 5.0
    assert of.grad is not None
    assert of.grad.item() == 3.0
