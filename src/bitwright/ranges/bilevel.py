"""The second level: scales and zeros of groups, found by any range, quantized over superblocks by min-max.

SpQR (Dettmers et al. 2023, section 3.3) quantizes scales and zeros independently. Here scales come first, and
then the zero that keeps the middle of the group's range where it was, given the scale that is really there: what
the scale's rounding takes from the range it takes from both ends alike.

What min-max alone would get wrong:

- A scale much smaller than the first step of its superblock, but not the smallest, is nearer to that smallest one,
  which may be any fraction of it and would leave its group one value. No scale is rounded below half.
- A group of weights that are all 0 has no scale. It takes one that its superblock has anyway, and a zero that is
  a code, so that its weights stay 0.
- A group far from 0 for its width (zero far outside the codes) would stretch the zeros of its whole superblock, or
  overflow where they are stored as floats. Its range is widened until the zero is at most a range's width outside.
- Column axis: zeros below 0 cannot be stored; ranges of positive weights are widened to begin at 0.
- Scales of both signs (symmetric codes) have no common minimum. Row axis: a superblock takes one sign, and groups
  of the other one the scale that covers the same range with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.numeric.bilevel import SecondLevel, code_offset
from bitwright.numeric.grid import Grid, rounded_up, stored_scale, stored_zero
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.ranges import minmax


def quantize_levels(scale: Tensor, zero: Tensor, spec: WeightSpec, free: Tensor | None = None) -> Grid:
    """The two-level grid nearest to `scale` and `zero`, float32 [out, groups]; `spec.bilevel` must be set.

    `free` bool [out, groups]: groups without any weight other than 0, which any scale serves. Superblocks whose
    scales and zeros are equal and representable in `scale_dtype` are exact. No scale is 0.

    Raises:
        WeightError: a scale does not fit `scale_dtype`.
    """
    bilevel = spec.bilevel
    if bilevel is None:
        raise ValueError(f"{spec.label()} has one level")
    shape = (scale.shape[0], scale.shape[1])
    free = torch.zeros_like(scale, dtype=torch.bool) if free is None else free
    scale, zero, free = (group_superblocks(values, bilevel) for values in (scale, zero, free))
    scale = _filled(scale, free)
    if spec.symmetric:
        scale = _one_sign(scale, spec) if bilevel.axis == "row" else scale
    else:
        scale, zero = _upright(scale, zero, spec)
        scale, zero = _widened(scale, zero, free, spec)
    if bilevel.axis == "row":
        codes, statistics = _affine(scale, spec)
    else:
        codes, statistics = _proportional(scale, spec)
    levels = SecondLevel(ungroup_superblocks(codes, shape, bilevel), None, statistics)
    if spec.symmetric:
        return Grid.of_levels(levels, stored_zero(ungroup_superblocks(zero, shape, bilevel), spec), spec)
    decoded = group_superblocks(levels.decode(spec)[0], bilevel)
    zero = recentred(scale, zero, decoded, spec).masked_fill(free, 0.0)
    if bilevel.zero_bits is None:
        return Grid.of_levels(levels, stored_zero(ungroup_superblocks(zero, shape, bilevel), spec), spec)
    if bilevel.axis == "row":
        zero_codes, zero_statistics = _affine_zeros(zero, free, spec)
    else:
        zero_codes, zero_statistics = _proportional_zeros(zero * decoded, spec)
    statistics = torch.cat([statistics, zero_statistics], dim=2)
    return Grid.of_levels(
        SecondLevel(levels.scale_codes, ungroup_superblocks(zero_codes, shape, bilevel), statistics), None, spec
    )


def settle_equal(
    weights: Tensor, inliers: Tensor | None, grid: tuple[Tensor, Tensor], spec: WeightSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale [n], zero [n], free [n]) of the fitted `grid` with the groups settled whose weights are all equal.

    Those of `weights` [n, width] that are all 0 are free. Others would have their own weight for a step, many times
    the steps of their superblock; they get the range from 0 to that weight instead.
    """
    scale, zero = grid
    low, high = minmax.extremes(weights, inliers)
    free = (low == 0) & (high == 0)
    if spec.zero == "float":
        equal = (low == high) & ~free
        scale = torch.where(equal, low.abs() / spec.max_code, scale)
        zero = torch.where(equal, torch.where(low < 0, float(spec.max_code), 0.0), zero)
    return scale, zero, free


