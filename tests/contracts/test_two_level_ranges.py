"""The contract of ranges on two-level grids: odd groups survive, neighbours in a superblock do not suffer, the
refined grid is never worse than the min-max one, and whole superblocks can be fitted apart.
"""

import pytest
import torch
from torch import Tensor

from bitwright.formats.native import TensorEntry, pack, unpack
from bitwright.numeric.grid import Grid
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.ranges import Hqq, Minmax, Mse, MseAdam, Ranging, fit_grid, quantize_levels

ALL = [Minmax(), Mse(), MseAdam(learning_rate=1e-3, steps=20), Hqq()]


def spec_of(kind: str, axis: str, size: int = 4, codes: tuple[int, int | None] = (3, 3), bits: int = 4) -> WeightSpec:
    scale_bits, zero_bits = codes
    return WeightSpec.model_validate(
        {
            "bits": bits,
            "group_size": 8,
            "symmetric": kind == "symmetric",
            "zero": "float" if kind == "float" else "int",
            "bilevel": {
                "axis": axis,
                "size": size,
                "scale_bits": scale_bits,
                "zero_bits": zero_bits if kind == "float" else None,
            },
        }
    )


SPECS = [
    *(spec_of(kind, axis) for kind in ("float", "int", "symmetric") for axis in ("row", "column")),
    *(spec_of("float", axis, codes=(6, None)) for axis in ("row", "column")),
    *(spec_of("float", axis, size=99, codes=(2, 8), bits=2) for axis in ("row", "column")),
    spec_of("symmetric", "column", size=16, codes=(2, None), bits=8),
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
each_range = pytest.mark.parametrize("settings", ALL, ids=lambda s: s.name)


def matrix(out: int = 22, width: int = 75, seed: int = 0) -> Tensor:
    """Rows of different sizes, some groups away from 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) * (0.02 + 0.1 * torch.rand(out, 1, generator=generator))
    return weight + 0.1 * (torch.rand(out, 1, generator=generator) < 0.1)


def decoded(weight: Tensor, grid: Grid) -> Tensor:
    return grid.decode(grid.encode(weight))


def error(weight: Tensor, grid: Grid, weighing: Tensor | None = None) -> float:
    squares = (decoded(weight, grid) - weight).double().square()
    return float((squares if weighing is None else squares * weighing).sum())


def one_level_fit(weight: Tensor, spec: WeightSpec, settings: Mse | Minmax) -> Grid:
    return fit_grid(weight, None, None, Ranging(spec.one_level, settings))


@each_spec
@each_range
def test_results_are_as_stored(settings, spec: WeightSpec) -> None:
    weight = matrix()
    grid = fit_grid(weight, None, None, Ranging(spec, settings))
    q = QTensor(grid.encode(weight), grid).validate("w")
    restored = unpack("w", pack(q), TensorEntry.of(q))
    assert torch.equal(restored.dequantize(), q.dequantize())
    again = fit_grid(weight, None, None, Ranging(spec, settings))
    assert torch.equal(again.scale, grid.scale)
    assert torch.equal(again.zero, grid.zero)


@each_spec
@each_range
def test_odd_groups_survive(settings, spec: WeightSpec) -> None:
    ordinary = matrix(8, 24, seed=3)
    odd = torch.stack(
        [
            torch.zeros(24),
            torch.full((24,), 0.25),
            torch.full((24,), -0.25),
            torch.linspace(0.5, 1.0, 24),
            torch.linspace(-1.0, -0.5, 24),
            torch.full((24,), 1e-9),
            torch.cat([torch.zeros(8), torch.full((8,), 0.1), torch.randn(8)]),
            1.0 + 1e-6 * torch.arange(24),
        ]
    )
    for weight in (odd, torch.stack([odd, ordinary], dim=1).flatten(0, 1), torch.zeros(5, 24), torch.full((1, 1), 0.3)):
        grid = fit_grid(weight, None, None, Ranging(spec, settings))
        result = QTensor(grid.encode(weight), grid).validate("w").dequantize()
        assert bool(torch.isfinite(result).all())
        assert not result[weight == 0].any(), "zeros of a group of zeros stay zero"
        nothing = torch.zeros_like(weight, dtype=torch.bool)
        grid = fit_grid(weight, nothing, None, Ranging(spec, settings))
        assert bool(torch.isfinite(grid.scale).all() and torch.isfinite(grid.zero).all())


@pytest.mark.parametrize("axis", ["row", "column"])
@each_range
def test_an_odd_group_does_not_ruin_its_superblock(settings, axis: str) -> None:
    """Without care, a group of zeros has the scale 1, a constant one its own weight, and a far one a zero of -1e5."""
    spec = spec_of("float", axis, size=8)
    weight = matrix(8, 64, seed=5)
    plain = fit_grid(weight, None, None, Ranging(spec, settings))
    for value in (0.0, 0.9, -0.9):
        odd = weight.clone()
        place = (slice(2, 3), slice(0, 64)) if axis == "row" else (slice(0, 8), slice(16, 24))
        odd[place] = value
        others = torch.ones_like(weight, dtype=torch.bool)
        others[place] = False
        before, after = ((decoded(w, g) - w)[others].square().sum() for w, g in (
            (weight, plain),
            (odd, fit_grid(odd, None, None, Ranging(spec, settings))),
        ))  # fmt: skip
        assert after < (2.5 if value == 0 else 60) * before
    far = weight.clone()
    far[2, 16:24] = 1 + 1e-5 * torch.arange(8)
    grid = fit_grid(far, None, None, Ranging(spec, settings))
    others = torch.ones_like(weight, dtype=torch.bool)
    others[2, 16:24] = False
    assert (decoded(far, grid) - far)[others].square().sum() < 5 * (decoded(weight, plain) - weight).square().sum()


@each_spec
def test_equal_superblocks_are_exact(spec: WeightSpec) -> None:
    shape = (7, 10)
    for value, sign in ((0.0078125, 1), (1 / 3, 1), (0.0078125, -1)):
        scale = torch.full(shape, value).half().float()
        zero = torch.full(shape, float(spec.centre) if spec.zero == "int" else spec.centre - 0.5)
        if sign < 0 and spec.symmetric:
            scale = -scale
        grid = quantize_levels(scale, zero, spec)
        if spec.bilevel is not None and spec.bilevel.axis == "row":
            assert torch.equal(grid.scale, scale)
            assert torch.equal(grid.zero, zero)
        else:
            # Multiples of a step: the largest code times a rounded step.
            assert torch.allclose(grid.scale, scale, rtol=2e-3)
            assert torch.allclose(grid.zero, zero, rtol=4e-3, atol=0.26)


@each_spec
@pytest.mark.parametrize("masked", [False, True])
def test_refining_is_never_worse_than_rounding_the_levels(spec: WeightSpec, masked: bool) -> None:
    weight = matrix(40, 100)
    importance = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) if masked else None
    inliers = weight.abs() < 0.8 * weight.abs().amax(dim=1, keepdim=True) if masked else None
    weighing = None if importance is None or inliers is None else importance * inliers
    first = fit_grid(weight, inliers, importance, Ranging(spec.one_level, Mse()))
    rounded = error(weight, quantize_levels(first.scale, first.zero, spec), weighing)
    refined = error(weight, fit_grid(weight, inliers, importance, Ranging(spec, Mse())), weighing)
    assert refined <= rounded * (1 + 1e-6)


def test_refining_recovers_most_of_what_the_second_level_costs() -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    spec = spec_of("float", "row", size=16).model_copy(update={"group_size": 16})
    one_level = one_level_fit(weight, spec, Mse())
    base = error(weight, one_level)
    rounded = error(weight, quantize_levels(one_level.scale, one_level.zero, spec)) / base
    refined = error(weight, fit_grid(weight, None, None, Ranging(spec, Mse()))) / base
    assert rounded > 1.3
    assert refined < 1.2


@pytest.mark.parametrize("axis", ["row", "column"])
def test_fine_levels_cost_next_to_nothing(axis: str) -> None:
    weight = matrix(64, 128)
    spec = spec_of("float", axis, codes=(8, 8))
    for settings in (Minmax(), Mse()):
        base = error(weight, one_level_fit(weight, spec, settings))
        assert error(weight, fit_grid(weight, None, None, Ranging(spec, settings))) < 1.02 * base


def test_scales_of_both_signs_keep_their_ranges() -> None:
    generator = torch.Generator().manual_seed(2)
    scale = (torch.rand(16, 6, generator=generator) + 0.5) * torch.where(
        torch.rand(16, 6, generator=generator) < 0.5, -1, 1
    )
    for axis in ("row", "column"):
        spec = spec_of("symmetric", axis, codes=(8, None))
        zero = torch.full_like(scale, float(spec.centre))
        grid = quantize_levels(scale, zero, spec)
        for code in (0.0, float(spec.max_code)):
            end = scale * (code - zero)
            ends = torch.stack([grid.scale * (0 - grid.zero), grid.scale * (spec.max_code - grid.zero)])
            tolerance = (spec.max_code + 1) / 2 * 1.5 / 254 * 1.1  # half a step of the coarser axis
            assert bool((ends.amin(0) - tolerance <= end).all())
            assert bool((ends.amax(0) + tolerance >= end).all())


@pytest.mark.parametrize("axis", ["row", "column"])
def test_scales_near_the_smallest_float16_are_not_cut(axis: str) -> None:
    """Steps of 255 codes would round to 0 or to half of themselves."""
    spec = spec_of("float", axis, codes=(8, 8))
    scale = torch.logspace(-7, -5.3, 16).reshape(4, 4)
    grid = quantize_levels(scale, torch.full((4, 4), 7.5), spec)
    assert bool((grid.scale > 0.45 * scale).all())


@each_spec
def test_negative_scales_of_asymmetric_codes_are_turned(spec: WeightSpec) -> None:
    if spec.symmetric:
        return
    grid = one_level_fit(matrix(), spec, Minmax())
    turned = quantize_levels(-grid.scale, spec.max_code - grid.zero, spec)
    straight = quantize_levels(grid.scale, grid.zero, spec)
    assert torch.equal(turned.scale, straight.scale)
    assert torch.allclose(turned.zero, straight.zero, atol=1e-3)


@each_spec
@pytest.mark.parametrize("settings", [Minmax(), Mse()], ids=lambda s: s.name)
def test_superblocks_are_independent(settings, spec: WeightSpec) -> None:
    """Row chunks and column chunks of whole superblocks give the grid of the matrix, as rounding relies on."""
    weight = matrix(22, 75)
    whole = fit_grid(weight, None, None, Ranging(spec, settings))
    rows = min(2 * spec.row_multiple, 22)
    parts = [fit_grid(part, None, None, Ranging(spec, settings)) for part in weight.split(rows)]
    joined = Grid.concatenate(parts)
    assert torch.equal(joined.scale, whole.scale)
    assert torch.equal(joined.zero, whole.zero)
    columns = 8 * spec.group_multiple
    parts = [fit_grid(part.contiguous(), None, None, Ranging(spec, settings)) for part in weight.split(columns, dim=1)]
    joined = Grid.concatenate_groups(parts)
    # The ragged last group is its own width here, not a padded one: sums may round otherwise.
    torch.testing.assert_close(joined.scale, whole.scale, rtol=0.2, atol=0)
    full = slice(0, 9 // spec.group_multiple * spec.group_multiple)
    assert torch.equal(joined.scale[:, full], whole.scale[:, full])
    assert torch.equal(joined.zero[:, full], whole.zero[:, full])


@pytest.mark.parametrize("axis", ["row", "column"])
def test_threads_do_not_change_a_bit(axis: str) -> None:
    spec, before = spec_of("float", axis, size=16), torch.get_num_threads()
    weight = matrix(320, 331)
    grids = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            grids.append(fit_grid(weight, None, None, Ranging(spec, Mse())))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(grids[0].scale, grids[1].scale)
    assert torch.equal(grids[0].zero, grids[1].zero)


def test_a_one_level_spec_is_refused() -> None:
    with pytest.raises(ValueError, match="one level"):
        quantize_levels(torch.ones(1, 1), torch.zeros(1, 1), WeightSpec(bits=4))
