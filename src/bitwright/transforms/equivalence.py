"""Equivalent rewriting of a decoder block: one scale and one shift for every channel of every edge.

The learnable equivalent transformation (LET) of OmniQuant (Shao et al., arXiv 2308.13137, section 3.3), with
SmoothQuant and AWQ as special cases. For an activation x between the producer and the consumers of an edge,

    x' = (x - shift) / scale        producer bias (b - shift) / scale,  producer rows / scale
    W' = W * scale                  consumer bias c + W shift,          consumer columns * scale

so that W' x' + c' = W x + c. Shifts are in units of the unscaled activation: they are put in first, with the original
weights, and everything is scaled after.

`apply` both trains and fuses: it is pure and differentiable, and what was learned through it is what is stored. It
never rounds to a stored type; fold in float32 or float64 and cast once.

Departures from OmniQuant's code: query and key share scales where RoPE mixes dims (the code's free scales are not
equivalent), value scales are shared by a group of query heads, which makes grouped-query attention work, and there
is an edge from up to down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.models.adapter import Adapter
from bitwright.models.edges import Edge, LinearEdge, NormEdge, apply_factors, merge_factors, per_query_head
from bitwright.transforms.sites import per_parameter


@dataclass(frozen=True, eq=False)
class Rewrite:
    """Scales and shifts aligned with `adapter.edges`; None leaves an edge unscaled or unshifted.

    Attributes:
        scales: for each edge positive factors [edge.width], or None.
        shifts: for each edge [edge.width] in units of the unscaled activation, or None.

    Raises:
        ValueError: the two differ in length, or a scale is not positive. NaN passes, so that what learns scales
            meets it in the loss.
    """

    scales: tuple[Tensor | None, ...]
    shifts: tuple[Tensor | None, ...]

    def __post_init__(self) -> None:
        """Refuse what no block could take."""
        if len(self.scales) != len(self.shifts):
            raise ValueError(
                f"got {len(self.scales)} scales and {len(self.shifts)} shifts; needed one of each per edge"
            )
        for index, scale in enumerate(self.scales):
            if scale is not None and bool((scale.detach() <= 0).any()):
                raise ValueError(
                    f"edge {index} has a scale of {float(scale.detach().min())}; needed positive ones; clamp them, or "
                    "learn their logarithms"
                )


def identity(adapter: Adapter) -> Rewrite:
    """The rewrite that changes nothing: float32 scales of one on every edge, and no shifts.

    Where learning starts; `apply` of it returns bit-identical values.
    """
    scales = tuple(torch.ones(edge.width(adapter.shape)) for edge in adapter.edges)
    return Rewrite(scales, (None,) * len(scales))


def apply(rewrite: Rewrite, adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a block after `rewrite`, which leaves the block's float output unchanged.

    Args:
        rewrite: scales and shifts of the edges.
        adapter: of the architecture.
        tensors: of one block, by names relative to it (`self_attn.q_proj.weight`); more than the edges touch
            is welcome.

    Returns:
        Every tensor of `tensors`: a touched one is new, in the type that promotion with scales and shifts gives, and
        carries gradients to them and to what it came from; any other is the same object.

    Raises:
        ValueError: the rewrite is not of this adapter, a size is wrong, a tensor that a rewritten edge touches is
            missing, or an edge is shifted that `shiftable` denies.
    """
    if len(rewrite.scales) != len(adapter.edges):
        raise ValueError(f"got a rewrite of {len(rewrite.scales)} edges; {adapter.model_type} has {len(adapter.edges)}")
    several = []
    for edge, scale in zip(adapter.edges, rewrite.scales, strict=True):
        if scale is not None:
            several.append(edge.factors(scale, adapter.shape))
            # a bias may be absent; half of an edge would change the output
            if missing := [name for name in several[-1] if name not in tensors and not name.endswith(".bias")]:
                raise ValueError(f"{edge} is scaled, but {missing} is not among the tensors; pass the whole block")
    factors = merge_factors(several)
    shifted = {**tensors, **_shifted_biases(rewrite, adapter, tensors)}
    return {
        name: apply_factors(tensor, factors[name]) if name in factors else tensor for name, tensor in shifted.items()
    }


