"""Sites: which edges a transform rewrites, and channel statistics in the order of an edge's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from bitwright.models.edges import BlockShape, Edge, LinearEdge, NormEdge, RotaryEdge

Site = Literal["norm", "value", "down"]
"""`norm`: norms before linears; `value`: V before O; `down`: up before down, in experts as well, or fc1 before fc2."""

LARGEST = 1e4
"""Scales stay between 1 / LARGEST and LARGEST. The largest outlier channels of LLMs exceed the median by 1e3; with
more, float16 could not hold a scaled weight of 0.1 beside one that is divided."""


def site_of(edge: Edge) -> Site | None:
    """The site of an edge; None for query and key, whose rows every grid with a scale per row takes as they are."""
    if isinstance(edge, RotaryEdge):
        return None
    if isinstance(edge, NormEdge):
        return "norm"
    return "value" if isinstance(edge, LinearEdge) and edge.attention else "down"


def per_parameter(statistics: Mapping[str, Tensor], edge: Edge, shape: BlockShape) -> Tensor:
    """A statistic of the input channels of an edge's consumers, [edge.width, channels that share a parameter].

    Args:
        statistics: [in] by linear relative to the block, of a stack of experts [experts, in]. The consumers of an edge
            read one input, so the first of them that is listed speaks for all.
        edge: whose parameters give the order; value channels come with those of all query heads of their group.
        shape: of the block.

    Raises:
        ValueError: no consumer is listed, or the statistic has the wrong size.
    """
    name = next((name for name in edge.consumers if name in statistics), None)
    if name is None:
        raise ValueError(f"{edge}: no statistic of {list(edge.consumers)}; got those of {sorted(statistics)}")
    channels = statistics[name].flatten()
    attention = isinstance(edge, LinearEdge) and edge.attention
    sharing = shape.queries_per_kv if attention else 1
    if len(channels) != edge.width(shape) * sharing:
        raise ValueError(
            f"{name}: got a statistic {list(statistics[name].shape)}, needed {edge.width(shape) * sharing} channels"
        )
    if not attention:
        return channels.unsqueeze(1)
    return channels.reshape(shape.kv_heads, sharing, shape.head_dim).transpose(1, 2).reshape(-1, sharing)
