"""The blocks of GGUF's quantized types: bytes to fields and back, nothing else.

A block holds 32 or 256 consecutive weights of a row. Every type but for the 6-bit pairs of Q4_K and Q5_K is a sequence
of sections in which byte `j` of a run of `width` bytes holds the elements `j`, `j + width`, `j + 2 * width` and so on,
from its least significant bits up; wide codes are split into such sections by their bits. ggml's `ggml-common.h` has
the structures; the gguf package's `quants.dequantize` is the reference here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_SIX_BIT_BYTES = 12


@dataclass(frozen=True)
class Blocks:
    """`n` blocks of one type.

    Attributes:
        codes: uint8 [n, weights], counted from 0 where the type's own are signed.
        d: float16 [n], the scale or what scale codes multiply.
        minimum: float16 [n], the offset or what minimum codes multiply; None where the type has none.
        scale_codes: uint8 [n, groups], counted from 0; None in types of one level.
        minimum_codes: uint8 [n, groups]; None where the type has none.
    """

    codes: Bytes
    d: NDArray[np.float16]
    minimum: NDArray[np.float16] | None = None
    scale_codes: Bytes | None = None
    minimum_codes: Bytes | None = None


@dataclass(frozen=True)
class _Part:
    """Bits `shift` to `shift + bits` of a field, in runs of `width` bytes. 8 bits are a two's complement."""

    field: Literal["codes", "scale_codes", "pairs"]
    shift: int
    bits: int
    width: int


_Section = Literal["d", "minimum", "six bits"] | _Part
_NIBBLES = _Part("codes", 0, 4, 16)
_LAYOUTS: dict[str, tuple[_Section, ...]] = {
    "Q4_0": ("d", _NIBBLES),
    "Q4_1": ("d", "minimum", _NIBBLES),
    "Q5_0": ("d", _Part("codes", 4, 1, 1), _NIBBLES),
    "Q5_1": ("d", "minimum", _Part("codes", 4, 1, 1), _NIBBLES),
    "Q8_0": ("d", _Part("codes", 0, 8, 1)),
    "Q2_K": (_Part("pairs", 0, 4, 16), _Part("codes", 0, 2, 32), "d", "minimum"),
    "Q3_K": (
        _Part("codes", 2, 1, 32),
        _Part("codes", 0, 2, 32),
        _Part("scale_codes", 0, 4, 8),
        _Part("scale_codes", 4, 2, 4),
        "d",
    ),
    "Q4_K": ("d", "minimum", "six bits", _Part("codes", 0, 4, 32)),
    "Q5_K": ("d", "minimum", "six bits", _Part("codes", 4, 1, 32), _Part("codes", 0, 4, 32)),
    "Q6_K": (_Part("codes", 0, 4, 64), _Part("codes", 4, 2, 32), _Part("scale_codes", 0, 8, 1), "d"),
}


def pack_blocks(kind: str, blocks: Blocks) -> Bytes:
    """The bytes of `blocks` of the type called `kind`, uint8 [n, bytes of a block]."""
    sections = []
    for section in _LAYOUTS[kind]:
        if isinstance(section, _Part):
            sections.append(_strided(_field(blocks, section.field) >> np.uint8(section.shift), section))
        elif section == "six bits":
            sections.append(_pack_six_bits(blocks))
        else:
            values = np.ascontiguousarray(getattr(blocks, section), dtype="<f2")
            sections.append(values.reshape(-1, 1).view(np.uint8))
    return np.concatenate(sections, axis=1)


def unpack_blocks(kind: str, raw: Bytes, weights: int) -> Blocks:
    """Inverse of `pack_blocks`; `raw` uint8 [n, bytes of a block], each block of `weights` weights."""
    groups = weights // 16  # of the types whose scale codes are parts
    lengths = {"codes": weights, "scale_codes": groups, "pairs": 2 * groups}
    found: dict[str, Any] = {}
    start = 0
    for section in _LAYOUTS[kind]:
        if isinstance(section, _Part):
            size = lengths[section.field] * section.bits // 8
            values = _unstrided(raw[:, start : start + size], section) << np.uint8(section.shift)
            found[section.field] = found.get(section.field, 0) | values
        elif section == "six bits":
            size = _SIX_BIT_BYTES
            found["scale_codes"], found["minimum_codes"] = _unpack_six_bits(raw[:, start : start + size])
        else:
            size = 2
            found[section] = np.ascontiguousarray(raw[:, start : start + size]).view("<f2")[:, 0]
        start += size
    if "pairs" in found:
        found["scale_codes"], found["minimum_codes"] = np.split(found.pop("pairs"), 2, axis=1)
    return Blocks(**found)


def _field(blocks: Blocks, name: str) -> Bytes:
    if name == "pairs":
        assert blocks.scale_codes is not None
        assert blocks.minimum_codes is not None
        return np.concatenate([blocks.scale_codes, blocks.minimum_codes], axis=1)
    values: Bytes = getattr(blocks, name)
    return values


def _strided(values: Bytes, part: _Part) -> Bytes:
    """The low `part.bits` bits of `values` [n, count] as bytes [n, count * bits / 8]."""
    if part.bits == 8:
        return values ^ np.uint8(0x80)
    low = values & np.uint8((1 << part.bits) - 1)
    runs = low.reshape(len(low), -1, 8 // part.bits, part.width)
    shifts = np.arange(0, 8, part.bits, dtype=np.uint8).reshape(-1, 1)
    joined: Bytes = np.bitwise_or.reduce(runs << shifts, axis=2).reshape(len(low), -1)
    return joined


def _unstrided(raw: Bytes, part: _Part) -> Bytes:
    """Inverse of `_strided`."""
    if part.bits == 8:
        return raw ^ np.uint8(0x80)
    shifts = np.arange(0, 8, part.bits, dtype=np.uint8).reshape(-1, 1)
    runs = raw.reshape(len(raw), -1, 1, part.width) >> shifts
    values: Bytes = (runs & np.uint8((1 << part.bits) - 1)).reshape(len(raw), -1)
    return values


def _pack_six_bits(blocks: Blocks) -> Bytes:
    """Eight scale codes and eight minimum codes of 6 bits in 12 bytes, the second four of each split 2 + 4."""
    assert blocks.scale_codes is not None
    assert blocks.minimum_codes is not None
    scales, minima = blocks.scale_codes, blocks.minimum_codes
    first = [(codes[:, :4] & 63) | (codes[:, 4:] >> 4 << 6) for codes in (scales, minima)]
    return np.concatenate([*first, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], axis=1)


def _unpack_six_bits(raw: Bytes) -> tuple[Bytes, Bytes]:
    """Inverse of `_pack_six_bits`: scale codes and minimum codes, each [n, 8]."""
    scales, minima, low = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    return (
        np.concatenate([scales & 63, (low & 15) | (scales >> 6 << 4)], axis=1),
        np.concatenate([minima & 63, (low >> 4) | (minima >> 6 << 4)], axis=1),
    )
