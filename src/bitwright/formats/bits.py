"""Dense bit streams: codes of 2 to 8 bits packed into 32-bit words without a wasted bit.

Layout of one row: code `i` occupies bits `i * bits .. (i + 1) * bits - 1` of the row's stream; bit `j` of
the stream is bit `j % 32` (least significant first) of word `j // 32`; words are little-endian. A code may
cross a word boundary. 32 codes take `bits` words, and 8 codes take exactly `bits` bytes, which is what the
code below uses: eight bytes of one code each are squeezed into `bits` bytes in three steps on 64-bit lanes.
One step moves the upper half of every field down next to the lower one: `lower + upper * 2**width` loses
`upper * (2**width - 2**used)`, which needs no masking of the lower half.

Views between integers and bytes assume a little-endian host, as PyTorch's and safetensors' own do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bitwright.errors import FormatError

# Codes handled at once: temporaries of 256 KiB stay in the second-level cache. A multiple of 32.
_TILE = 1 << 18


def row_words(bits: int, n: int) -> int:
    """32-bit words that hold `n` codes of `bits` bits."""
    return -(-n * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of `codes` uint8 [rows, n] into int32 [rows, ceil(n * bits / 32)]; padding bits are zero.

    Raises:
        FormatError: `codes` is not a uint8 matrix, or a code needs more than `bits` bits.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise FormatError(f"codes are {codes.dtype} with {codes.dim()} axes, needed uint8 [rows, n]")
    rows, n = codes.shape
    words = torch.zeros(rows, row_words(bits, n), dtype=torch.int32, device=codes.device)
    stream = words.view(torch.uint8)
    for some, columns in _tiles(rows, n):
        tile = _whole_groups(codes[some, columns])
        if bits < 8 and int(tile.max()) >> bits:
            raise FormatError(f"code {int(tile.max())} does not fit {bits} bits")
        packed = _squeeze(tile.view(torch.int64), bits)
        start = columns.start * bits // 8
        stop = min(start + packed.shape[1], stream.shape[1])
        stream[some, start:stop] = packed[:, : stop - start]
    return words


def unpack_rows(words: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack_rows`: int32 [rows, ceil(n * bits / 32)] to uint8 [rows, n]; padding is not looked at.

    Raises:
        FormatError: `words` is not an int32 matrix of that width.
    """
    _check_bits(bits)
    width = row_words(bits, n)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != width:
        raise FormatError(
            f"words are {words.dtype} {list(words.shape)}, needed int32 [rows, {width}] for {n} codes of {bits} bits"
        )
    rows = words.shape[0]
    stream = words.contiguous().view(torch.uint8)
    codes = torch.empty(rows, n, dtype=torch.uint8, device=words.device)
    for some, columns in _tiles(rows, n):
        start = columns.start * bits // 8
        groups = -(-(columns.stop - columns.start) // 8)
        lanes = _spread(stream[some, start : start + groups * bits], bits, groups)
        codes[some, columns] = lanes.view(torch.uint8)[:, : columns.stop - columns.start]
    return codes


def has_padding_bits(words: Tensor, bits: int, n: int) -> bool:
    """Whether any bit after the last code of a row of `words` (as in `unpack_rows`) is set."""
    used = n * bits % 32
    if used == 0 or words.numel() == 0:
        return False
    return bool((words[:, -1] & -(1 << used)).any())


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise FormatError(f"{bits} bits per code; the bit stream holds 2 to 8")


def _tiles(rows: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Row and column ranges of about `_TILE` codes; columns start at multiples of 32: on whole words."""
    height = max(1, _TILE // max(n, 1))
    for row in range(0, rows, height):
        for column in range(0, n, _TILE):
            yield slice(row, min(row + height, rows)), slice(column, min(column + _TILE, n))


def _whole_groups(tile: Tensor) -> Tensor:
    """`tile` uint8 [rows, n], zero-padded to a multiple of 8 columns, laid out so that int64 can view it."""
    short = -tile.shape[1] % 8
    if short:
        return torch.nn.functional.pad(tile, (0, short))
    return _aligned(tile)


def _aligned(matrix: Tensor) -> Tensor:
    """`matrix`, copied unless wider integers can view it (they look at the stride even of a single row)."""
    rows, n = matrix.shape
    fits = matrix.stride() == (n, 1) and matrix.storage_offset() % 8 == 0
    return matrix if fits else torch.empty(rows, n, dtype=matrix.dtype, device=matrix.device).copy_(matrix)


def _squeeze(lanes: Tensor, bits: int) -> Tensor:
    """int64 [rows, groups], eight byte-wide codes each, to the stream: uint8 [rows, groups * bits]."""
    if bits == 8:
        return lanes.view(torch.uint8)
    for width in (8, 16, 32):
        used = bits * width // 8
        upper = (lanes >> width).bitwise_and_(_mask(used, 2 * width))
        lanes = torch.sub(lanes, upper, alpha=(1 << width) - (1 << used))
    rows, groups = lanes.shape
    unit = _unit(bits)
    units = bits // unit.itemsize
    packed = torch.empty(rows, groups * units, dtype=unit, device=lanes.device)
    packed.view(rows, groups, units).copy_(lanes.view(unit).view(rows, groups, -1)[..., :units])
    return packed.view(torch.uint8)


def _spread(stream: Tensor, bits: int, groups: int) -> Tensor:
    """Inverse of `_squeeze`; a `stream` cut short by the end of the row is completed with zeros."""
    rows, unit = stream.shape[0], _unit(bits)
    short = groups * bits - stream.shape[1]
    if short:
        stream = torch.nn.functional.pad(stream, (0, short))
    stream = _aligned(stream)
    if bits == 8:
        return stream.view(torch.int64)
    lanes = torch.zeros(rows, groups, dtype=torch.int64, device=stream.device)
    units = bits // unit.itemsize
    lanes.view(unit).view(rows, groups, -1)[..., :units] = stream.view(unit).view(rows, groups, units)
    for width in (32, 16, 8):
        used = bits * width // 8
        upper = (lanes >> used).bitwise_and_(_mask(used, 2 * width))
        lanes.add_(upper, alpha=(1 << width) - (1 << used))
    return lanes


def _unit(bits: int) -> torch.dtype:
    """Widest integer of which `bits` bytes are a whole number: fewer, larger elements to copy."""
    return {2: torch.int16, 4: torch.int32, 6: torch.int16}.get(bits, torch.uint8)


def _mask(used: int, width: int) -> int:
    """64-bit mask of the low `used` bits of every field of `width` bits."""
    return sum(((1 << used) - 1) << shift for shift in range(0, 64, width))
