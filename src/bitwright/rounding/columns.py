"""Error feedback over columns: the inner loop of GPTQ and SpQR, and coordinate descent on the codes it chose.

Rounding columns in order, each passes its error on to the columns after it (Frantar et al. 2022, GPTQ, arXiv
2210.17323, algorithm 1). With `factor` the upper triangular U of inverse(H) = Uᵀ U, for column j in order:

    code  = clamp(round_half_even(w_j / scale + zero), 0, max_code)
    error = (w_j - scale * (code - zero)) / U_jj
    w_k  -= error * U_jk                                                      for every later column k

error² is what rounding this weight adds to the row's objective (w - decoded) H (w - decoded)ᵀ, given the best answer
of the later columns. An outlier (Dettmers et al. 2023, SpQR, arXiv 2306.03078) is kept exactly and passes nothing on.

Rows are independent, so the compiled kernel runs over tiles of rows, in threads. The reference in PyTorch does the
same operations on every weight in the same order: both give the same bits, with any number of threads. Without a
compiled kernel the reference does the work; `backend` tells which it is.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import WeightError
from bitwright.numeric.grid import decode

# The interface of csrc/cpu/module.cpp that this file speaks.
INTERFACE = 1
# A refinement must lower the objective by more than this share of its curvature term. The gradient is a float32 sum
# over all columns: a gain smaller than its rounding error could be none, and is worth nothing.
MARGIN = 2.0**-10


def _load_native() -> tuple[ModuleType | None, str]:
    """The compiled module if there is one, and why it is used or not."""
    remedy = "with a C++17 compiler at hand, install bitwright again"
    try:
        module = importlib.import_module("bitwright._native")
    except ImportError as error:
        return None, f"the compiled kernels were not built ({error}); {remedy}"
    if module.INTERFACE != INTERFACE:
        return None, f"the compiled kernels are of another version of bitwright; {remedy}"
    return module, f"compiled for {module.isas()[-1]}"


_NATIVE, _WHY = _load_native()


def backend() -> Literal["native", "reference"]:
    """What rounds columns on the CPU: the compiled kernels, or the PyTorch reference."""
    return "reference" if _NATIVE is None or os.environ.get("BITWRIGHT_NATIVE") == "0" else "native"


def backend_reason() -> str:
    """Why `backend` is what it is, in a few words: the instruction set, or what is missing and the remedy."""
    if _NATIVE is not None and backend() == "reference":
        return "BITWRIGHT_NATIVE=0 is set"
    return _WHY


@dataclass(frozen=True)
class ColumnGrid:
    """The grid of a block of columns, in processing order."""

    scale: Tensor  # float32 [out, groups], none of them zero
    zero: Tensor  # float32 [out, groups]
    group: Tensor  # int32 [width]: the group of each column
    max_code: int  # 1 to 255

    def expand(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every weight, each [out, width]."""
        group = self.group.long()
        return self.scale[:, group], self.zero[:, group]


@dataclass(frozen=True)
class Columns:
    """What became of a block of columns, in processing order."""

    codes: Tensor  # uint8 [out, width]; beneath an outlier, the nearest code of its own value
    target: Tensor  # float32 [out, width]: the compensated weight at the moment it was rounded
    error: Tensor  # float32 [out, width]: (target - decoded) / factor[j, j]; zero where kept as an outlier
    outlier: Tensor  # bool [out, width]


