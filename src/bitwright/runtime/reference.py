"""The reference kernels in plain PyTorch: decode a bounded number of rows, then multiply. Any device.

They define the operators' results. Weights are decoded in float32 by the same arithmetic as
`QTensor.dequantize`; the product is taken in `product_dtype`, and the result has the type of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.formats.bits import unpack_rows
from bitwright.formats.native import PART_NAMES, unpack_grid, unpack_outliers
from bitwright.numeric.grid import Grid, decode
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.spec import SCALE_DTYPES, WeightSpec

# Weights decoded at once: 64 MiB of float32 and at most twice that in temporaries.
_CHUNK = 1 << 24

# Axes of superblocks by the number that stands for them in an operator's arguments.
_AXES = ("row", "column")


@dataclass(frozen=True)
class PackedWeight:
    """One stored matrix [out, in] in the layout of `formats.native`, as a kernel receives it.

    The tensors are the parts of the format, None where the layout has no such part. `bilevel` is empty for one
    level, else (axis: 0 row or 1 column, size, scale_bits, zero_bits or 0).
    """

    weight_packed: Tensor
    weight_scale: Tensor | None
    weight_zero: Tensor | None
    scale_codes: Tensor | None
    zero_codes: Tensor | None
    superblock_statistics: Tensor | None
    outlier_counts: Tensor | None
    outlier_idx: Tensor | None
    outlier_val: Tensor | None
    outlier_step: Tensor | None
    bits: int
    group_size: int
    in_features: int
    bilevel: tuple[int, ...] = ()

    @staticmethod
    def of(stored: Mapping[str, Tensor], spec: WeightSpec, in_features: int) -> PackedWeight:
        """The matrix whose parts are `stored`."""
        level = spec.bilevel
        numbers = () if level is None else (_AXES.index(level.axis), level.size, level.scale_bits, level.zero_bits or 0)
        fields: list[Any] = [stored.get(name) for name in PART_NAMES]
        fields += [spec.bits, spec.group_width(in_features), in_features, numbers]
        return PackedWeight(*fields)

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.weight_packed.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def spec(self) -> WeightSpec:
        """What the codes look like; symmetric without zeros, float zeros when they are no packed integers.

        Raises:
            ValueError: no spec has these sizes, or neither scales nor statistics are of a stored type.
        """
        zero, scale = self.weight_zero, self.superblock_statistics if self.bilevel else self.weight_scale
        if self.zero_codes is not None or (zero is not None and zero.is_floating_point()):
            kind = "float"
        else:
            kind = "symmetric" if zero is None else "int"
        return _spec(self.bits, self.group_size, kind, None if scale is None else scale.dtype, tuple(self.bilevel))

    def stored(self) -> dict[str, Tensor]:
        """The parts that are there, by local name."""
        present = ((name, getattr(self, name)) for name in PART_NAMES)
        return {name: tensor for name, tensor in present if tensor is not None}

    def grid(self) -> Grid:
        """Scales and zeros, decoded from whatever stores them."""
        return unpack_grid(self.stored(), self.spec, self.shape)

    def outliers(self) -> Outliers | None:
        """The outliers by row, unpacked; None where there are none."""
        return None if self.outlier_idx is None else unpack_outliers(self.stored(), self.shape)


def packs_levels(spec: WeightSpec, tile: int) -> bool:
    """Whether a group's two level codes fit a byte, and every tile of `tile` rows has one superblock."""
    level = spec.bilevel
    if level is None or level.axis != "row" or level.zero_bits is None:
        return False
    return level.scale_bits <= 4 and level.zero_bits <= 4 and level.size % tile == 0


def packed_levels(weight: PackedWeight, tile: int) -> tuple[Tensor, Tensor]:
    """Both codes of a group in one byte, the scale's below, uint8 [out, groups]; statistics of every tile's superblock.

    Needs `packs_levels`.
    """
    level = weight.spec.bilevel
    assert level is not None
    assert level.zero_bits is not None
    assert weight.scale_codes is not None
    assert weight.zero_codes is not None
    assert weight.superblock_statistics is not None
    rows, groups = weight.out_features, weight.spec.groups(weight.in_features)
    scale = unpack_rows(weight.scale_codes[None], level.scale_bits, rows * groups).view(rows, groups)
    zero = unpack_rows(weight.zero_codes[None], level.zero_bits, rows * groups).view(rows, groups)
    superblock = torch.arange(0, rows, tile, device=scale.device) // level.size
    return scale | zero << 4, weight.superblock_statistics[superblock].contiguous()


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`x` [..., in] times the transposed weight, plus `bias` [out]: [..., out] of the type of `x`."""
    dtype = product_dtype(x)
    inputs = x.to(dtype)
    grid, outliers = weight.grid(), weight.outliers()
    result = x.new_empty((*x.shape[:-1], weight.out_features))
    for rows in _row_chunks(*weight.shape):
        part = None if bias is None else bias[rows].to(dtype)
        decoded = _decode_chunk(weight, grid, outliers, rows).to(dtype)
        result[..., rows] = functional.linear(inputs, decoded, part)
    return result


def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (int32 or int64, any shape) of the weight, [*ids.shape, in]; decodes no other row's weights."""
    rows = ids.reshape(-1)
    grid, outliers = weight.grid(), weight.outliers()
    result = torch.empty(rows.numel(), weight.in_features, dtype=dtype, device=ids.device)
    for some in _row_chunks(rows.numel(), weight.in_features):
        result[some] = _decode_rows(weight, grid, outliers, rows[some]).to(dtype)
    return result.reshape(*ids.shape, weight.in_features)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The whole matrix [out, in] as `dtype`."""
    grid, outliers = weight.grid(), weight.outliers()
    result = torch.empty(weight.shape, dtype=dtype, device=weight.weight_packed.device)
    for rows in _row_chunks(*weight.shape):
        result[rows] = _decode_chunk(weight, grid, outliers, rows).to(dtype)
    return result


def product_dtype(x: Tensor) -> torch.dtype:
    """Type of the product: that of `x`, but float32 for half types on the CPU, where their products crawl."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and x.device.type == "cpu" else x.dtype


