"""Outliers: single weights kept apart from the grid, and the policies that choose them.

An outlier is stored as a *residual*: target minus the value of the code beneath it. Decoding always adds, so
a reader that ignores outliers degrades gracefully, and kernels need no masks. (The released SpQR saves the
whole value and its kernel adds it too, which multiplies the error at 3 bits; we do not copy that.)

Policies:

- `none`: keep nothing apart.
- `nsigma` (EasyQuant, Tang et al. 2024, section 3): keep weights with `|w - mean| > n * sigma`, statistics
  over the whole tensor or over each output channel. The share is capped: when more weights qualify, the ones
  farthest from the mean are kept (our addition; heavy-tailed tensors otherwise fill the disk).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from bitwright.errors import FormatError, WeightError
from bitwright.numeric.settings import Settings


@dataclass(frozen=True)
class Outliers:
    """Sparse residuals in row-major order: `column[row_pointer[r]:row_pointer[r+1]]` belong to row r.

    `row_pointer` int64 [out + 1], `column` int64 [count] (ascending and unique within a row), `residual`
    float32 [count] with values exactly representable in float16.
    """

    row_pointer: Tensor
    column: Tensor
    residual: Tensor

    @property
    def count(self) -> int:
        """Number of outliers."""
        return self.column.numel()

    @staticmethod
    def gather(mask: Tensor, residual: Tensor) -> Outliers:
        """The residuals [out, in] at the true places of `mask` [out, in], rounded to float16.

        Raises:
            WeightError: a residual is too large for float16.
        """
        row, column = mask.nonzero(as_tuple=True)
        values = residual[row, column].float()
        if values.numel() and values.abs().max().item() > torch.finfo(torch.float16).max:
            raise WeightError(f"an outlier residual of {values.abs().max().item():.3g} does not fit float16")
        row_pointer = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(mask.sum(dim=1), dim=0, out=row_pointer[1:])
        return Outliers(row_pointer, column, values.half().float())

    @staticmethod
    def concatenate(parts: list[Outliers]) -> Outliers:
        """Outliers of consecutive row chunks as one."""
        pointers = [parts[0].row_pointer[:1]]
        offset = 0
        for part in parts:
            pointers.append(part.row_pointer[1:] + offset)
            offset += part.count
        return Outliers(
            torch.cat(pointers), torch.cat([p.column for p in parts]), torch.cat([p.residual for p in parts])
        )

    def row_slice(self, rows: slice) -> Outliers:
        """The outliers of consecutive rows, counted from the first of them."""
        pointer = self.row_pointer[rows.start : rows.stop + 1]
        first, last = int(pointer[0]), int(pointer[-1])
        return Outliers(pointer - first, self.column[first:last], self.residual[first:last])

    def validate(self, name: str, shape: tuple[int, int]) -> Outliers:
        """Self, if it fits a matrix of `shape` (out, in).

        Raises:
            FormatError: impossible pointers, columns or values; `name` is in the message.
        """
        pointer, column = self.row_pointer, self.column
        if pointer.numel() != shape[0] + 1:
            raise FormatError(f"{name}.outlier_ptr: {pointer.numel()} row pointers, needed {shape[0] + 1}")
        if int(pointer[0]) != 0 or int(pointer[-1]) != self.count or bool((pointer.diff() < 0).any()):
            raise FormatError(
                f"{name}.outlier_ptr: runs from {int(pointer[0])} to {int(pointer[-1])}, "
                f"needed values rising from 0 to the {self.count} outliers"
            )
        if self.residual.numel() != self.count:
            raise FormatError(f"{name}.outlier_val: {self.residual.numel()} values for {self.count} columns")
        if not bool(torch.isfinite(self.residual).all()):
            raise FormatError(f"{name}.outlier_val: holds NaN or Inf, needed finite values")
        if self.count == 0:
            return self
        low, high = int(column.min()), int(column.max())
        if low < 0 or high >= shape[1]:
            raise FormatError(f"{name}.outlier_idx: columns {low}..{high}, needed 0..{shape[1] - 1}")
        same_row = self.rows().diff() == 0
        if bool((column.diff()[same_row] <= 0).any()):
            raise FormatError(f"{name}.outlier_idx: needed ascending columns without repeats within a row")
        return self

    def rows(self) -> Tensor:
        """Row of each outlier, int64 [count]."""
        places = torch.arange(self.count, device=self.row_pointer.device)
        # repeat_interleave would do, but takes a millisecond on the CPU however short its input.
        return torch.searchsorted(self.row_pointer[1:], places, right=True)

    def add_to(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] plus the residuals, a new tensor."""
        return weight.index_put((self.rows(), self.column), self.residual.to(weight.dtype), accumulate=True)


