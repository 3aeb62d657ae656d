"""`TritonKernel`: the kernels behind `bitwright::linear`, `site_linear` and `embedding` on a CUDA device.

Products of 16-bit inputs are summed in float32. Float32 inputs are exact for one row; for more, the weight is decoded
and cuBLAS multiplies as `torch.backends.cuda.matmul` says. Equal calls give equal bits: no sum depends on the order in
which programs run. Nothing waits for the device but the first use of a weight, so calls can be captured in CUDA graphs
after one warm-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from bitwright.numeric.activation import InputSite, fake_quantize
from bitwright.runtime import reference
from bitwright.runtime.reference import PackedWeight
from bitwright.runtime.triton import configs, w8a8
from bitwright.runtime.triton.dequantize import dequantize_kernel, outlier_kernel
from bitwright.runtime.triton.gemm import gemm_kernel
from bitwright.runtime.triton.gemv import EXPONENT, gemv_kernel, reduce_kernel
from bitwright.runtime.triton.layout import (
    HALF,
    PLANES,
    TILE,
    UNIT,
    TritonWeight,
    int8_refusal,
    moved,
    resident,
    supports,
    weight_bytes,
)
from bitwright.runtime.triton.w8a8 import Weight8

# Types of inputs.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_REDUCED = 512

Made = TypeVar("Made", TritonWeight, Weight8)


def linear(x: Tensor, weight: TritonWeight, bias: Tensor | None = None) -> Tensor:
    """`x` [..., in], of `DTYPES`, times the transposed weight, plus `bias` [out]: [..., out] of the type of `x`."""
    rows = x.reshape(-1, weight.in_features)
    count = rows.shape[0]
    if count == 0:
        return x.new_empty(*x.shape[:-1], weight.out_features)
    if count == 1:
        result = gemv(rows, weight, bias)
    elif count <= configs.MOST_GEMM_ROWS and x.dtype != torch.float32:
        result = gemm(rows, weight, bias)
    else:
        result = dequantized_linear(rows, weight, bias)
    return result.view(*x.shape[:-1], weight.out_features)


def gemv(x: Tensor, weight: TritonWeight, bias: Tensor | None = None) -> Tensor:
    """`linear` for one row, `x` [1, in]."""
    config = configs.gemv_config(weight.tiles, weight.units)
    # Four inputs are read as one 8-byte number, up to the end of the last unit.
    x = functional.pad(x, (0, -weight.in_features % UNIT)).contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    result, parts = _outputs(x, 1, weight, config.splits)
    gemv_kernel[(weight.tiles, config.splits)](
        x, parts, bias, *_planes(weight), *_outliers(weight), weight.out_features, EXPONENT, **_sizes(weight),
        SPLITS=config.splits, SPAN=config.span, BLOCK_UNITS=config.block_units, BLOCK_SLOTS=config.block_slots,
        num_warps=config.warps,
    )  # fmt: skip
    return _reduced(parts, result, bias, config.splits)


def gemm(x: Tensor, weight: TritonWeight, bias: Tensor | None = None) -> Tensor:
    """`linear` for 1 to 64 rows, `x` [rows, in] of 16 bits."""
    config = configs.gemm_config(weight.out_features, weight.units, x.shape[0])
    x = x.contiguous()
    turned = None if weight.slot_value is None else x.t().contiguous()
    result, parts = _outputs(x, x.shape[0], weight, config.splits)
    gemm_kernel[(-(-weight.out_features // config.block_out), config.splits)](
        x, turned, parts, bias, *_planes(weight), *_outliers(weight),
        x.shape[0], weight.in_features, weight.out_features, EXPONENT, **_sizes(weight),
        SPLITS=config.splits, SPAN=config.span, BLOCK_OUT=config.block_out, BLOCK_ROWS=config.block_rows,
        BLOCK_UNITS=config.block_units, BLOCK_SLOTS=config.block_slots,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return _reduced(parts, result, bias, config.splits)


def dequantized_linear(x: Tensor, weight: TritonWeight, bias: Tensor | None = None) -> Tensor:
    """`linear` for any rows, `x` [rows, in]: the weight is decoded, some rows at a time, and multiplied by PyTorch."""
    result = x.new_empty(x.shape[0], weight.out_features)
    step = configs.rows_per_dequantize(weight.in_features)
    for first in range(0, weight.out_features, step):
        some = slice(first, min(first + step, weight.out_features))
        decoded = dequantize(weight, x.dtype, some.start, some.stop - some.start)
        part = functional.linear(x, decoded, None if bias is None else bias[some].to(x.dtype))
        if part.shape == result.shape:
            return part
        result[:, some] = part
    return result


def dequantize(weight: TritonWeight, dtype: torch.dtype, first_row: int = 0, rows: int | None = None) -> Tensor:
    """`rows` rows (all when None) of the weight from `first_row` on, [rows, in] of `dtype`."""
    rows = weight.out_features if rows is None else rows
    return _decoded(weight, None, first_row, rows, dtype)


def embedding(ids: Tensor, weight: TritonWeight, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (int32 or int64, any shape), [*ids.shape, in] of `dtype`.

    An id outside the weight fails the device's next synchronization, as elsewhere in PyTorch.
    """
    flat = ids.reshape(-1).contiguous()
    if flat.numel():
        torch._assert_async(((flat >= 0) & (flat < weight.out_features)).all())
        # What is read before that failure is reported must exist.
        flat = flat.clamp(0, weight.out_features - 1)
    return _decoded(weight, flat, 0, flat.numel(), dtype).view(*ids.shape, weight.in_features)


