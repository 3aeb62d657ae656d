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
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bitwright.errors import FormatError, WeightError
from bitwright.execute.local import spread
from bitwright.numeric.grid import rounded_up
from bitwright.numeric.settings import Settings

# Of an 8-bit residual; -128 stays unused, so that the range is that of the sign and the magnitude.
_LARGEST_VALUE = 127


@dataclass(frozen=True)
class Outliers:
    """Sparse residuals in row-major order: `column[row_pointer[r]:row_pointer[r+1]]` belong to row r.

    `row_pointer` int64 [out + 1], `column` int64 [count] (ascending and unique within a row), `residual`
    float32 [count]. Without `step` residuals are exactly representable in float16. With `step`, float32 [out] of
    float16 values not below 0, they are 8-bit multiples of their row's step: `step * v`, v in -127 .. 127.
    """

    row_pointer: Tensor
    column: Tensor
    residual: Tensor
    step: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of outliers."""
        return self.column.numel()

    @property
    def value_bits(self) -> int:
        """Bits of a stored residual: 16, or 8 with a step for each row."""
        return 16 if self.step is None else 8

    @staticmethod
    def gather(mask: Tensor, residual: Tensor, value_bits: Literal[8, 16] = 16) -> Outliers:
        """The residuals [out, in] at the true places of `mask` [out, in], rounded to `value_bits`.

        The step of a row is its largest residual over 127, rounded up to float16: nothing is clipped.

        Raises:
            WeightError: a residual is too large for float16, or a step is.
        """
        row, column = mask.nonzero(as_tuple=True)
        values = residual[row, column].float()
        row_pointer = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(mask.sum(dim=1), dim=0, out=row_pointer[1:])
        if value_bits == 16:
            _check_half(values, "an outlier residual")
            return Outliers(row_pointer, column, values.half().float())
        largest = torch.zeros(mask.shape[0], device=values.device).scatter_reduce_(0, row, values.abs(), "amax")
        step = largest / _LARGEST_VALUE
        _check_half(step, "a step of outlier residuals")
        step = rounded_up(step, torch.float16)
        of_each = step[row]
        # A row whose residuals are all 0 has the step 0.
        multiples = torch.where(of_each > 0, values / of_each, 0.0).round_().clamp_(-_LARGEST_VALUE, _LARGEST_VALUE)
        # Through int8, which knows no -0.
        return Outliers(row_pointer, column, multiples.to(torch.int8) * of_each, step)

    @staticmethod
    def concatenate(parts: list[Outliers]) -> Outliers:
        """Outliers of consecutive row chunks as one."""
        pointers = [parts[0].row_pointer[:1]]
        offset = 0
        for part in parts:
            pointers.append(part.row_pointer[1:] + offset)
            offset += part.count
        steps = [part.step for part in parts if part.step is not None]
        if len(steps) not in (0, len(parts)):
            raise ValueError("outliers of 16 and of 8 bits have no common form; gather all with one value_bits")
        column, residual = torch.cat([p.column for p in parts]), torch.cat([p.residual for p in parts])
        return Outliers(torch.cat(pointers), column, residual, torch.cat(steps) if steps else None)

    def row_slice(self, rows: slice) -> Outliers:
        """The outliers of consecutive rows, counted from the first of them."""
        pointer = self.row_pointer[rows.start : rows.stop + 1]
        first, last = int(pointer[0]), int(pointer[-1])
        step = None if self.step is None else self.step[rows]
        return Outliers(pointer - first, self.column[first:last], self.residual[first:last], step)

    def multiples(self) -> Tensor:
        """The residuals over their row's step, float32 integers [count]; only with a `step`."""
        if self.step is None:
            raise ValueError("16-bit residuals have no step")
        step = self.step[self.rows()]
        return torch.where(step > 0, self.residual / step, 0.0).round_()

    def validate(self, name: str, shape: tuple[int, int]) -> Outliers:
        """Self, if it fits a matrix of `shape` (out, in).

        Raises:
            FormatError: impossible pointers, columns or values; `name` is in the message.
        """
        pointer, column = self.row_pointer, self.column
        if pointer.numel() != shape[0] + 1:
            raise FormatError(f"{name}: {pointer.numel()} row pointers of outliers, needed {shape[0] + 1}")
        if int(pointer[0]) != 0 or int(pointer[-1]) != self.count or bool((pointer.diff() < 0).any()):
            raise FormatError(
                f"{name}: row pointers of outliers run from {int(pointer[0])} to {int(pointer[-1])}, "
                f"needed values rising from 0 to the {self.count} outliers"
            )
        if self.residual.numel() != self.count:
            raise FormatError(f"{name}.outlier_val: {self.residual.numel()} values for {self.count} columns")
        self._validate_step(name, shape[0])
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

    def _validate_step(self, name: str, out_features: int) -> None:
        if self.step is None:
            return
        if self.step.numel() != out_features:
            raise FormatError(f"{name}.outlier_step: {self.step.numel()} steps for {out_features} rows")
        if not bool((torch.isfinite(self.step) & (self.step >= 0)).all()):
            raise FormatError(f"{name}.outlier_step: holds NaN, Inf or negative steps, needed finite steps from 0 up")
        multiples = self.multiples()
        exact = multiples.abs().le(_LARGEST_VALUE) & (multiples * self.step[self.rows()] == self.residual)
        if not bool(exact.all()):
            raise FormatError(
                f"{name}.outlier_val: residuals are no multiples of their row's step up to {_LARGEST_VALUE}"
            )

    def rows(self) -> Tensor:
        """Row of each outlier, int64 [count]."""
        places = torch.arange(self.count, device=self.row_pointer.device)
        # repeat_interleave would do, but takes a millisecond on the CPU however short its input.
        return torch.searchsorted(self.row_pointer[1:], places, right=True)

    def add_to(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] plus the residuals, a new tensor."""
        return weight.index_put((self.rows(), self.column), self.residual.to(weight.dtype), accumulate=True)


def _check_half(values: Tensor, what: str) -> None:
    """Refuse values that float16 cannot hold."""
    largest = values.abs().max().item() if values.numel() else 0.0
    if largest > torch.finfo(torch.float16).max:
        raise WeightError(f"{what} of {largest:.3g} does not fit float16")


class NoOutliers(Settings):
    """Keep nothing apart."""

    name: Literal["none"] = "none"


class NSigma(Settings):
    """Keep weights farther than `n` standard deviations from the mean, at most `max_share` of the tensor."""

    name: Literal["nsigma"] = "nsigma"
    n: float = Field(default=3.0, gt=0)
    scope: Literal["tensor", "channel"] = "tensor"
    max_share: float = Field(default=0.01, ge=0, le=1)


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
    moments = torch.cat(spread(lambda rows: _row_moments(weight[rows].float()), chunks))
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
    count = sum(spread(lambda rows: int(threshold.select(rows, weight[rows].float()).sum()), chunks))
    if count <= allowed:
        return threshold
    ratio = torch.cat([threshold.ratios(rows, weight[rows].float()) for rows in chunks])
    # The (allowed+1)-th largest ratio is the first that must go; "greater than" then keeps at most `allowed`.
    factor = ratio.kthvalue(ratio.numel() - allowed).values
    # One float32 step up: (limit * factor) may round below the very weight that defined the factor.
    return OutlierThreshold(threshold.mean, torch.nextafter(threshold.limit * factor, torch.tensor(torch.inf)))