@torch.no_grad()
def round_columns(
    weight: Tensor, factor: Tensor, grid: ColumnGrid, limit: Tensor | None = None, mask: Tensor | None = None
) -> Columns:
    """Round a block of columns in order, each passing its error on to those after it in the block.

    Columns beyond the block are the caller's: subtract `error @ factor_beyond` from them. No input is modified.

    Args:
        weight: float32 [out, width], already compensated for every column before the block.
        factor: float32 [width, width], the block's diagonal block of U, upper triangular, inverse(H) = Uᵀ U; what
            is below the diagonal is not read.
        grid: Scales, zeros and groups of the block's columns.
        limit: float32 [out]; a weight with error² above its row's limit is kept as an outlier.
        mask: bool [out, width]; true keeps a weight as an outlier whatever its error.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or a group is outside the grid.
        WeightError: a value that is not finite came up.
    """
    out, width = _shape("weight", weight)
    _check("weight", weight, torch.float32, (out, width), weight)
    _check("factor", factor, torch.float32, (width, width), weight)
    _check_grid(grid, out, width, weight)
    if limit is not None:
        _check("limit", limit, torch.float32, (out,), weight)
    if mask is not None:
        _check("mask", mask, torch.bool, (out, width), weight)
    if backend() == "reference" or weight.device.type != "cpu":
        return reference_round_columns(weight, factor, grid, limit, mask)
    assert _NATIVE is not None
    inputs = [None if tensor is None else tensor.contiguous() for tensor in (weight, factor, limit, mask)]
    columns = Columns(
        torch.empty(out, width, dtype=torch.uint8),
        torch.empty(out, width),
        torch.empty(out, width),
        torch.empty(out, width, dtype=torch.bool),
    )
    outputs = (columns.codes, columns.target, columns.error, columns.outlier)
    grid, how = _contiguous(grid), (_NATIVE.isas()[-1], torch.get_num_threads())
    finite = _NATIVE.round_columns(_pointers(inputs), _native_grid(grid), _pointers(outputs), (out, width), how)
    return _finite(columns, finite)


@torch.no_grad()
def refine_codes(
    codes: Tensor,
    residual: Tensor,
    hessian: Tensor,
    grid: ColumnGrid,
    frozen: Tensor | None = None,
    sweeps: int = 1,
) -> Tensor:
    """Coordinate descent: each column in order takes its best code given all others; new codes, uint8 [out, in].

    A row's objective is r H rᵀ. With its gradient g = r H, the best value of column j is decoded_j + g_j / H_jj; the
    nearest code to it is taken if that lowers the objective by more than rounding errors could feign. So it never
    rises. Columns without curvature (H_jj = 0) keep their codes. No input is modified.

    Args:
        codes: uint8 [out, in], no code above `grid.max_code`.
        residual: float32 [out, in], target minus what is decoded now; zero where an outlier is stored exactly.
        hessian: float32 [in, in], symmetric.
        grid: Scales, zeros and groups of all columns.
        frozen: bool [out, in]; true keeps a code (outliers, whose residual is stored).
        sweeps: How often to go over the columns, at least 1; ends early when nothing changes.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        WeightError: residual @ hessian is not finite.
    """
    out, width = _shape("codes", codes)
    _check("codes", codes, torch.uint8, (out, width), codes)
    _check("residual", residual, torch.float32, (out, width), codes)
    _check("hessian", hessian, torch.float32, (width, width), codes)
    _check_grid(grid, out, width, codes)
    if frozen is not None:
        _check("frozen", frozen, torch.bool, (out, width), codes)
    if sweeps < 1:
        raise ValueError(f"sweeps is {sweeps}, needed at least 1")
    gradient = residual @ hessian
    if not torch.isfinite(gradient).all():
        raise WeightError("residual @ hessian is not finite: look for NaN, Inf or huge values in both")
    if backend() == "reference" or codes.device.type != "cpu":
        return reference_refine_codes(codes, gradient, hessian, grid, frozen, sweeps)
    assert _NATIVE is not None
    refined = codes.clone(memory_format=torch.contiguous_format)
    tensors = (refined, gradient, hessian.contiguous(), None if frozen is None else frozen.contiguous())
    grid, how = _contiguous(grid), (_NATIVE.isas()[-1], torch.get_num_threads())
    _NATIVE.refine_codes(_pointers(tensors), _native_grid(grid), (MARGIN, sweeps), (out, width), how)
    return refined


