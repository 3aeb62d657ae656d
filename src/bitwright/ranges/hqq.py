"""The hqq range: half-quadratic quantization of the zero (or, for symmetric codes, of the scale).

HQQ (Badri and Shaji 2023): minimise `sum |w - Q(w)|**p`, p < 1, by splitting off an error variable e:
e = shrink_p(w - Q(w), beta), then the zero in closed form, `mean(code - (w - e) / scale)`, with beta rising by
kappa each step. The scale stays at the min-max one. Differences from the released code: each group keeps its
own best iterate by the objective (the release stops the whole tensor when the mean error rises), so a group is
never worse than min-max; the arithmetic is float32; and symmetric codes, which have no zero to move, apply the
same half-quadratic step to the scale, `<d, w - e> / <d, d>`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bitwright.numeric.grid import stored_scale, stored_zero
from bitwright.numeric.settings import Settings
from bitwright.numeric.spec import WeightSpec
from bitwright.ranges import minmax


class Hqq(Settings):
    """Half-quadratic splitting of the `power` norm: at most `iterations`, penalty `beta` growing by `kappa`."""

    name: Literal["hqq"] = "hqq"
    power: float = Field(default=0.7, gt=0, le=1)
    beta: float = Field(default=10.0, gt=0)
    kappa: float = Field(default=1.01, ge=1)
    iterations: int = Field(default=20, ge=0)


def fit(
    weights: Tensor, inliers: Tensor | None, importance: Tensor | None, spec: WeightSpec, settings: Hqq
) -> tuple[Tensor, Tensor]:
    """(scale [n], zero [n]) of least `sum |w - Q(w)|**power` over the inliers of each row of `weights`.

    `importance` is not used: the objective has no weights.
    """
    scale, zero = minmax.fit(weights, inliers, None, spec, minmax.Minmax())
    if inliers is not None:
        # An outlier's error must pull on nothing: it is replaced by the value that the grid gives it.
        weights = torch.where(inliers, weights, weights.clamp(*_span(weights, scale, zero, spec)))
    best_scale, best_zero = scale, zero
    best_error = torch.full_like(scale, torch.inf)
    beta = settings.beta
    # Buffers for the whole search: see `mse`.
    codes, residual, magnitude, slope, cost = (torch.empty_like(weights) for _ in range(5))
    for iteration in range(settings.iterations + 1):
        inverse = (1 / scale).unsqueeze(1)
        torch.mul(weights, inverse, out=codes).add_(zero.unsqueeze(1)).round_().clamp_(0, spec.max_code)
        torch.sub(codes, zero.unsqueeze(1), out=residual).mul_(scale.unsqueeze(1))
        torch.sub(weights, residual, out=residual)
        torch.abs(residual, out=magnitude)
        # |r|**(p - 1) serves both the objective, |r| times it, and the shrinkage; pow is the dearest step here.
        slope.copy_(magnitude).clamp_min_(1e-30).pow_(settings.power - 1)
        torch.mul(magnitude, slope, out=cost)
        error = (cost if inliers is None else cost.mul_(inliers)).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        if iteration == settings.iterations:
            break
        magnitude.sub_(slope.div_(beta)).clamp_min_(0).mul_(residual.sign_())
        target = torch.sub(weights, magnitude, out=residual)
        if spec.symmetric:
            steps = codes.sub_(zero.unsqueeze(1))
            moved = torch.mul(steps, target, out=cost).sum(dim=1) / steps.square_().sum(dim=1).clamp_min(1e-30)
            scale = stored_scale(torch.where(moved * scale > 0, moved, scale), spec)
        else:
            zero = stored_zero(codes.sub_(target.mul_(inverse)).mean(dim=1), spec)
        beta *= settings.kappa
    return best_scale, best_zero


def objective(residual: Tensor, power: float, inliers: Tensor | None) -> Tensor:
    """`sum |residual|**power` over the inliers of each row."""
    cost = residual.abs().pow_(power)
    return (cost if inliers is None else cost * inliers).sum(dim=1)


def _span(weights: Tensor, scale: Tensor, zero: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    ends = torch.stack([-zero * scale, (spec.max_code - zero) * scale])
    return ends.amin(dim=0).unsqueeze(1), ends.amax(dim=0).unsqueeze(1)
