"""The clip range: min-max of a share of each group's range, the shares found by learning or by search.

OmniQuant's learnable weight clipping (Shao et al. 2023, section 3.2): `max` becomes `sigmoid(gamma) * max` and `min`
`sigmoid(beta) * min`, gamma and beta learned per group, 4 at first. Departures from the released code: the range
always contains 0, so that integer zeros stay inside the code range (there, an all-positive row got a zero of -17), and
scales are rounded to their stored precision while training, so that what is trained is what is stored.

`search_clipping` is AWQ's search (Lin et al. 2023, released code): the one share of each group's range, of a grid down
to `smallest`, that leaves the least error of the group's part of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.numeric.grid import decode, encode, group_rows, ungroup_rows
from bitwright.numeric.settings import Settings
from bitwright.numeric.spec import WeightSpec
from bitwright.numeric.straight_through import straight_through
from bitwright.ranges import minmax


class Clip(Settings):
    """Min-max of learned or searched shares of the range; of all of it where nothing has found them.

    `search`: shares are searched for, and learning begins with what was found.
    """

    name: Literal["clip"] = "clip"
    search: bool = False


@dataclass(frozen=True)
class Clipping:
    """Shares of the range, float32 [out, groups], in (0, 1]: of the largest weight and of the smallest."""

    upper: Tensor
    lower: Tensor

    def groups(self, groups: slice) -> Clipping:
        """Those of consecutive groups."""
        return Clipping(self.upper[:, groups], self.lower[:, groups])

    def rows(self, rows: slice) -> Clipping:
        """Those of consecutive rows."""
        return Clipping(self.upper[rows], self.lower[rows])


def fit(
    weights: Tensor, inliers: Tensor | None, shares: tuple[Tensor, Tensor] | None, spec: WeightSpec
) -> tuple[Tensor, Tensor]:
    """(scale [n], zero [n]) of each row of `weights` [n, width]; `shares` (upper, lower) are [n] each.

    Gradients reach `weights` and `shares` through the scale, not through the zero. Shares of 1 give min-max to the
    last bit.
    """
    if weights.requires_grad and torch.is_grad_enabled() and inliers is None:
        # by index: the gradient goes to one weight, in one pass
        low, high = weights.min(dim=1).values, weights.max(dim=1).values
    else:
        low, high = minmax.extremes(weights, inliers)
    if shares is not None:
        low, high = low * shares[1], high * shares[0]
    with torch.no_grad():
        scale, zero = minmax.span(low, high, spec)
    if not (torch.is_grad_enabled() and (low.requires_grad or high.requires_grad)):
        return scale, zero
    return straight_through(scale, _smooth_scale(low, high, scale, spec)), zero


def _smooth_scale(low: Tensor, high: Tensor, scale: Tensor, spec: WeightSpec) -> Tensor:
    """The scale before it is rounded for storage, as `minmax.span` has it; constant where that is."""
    if spec.symmetric:
        longer, shorter = torch.maximum(-low, high), torch.minimum(-low, high)
        return torch.sign(scale) * torch.maximum(longer / spec.centre, shorter / (spec.centre - 1))
    if spec.zero == "int":
        low, high = low.clamp_max(0), high.clamp_min(0)
    return (high - low) / spec.max_code


@torch.no_grad()
def search_clipping(
    weight: Tensor, hessian: Tensor, spec: WeightSpec, points: int = 20, smallest: float = 0.5
) -> Clipping:
    """The share of each group's range, 1 among them, of least output error under the group's own Hessian.

    Args:
        weight: float32 [out, in].
        hessian: mean of x x^T over the inputs, [in, in]; only blocks on its diagonal count, as the paper scores each
            group by its own part of the output.
        spec: of the codes; scales count with one level.
        points: shares that are tried, evenly spaced from 1 down to, but without, `smallest`.
        smallest: share.
    """
    one_level, width = spec.one_level, spec.group_width(weight.shape[1])
    blocks = _diagonal_blocks(hessian.float(), width)
    best_shares, start = [], 0
    for part in group_rows(weight, spec):
        groups = part.shape[0] // weight.shape[0]
        here = blocks[start : start + groups, : part.shape[1], : part.shape[1]]
        best_shares.append(_best_shares(part, here, one_level, _shares(points, smallest)))
        start += groups
    shares = ungroup_rows(best_shares, weight.shape[0])
    return Clipping(shares, shares.clone())


def _shares(points: int, smallest: float) -> list[float]:
    return [1.0 - (1.0 - smallest) * point / points for point in range(points)]


def _best_shares(part: Tensor, blocks: Tensor, spec: WeightSpec, candidates: list[float]) -> Tensor:
    """[out * groups] for weights [out * groups, width] and Hessians [groups, width, width]."""
    low, high = minmax.extremes(part, None)
    best = torch.ones(part.shape[0])
    least = torch.full((part.shape[0],), torch.inf)
    for share in candidates:
        scale, zero = (value.unsqueeze(1) for value in minmax.span(low * share, high * share, spec))
        error = decode(encode(part, scale, zero, spec), scale, zero).sub_(part)
        by_group = error.reshape(-1, blocks.shape[0], part.shape[1])
        loss = (torch.einsum("ogw,gwv->ogv", by_group, blocks) * by_group).sum(dim=2).flatten()
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, share, best)
    return best


def _diagonal_blocks(hessian: Tensor, width: int) -> Tensor:
    """[groups, width, width]: the blocks on the diagonal, the last filled up with zeros."""
    short = -hessian.shape[0] % width
    padded = functional.pad(hessian, (0, short, 0, short))
    groups = padded.shape[0] // width
    return padded.reshape(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


__all__ = ["Clip", "Clipping", "fit", "search_clipping"]