def reference_round_columns(
    weight: Tensor, factor: Tensor, grid: ColumnGrid, limit: Tensor | None = None, mask: Tensor | None = None
) -> Columns:
    """`round_columns` in PyTorch, on any device, one column at a time over all rows; arguments are not checked."""
    target, error = weight.clone(memory_format=torch.contiguous_format), torch.empty_like(weight)
    codes, finite = torch.empty_like(weight), torch.isfinite(factor.diagonal()).expand(weight.shape).clone()
    outlier = torch.zeros_like(weight, dtype=torch.bool) if mask is None else mask.clone()
    scale, zero = grid.expand()
    for column in range(weight.shape[1]):
        here = slice(column, column + 1)
        position = target[:, here] / scale[:, here] + zero[:, here]
        codes[:, here] = torch.clamp(torch.round(position), 0, grid.max_code)
        error[:, here] = (target[:, here] - decode(codes[:, here], scale[:, here], zero[:, here])) / factor[here, here]
        if limit is not None:
            outlier[:, here] |= error[:, here] * error[:, here] > limit.unsqueeze(1)
        error[:, here].masked_fill_(outlier[:, here], 0.0)
        finite[:, here] &= torch.isfinite(position)
        target[:, column + 1 :] -= error[:, here] * factor[here, column + 1 :]
    finite &= torch.isfinite(target) & torch.isfinite(error)
    return _finite(Columns(codes.to(torch.uint8), target, error, outlier), bool(finite.all()))


def reference_refine_codes(
    codes: Tensor, gradient: Tensor, hessian: Tensor, grid: ColumnGrid, frozen: Tensor | None = None, sweeps: int = 1
) -> Tensor:
    """`refine_codes` in PyTorch from gradient = residual @ hessian [out, in]; arguments are not checked."""
    refined, gradient = codes.float(), gradient.clone()
    scale, zero = grid.expand()
    curved = torch.nonzero(hessian.diagonal() > 0).flatten().tolist()
    for _ in range(sweeps):
        before = refined.clone()
        for column in curved:
            s, z, g, h = scale[:, column], zero[:, column], gradient[:, column], hessian[column, column : column + 1]
            decoded = decode(refined[:, column], s, z)
            best = torch.clamp(torch.round((decoded + g / h) / s + z), 0, grid.max_code)
            step = decode(best, s, z) - decoded
            curvature = step * step * h
            accept = 2.0 * (step * g) - curvature > curvature * MARGIN
            if frozen is not None:
                accept &= ~frozen[:, column]
            refined[:, column] = torch.where(accept, best, refined[:, column])
            gradient -= torch.where(accept, step, 0.0).unsqueeze(1) * hessian[column]
        if torch.equal(before, refined):
            break
    return refined.to(torch.uint8)


def _finite(columns: Columns, finite: bool) -> Columns:
    """`columns` as they are, or a refusal."""
    if finite:
        return columns
    raise WeightError("rounding columns gave NaN or Inf: look for them in the weight, the factor, scales and zeros")


def _shape(name: str, matrix: Tensor) -> tuple[int, int]:
    if matrix.ndim != 2:
        raise ValueError(f"{name} is {list(matrix.shape)}, needed two axes: [out, width]")
    return matrix.shape[0], matrix.shape[1]


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], beside: Tensor) -> None:
    """Refuse a tensor that the kernels could not read as `dtype` of `shape` on the device of `beside`."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device != beside.device:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
            f"needed {dtype} {list(shape)} on {beside.device}"
        )


def _check_grid(grid: ColumnGrid, out: int, width: int, beside: Tensor) -> None:
    groups = _shape("grid.scale", grid.scale)[1]
    _check("grid.scale", grid.scale, torch.float32, (out, groups), beside)
    _check("grid.zero", grid.zero, torch.float32, (out, groups), beside)
    _check("grid.group", grid.group, torch.int32, (width,), beside)
    if not 1 <= grid.max_code <= 255:
        raise ValueError(f"grid.max_code is {grid.max_code}, needed 1 to 255")
    if width:
        low, high = (int(value) for value in torch.aminmax(grid.group))
        if low < 0 or high >= groups:
            raise ValueError(f"grid.group holds {low} to {high}, needed groups of the grid, 0 to {groups - 1}")


# What csrc/cpu/module.cpp takes: addresses of contiguous tensors, which the caller keeps alive.


def _contiguous(grid: ColumnGrid) -> ColumnGrid:
    return ColumnGrid(grid.scale.contiguous(), grid.zero.contiguous(), grid.group.contiguous(), grid.max_code)


def _native_grid(grid: ColumnGrid) -> tuple[int, ...]:
    return (*_pointers((grid.scale, grid.zero, grid.group)), grid.scale.shape[1], grid.max_code)


def _pointers(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


__all__ = [
    "ColumnGrid",
    "Columns",
    "backend",
    "backend_reason",
    "reference_refine_codes",
    "reference_round_columns",
    "refine_codes",
    "round_columns",
]
