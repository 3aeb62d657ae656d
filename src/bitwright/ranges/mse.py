"""The mse range: the scale (and zero) of least squared reconstruction error, as EasyQuant optimises it.

EasyQuant (Tang et al. 2024, section 3.2) starts from the largest inlier and runs Adam on `sum (Q(w) - w)**2`
over the scale. Two solvers of that objective:

- `Mse`, the default: a coarse search over shrunk ranges, then closed-form updates that alternate nearest
  codes with the least-squares scale `<d, w> / <d, d>` (d = code - zero). Asymmetric groups may also move the
  zero. About 20 passes against Adam's hundreds, free of a learning rate whose right size depends on the
  weights' own scale, and never worse than where it started.
- `MseAdam`, the paper's: symmetric codes -(2**(b-1)-1) .. 2**(b-1) (stored as a negative scale), Adam on the
  almost-everywhere derivative `2 * sum (Q - w) * code` with the clamped code, a fixed number of steps, the
  last iterate taken whatever its error. The paper's learning rate is absolute.

Squared errors are weighted by `importance` where given; outliers (not `inliers`) weigh nothing.
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


class Mse(Settings):
    """Coarse search over `candidates` ranges shrunk down to `smallest`, then `updates` closed-form steps."""

    name: Literal["mse"] = "mse"
    candidates: int = Field(default=15, ge=1)
    smallest: float = Field(default=0.3, gt=0, le=1)
    updates: int = Field(default=3, ge=0)


class MseAdam(Settings):
    """The paper's solver: `steps` of Adam on the scale from the min-max range."""

    name: Literal["mse-adam"] = "mse-adam"
    learning_rate: float = Field(default=1e-4, gt=0)
    steps: int = Field(default=500, ge=0)


def fit(
    weights: Tensor, inliers: Tensor | None, importance: Tensor | None, spec: WeightSpec, settings: Mse
) -> tuple[Tensor, Tensor]:
    """(scale [n], zero [n]) of least squared error over the inliers of each row of `weights` [n, width]."""
    if inliers is not None and spec.zero == "int":
        # These grids hold 0 exactly: an outlier set to 0 has no error, takes no part in any sum below and
        # stretches no range, which spares the pass that would weigh it with 0.
        weights, inliers = weights.masked_fill(~inliers, 0.0), None
    low, high = minmax.extremes(weights, inliers)
    search = _Search(weights, _weighing(inliers, importance), spec)
    # All candidates' grids at once: as vectors of a few thousand they would cost more than the weights do.
    shrinks = torch.linspace(1.0, settings.smallest, settings.candidates).unsqueeze(1)
    scales, zeros = minmax.span(low * shrinks, high * shrinks, spec)
    errors = torch.stack([search.error(scale, zero) for scale, zero in zip(scales, zeros, strict=True)])
    error, chosen = errors.min(dim=0)
    scale, zero = (grid.gather(0, chosen.unsqueeze(0)).squeeze(0) for grid in (scales, zeros))
    return search.refine(scale, zero, error, settings.updates)


