"""The min-max range: the grid spans exactly the weights of the group (round-to-nearest, "RTN").

Asymmetric integer zeros need a grid that contains 0, so the span is first widened to include it; float zeros
do not. Symmetric grids put the weight of largest magnitude on the long side, code `-2**(bits-1)`, through the
sign of the scale: one more usable code than `absmax / (2**(bits-1) - 1)`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bitwright.numeric.grid import stored_scale, stored_zero
from bitwright.numeric.settings import Settings
from bitwright.numeric.spec import WeightSpec

_LARGEST_ZERO = 256.0
"""In steps: float zeros up to it are exact to half a step in bfloat16, and better in float16."""


class Minmax(Settings):
    """The grid spans the smallest to the largest weight."""

    name: Literal["minmax"] = "minmax"


def fit(
    weights: Tensor, inliers: Tensor | None, importance: Tensor | None, spec: WeightSpec, settings: Minmax
) -> tuple[Tensor, Tensor]:
    """(scale [n], zero [n]) spanning the inliers of each row of `weights` [n, width]."""
    low, high = extremes(weights, inliers)
    return span(low, high, spec)


def extremes(weights: Tensor, inliers: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest inlier of each row, (0, 0) where a row has none."""
    if inliers is None:
        low, high = torch.aminmax(weights, dim=1)
        return low, high
    low = weights.masked_fill(~inliers, torch.inf).amin(dim=1)
    high = weights.masked_fill(~inliers, -torch.inf).amax(dim=1)
    empty = low > high
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def span(low: Tensor, high: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero, as stored, of the grid from `low` to `high` (each [n] or broadcastable)."""
    if spec.symmetric:
        return _symmetric_span(low, high, spec)
    if spec.zero == "int":
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / spec.max_code
    # A group of equal weights has no width; its magnitude as the step puts code 0 exactly on the weight.
    scale = torch.where(scale > 0, scale, torch.where(low != 0, low.abs(), torch.ones_like(low)))
    if spec.zero == "float":
        # A narrow group far from 0 would need a zero that its 16 bits cannot hold to half a step.
        scale = torch.maximum(scale, torch.maximum(low.abs(), high.abs()) / _LARGEST_ZERO)
    scale = stored_scale(scale, spec)
    return scale, stored_zero(-low / scale, spec)


def _symmetric_span(low: Tensor, high: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Longer side towards code 0 (signed `-2**(bits-1)`), both sides inside the grid."""
    longer, shorter = torch.maximum(-low, high), torch.minimum(-low, high)
    scale = torch.maximum(longer / spec.centre, shorter / (spec.centre - 1))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scale = stored_scale(torch.where(high > -low, -scale, scale), spec)
    return scale, stored_zero(scale, spec)
