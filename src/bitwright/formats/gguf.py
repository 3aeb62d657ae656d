"""GGUF's quantized types: which of them holds a grid exactly, and codes to block bytes and back.

`docs/formats/gguf.md` has the table. Two families:

    one level, blocks of 32        Q4_0 Q5_0 Q8_0  w = d * signed        Q4_1 Q5_1       w = d * code + m
    column superblocks of 256      Q3_K Q6_K       w = d * s * signed    Q2_K Q4_K Q5_K  w = d * s * code - dmin * c

A grid goes into any type that is wide enough for it, not only into its twin: groups of a multiple of the type's are
repeated, and with an integer zero, `code - zero` is a signed code that needs one bit more. The signed types decode
to the very float32 values of `QTensor.dequantize`. In those with a minimum only the order of operations differs: see
`tolerance`.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf.quants
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.gguf_blocks import Blocks, Bytes, pack_blocks, unpack_blocks
from bitwright.numeric.bilevel import SecondLevel, code_offset
from bitwright.numeric.grid import Grid, expand_groups
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec


@dataclass(frozen=True)
class BlockType:
    """One quantized type.

    Attributes:
        name: as GGUF spells it.
        group: weights that share a scale.
        bits: of a code.
        minimum: whether weights have an offset; without one, codes are signed.
        scale_bits: of a second-level scale code, signed where codes are; None in types of one level.
    """

    name: str
    group: int
    bits: int
    minimum: bool
    scale_bits: int | None = None

    @property
    def kind(self) -> GGMLQuantizationType:
        """The number that the file has for it."""
        return GGMLQuantizationType[self.name]

    @property
    def weights(self) -> int:
        """Weights of a block."""
        return int(GGML_QUANT_SIZES[self.kind][0])

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return int(GGML_QUANT_SIZES[self.kind][1])

    @property
    def offset(self) -> int:
        """What is subtracted from a code as `Blocks` has it."""
        return 0 if self.minimum else 1 << (self.bits - 1)

    @property
    def spec(self) -> WeightSpec:
        """The grid that is this type's twin; an offset of one level is a superblock of one group."""
        bilevel = None
        if self.scale_bits is not None:
            zero_bits = self.scale_bits if self.minimum else None
            size = self.weights // self.group
            bilevel = Bilevel(axis="column", size=size, scale_bits=self.scale_bits, zero_bits=zero_bits)
        elif self.minimum:
            bilevel = _ONE_GROUP
        zero = "float" if self.minimum else "int"
        return WeightSpec(bits=self.bits, group_size=self.group, symmetric=not self.minimum, zero=zero, bilevel=bilevel)


# The codes are 1: fp16 scale and fp16 minimum, as they are.
_ONE_GROUP = Bilevel(axis="column", size=1, scale_bits=2, zero_bits=2)

TYPES = {
    found.name: found
    for found in (  # by size
        BlockType("Q2_K", 16, 2, minimum=True, scale_bits=4),
        BlockType("Q3_K", 16, 3, minimum=False, scale_bits=6),
        BlockType("Q4_0", 32, 4, minimum=False),
        BlockType("Q4_K", 32, 4, minimum=True, scale_bits=6),
        BlockType("Q4_1", 32, 4, minimum=True),
        BlockType("Q5_0", 32, 5, minimum=False),
        BlockType("Q5_K", 32, 5, minimum=True, scale_bits=6),
        BlockType("Q5_1", 32, 5, minimum=True),
        BlockType("Q6_K", 16, 6, minimum=False, scale_bits=8),
        BlockType("Q8_0", 32, 8, minimum=False),
    )
}

REMEDY = (
    "quantize with --set bilevel=none --scheme w4a16g32-sym (Q4_0), w3a16g32-asym (Q4_0) or w4a16g32-asym (Q5_0), or "
    "export with --allow-lossy"
)


_OF_WHOLE_SUPERBLOCKS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 7: "Q8_0", 8: "Q8_0"}
_OF_BLOCKS = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}


def gguf_grid(bits: int, in_features: int) -> WeightSpec:
    """The grid to quantize rows of `in_features` columns on, so that a GGUF type holds them exactly.

    K-types where rows are whole superblocks of 256, else the type of one level with at least as many `bits`; those
    with a minimum in fp16 (Q4_1, Q5_1) are not chosen, as they cost what a bit more or a second level costs.

    Raises:
        FormatError: rows are not whole blocks of 32.
    """
    if in_features % 32:
        raise FormatError(
            f"{in_features} columns, and GGUF's quantized types need a multiple of 32; leave it in float with "
            "--set keep=NAME"
        )
    return TYPES[(_OF_BLOCKS if in_features % 256 else _OF_WHOLE_SUPERBLOCKS)[bits]].spec