def _decoded(weight: TritonWeight, ids: Tensor | None, first_row: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Rows `ids`, or `rows` rows from `first_row` on."""
    result = torch.empty(rows, weight.in_features, dtype=dtype, device=weight.device)
    if not rows:
        return result
    block_out, block_units = (64, 4) if rows > TILE else (TILE, 8)
    grid = (-(-rows // block_out), -(-weight.units // block_units))
    dequantize_kernel[grid](
        result, ids, *_planes(weight), first_row, rows, weight.in_features, EXPONENT, **_sizes(weight),
        BLOCK_OUT=block_out, BLOCK_UNITS=block_units,
    )  # fmt: skip
    if weight.slot_value is not None:
        outlier_kernel[(rows,)](
            result, ids, *_planes(weight), *_outliers(weight), first_row, weight.in_features, EXPONENT,
            **_sizes(weight), BLOCK_SLOTS=64, num_warps=1,
        )  # fmt: skip
    return result


# --- arguments -----------------------------------------------------------------------------------------------------


def _planes(weight: TritonWeight) -> tuple[Tensor | None, ...]:
    return weight.low, weight.high, weight.scale, weight.zero, weight.statistics


def _outliers(weight: TritonWeight) -> tuple[Tensor | None, ...]:
    return weight.slot_start, weight.slot_column, weight.slot_value, weight.step


def _sizes(weight: TritonWeight) -> dict[str, Any]:
    """The constants that all kernels have."""
    low_bits, high_bits = PLANES[weight.bits]
    return {
        "UNITS": weight.units,
        "GROUPS": weight.groups,
        # One group is as wide as all units, so that no unit has two.
        "GROUP_HALVES": weight.group_width // HALF if weight.groups > 1 else UNIT // HALF * weight.units,
        "LOW": low_bits,
        "HIGH": high_bits,
        "KIND": weight.zero_kind,
        "CENTRE": float(1 << (weight.bits - 1)),
    }


def _outputs(x: Tensor, rows: int, weight: TritonWeight, splits: int) -> tuple[Tensor, Tensor]:
    """The result [rows, out], and where programs write: that, or float32 parts [splits, rows, out]."""
    result = x.new_empty(rows, weight.out_features)
    if splits == 1:
        return result, result
    return result, torch.empty(splits, rows, weight.out_features, dtype=torch.float32, device=x.device)


def _reduced(parts: Tensor, result: Tensor, bias: Tensor | None, splits: int) -> Tensor:
    """`result`, once `parts` are summed in their order."""
    if splits > 1:
        grid = (triton.cdiv(result.numel(), _REDUCED),)
        count, out_features = result.numel(), result.shape[1]
        reduce_kernel[grid](parts, result, bias, count, out_features, SPLITS=splits, BLOCK=_REDUCED)
    return result


# --- the seam ------------------------------------------------------------------------------------------------------


class TritonKernel:
    """Remembers the layout of each weight for as long as its `weight_packed` lives and no part of it changes."""

    def __init__(self) -> None:
        """Nothing is remembered yet."""
        self._prepared: Any = WeakIdKeyDictionary()

    def prepared(self, weight: PackedWeight, device: torch.device | None = None) -> TritonWeight | None:
        """The layout of `weight` on `device` (default: where it is); None where there is none.

        Raises:
            FormatError: see `TritonWeight.of`.
        """
        return self._remembered(weight, device, TritonWeight.of) if supports(weight) else None

    def prepared8(self, weight: PackedWeight, device: torch.device | None = None) -> Weight8:
        """The int8 form of `weight`, which `int8_refusal` has nothing against, on `device` (default: where it is).

        Raises:
            FormatError: see `Weight8.of`.
        """
        return self._remembered(weight, device, Weight8.of)

    def _remembered(
        self, weight: PackedWeight, device: torch.device | None, make: Callable[[PackedWeight], Made]
    ) -> Made:
        """What `make` makes of `weight` on `device`, once."""
        device = weight.weight_packed.device if device is None else device
        # All parts but the first, which is the key, are held: another tensor cannot take an address meanwhile.
        parts = list(weight.stored().values())
        numbers = (weight.bits, weight.group_size, weight.in_features, tuple(weight.bilevel), device)
        stamp = tuple((part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts)
        forms = self._prepared.setdefault(weight.weight_packed, {})
        found = forms.get(make)
        if found is not None and found[:2] == (stamp, numbers):
            made: Made = found[3]
            return made
        made = make(moved(weight, device))
        forms[make] = (stamp, numbers, parts[1:], made)
        return made

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """A `LinearKernel`; what the kernels do not cover goes to the reference."""
        prepared = self.prepared(weight, x.device) if x.dtype in DTYPES else None
        return reference.linear(x, resident(weight, x), bias) if prepared is None else linear(x, prepared, bias)

    def site_linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, site: InputSite) -> Tensor:
        """A `SiteKernel`: int8 products where `int8_refusal` lets them, else `x` is rounded in float."""
        activation = site.activation
        assert activation is not None
        if x.dtype not in DTYPES or int8_refusal(weight, activation) is not None:
            return self.linear(fake_quantize(x, activation, site.scale, site.zero), weight, bias)
        static = None if site.scale is None or site.zero is None else (site.scale, site.zero)
        return w8a8.int8_linear(x, self.prepared8(weight, x.device), bias, activation, static)

    def path(self, weight: PackedWeight, site: InputSite | None, device: torch.device) -> tuple[str, int]:
        """What multiplies inputs of 16 bits on `device`, in words, and the bytes of the weight that it reads."""
        activation = None if site is None else site.activation
        reason = None if activation is None else int8_refusal(weight, activation)
        if activation is not None and reason is None:
            return "int8 products", self.prepared8(weight, device).bytes
        prepared = self.prepared(weight, device)
        if prepared is None:
            return f"reference: groups of {weight.group_size} columns", weight_bytes(weight)
        return "float products" if reason is None else f"inputs rounded in float: {reason}", prepared.bytes

    def embedding(self, ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """An `EmbeddingKernel`; what the kernels do not cover goes to the reference."""
        prepared = self.prepared(weight, ids.device) if dtype in DTYPES else None
        if prepared is None:
            return reference.embedding(ids, resident(weight, ids), dtype)
        return embedding(ids, prepared, dtype)
