"""The layout of a stored matrix: which tensors, of which shapes and types, an entry determines.

A stored tensor never has a layout that its `TensorEntry` does not determine, so sizes are known before any
weight is read (`parts`, `packed_bytes`) and a reader can refuse a file from its headers alone
(`check_layout`). Changing any layout means a new version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats import sparse
from bitwright.formats.bits import row_words
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec

# In the order of the specification. The first three are the codes and a one-level grid, the next three the
# second level of a grid.
PART_NAMES = (
    "weight_packed",
    "weight_scale",
    "weight_zero",
    "scale_codes",
    "zero_codes",
    "superblock_statistics",
    "outlier_counts",
    "outlier_idx",
    "outlier_val",
    "outlier_step",
)

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

# Above every real matrix by far, and small enough that no byte count below overflows 64 bits.
_MAX_FEATURES = 1 << 27


@dataclass(frozen=True)
class TensorEntry:
    """All that determines the stored layout of one matrix: `spec`, `shape` (out, in), number of `outliers`.

    `value_bits`: bits of an outlier's residual, 16 or 8; 16 without outliers.

    Raises:
        FormatError: a size below 1, more outliers than weights, or other `value_bits`.
    """

    spec: WeightSpec
    shape: tuple[int, int]
    outliers: int = 0
    value_bits: int = 16

    def __post_init__(self) -> None:
        """Refuse sizes that no matrix has."""
        if not all(1 <= size <= _MAX_FEATURES for size in self.shape):
            raise FormatError(f"shape {list(self.shape)}: needed two sizes between 1 and {_MAX_FEATURES}")
        if not 0 <= self.outliers <= prod(self.shape):
            raise FormatError(f"{self.outliers} outliers in a matrix of shape {list(self.shape)}")
        if self.value_bits != 16 and (self.value_bits != 8 or not self.outliers):
            raise FormatError(
                f"value_bits {self.value_bits} for {self.outliers} outliers; needed 16, or 8 if there are any"
            )

    @staticmethod
    def of(q: QTensor) -> TensorEntry:
        """The entry of `q`; a `q` with an empty list of outliers has none."""
        if q.outliers is None or q.outliers.count == 0:
            return TensorEntry(q.spec, q.shape)
        return TensorEntry(q.spec, q.shape, q.outliers.count, q.outliers.value_bits)


def parts(entry: TensorEntry) -> Layout:
    """Local name -> (shape, dtype) of every tensor stored for `entry`, in the order of the specification."""
    out_features, in_features = entry.shape
    layout: Layout = {"weight_packed": ((out_features, row_words(entry.spec.bits, in_features)), torch.int32)}
    layout |= _grid_parts(entry.spec, out_features, entry.spec.groups(in_features))
    if entry.outliers:
        layout |= sparse.parts(entry.shape, entry.outliers, entry.value_bits)
    return layout


def _grid_parts(spec: WeightSpec, out_features: int, groups: int) -> Layout:
    layout: Layout = {}
    bilevel, numbers = spec.bilevel, out_features * groups
    if bilevel is None:
        layout["weight_scale"] = ((out_features, groups), spec.storage_dtype)
    # Zeros of one level. Small integers are one stream for all rows: padding each would cost up to 31 bits per row.
    if spec.zero == "int" and not spec.symmetric:
        layout["weight_zero"] = ((row_words(spec.bits, numbers),), torch.int32)
    elif spec.zero == "float" and (bilevel is None or bilevel.zero_bits is None):
        layout["weight_zero"] = ((out_features, groups), spec.storage_dtype)
    if bilevel is not None:
        layout["scale_codes"] = ((row_words(bilevel.scale_bits, numbers),), torch.int32)
        if bilevel.zero_bits is not None:
            layout["zero_codes"] = ((row_words(bilevel.zero_bits, numbers),), torch.int32)
        shape = (*bilevel.superblocks(out_features, groups), bilevel.statistics)
        layout["superblock_statistics"] = (shape, spec.storage_dtype)
    return layout


def packed_bytes(entry: TensorEntry) -> int:
    """Bytes of all tensors stored for `entry`."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in parts(entry).values())


def check_layout(name: str, stored: Mapping[str, Tensor], entry: TensorEntry) -> None:
    """Refuse missing and unknown tensors, wrong dtypes and wrong shapes; no value is read.

    Raises:
        FormatError: naming the tensor, what was found and what was needed.
    """
    layout = parts(entry)
    for part in stored.keys() - layout.keys():
        raise FormatError(f"{name}.{part}: unknown; the entry {entry.spec.label()} has no such tensor")
    for part, (shape, dtype) in layout.items():
        if part not in stored:
            raise FormatError(f"{name}.{part}: missing; needed {dtype} {list(shape)}; the checkpoint is incomplete")
        check_part(f"{name}.{part}", tuple(stored[part].shape), stored[part].dtype, (shape, dtype))


def check_part(
    name: str, shape: tuple[int, ...], dtype: torch.dtype | str, needed: tuple[tuple[int, ...], torch.dtype]
) -> None:
    """Refuse a tensor whose `shape` or `dtype` (text for a type that no part has) is not the `needed` one."""
    if (shape, dtype) != needed:
        raise FormatError(
            f"{name}: found {dtype} {list(shape)}, needed {needed[1]} {list(needed[0])}; "
            "the tensor does not belong to this quantization_config"
        )


def beyond_plain_codes(entry: TensorEntry) -> str | None:
    """What a matrix has besides codes, one level of scales and integer zeros, and the remedy; None: nothing.

    Formats of other tools hold no more than that.
    """
    spec = entry.spec
    if spec.bilevel is not None:
        return f"has a two-level grid ({spec.label()}), needed one level; quantize with --set bilevel=none"
    if entry.outliers:
        return f"has {entry.outliers} outliers, needed none; quantize with --set outliers.name=none"
    if spec.zero == "float":
        return "has float zeros, needed integers; quantize with --set zero=int"
    return None