def gguf_type(spec: WeightSpec, in_features: int) -> str:
    """The smallest GGUF type that holds every matrix of `spec` with `in_features` columns exactly.

    "Q4_1" and "Q5_1" are given for their twins alone, whose values `encode` checks.

    Raises:
        FormatError: there is none; the message says why.
    """
    for name, found in TYPES.items():
        if _obstacle(found, spec, in_features) is None:
            return name
    raise FormatError(f"{spec.label()} with {in_features} columns: {_why_none(spec, in_features)}; {REMEDY}")


def rounded_type(spec: WeightSpec, in_features: int) -> str | None:
    """The smallest type of one level that keeps all codes when scales and offsets are rounded to fp16, or None."""
    flat = spec.model_copy(update={"bilevel": None, "scale_dtype": "float16"})
    for name, found in TYPES.items():
        if found.scale_bits is not None:
            continue
        if found.minimum and spec.bits <= found.bits and not spec.symmetric and _whole(found, flat, in_features):
            return name
        if _obstacle(found, flat, in_features) is None:
            return name
    return None


def _obstacle(found: BlockType, spec: WeightSpec, in_features: int) -> str | None:
    """Why `found` does not hold every matrix of `spec` exactly; None where it does."""
    bilevel = spec.bilevel
    if spec.scale_dtype != "float16":
        return f"scales are {spec.scale_dtype}, and GGUF's are float16"
    if not _whole(found, spec, in_features):
        return f"rows and groups must be multiples of {found.weights} and {found.group} columns"
    if found.minimum and found.scale_bits is None:
        return None if bilevel == _ONE_GROUP and spec.bits <= found.bits else "offsets would be rounded to fp16"
    if (found.scale_bits is None) != (bilevel is None):
        return "levels of the grid differ"
    if found.minimum:
        fits = bilevel is not None and bilevel.zero_bits is not None and spec.bits <= found.bits
    else:
        low, high = _signed_range(spec) or (-1 << 9, 1 << 9)
        fits = -found.offset <= low and high < found.offset
    if not fits:
        return f"codes do not fit {found.bits} bits"
    if bilevel is None or found.scale_bits is None:
        return None
    if bilevel.axis == "row":
        return "superblocks lie along rows of scales"
    if max(bilevel.scale_bits + (not spec.symmetric and not found.minimum), bilevel.zero_bits or 0) > found.scale_bits:
        return f"second-level codes do not fit {found.scale_bits} bits"
    columns = spec.group_width(in_features) * bilevel.size
    return None if columns % found.weights == 0 or columns >= in_features else "superblocks are no whole blocks"


def _whole(found: BlockType, spec: WeightSpec, in_features: int) -> bool:
    """Whether rows are whole blocks and every group of a block lies in one group of the grid."""
    return in_features % found.weights == 0 and spec.group_width(in_features) % found.group == 0


def _signed_range(spec: WeightSpec) -> tuple[int, int] | None:
    """Least and largest `code - zero`; None where zeros are floats."""
    if spec.symmetric:
        return -spec.centre, spec.centre - 1
    return (-spec.max_code, spec.max_code) if spec.zero == "int" else None


def _why_none(spec: WeightSpec, in_features: int) -> str:
    """The first reason that users can do something about."""
    if spec.bilevel is not None and spec.bilevel.axis == "row":
        return "superblocks of rows have no GGUF type"
    if in_features % 32:
        return "rows of GGUF's quantized types are multiples of 32 columns"
    if spec.bilevel is not None and spec.bits > TYPES["Q6_K"].bits:
        return "GGUF's two-level types have at most 6 bits"
    if spec.bilevel is not None:
        whole = "" if in_features % 256 == 0 else ", and rows of whole blocks"
        return f"GGUF's two-level types have superblocks of 256 columns in groups of 16 or 32{whole}"
    if spec.group_width(in_features) % 32:
        return "groups of GGUF's types of one level are multiples of 32 columns"
    if spec.scale_dtype != "float16":
        return f"scales are {spec.scale_dtype}, and GGUF's are float16"
    if spec.zero == "float":
        return "GGUF rounds the offset -scale * zero to fp16"
    return "codes minus zeros of 8 bits do not fit the signed bytes of Q8_0"


