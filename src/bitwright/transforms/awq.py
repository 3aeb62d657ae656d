"""AWQ: scales mean|x|**r, with the exponent r of each edge found by a grid search.

Lin et al., arXiv 2306.00978, section 3.2: channels with large activations are scaled up before quantization, so that
their weights are rounded more finely. The paper runs the module for every candidate; here the output error of the
consumers is computed from their Hessians H, the mean of x x^T over the calibration tokens:

    mean |D x|^2 = tr(D H D^T),  D = Q(W * scale) / scale - W

which is the same number for every linear, for one matrix product per consumer and candidate and no activations. The
paper's module is the attention or the feed-forward as a whole, nonlinear parts included. AWQ's code skips value before
output under grouped-query attention; here the query heads of a group share a scale, from the mean of their means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bitwright.models.adapter import Adapter
from bitwright.models.edges import BlockShape, Edge, Factors, apply_factors
from bitwright.numeric.settings import Settings
from bitwright.transforms.equivalence import Rewrite, apply
from bitwright.transforms.sites import LARGEST, Site, per_parameter, site_of

Quantized = Callable[[str, Tensor], Tensor]
"""(linear relative to the block, its weight) -> the values that the weight takes when it is quantized."""


class Awq(Settings):
    """Grid search over the exponents 0, 1 / points, ... below 1; see `bitwright.transforms.sites.Site`."""

    name: Literal["awq"] = "awq"
    points: int = Field(default=20, ge=1)
    sites: tuple[Site, ...] = Field(default=("norm", "value", "down"), min_length=1)


@dataclass(frozen=True)
class Choice:
    """What the search found for one edge.

    Attributes:
        edge: that was searched.
        exponent: of the mean absolute activation; 0 means that nothing beat the unscaled edge.
        before, after: mean squared error of the consumers' outputs, summed over output channels, when their weights
            are quantized without and with the scale.
    """

    edge: Edge
    exponent: float
    before: float
    after: float


@torch.no_grad()
def search_scales(
    settings: Awq,
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    mean_abs: Mapping[str, Tensor],
    quantized: Quantized,
) -> tuple[Rewrite, tuple[Choice, ...]]:
    """The best scale of every edge at the chosen sites, and what each one gains.

    Edges are searched one by one in order of execution. A scale of an edge also divides the rows of its producer, so
    each search sees the weights as the scales before it left them: `v_proj`, say, is judged as a reader of its norm
    before the value edge scales its rows. The identity is always a candidate, so no edge's error grows.

    Args:
        settings: grid and sites.
        adapter: of the architecture.
        tensors: of one block, by names relative to it.
        hessians: mean of x x^T over the inputs of linears, [in, in], by linear relative to the block, for the block as
            it is in `tensors`; of a stack of experts one for all, or [experts, in, in]. A consumer without one counts
            as one that stays in float: it is scaled but not scored; an edge without any scored consumer is left alone.
        mean_abs: mean of |x|, [in], or [experts, in]; one linear of an edge is enough.
        quantized: what a weight becomes; called with scaled float weights.

    Returns:
        Float32 scales (None for edges that were not searched; no shifts), and a `Choice` for each searched edge.

    Raises:
        ValueError: a searched edge has no mean absolute input, a size is wrong, or a tensor is missing.
    """
    current = dict(tensors)
    scales: list[Tensor | None] = [None] * len(adapter.edges)
    choices = []
    for index, edge in enumerate(adapter.edges):
        if site_of(edge) not in settings.sites or not any(name in hessians for name in edge.consumers):
            continue
        mean = per_parameter(mean_abs, edge, adapter.shape).float().mean(dim=1)
        objective = _Objective(edge, adapter.shape, current, hessians, quantized)
        choice, scale = _search(settings.points, mean, objective)
        scales[index] = scale
        choices.append(choice)
        alone: list[Tensor | None] = [None] * len(scales)
        alone[index] = scale
        current = apply(Rewrite(tuple(alone), (None,) * len(scales)), adapter, current)
    return Rewrite(tuple(scales), (None,) * len(scales)), tuple(choices)


class _Objective:
    """The output error of one edge's consumers as a function of the edge's scale."""

    def __init__(
        self,
        edge: Edge,
        shape: BlockShape,
        tensors: Mapping[str, Tensor],
        hessians: Mapping[str, Tensor],
        quantized: Quantized,
    ):
        if missing := [tensor for tensor in edge.consumers.values() if tensor not in tensors]:
            raise ValueError(f"{edge} is to be searched, but {missing} is not among the tensors; pass the whole block")
        self.edge, self.shape, self.quantized = edge, shape, quantized
        self.consumers = {
            name: (tensors[tensor], hessians[name]) for name, tensor in edge.consumers.items() if name in hessians
        }
        for name, (weight, hessian) in self.consumers.items():
            width = weight.shape[-1]
            if hessian.shape not in ((width, width), (*weight.shape[:-2], width, width)):
                raise ValueError(f"{name}: got a Hessian {list(hessian.shape)}, needed [{width}, {width}]")

    def __call__(self, scale: Tensor) -> float:
        """Sum over the scored consumers of tr(D H D^T)."""
        factors = self.edge.factors(scale, self.shape)
        total = 0.0
        for name, (weight, hessian) in self.consumers.items():
            columns = factors[self.edge.consumers[name]].columns
            assert columns is not None
            scaled = apply_factors(weight, Factors(columns=columns))
            back = apply_factors(self.quantized(name, scaled), Factors(columns=1 / columns))
            difference = back - weight
            product = difference @ hessian.to(difference.dtype)
            error = float(product.mul_(difference).sum(dtype=torch.float64))
            # rounding of the products may leave a perfect result below zero; NaN must stay
            total += 0.0 if error < 0 else error
        return total


def _search(points: int, mean_abs: Tensor, objective: _Objective) -> tuple[Choice, Tensor]:
    """The first of the best candidates; an error that is NaN is never best."""
    best_exponent, best_scale = 0.0, torch.ones_like(mean_abs)
    before = best = objective(best_scale)
    for point in range(1, points):
        scale = _candidate(mean_abs, point / points)
        error = objective(scale)
        if error < best:
            best_exponent, best_scale, best = point / points, scale, error
    return Choice(objective.edge, best_exponent, before, best), best_scale


def _candidate(mean_abs: Tensor, exponent: float) -> Tensor:
    """mean|x|**exponent, divided by the geometric mean of its extremes as AWQ does."""
    alive = mean_abs > 0
    if not bool(alive.any()):
        return torch.ones_like(mean_abs)
    # a dead channel counts as the faintest live one: its weights do not matter and must not widen a grid
    scale = mean_abs.clamp(min=float(mean_abs[alive].min())) ** exponent
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1 / LARGEST, LARGEST)