def shiftable(edge_index: int, adapter: Adapter, tensors: Mapping[str, Tensor]) -> bool:
    """Whether edge `edge_index` can be shifted: its producer and all its consumers have biases to take the shift.

    Only a norm before linears, and value before output: a row of attention weights sums to one, so that a shift of
    every value is the same shift of what they mix to. An activation or a product between stops a shift.
    """
    edge = adapter.edges[edge_index]
    if not isinstance(edge, NormEdge) and not (isinstance(edge, LinearEdge) and edge.attention):
        return False
    # a stack of experts has no tensor of such a name
    return all(f"{module}.bias" in tensors for module in edge.modules)


def midpoint_shifts(
    adapter: Adapter, tensors: Mapping[str, Tensor], low: Mapping[str, Tensor], high: Mapping[str, Tensor]
) -> tuple[Tensor | None, ...]:
    """(low + high) / 2 of every channel of every shiftable edge, OmniQuant's first shift; None for other edges.

    Args:
        adapter: of the architecture.
        tensors: of one block, which tell the edges that are shiftable.
        low, high: extremes of the inputs of linears, [in], by linear relative to the block; one linear of an edge
            is enough. Channels that share a shift (query heads of one group) take their common extremes.

    Raises:
        ValueError: a shiftable edge has no extremes, or they have the wrong size.
    """
    shifts: list[Tensor | None] = []
    for index, edge in enumerate(adapter.edges):
        if not shiftable(index, adapter, tensors):
            shifts.append(None)
            continue
        below = per_parameter(low, edge, adapter.shape).amin(dim=1)
        above = per_parameter(high, edge, adapter.shape).amax(dim=1)
        shifts.append(below + (above - below) / 2)
    return tuple(shifts)


def _shifted_biases(rewrite: Rewrite, adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The biases after all shifts, before any scale; shifts only add, so their order does not matter."""
    biases: dict[str, Tensor] = {}
    for index, (edge, shift) in enumerate(zip(adapter.edges, rewrite.shifts, strict=True)):
        if shift is None:
            continue
        _check_shift(index, adapter, tensors, shift)
        producer = f"{edge.modules[0]}.bias"
        biases[producer] = biases.get(producer, tensors[producer]) - shift
        attention = isinstance(edge, LinearEdge) and edge.attention
        channels = per_query_head(shift, adapter.shape) if attention else shift
        for name, tensor in edge.consumers.items():
            bias = biases.get(f"{name}.bias", tensors[f"{name}.bias"])
            biases[f"{name}.bias"] = bias + _product(tensors[tensor], channels)
    return biases


def _check_shift(index: int, adapter: Adapter, tensors: Mapping[str, Tensor], shift: Tensor) -> None:
    edge: Edge = adapter.edges[index]
    if shift.shape != (edge.width(adapter.shape),):
        raise ValueError(f"{edge} takes a shift of shape ({edge.width(adapter.shape)},), got {tuple(shift.shape)}")
    if not shiftable(index, adapter, tensors):
        raise ValueError(
            f"{edge} cannot be shifted: needed a norm before linears or value before output, with biases "
            f"{[f'{module}.bias' for module in edge.modules]}; leave its shift None"
        )
    if missing := [tensor for tensor in edge.consumers.values() if tensor not in tensors]:
        raise ValueError(f"{edge} is shifted, but {missing} is not among the tensors; pass the whole block")


def _product(weight: Tensor, shift: Tensor) -> Tensor:
    """weight @ shift in the type that promotion gives, which matrix products do not do themselves."""
    dtype = torch.promote_types(weight.dtype, shift.dtype)
    return weight.to(dtype) @ shift.to(dtype)
