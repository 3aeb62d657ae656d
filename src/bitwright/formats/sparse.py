"""Stored outliers: places in 9 bits each and a bit per tile, values in 16 or 8 bits.

Rows are cut into tiles of 256 columns (the last may be shorter), tiles are counted row by row. `outlier_idx` is
the column within the tile. `outlier_counts` says in unary how many outliers each tile has: as many 1 bits as it
has outliers, then a 0 bit, in the bit order of `bits.py`. So k outliers and t tiles take k + t bits however they
are distributed, and a full tile is no special case. A byte per tile would take more up to a share of 2.7 %, 16-bit
columns with row pointers from 0.06 % on; at 0.1 to 1 % an outlier's place takes at most 1.5 bits above its entropy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.bits import row_words
from bitwright.numeric.outliers import Outliers

TILE = 256


def parts(shape: tuple[int, int], count: int, value_bits: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Local name -> (shape, dtype) of the tensors of `count` outliers, one at least, in a matrix [out, in]."""
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "outlier_counts": ((row_words(1, count + _tiles(shape)),), torch.int32),
        "outlier_idx": ((count,), torch.uint8),
        "outlier_val": ((count,), torch.float16 if value_bits == 16 else torch.int8),
    }
    if value_bits == 8:
        layout["outlier_step"] = ((shape[0],), torch.float16)
    return layout


def pack_outliers(outliers: Outliers, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of `parts` for `outliers` of a matrix `shape` (out, in)."""
    per_row, device = -(-shape[1] // TILE), outliers.column.device
    tile = outliers.rows() * per_row + outliers.column // TILE
    words = row_words(1, outliers.count + _tiles(shape))
    bits = torch.zeros(words * 32, dtype=torch.uint8, device=device)
    # Before the 1 of an outlier stand those of all earlier outliers and a 0 for every earlier tile.
    bits[tile + torch.arange(outliers.count, device=device)] = 1
    packed = {
        "outlier_counts": (bits.view(-1, 8) * _bit_values(device)).sum(dim=1, dtype=torch.uint8).view(torch.int32),
        "outlier_idx": (outliers.column % TILE).to(torch.uint8),
    }
    if outliers.step is None:
        return packed | {"outlier_val": outliers.residual.half()}
    return packed | {"outlier_val": outliers.multiples().to(torch.int8), "outlier_step": outliers.step.half()}


def unpack_outliers(stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Outliers:
    """The outliers of a matrix `shape` (out, in); they mean nothing unless `check_outliers` accepts them."""
    per_row, idx = -(-shape[1] // TILE), stored["outlier_idx"]
    places = torch.arange(idx.numel(), device=idx.device)
    ones = _bits(stored["outlier_counts"]).cumsum(0)
    # Where the running number of ones reaches k + 1 is the k-th 1; nonzero() would wait for the device.
    tile = torch.searchsorted(ones, places + 1) - places
    row = tile // per_row
    row_pointer = torch.searchsorted(row, torch.arange(shape[0] + 1, device=idx.device))
    column = tile % per_row * TILE + idx
    step = stored["outlier_step"].float() if "outlier_step" in stored else None
    value = stored["outlier_val"].float()
    return Outliers(row_pointer, column, value if step is None else value * step[row], step)


def check_outliers(name: str, stored: Mapping[str, Tensor], count: int, shape: tuple[int, int]) -> None:
    """Refuse stored outliers unless they are `count` legal ones of a matrix `shape` (out, in).

    Raises:
        FormatError: naming the tensor, what was found and what was needed.
    """
    bits, used = _bits(stored["outlier_counts"]), count + _tiles(shape)
    if bool(bits[used:].any()):
        raise FormatError(f"{name}.outlier_counts: padding bits are set, needed zeros; the file is damaged")
    found = int(bits.sum())
    # A 1 at the very end is an outlier behind the last tile.
    if found != count or int(bits[used - 1]):
        raise FormatError(
            f"{name}.outlier_counts: add up to {found} in {_tiles(shape)} tiles, needed {count} and a 0 at the end; "
            "the file is damaged"
        )
    if "outlier_step" in stored and bool((stored["outlier_val"] == -128).any()):
        raise FormatError(f"{name}.outlier_val: holds -128, needed -127..127; the file is damaged")
    unpack_outliers(stored, shape).validate(name, shape)


def _tiles(shape: tuple[int, int]) -> int:
    return shape[0] * -(-shape[1] // TILE)


def _bit_values(device: torch.device) -> Tensor:
    return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)


def _bits(words: Tensor) -> Tensor:
    """The bits of int32 `words` as uint8 0 and 1, in the order of the stream."""
    return (words.view(torch.uint8).unsqueeze(1) & _bit_values(words.device)).ne(0).to(torch.uint8).flatten()