def encode(q: QTensor, name: str, rounded: bool = False) -> Bytes:
    """The rows of `q` as blocks of the type called `name`: uint8 [out, in / weights * block bytes].

    With `rounded`, scales and offsets may be rounded to fp16 and a second level is decoded first, so that a type of
    `rounded_type` serves.

    Raises:
        FormatError: the type cannot hold `q`: outliers, codes, or values that are no fp16.
    """
    found, (out_features, in_features) = TYPES[name], q.shape
    if q.outliers is not None and q.outliers.count:
        raise FormatError(f"{name} has no place for {q.outliers.count} outliers; needed a matrix without")
    if not _whole(found, q.spec, in_features):
        raise FormatError(f"{q.spec.label()} with {in_features} columns is not made of whole {name} blocks")
    numbers = _one_level(q.grid, in_features, found, rounded) if found.scale_bits is None else _two_level(q, found)
    codes = _signed_codes(q, found) if not found.minimum else q.codes
    if codes.numel() and int(codes.max()) >> found.bits:
        raise FormatError(f"{name}: code {int(codes.max())} does not fit {found.bits} bits")
    per_block = {key: values.reshape(-1, values.shape[-1]) for key, values in numbers.items()}
    blocks = Blocks(
        codes.reshape(-1, found.weights).numpy(),
        **{key: values[:, 0] if key in ("d", "minimum") else values for key, values in per_block.items()},
    )
    return pack_blocks(name, blocks).reshape(out_features, -1)


def _signed_codes(q: QTensor, found: BlockType) -> Tensor:
    """`code - zero + offset`, uint8 [out, in]."""
    zero = q.grid.zero
    if bool((zero != zero.round()).any() or (zero.abs() > q.spec.max_code).any()):
        raise FormatError(f"{found.name}: zeros are no codes, and it has no offsets")
    shift = (found.offset - zero).to(torch.int16)
    codes = q.codes + expand_groups(shift, q.spec, q.shape[1])
    low, high = (int(value) for value in torch.aminmax(codes))
    if low < 0 or high >= 2 * found.offset:
        raise FormatError(f"{found.name}: codes minus zeros do not fit {found.bits} signed bits")
    return codes.to(torch.uint8)


def check_values(grid: Grid, in_features: int, name: str) -> None:
    """Refuse a `grid` of `in_features` columns whose numbers a type of one level would round; codes are not needed.

    Raises:
        FormatError: a scale or offset is no fp16 number.
    """
    if TYPES[name].scale_bits is None:
        _one_level(grid, in_features, TYPES[name], rounded=False)


def _one_level(grid: Grid, in_features: int, found: BlockType, rounded: bool) -> dict[str, np.ndarray]:
    """d and minimum [out, blocks, 1] of a type of one level."""
    place = _groups_at(grid.spec, in_features, found.group)
    numbers = {"d": _fp16("scale", grid.scale, found.name, rounded)[:, place, None]}
    if found.minimum:
        levels = grid.levels
        if levels is not None and levels.zero_codes is not None and grid.spec.bilevel == _ONE_GROUP:
            minimum = -(levels.statistics[..., 1] * levels.zero_codes).double()
        else:
            minimum = -grid.scale.double() * grid.zero.double()
        numbers["minimum"] = _fp16("offset", minimum, found.name, rounded)[:, place, None]
    return numbers


def _two_level(q: QTensor, found: BlockType) -> dict[str, np.ndarray]:
    """d, minimum [out, blocks, 1], scale codes and minimum codes [out, blocks, groups of a block]."""
    levels, bilevel = q.grid.levels, q.spec.bilevel
    if levels is None or bilevel is None or bilevel.axis != "column" or found.scale_bits is None:
        raise FormatError(f"{q.spec.label()} has no column superblocks; needed for {found.name}")
    groups, out_features = _groups_at(q.spec, q.shape[1], found.group), q.shape[0]
    # Where scales are signed they are stored so by the type, too.
    shift = 0 if found.minimum else (1 << (found.scale_bits - 1)) - code_offset(q.spec)
    parts = {"scale_codes": levels.scale_codes.int() + shift}
    if levels.zero_codes is not None:
        parts["minimum_codes"] = levels.zero_codes.int()
    size = found.weights // found.group
    numbers: dict[str, np.ndarray] = {}
    for key, codes in parts.items():
        if bool((codes < 0).any() or (codes >> found.scale_bits > 0).any()):
            raise FormatError(f"{found.name}: {key} do not fit {found.scale_bits} bits")
        numbers[key] = codes[:, groups].to(torch.uint8).numpy().reshape(out_features, -1, size)
    superblocks = _groups_at(q.spec, q.shape[1], found.weights) // bilevel.size
    for key, values in zip(("d", "minimum"), levels.statistics.unbind(dim=2), strict=False):
        numbers[key] = _fp16("statistic", values, found.name, False)[:, superblocks, None]
    return numbers


