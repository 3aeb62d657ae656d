"""Ranges: given the weights of a group, pick its scale and zero.

Every range but `clip`, whose shares come from learning or a search, is a frozen settings class and one pure function

    fit(weights [n, width], inliers [n, width] | None, importance [n, width] | None, spec, settings)
        -> (scale [n], zero [n])

in float32, already rounded to their stored precision. Weights where `inliers` is false are kept apart as
outliers and must not stretch the grid. `importance` weighs squared errors where the range's objective has
any. The contract: never worse than `minmax` on the range's own declared objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from bitwright.numeric.grid import Grid, group_rows, ungroup_rows
from bitwright.numeric.spec import WeightSpec
from bitwright.ranges import bilevel, clip, hqq, minmax, mse
from bitwright.ranges.bilevel import quantize_levels
from bitwright.ranges.clip import Clip, Clipping
from bitwright.ranges.hqq import Hqq
from bitwright.ranges.minmax import Minmax
from bitwright.ranges.mse import Mse, MseAdam
from bitwright.ranges.refine import refine_levels

AnyRange = Minmax | Mse | MseAdam | Hqq | Clip
RangeSettings = Annotated[AnyRange, Field(discriminator="name")]

RANGES: dict[type, Callable[..., tuple[Tensor, Tensor]]] = {
    Minmax: minmax.fit,
    Mse: mse.fit,
    MseAdam: mse.fit_adam,
    Hqq: hqq.fit,
}


@dataclass(frozen=True)
class Ranging:
    """How the grid of one matrix is chosen: its spec, a range, and for `Clip` the shares that were found."""

    spec: WeightSpec
    settings: AnyRange
    clipping: Clipping | None = None

    def fit(self, weight: Tensor, inliers: Tensor | None = None, importance: Tensor | None = None) -> Grid:
        """The grid of `weight` [out, in]; see `fit_grid`."""
        return fit_grid(weight, inliers, importance, self)

    def groups(self, groups: slice) -> Ranging:
        """For consecutive groups of the matrix."""
        return self if self.clipping is None else replace(self, clipping=self.clipping.groups(groups))

    def rows(self, rows: slice) -> Ranging:
        """For consecutive rows of the matrix."""
        return self if self.clipping is None else replace(self, clipping=self.clipping.rows(rows))


def fit_grid(weight: Tensor, inliers: Tensor | None, importance: Tensor | None, ranging: Ranging) -> Grid:
    """The grid of a matrix: the range applied to every group of every row.

    `weight`, `inliers` and `importance` are [out, in] (`importance` may be [1, in]); ragged last groups are
    fitted on their own width. With `spec.bilevel`, groups are fitted as if they had one level of float32 scales,
    then quantized together with those of their superblock, and for `Mse`, whose objective that is, refined: fit
    whole superblocks (`spec.row_multiple` rows, `spec.group_multiple` groups) at once.
    """
    spec, settings = ranging.spec, ranging.settings
    if importance is not None:
        importance = importance.expand_as(weight)
    missing = [None] * len(group_rows(weight[:1], spec))
    scales, zeros, frees = [], [], []
    for part, part_inliers, part_importance, shares in zip(
        group_rows(weight, spec),
        missing if inliers is None else group_rows(inliers, spec),
        missing if importance is None else group_rows(importance, spec),
        missing if ranging.clipping is None else _shares(ranging.clipping, weight, spec),
        strict=True,
    ):
        if isinstance(settings, Clip):
            scale, zero = clip.fit(part, part_inliers, shares, spec.one_level)
        else:
            fit = RANGES[type(settings)]
            scale, zero = fit(part, part_inliers, part_importance, spec.one_level, settings)
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


def _shares(clipping: Clipping, weight: Tensor, spec: WeightSpec) -> list[tuple[Tensor, Tensor]]:
    """(upper, lower) of each part of `group_rows`, one share per row of it."""
    full = weight.shape[1] // spec.group_width(weight.shape[1])
    parts = [slice(0, full), slice(full, None)][: len(group_rows(weight[:1], spec))]
    return [(clipping.upper[:, part].flatten(), clipping.lower[:, part].flatten()) for part in parts]


def _weighing(inliers: Tensor | None, importance: Tensor | None) -> Tensor | None:
    if inliers is None:
        return importance
    return inliers.float() if importance is None else importance * inliers


__all__ = [
    "RANGES",
    "AnyRange",
    "Clip",
    "Clipping",
    "Hqq",
    "Minmax",
    "Mse",
    "MseAdam",
    "RangeSettings",
    "Ranging",
    "fit_grid",
    "quantize_levels",
]
