"""The kernels' layout of a packed weight, made from the native format when a weight is first used; pure PyTorch.

Rows are cut into *tiles* of 16, columns into *units* of 32 (docs/kernels_gpu.md says why). Rows are innermost
everywhere: four words of four rows are the 16 bytes that a thread reads at once.

- `low` int32 [tiles, units · low_bits, 16] and, for 3, 5 and 6 bits, `high` int32 [tiles, units · high_bits, 16]: two
  planes of each code, so that no field straddles words. Word w of a plane of b bits has the columns w · 32/b on.
  Fields of the low plane are in the order of columns; `high_position` says where the high plane has which.
- `scale` [tiles, groups, 16] and `zero` likewise: of the stored type, or float32 where two levels were decoded.
- With *levels* kept, `scale` is a byte of both codes, and `statistics` [tiles, groups, 4] are as stored.
- Outliers: for each tile as many *slots* as its fullest row has outliers; `slot_column` and `slot_value`
  [slots, 16], rising by column; `slot_start` int32 [tiles + 1]. Unused slots have the column and the value 0.

Everything that does not exist (rows, columns, slots) is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitwright.formats.bits import unpack_rows
from bitwright.formats.native import TensorEntry, check_parts
from bitwright.numeric.activation import ActivationSpec
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime.reference import PackedWeight, packed_levels, packs_levels

TILE, UNIT, HALF = 16, 32, 16

# Bits of a code -> bits of its planes, low and high. 7 bits take a byte: their planes would take as many operations
# as those of 3 bits and save an eighth.
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 7: (8, 0), 8: (8, 0)}

# How a group's zero is stored.
ZERO_CONSTANT, ZERO_TENSOR, ZERO_LEVELS = 0, 1, 2


def high_position(column: int, low_bits: int, high_bits: int) -> int:
    """Place of the high field of `column` (0 … 31 of its unit) in the unit's high words, bit 0 of the first first.

    Low fields are used a byte at a time, so high fields of one such byte lie at the same distance from each other as
    the low ones: one shift brings all of them next to theirs.
    """
    window, field = divmod(column, 8 // low_bits)
    byte, turn = divmod(window, low_bits // high_bits)
    return 8 * byte + low_bits * field + high_bits * turn


def supports(weight: PackedWeight) -> bool:
    """Whether there is a layout for `weight`: groups are whole halves of units, or one group is the whole row."""
    width = min(weight.group_size, weight.in_features)
    return width % HALF == 0 or width == weight.in_features


def int8_refusal(weight: PackedWeight, activation: ActivationSpec) -> str | None:
    """Why int8 products do not serve `weight` and such activations; None where they do."""
    if weight.bits < 7:
        return f"its codes have {weight.bits} bits; int8 products are for 7 and 8"
    if weight.group_size < weight.in_features:
        return f"its groups have {weight.group_size} of {weight.in_features} columns; int8 products need one per row"
    if weight.outlier_val is not None:
        return "it has outliers"
    spec = weight.spec
    most_x = (1 << (activation.bits - 1)) - 1 if activation.symmetric else (1 << activation.bits) - 1
    most_w = 1 << (weight.bits - 1) if spec.symmetric else (1 << weight.bits) - 1
    if weight.in_features * most_x * most_w >= 1 << 31:
        return f"sums of {weight.in_features} products may exceed int32"
    return None


def resident(weight: PackedWeight, x: Tensor) -> PackedWeight:
    """`weight`, for the reference, which needs its parts where `x` is.

    Raises:
        ValueError: they are kept on the CPU.
    """
    if weight.weight_packed.device != x.device:
        raise ValueError(
            f"bitwright: the packed weight is kept on {weight.weight_packed.device}, and no kernel takes it with "
            f"inputs of {x.dtype} on {x.device}; call keep_packed_on_cpu(model, keep=False) and model.to('{x.device}')"
        )
    return weight


def weight_bytes(weight: PackedWeight) -> int:
    """Memory of the parts as they are stored."""
    return sum(tensor.numel() * tensor.itemsize for tensor in weight.stored().values())


def moved(weight: PackedWeight, device: torch.device) -> PackedWeight:
    """`weight` with its parts on `device`."""
    parts: dict[str, Any] = {name: tensor.to(device) for name, tensor in weight.stored().items()}
    return replace(weight, **parts)


@dataclass(frozen=True)
class TritonWeight:
    """A weight [out, in] in the kernels' layout; made by `TritonWeight.of`."""

    out_features: int
    in_features: int
    bits: int
    group_width: int
    low: Tensor
    high: Tensor | None
    scale: Tensor
    zero: Tensor | None
    statistics: Tensor | None
    slot_start: Tensor | None
    slot_column: Tensor | None
    slot_value: Tensor | None
    step: Tensor | None

    @staticmethod
    def of(weight: PackedWeight) -> TritonWeight:
        """The layout of `weight`, which `supports` it, on its device. Takes a copy: `weight` may change afterwards.

        Waits for the device: do it before a CUDA graph is captured.

        Raises:
            FormatError: `weight` breaks any rule of the native format.
        """
        stored, spec = weight.stored(), weight.spec
        count = 0 if weight.outlier_val is None else weight.outlier_val.numel()
        value_bits = 16 if weight.outlier_step is None else 8
        check_parts("weight", stored, TensorEntry(spec, weight.shape, count, value_bits))
        codes = unpack_rows(weight.weight_packed, spec.bits, weight.in_features)
        numbers = (*weight.shape, spec.bits, spec.group_width(weight.in_features))
        tensors: list[Any] = [*_planes(codes, spec.bits), *_grid(weight, spec)]
        tensors += _slots(weight.outliers(), weight.out_features, weight.in_features)
        return TritonWeight(*numbers, *tensors)

    @property
    def tiles(self) -> int:
        """Tiles of rows."""
        return self.low.shape[0]

    @property
    def units(self) -> int:
        """Units of columns."""
        return -(-self.in_features // UNIT)

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return self.scale.shape[1]

    @property
    def zero_kind(self) -> int:
        """How zeros are stored: `ZERO_CONSTANT`, `ZERO_TENSOR` or `ZERO_LEVELS`."""
        if self.statistics is not None:
            return ZERO_LEVELS
        return ZERO_CONSTANT if self.zero is None else ZERO_TENSOR

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.low.device

    def tensors(self) -> list[Tensor]:
        """All tensors that are there."""
        optional = (self.high, self.zero, self.statistics, self.slot_start, self.slot_column, self.slot_value)
        return [t for t in (self.low, self.scale, *optional, self.step) if t is not None]

    @property
    def bytes(self) -> int:
        """Memory of the layout."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors())


def _planes(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """`codes` uint8 [out, in] as planes."""
    low_bits, high_bits = PLANES[bits]
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % UNIT, 0, -rows % TILE))
    # [tiles, units, 32, 16]: rows innermost.
    ordered = padded.view(-1, TILE, padded.shape[1] // UNIT, UNIT).permute(0, 2, 3, 1)
    low = _plane(ordered, low_bits, 0, [low_bits * column for column in range(UNIT)])
    if not high_bits:
        return low, None
    places = [high_position(column, low_bits, high_bits) for column in range(UNIT)]
    return low, _plane(ordered, high_bits, low_bits, places)


def _plane(ordered: Tensor, bits: int, shift: int, places: list[int]) -> Tensor:
    """Bits `shift` … `shift + bits - 1` of codes [tiles, units, 32, 16], each at its place in the unit's words."""
    tiles, units = ordered.shape[:2]
    words = torch.zeros(tiles, units, bits, TILE, dtype=torch.int32, device=ordered.device)
    for column, place in enumerate(places):
        field = ((ordered[:, :, column] >> shift) & ((1 << bits) - 1)).to(torch.int32)
        words[:, :, place // 32] |= field << place % 32
    return words.view(tiles, units * bits, TILE)


def _grid(weight: PackedWeight, spec: WeightSpec) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scale, zero and statistics."""
    if packs_levels(spec, TILE):
        codes, statistics = packed_levels(weight, TILE)
        return _tiled(codes), None, statistics
    grid = weight.grid()
    # Decoded levels need float32; one level keeps its type.
    dtype = spec.storage_dtype if spec.bilevel is None else torch.float32
    scale = _tiled(grid.scale.to(dtype))
    if spec.symmetric:
        return scale, None, None
    return scale, _tiled(grid.zero.to(torch.uint8 if spec.zero == "int" else dtype)), None


def _tiled(values: Tensor) -> Tensor:
    """`values` [out, groups] as [tiles, groups, 16]."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % TILE))
    return padded.view(-1, TILE, values.shape[1]).transpose(1, 2).contiguous()


def _slots(outliers: Outliers | None, rows: int, columns: int) -> tuple[Tensor | None, ...]:
    """Start of every tile, columns, values, and the steps of rows."""
    if outliers is None:
        return None, None, None, None
    device, tiles = outliers.column.device, -(-rows // TILE)
    counts = torch.nn.functional.pad(outliers.row_pointer.diff(), (0, -rows % TILE))
    start = torch.zeros(tiles + 1, dtype=torch.int64, device=device)
    torch.cumsum(counts.view(tiles, TILE).amax(1), 0, out=start[1:])
    row = outliers.rows()
    rank = torch.arange(outliers.count, device=device) - outliers.row_pointer[row]
    place = (start[row // TILE] + rank) * TILE + row % TILE
    values, step = outliers.residual.half(), None
    if outliers.step is not None:
        values, step = outliers.multiples().to(torch.int8), outliers.step.half()
        step = torch.nn.functional.pad(step, (0, -rows % TILE))
    # Kernels read 16-bit columns as unsigned.
    column = outliers.column.to(torch.int16 if columns <= 1 << 16 else torch.int32)
    slots = int(start[-1])
    slot_column = torch.zeros(slots * TILE, dtype=column.dtype, device=device)
    slot_value = torch.zeros(slots * TILE, dtype=values.dtype, device=device)
    slot_column[place], slot_value[place] = column, values
    return start.to(torch.int32), slot_column.view(slots, TILE), slot_value.view(slots, TILE), step
