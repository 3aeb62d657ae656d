"""Ranges: given the weights of a group, pick its scale and zero.

Every range is a frozen settings class and one pure function

    fit(weights [n, width], inliers [n, width] | None, importance [n, width] | None, spec, settings)
        -> (scale [n], zero [n])

in float32, already rounded to their stored precision. Weights where `inliers` is false are kept apart as
outliers and must not stretch the grid. `importance` weighs squared errors where the range's objective has
any. The contract: never worse than `minmax` on the range's own declared objective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor

from bitwright.numeric.grid import Grid, group_rows, ungroup_rows
from bitwright.numeric.spec import WeightSpec
from bitwright.ranges import bilevel, hqq, minmax, mse
from bitwright.ranges.bilevel import quantize_levels
from bitwright.ranges.hqq import Hqq
from bitwright.ranges.minmax import Minmax
from bitwright.ranges.mse import Mse, MseAdam
from bitwright.ranges.refine import refine_levels

RangeSettings = Annotated[Minmax | Mse | MseAdam | Hqq, Field(discriminator="name")]

RANGES: dict[type, Callable[..., tuple[Tensor, Tensor]]] = {
    Minmax: minmax.fit,
    Mse: mse.fit,
    MseAdam: mse.fit_adam,
    Hqq: hqq.fit,
}


def fit_grid(
    weight: Tensor,
    inliers: Tensor | None,
    importance: Tensor | None,
    spec: WeightSpec,
    settings: Minmax | Mse | MseAdam | Hqq,
) -> Grid:
    """The grid of a matrix: `settings`' range applied to every group of every row.

    `weight`, `inliers` and `importance` are [out, in] (`importance` may be [1, in]); ragged last groups are
    fitted on their own width. With `spec.bilevel`, groups are fitted as if they had one level of float32 scales,
    then quantized together with those of their superblock, and for `Mse`, whose objective that is, refined: fit
    whole superblocks (`spec.row_multiple` rows, `spec.group_multiple` groups) at once.
    """
    if importance is not None:
        importance = importance.expand_as(weight)
    fit = RANGES[type(settings)]
    one_level = spec.one_level
    missing = [None] * len(group_rows(weight[:1], spec))
    scales, zeros, frees = [], [], []
    for part, part_inliers, part_importance in zip(
        group_rows(weight, spec),
        missing if inliers is None else group_rows(inliers, spec),
        missing if importance is None else group_rows(importance, spec),
        strict=True,
    ):
        scale, zero = fit(part, part_inliers, part_importance, one_level, settings)
        if spec.bilevel is not None:
            scale, zero, free = bilevel.settle_equal(part, part_inliers, (scale, zero), spec)
            frees.append(free)
        scales.append(scale)
        zeros.append(zero)
    scale, zero = (ungroup_rows(values, weight.shape[0]) for values in (scales, zeros))
    if spec.bilevel is None:
        return Grid(scale, zero, spec)
    free = ungroup_rows(frees, weight.shape[0])
    grid = quantize_levels(scale, zero, spec, free)
    if not isinstance(settings, Mse):
        return grid
    return refine_levels(weight, _weighing(inliers, importance), grid, free)


def _weighing(inliers: Tensor | None, importance: Tensor | None) -> Tensor | None:
    if inliers is None:
        return importance
    return inliers.float() if importance is None else importance * inliers


__all__ = ["RANGES", "Hqq", "Minmax", "Mse", "MseAdam", "RangeSettings", "fit_grid", "quantize_levels"]