class NoOutliers(Settings):
    """Keep nothing apart."""

    name: Literal["none"] = "none"


class NSigma(Settings):
    """Keep weights farther than `n` standard deviations from the mean, at most `max_share` of the tensor."""

    name: Literal["nsigma"] = "nsigma"
    n: float = Field(default=3.0, gt=0)
    scope: Literal["tensor", "channel"] = "tensor"
    max_share: float = Field(default=0.01, ge=0, le=1)


OutlierPolicy = Annotated[NoOutliers | NSigma, Field(discriminator="name")]


@dataclass(frozen=True)
class OutlierThreshold:
    """Which weights of one tensor are outliers: those with `|w - mean| > limit`; both [out, 1] or [1, 1]."""

    mean: Tensor
    limit: Tensor

    def select(self, rows: slice, weight: Tensor) -> Tensor:
        """Mask of the outliers among `weight`, the given rows of the tensor in float32."""
        mean, limit = (t if t.shape[0] == 1 else t[rows] for t in (self.mean, self.limit))
        return (weight - mean).abs() > limit

    def ratios(self, rows: slice, weight: Tensor) -> Tensor:
        """Distance from the mean over the limit, for the outliers among `weight`; each above 1."""
        mask = self.select(rows, weight)
        mean, limit = ((t if t.shape[0] == 1 else t[rows]).expand_as(weight)[mask] for t in (self.mean, self.limit))
        return (weight[mask] - mean).abs() / limit.clamp_min(torch.finfo(torch.float32).tiny)


def outlier_threshold(weight: Tensor, policy: NoOutliers | NSigma, chunks: list[slice]) -> OutlierThreshold | None:
    """The threshold that `policy` sets for `weight` [out, in]; None when nothing is kept apart.

    Moments are float64 per row, and summed exactly over rows, so that they depend neither on the `chunks` in
    which rows are read nor on the number of threads.
    """
    if isinstance(policy, NoOutliers) or policy.max_share == 0:
        return None
    moments = torch.cat([_row_moments(weight[rows].float()) for rows in chunks])
    if policy.scope == "tensor":
        exact = [math.fsum(column) for column in moments.T.tolist()]
        moments = torch.tensor([exact], dtype=torch.float64)
        per_statistic = weight.numel()
    else:
        per_statistic = weight.shape[1]
    mean = moments[:, :1] / per_statistic
    variance = (moments[:, 1:] / per_statistic - mean**2).clamp_min(0)
    threshold = OutlierThreshold(mean.float(), (policy.n * variance.sqrt()).float())
    return _capped(weight, threshold, policy.max_share, chunks)


def _row_moments(weight: Tensor) -> Tensor:
    """Sum and sum of squares of each row, float64 [rows, 2]."""
    exact = weight.double()
    return torch.stack([exact.sum(dim=1), exact.mul_(exact).sum(dim=1)], dim=1)


def _capped(weight: Tensor, threshold: OutlierThreshold, max_share: float, chunks: list[slice]) -> OutlierThreshold:
    """Raise every limit by one common factor until at most `max_share` of all weights exceed it."""
    allowed = int(max_share * weight.numel())
    count = sum(int(threshold.select(rows, weight[rows].float()).sum()) for rows in chunks)
    if count <= allowed:
        return threshold
    ratio = torch.cat([threshold.ratios(rows, weight[rows].float()) for rows in chunks])
    # The (allowed+1)-th largest ratio is the first that must go; "greater than" then keeps at most `allowed`.
    factor = ratio.kthvalue(ratio.numel() - allowed).values
    # One float32 step up: (limit * factor) may round below the very weight that defined the factor.
    return OutlierThreshold(threshold.mean, torch.nextafter(threshold.limit * factor, torch.tensor(torch.inf)))