def _row_chunks(rows: int, width: int) -> list[slice]:
    """Consecutive ranges of rows with at most `_CHUNK` weights each, at least one row."""
    height = max(1, _CHUNK // max(width, 1))
    return [slice(row, min(row + height, rows)) for row in range(0, rows, height)]


def _decode_chunk(weight: PackedWeight, grid: Grid, outliers: Outliers | None, rows: slice) -> Tensor:
    """Consecutive `rows` of the weight in float32."""
    dense = _decode_grid(weight, weight.weight_packed[rows], grid.scale[rows], grid.zero[rows])
    if outliers is None:
        return dense
    # The count of the whole matrix is known from a shape; a slice reads pointers, which waits for the device.
    some = outliers if dense.shape[0] == weight.out_features else outliers.row_slice(rows)
    return dense.index_put_((some.rows(), some.column), some.residual, accumulate=True)


def _decode_rows(weight: PackedWeight, grid: Grid, outliers: Outliers | None, rows: Tensor) -> Tensor:
    """Any `rows` (int [n]) of the weight in float32.

    Raises:
        IndexError: a row does not exist (on the CPU; other devices report it when they next synchronize).
    """
    packed, scale, zero = (t.index_select(0, rows) for t in (weight.weight_packed, grid.scale, grid.zero))
    dense = _decode_grid(weight, packed, scale, zero)
    if outliers is None:
        return dense
    first = outliers.row_pointer.index_select(0, rows)
    lengths = outliers.row_pointer.index_select(0, rows + 1) - first
    ends = lengths.cumsum(0)
    places = torch.arange(int(ends[-1]), device=dense.device)
    owners = torch.searchsorted(ends, places, right=True)
    # Position within its row's segment: the running number less where the segment started.
    chosen = places + (first - (ends - lengths))[owners]
    return dense.index_put_((owners, outliers.column[chosen]), outliers.residual[chosen], accumulate=True)


def _decode_grid(weight: PackedWeight, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Decoded codes of some rows, float32 [rows, in], without the outliers."""
    codes = unpack_rows(packed, weight.bits, weight.in_features)
    width = min(weight.group_size, weight.in_features)
    full = weight.in_features // width
    # Broadcasting over whole groups spares two matrices of expanded scales and zeros.
    whole = codes[:, : full * width].reshape(-1, full, width)
    dense = decode(whole, scale[:, :full, None], zero[:, :full, None]).flatten(1)
    if full == scale.shape[1]:
        return dense
    return torch.cat([dense, decode(codes[:, full * width :], scale[:, full:], zero[:, full:])], dim=1)


@lru_cache(maxsize=256)
def _spec(
    bits: int, group_size: int, kind: str, scale_dtype: torch.dtype | None, bilevel: tuple[int, ...]
) -> WeightSpec:
    """The spec of given sizes; raises ValueError where there is none."""
    names = {dtype: name for name, dtype in SCALE_DTYPES.items()}
    if scale_dtype not in names or len(bilevel) not in (0, 4) or (bilevel and bilevel[0] not in (0, 1)):
        raise ValueError(f"scales of {scale_dtype} with bilevel {list(bilevel)}")
    level = (
        {
            "axis": _AXES[bilevel[0]],
            "size": bilevel[1],
            "scale_bits": bilevel[2],
            "zero_bits": bilevel[3] or None,
        }
        if bilevel
        else None
    )
    return WeightSpec.model_validate(
        {
            "bits": bits,
            "group_size": group_size,
            "symmetric": kind == "symmetric",
            "zero": "float" if kind == "float" else "int",
            "scale_dtype": names[scale_dtype],
            "bilevel": level,
        }
    )
