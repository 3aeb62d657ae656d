"""SmoothQuant: part of the spread of activation channels is moved into the weights, in closed form.

Xiao et al., arXiv 2211.10438, equation 4: s_j = max|x_j|**alpha / max|w_j|**(1 - alpha), the activation divided by s
and the weight's columns multiplied, which is the convention of edges. max|w_j| is taken over all linears that
read the activation; OmniQuant's code looks at the first of them only. Nothing is normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bitwright.models.adapter import Adapter
from bitwright.models.edges import BlockShape, Edge, ExpertEdge
from bitwright.numeric.settings import Settings
from bitwright.transforms.equivalence import Rewrite
from bitwright.transforms.sites import LARGEST, Site, per_parameter, site_of


class Smooth(Settings):
    """Scales in closed form: `alpha` 0 evens out the weights' channels, 1 those of the activations.

    `sites` are those of the paper by default; see `bitwright.transforms.sites.Site`.
    """

    name: Literal["smooth"] = "smooth"
    alpha: float = Field(default=0.5, ge=0, le=1)
    sites: tuple[Site, ...] = Field(default=("norm",), min_length=1)


@torch.no_grad()
def smooth_scales(
    settings: Smooth, adapter: Adapter, tensors: Mapping[str, Tensor], input_absmax: Mapping[str, Tensor]
) -> Rewrite:
    """Float32 scales of every edge at the chosen sites; other edges, and all shifts, are None.

    Channels that share a scale (query heads of one group) enter by their largest. A channel without activations or
    without weights, or with infinite ones, keeps scale 1; others stay between 1e-4 and 1e4.

    Args:
        settings: alpha and sites.
        adapter: of the architecture.
        tensors: of one block, by names relative to it; may be missing linears of edges that are not chosen.
        input_absmax: largest absolute input of each channel, [in], by linear relative to the block (of a stack of
            experts [experts, in]); one linear of an edge is enough.

    Raises:
        ValueError: a chosen edge has no statistic, a size is wrong, or a weight is missing.
    """
    scales = tuple(
        _scale(settings.alpha, edge, adapter.shape, tensors, input_absmax) if site_of(edge) in settings.sites else None
        for edge in adapter.edges
    )
    return Rewrite(scales, (None,) * len(scales))


def _scale(
    alpha: float, edge: Edge, shape: BlockShape, tensors: Mapping[str, Tensor], input_absmax: Mapping[str, Tensor]
) -> Tensor:
    if missing := [tensor for tensor in edge.consumers.values() if tensor not in tensors]:
        raise ValueError(f"{edge} is to be smoothed, but {missing} is not among the tensors; pass the whole block")
    name = next(iter(edge.consumers))
    columns = torch.stack([_column_absmax(tensors[tensor], edge) for tensor in edge.consumers.values()]).amax(dim=0)
    activation = per_parameter(input_absmax, edge, shape).amax(dim=1).float()
    weight = per_parameter({name: columns}, edge, shape).amax(dim=1)
    scale = activation**alpha / weight ** (1 - alpha)
    alive = (activation > 0) & (weight > 0) & activation.isfinite() & weight.isfinite()
    return torch.where(alive, scale, 1.0).clamp(1 / LARGEST, LARGEST)


def _column_absmax(weight: Tensor, edge: Edge) -> Tensor:
    """Largest absolute weight of each input channel: [in]; where every expert has inputs of its own [experts, in]."""
    largest = weight.abs().amax(dim=-2).float()
    return largest if isinstance(edge, ExpertEdge) or largest.ndim == 1 else largest.amax(dim=0)