def _groups_at(spec: WeightSpec, in_features: int, step: int) -> Tensor:
    """The group of every `step`-th column."""
    return torch.arange(0, in_features, step) // spec.group_width(in_features)


def _fp16(what: str, values: Tensor, name: str, rounded: bool) -> np.ndarray:
    stored = values.half()
    if not bool(torch.isfinite(stored).all()):
        raise FormatError(f"{name}: a {what} of {values.abs().max().item():.3g} does not fit fp16")
    if not rounded and not torch.equal(stored.to(values.dtype), values):
        raise FormatError(f"{name}: a {what} is no fp16 number, and would be rounded")
    array: np.ndarray = stored.numpy()
    return array


def decode(name: str, raw: Bytes, in_features: int, label: str) -> QTensor:
    """The matrix whose rows are the blocks `raw`, uint8 [out, bytes of a row], of the type called `name`.

    Its grid is `TYPES[name].spec`. A group whose scale is 0, which native grids do not have, becomes one of equal
    value with scale 1 (or scale code 1) and codes that stand for 0. `label` goes into messages.

    Raises:
        FormatError: a scale or offset is NaN or Inf.
    """
    found, out_features = TYPES[name], raw.shape[0]
    blocks = unpack_blocks(name, raw.reshape(-1, found.block_bytes), found.weights)
    d = torch.from_numpy(blocks.d.astype(np.float32)).reshape(out_features, -1)
    minimum = None if blocks.minimum is None else torch.from_numpy(blocks.minimum.astype(np.float32)).reshape_as(d)
    for values in (d, minimum):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise FormatError(f"{label}: a scale of a {name} block is NaN or Inf; the file is damaged")
    spec = found.spec
    codes = torch.from_numpy(blocks.codes.copy()).reshape(out_features, in_features)
    empty = (d == 0).repeat_interleave(found.weights // found.group, dim=1)
    d = torch.where(d == 0, 1.0, d)
    if spec.bilevel is None:
        grid = Grid(d, torch.full_like(d, float(spec.centre)), spec)
    else:
        levels, without = _levels(found, blocks, d, minimum)
        empty |= without
        levels.scale_codes[empty] = 1 + code_offset(spec)
        grid = Grid.of_levels(levels, torch.full(empty.shape, float(spec.centre)) if spec.symmetric else None, spec)
    return QTensor(torch.where(expand_groups(empty, spec, in_features), found.offset, codes).to(torch.uint8), grid)


def _levels(found: BlockType, blocks: Blocks, d: Tensor, minimum: Tensor | None) -> tuple[SecondLevel, Tensor]:
    """The second level of `blocks`, and which groups have scale code 0."""
    if blocks.scale_codes is None:
        assert minimum is not None
        ones = torch.ones(d.shape, dtype=torch.uint8)
        return SecondLevel(ones, ones.clone(), torch.stack([d, -minimum], dim=2)), torch.zeros_like(d, dtype=torch.bool)
    scale_codes = torch.from_numpy(blocks.scale_codes.copy()).reshape(d.shape[0], -1)
    if blocks.minimum_codes is None or minimum is None:
        return SecondLevel(scale_codes, None, d[..., None]), scale_codes == code_offset(found.spec)
    minimum_codes = torch.from_numpy(blocks.minimum_codes.copy()).reshape(d.shape[0], -1)
    return SecondLevel(scale_codes, minimum_codes, torch.stack([d, minimum], dim=2)), scale_codes == 0


def dequantized(name: str, raw: Bytes) -> Tensor:
    """What the gguf package makes of rows of blocks, float32 [out, in]."""
    return torch.from_numpy(gguf.quants.dequantize(raw, GGMLQuantizationType[name]))


def tolerance(q: QTensor, name: str) -> Tensor | float:
    """By how much an exact export may differ from `q.dequantize()`: 0, or float32 rounding [out, in].

    Types with a minimum compute d * code - minimum in place of scale * (code - zero): each of the two rounds three
    times, by 2**-24 of at most |scale| * (largest code + |zero|).
    """
    if not TYPES[name].minimum:
        return 0.0
    scale, zero = q.grid.expand(q.shape[1])
    return 2.0**-22 * scale.abs() * (q.spec.max_code + zero.abs())
