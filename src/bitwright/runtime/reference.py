"""The reference kernels in plain PyTorch: decode a bounded number of rows, then multiply. Any device.

They define the operators' results. Weights are decoded in float32 by the same arithmetic as
`QTensor.dequantize`; the product is taken in `product_dtype`, and the result has the type of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.formats.bits import unpack_rows
from bitwright.formats.native import unpack_zero
from bitwright.numeric.grid import decode
from bitwright.numeric.spec import SCALE_DTYPES, WeightSpec

# Weights decoded at once: 64 MiB of float32 and at most twice that in temporaries.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class PackedWeight:
    """One stored matrix [out, in] in the layout of `formats.native`, as a kernel receives it."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None
    outlier_ptr: Tensor | None
    outlier_idx: Tensor | None
    outlier_val: Tensor | None
    bits: int
    group_size: int
    in_features: int

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.weight_packed.shape[0]

    @property
    def spec(self) -> WeightSpec:
        """What the codes look like; symmetric without a zero, float zeros when they are stored as floats."""
        zero = self.weight_zero
        has_float_zero = zero is not None and zero.is_floating_point()
        return _spec(self.bits, self.group_size, zero is None, has_float_zero, self.weight_scale.dtype)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`x` [..., in] times the transposed weight, plus `bias` [out]: [..., out] of the type of `x`."""
    dtype = product_dtype(x)
    inputs = x.to(dtype)
    chunks = _row_chunks(weight.out_features, weight.in_features)
    zero = unpack_zero(weight.weight_zero, weight.weight_scale, weight.bits)
    result = x.new_empty((*x.shape[:-1], weight.out_features))
    for rows in chunks:
        part = None if bias is None else bias[rows].to(dtype)
        result[..., rows] = functional.linear(inputs, _decode_chunk(weight, zero, rows).to(dtype), part)
    return result


def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (int32 or int64, any shape) of the weight, [*ids.shape, in]; decodes no other row."""
    rows = ids.reshape(-1)
    zero = unpack_zero(weight.weight_zero, weight.weight_scale, weight.bits)
    result = torch.empty(rows.numel(), weight.in_features, dtype=dtype, device=ids.device)
    for some in _row_chunks(rows.numel(), weight.in_features):
        result[some] = _decode_rows(weight, zero, rows[some]).to(dtype)
    return result.reshape(*ids.shape, weight.in_features)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The whole matrix [out, in] as `dtype`."""
    zero = unpack_zero(weight.weight_zero, weight.weight_scale, weight.bits)
    shape = (weight.out_features, weight.in_features)
    result = torch.empty(shape, dtype=dtype, device=weight.weight_packed.device)
    for rows in _row_chunks(*shape):
        result[rows] = _decode_chunk(weight, zero, rows).to(dtype)
    return result


def product_dtype(x: Tensor) -> torch.dtype:
    """Type of the product: that of `x`, but float32 for half types on the CPU, where their products crawl."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and x.device.type == "cpu" else x.dtype


def _row_chunks(rows: int, width: int) -> list[slice]:
    """Consecutive ranges of rows with at most `_CHUNK` weights each, at least one row."""
    height = max(1, _CHUNK // max(width, 1))
    return [slice(row, min(row + height, rows)) for row in range(0, rows, height)]


def _decode_chunk(weight: PackedWeight, zero: Tensor, rows: slice) -> Tensor:
    """Consecutive `rows` of the weight in float32."""
    dense = _decode_grid(weight, weight.weight_packed[rows], weight.weight_scale[rows], zero[rows])
    if weight.outlier_ptr is None or weight.outlier_idx is None or weight.outlier_val is None:
        return dense
    pointer = weight.outlier_ptr[rows.start : rows.stop + 1].to(torch.int64)
    whole = dense.shape[0] == weight.out_features
    # The count of the whole matrix is known from a shape; reading a pointer would wait for the device.
    first, last = (0, weight.outlier_idx.numel()) if whole else (int(pointer[0]), int(pointer[-1]))
    places = torch.arange(first, last, device=dense.device)
    # repeat_interleave would do; on the CPU it costs a millisecond however short its input.
    owners = torch.searchsorted(pointer[1:], places, right=True)
    columns = weight.outlier_idx[first:last].to(torch.int64)
    return dense.index_put_((owners, columns), weight.outlier_val[first:last].float(), accumulate=True)


def _decode_rows(weight: PackedWeight, zero: Tensor, rows: Tensor) -> Tensor:
    """Any `rows` (int [n]) of the weight in float32.

    Raises:
        IndexError: a row does not exist (on the CPU; other devices report it when they next synchronize).
    """
    packed = weight.weight_packed.index_select(0, rows)
    dense = _decode_grid(weight, packed, weight.weight_scale.index_select(0, rows), zero.index_select(0, rows))
    if weight.outlier_ptr is None or weight.outlier_idx is None or weight.outlier_val is None:
        return dense
    first = weight.outlier_ptr.index_select(0, rows).to(torch.int64)
    lengths = weight.outlier_ptr.index_select(0, rows + 1).to(torch.int64) - first
    ends = lengths.cumsum(0)
    places = torch.arange(int(ends[-1]), device=dense.device)
    owners = torch.searchsorted(ends, places, right=True)
    # Position within its row's segment: the running number less where the segment started.
    chosen = places + (first - (ends - lengths))[owners]
    columns = weight.outlier_idx.to(torch.int32)[chosen].to(torch.int64)
    return dense.index_put_((owners, columns), weight.outlier_val[chosen].float(), accumulate=True)


def _decode_grid(weight: PackedWeight, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Decoded codes of some rows, float32 [rows, in], without the outliers."""
    codes = unpack_rows(packed, weight.bits, weight.in_features)
    scale = scale.float()
    width = min(weight.group_size, weight.in_features)
    full = weight.in_features // width
    # Broadcasting over whole groups spares two matrices of expanded scales and zeros.
    whole = codes[:, : full * width].reshape(-1, full, width)
    dense = decode(whole, scale[:, :full, None], zero[:, :full, None]).flatten(1)
    if full == scale.shape[1]:
        return dense
    return torch.cat([dense, decode(codes[:, full * width :], scale[:, full:], zero[:, full:])], dim=1)


@lru_cache(maxsize=256)
def _spec(bits: int, group_size: int, symmetric: bool, float_zero: bool, scale_dtype: torch.dtype) -> WeightSpec:
    names = {dtype: name for name, dtype in SCALE_DTYPES.items()}
    zero = "float" if float_zero else "int"
    return WeightSpec.model_validate(
        {
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
            "zero": zero,
            "scale_dtype": names[scale_dtype],
        }
    )