def group_superblocks(values: Tensor, bilevel: Bilevel) -> Tensor:
    """[out, groups] to [superblocks along rows, along groups, size]; the last row or group fills a short one."""
    axis = 0 if bilevel.axis == "row" else 1
    length = values.shape[axis]
    size = min(bilevel.size, length)
    places = torch.arange(-(-length // size) * size, device=values.device).clamp_max_(length - 1)
    whole = values.index_select(axis, places)
    if axis == 0:
        return whole.view(-1, size, whole.shape[1]).movedim(1, 2)
    return whole.view(whole.shape[0], -1, size)


def ungroup_superblocks(blocks: Tensor, shape: tuple[int, int], bilevel: Bilevel) -> Tensor:
    """Inverse of `group_superblocks`: to `shape` (out, groups)."""
    axis = 0 if bilevel.axis == "row" else 1
    return blocks.movedim(2, axis + 1).flatten(axis, axis + 1).narrow(axis, 0, shape[axis]).contiguous()


def _filled(scale: Tensor, free: Tensor) -> Tensor:
    """`scale` with the smallest magnitude of the superblock's other groups in the free ones (1 if all are free)."""
    smallest = scale.abs().masked_fill(free, torch.inf).amin(dim=2, keepdim=True)
    return torch.where(free, torch.where(smallest.isinf(), 1.0, smallest), scale)


def _one_sign(scale: Tensor, spec: WeightSpec) -> Tensor:
    """Scales of one sign per superblock, that of the larger ones; turned ones cover their old range."""
    sign = torch.where((scale * scale.abs()).sum(dim=2, keepdim=True) < 0, -1.0, 1.0)
    # The long side has `centre` steps, the short one `centre - 1`.
    turned = scale.abs() * (spec.centre / (spec.centre - 1))
    return torch.where(scale * sign > 0, scale, sign * turned)


def _upright(scale: Tensor, zero: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """The same grids with positive scales: the codes of a negative scale counted from the other end."""
    return scale.abs(), torch.where(scale < 0, spec.max_code - zero, zero)


def _widened(scale: Tensor, zero: Tensor, free: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Ranges widened where the second level could not hold their zero, or only at the cost of the others."""
    assert spec.bilevel is not None
    low, high = -zero * scale, (spec.max_code - zero) * scale
    new_low, new_high = torch.minimum(low, high / 2), torch.maximum(high, low / 2)
    if spec.bilevel.zero_bits is not None and spec.bilevel.axis == "column":
        new_low = low.clamp_max(0)
    elif spec.bilevel.zero_bits is not None:
        # Where a group of zeros shares statistics, 0 must be a code of it, so all ranges hold 0.
        holds_free = free.any(dim=2, keepdim=True)
        new_low = torch.where(holds_free, new_low.clamp_max(0), new_low)
        new_high = torch.where(holds_free, new_high.clamp_min(0), new_high)
    # Not all of them: the way there and back would round.
    changed = ((new_low < low) | (new_high > high)) & ~free
    wider = (new_high - new_low) / spec.max_code
    return torch.where(changed, wider, scale), torch.where(changed, -new_low / wider, zero)


def recentred(scale: Tensor, zero: Tensor, decoded: Tensor, spec: WeightSpec) -> Tensor:
    """Zeros that keep the middle of each range when its `scale` becomes `decoded`."""
    middle = spec.max_code / 2
    return torch.where(decoded == scale, zero, middle - (middle - zero) * scale / decoded)


def _affine(scale: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """(codes, [minimum, step]) of scales of one sign per superblock."""
    assert spec.bilevel is not None
    sign = torch.where(scale[..., :1] < 0, -1.0, 1.0)
    magnitude = scale.abs()
    minimum = stored_scale(magnitude.amin(dim=2, keepdim=True), spec)
    codes, step = _steps(magnitude, minimum, spec.bilevel.scale_bits, spec)
    # Between a tiny minimum and its first step the nearer of the two may be a tiny fraction of the scale.
    codes = codes + (2 * (minimum + step * codes) < magnitude)
    return codes, torch.cat([sign * minimum, torch.where(step > 0, sign * step, 0.0)], dim=2)


def _affine_zeros(zero: Tensor, free: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """(codes, [minimum, step]) of zeros; where a group is free the minimum is an integer code, for it to use."""
    assert spec.bilevel is not None
    holds_free = free.any(dim=2, keepdim=True)
    zero = torch.where(holds_free, zero.clamp(0, spec.max_code), zero)
    minimum = zero.masked_fill(free, torch.inf).amin(dim=2, keepdim=True)
    minimum = torch.where(holds_free, torch.where(minimum.isinf(), 0.0, minimum).floor(), minimum)
    minimum = minimum.to(spec.storage_dtype).float()
    codes, step = _steps(torch.where(free, minimum, zero), minimum, spec.bilevel.zero_bits or 0, spec)
    return codes, torch.cat([minimum, step], dim=2)


def _steps(values: Tensor, minimum: Tensor, bits: int, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """(codes, step) of `values` from `minimum` up to their largest."""
    largest_code = (1 << bits) - 1
    span = (values.amax(dim=2, keepdim=True) - minimum).clamp_min(0)
    # Up, so that the largest value is not cut where steps are subnormal and coarse.
    step = rounded_up(span / largest_code, spec.storage_dtype)
    codes = torch.where(step > 0, (values - minimum) / step, 0.0).round_().clamp_(0, largest_code)
    return codes.to(torch.uint8), step


def _proportional(scale: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """(codes, [step]) of scales as multiples of a step, never 0."""
    assert spec.bilevel is not None
    offset = code_offset(spec)
    lowest, highest = -offset, (1 << spec.bilevel.scale_bits) - 1 - offset
    step = scale.clamp_min(0).amax(dim=2, keepdim=True) / highest
    if spec.symmetric:
        step = torch.maximum(step, (-scale).clamp_min(0).amax(dim=2, keepdim=True) / offset)
    # Up, as above; and never 0.
    step = stored_scale(rounded_up(step, spec.storage_dtype), spec)
    multiples = (scale / step).round_()
    multiples = torch.where(multiples == 0, torch.sign(scale), multiples).clamp_(lowest, highest)
    return (multiples + offset).to(torch.uint8), step


def _proportional_zeros(minimum: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """(codes, [minimum step]) of what lies below 0 in each range, `zero * scale`."""
    assert spec.bilevel is not None
    largest_code = (1 << (spec.bilevel.zero_bits or 0)) - 1
    minimum = minimum.clamp_min(0)
    step = rounded_up(minimum.amax(dim=2, keepdim=True) / largest_code, spec.storage_dtype)
    codes = torch.where(step > 0, minimum / step, 0.0).round_().clamp_(0, largest_code)
    return codes.to(torch.uint8), step