class _Search:
    """Squared errors and least-squares steps of candidate grids for one chunk of groups.

    One pair of buffers serves every candidate: fresh temporaries of this size would be mapped and faulted in
    anew each time, which costs as much as the arithmetic.
    """

    def __init__(self, weights: Tensor, weighing: Tensor | None, spec: WeightSpec):
        self.weights, self.weighing, self.spec = weights, weighing, spec
        self.steps, self._residual = torch.empty_like(weights), torch.empty_like(weights)

    def error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Weighted squared error [n] of one grid per row; leaves its code - zero in `steps`."""
        steps, residual, zero = self.steps, self._residual, zero.unsqueeze(1)
        # The reciprocal may round a tie the other way than `grid.encode` does; both neighbours are equally far.
        torch.mul(self.weights, (1 / scale).unsqueeze(1), out=steps)
        steps.add_(zero).round_().clamp_(0, self.spec.max_code).sub_(zero)
        torch.addcmul(self.weights, steps, scale.unsqueeze(1), value=-1, out=residual)
        if self.weighing is None:
            norm: Tensor = torch.linalg.vector_norm(residual, dim=1)
            return norm.square_()
        return residual.square_().mul_(self.weighing).sum(dim=1)

    def refine(self, scale: Tensor, zero: Tensor, error: Tensor, updates: int) -> tuple[Tensor, Tensor]:
        """Alternate nearest codes with the least-squares zero and scale; the best stored grid met on the way."""
        best = (error, scale, zero)
        self.error(scale, zero)
        for _ in range(updates):
            if not self.spec.symmetric:
                zero = stored_zero(self._least_squares_zero(scale, zero), self.spec)
                best = _better(best, (self.error(scale, zero), scale, zero))
            scale = stored_scale(self._least_squares_scale(scale), self.spec)
            best = _better(best, (self.error(scale, zero), scale, zero))
        return best[1], best[2]

    def _least_squares_scale(self, scale: Tensor) -> Tensor:
        """`<steps, w> / <steps, steps>`; the old scale where every step is zero or the sign would flip."""
        weighted = self._residual
        weighted.copy_(self.steps)
        if self.weighing is not None:
            weighted.mul_(self.weighing)
        denominator = torch.mul(weighted, self.steps).sum(dim=1)
        result = weighted.mul_(self.weights).sum(dim=1) / denominator
        return torch.where((denominator > 0) & (result * scale > 0), result, scale)

    def _least_squares_zero(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The zero that centres the residuals of fixed codes: `mean(code - w / scale)`."""
        offset = torch.mul(self.weights, (1 / scale).unsqueeze(1), out=self._residual).neg_().add_(self.steps)
        if self.weighing is None:
            return zero + offset.mean(dim=1)
        total = self.weighing.sum(dim=1)
        return torch.where(total > 0, zero + offset.mul_(self.weighing).sum(dim=1) / total, zero)


_Candidate = tuple[Tensor, Tensor, Tensor]


def _better(best: _Candidate, new: _Candidate) -> _Candidate:
    """Row by row the (error, scale, zero) of smaller error; the old one when equal."""
    improved = new[0] < best[0]
    error, scale, zero = (torch.where(improved, after, before) for before, after in zip(best, new, strict=True))
    return error, scale, zero


def _weighing(inliers: Tensor | None, importance: Tensor | None) -> Tensor | None:
    if inliers is None:
        return importance
    return inliers.float() if importance is None else importance * inliers


def fit_adam(
    weights: Tensor, inliers: Tensor | None, importance: Tensor | None, spec: WeightSpec, settings: MseAdam
) -> tuple[Tensor, Tensor]:
    """(scale [n], zero [n]) after the paper's Adam; the last iterate, as published.

    Asymmetric specs keep the min-max zero and train the scale, which the paper does not cover.
    """
    low, high = minmax.extremes(weights, inliers)
    weighing = _weighing(inliers, importance)
    if spec.symmetric:
        # Paper: codes up to 2**(b-1) on the positive side, initial range max|w| on code 2**(b-1).
        scale = torch.maximum(high, -low) / spec.centre
        scale = -torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.full_like(scale, float(spec.centre))
    else:
        scale, zero = minmax.span(low, high, spec)
    # Adam's first and second moments with torch.optim.Adam's defaults, written out: rows stay independent.
    mean, square = torch.zeros_like(scale), torch.zeros_like(scale)
    sign = torch.sign(scale)
    for step in range(1, settings.steps + 1):
        inverse = (1 / scale).unsqueeze(1)
        codes = torch.addcmul(zero.unsqueeze(1), weights, inverse).round_().clamp_(0, spec.max_code)
        steps = codes.sub_(zero.unsqueeze(1))
        residual = torch.addcmul(weights, steps, scale.unsqueeze(1), value=-1).neg_()
        if weighing is not None:
            residual.mul_(weighing)
        gradient = 2 * (residual * steps).sum(dim=1)
        mean.mul_(0.9).add_(gradient, alpha=0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        scale = scale - settings.learning_rate * update
        # A learning rate larger than the scale would step through zero and turn the grid inside out.
        scale = torch.where(scale * sign > 0, scale, sign * 1e-8)
    return stored_scale(scale, spec), zero
