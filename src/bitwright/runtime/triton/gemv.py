"""One row of inputs: a program decodes its 16 rows of the weight in registers and multiplies in float32.

The arithmetic is arranged to take about four instructions a weight (an H100 has time for five while a 4-bit weight
arrives): a field is moved to the top of a float's mantissa and given an exponent, so that it reads
`2^k + code` without a conversion; the sums of `2^k · x` and of `zero · x` are subtracted once for 16 or 32 columns,
and the scale is applied once. Sums are taken in a fixed order: equal inputs give equal outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitwright.runtime.triton.layout import ZERO_CONSTANT, ZERO_LEVELS

# Exponent bits of 2^23. Kernels get them at run time: as a constant they cost each weight another instruction, since
# a three-way logical operation takes one immediate operand, and that is the mask.
EXPONENT = 150 << 23

# What kernels read of a module must be constexpr. Its sizes, 16 rows and 32 columns, are written out below.
_CONSTANT, _LEVELS = tl.constexpr(ZERO_CONSTANT), tl.constexpr(ZERO_LEVELS)


@triton.jit
def four_at(ptr, place):
    """Four consecutive numbers, aligned; those of 16 bits as an int64, since vectors have no elements in Triton."""
    if ptr.dtype.element_ty == tl.float32:
        packed = place
    else:
        packed = tl.load((ptr + place).to(tl.pointer_type(tl.int64)))
    return packed


@triton.jit
def one_of(ptr, packed, place, E: tl.constexpr):
    """Number E of `four_at` in float32."""
    if ptr.dtype.element_ty == tl.float32:
        value = tl.load(ptr + place + E)
    elif ptr.dtype.element_ty == tl.bfloat16:
        value = (((packed >> 16 * E) & 0xFFFF).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = (packed >> 16 * E).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def grid_at(scale_ptr, zero_ptr, statistics_ptr, group, row, KIND: tl.constexpr, CENTRE: tl.constexpr):
    """Scale and zero, float32, of `group` (counted over all tiles) and `row` of its tile."""
    place = group * 16 + row
    stored = tl.load(scale_ptr + place)
    if KIND == _LEVELS:
        # Through int32: bytes are converted to floats slowly.
        codes, four = stored.to(tl.int32), four_at(statistics_ptr, group * 4)
        s0 = one_of(statistics_ptr, four, group * 4, 0)
        s1 = one_of(statistics_ptr, four, group * 4, 1)
        s2 = one_of(statistics_ptr, four, group * 4, 2)
        s3 = one_of(statistics_ptr, four, group * 4, 3)
        scale = s0 + s1 * (codes & 15).to(tl.float32)
        zero = s2 + s3 * (codes >> 4).to(tl.float32)
    elif KIND == _CONSTANT:
        scale = stored.to(tl.float32)
        zero = tl.zeros_like(scale) + CENTRE
    else:
        scale = stored.to(tl.float32)
        zero = tl.load(zero_ptr + place).to(tl.float32)
    return scale, zero


@triton.jit
def shifted(word, AMOUNT: tl.constexpr):
    """`word` · 2^AMOUNT; what a right shift brings in from the left is garbage."""
    if AMOUNT >= 0:
        result = word << AMOUNT
    else:
        result = word >> -AMOUNT
    return result


@triton.jit
def raised(low, high, exponent, COLUMN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Magic + code and magic, a power of two, of COLUMN of a unit, whose fields are in the words `low` and `high`."""
    # The byte of the low word that has the code goes to bits 15 to 22, lower if a high field must follow the last.
    BASE: tl.constexpr = 15 - HIGH
    WINDOW: tl.constexpr = COLUMN // (8 // LOW)
    PLACE: tl.constexpr = BASE + LOW * (COLUMN % (8 // LOW))
    field = (shifted(low, BASE - 8 * (WINDOW % 4)) & (((1 << LOW) - 1) << PLACE)) | (exponent - (PLACE << 23))
    if HIGH > 0:
        BYTE: tl.constexpr = WINDOW * HIGH // LOW
        TURN: tl.constexpr = WINDOW % (LOW // HIGH)
        upper = shifted(high, BASE + LOW - 8 * (BYTE % 4) - HIGH * TURN)
        # Exclusive, lest the compiler regroup: an immediate mask for each of two operations.
        field = field ^ (upper & (((1 << HIGH) - 1) << (PLACE + LOW)))
    return field.to(tl.float32, bitcast=True), float(1 << (23 - PLACE))


@triton.jit
def words_of(ptr, unit, row, BITS: tl.constexpr):
    """The words [units, 16] of a plane of BITS of each unit, as a tuple."""
    words = ()
    for word in tl.static_range(BITS):
        words = words + (tl.load(ptr + unit[:, None] * (BITS * 16) + word * 16 + row[None, :]),)  # noqa: RUF005
    return words


@triton.jit
def products_of(x_ptr, low, high, column, exponent, START: tl.constexpr, COLUMNS: tl.constexpr):
    """Of COLUMNS columns from START of each unit: Σ (magic + code) · x [units, 16], Σ magic · x and Σ x [units]."""
    LOW: tl.constexpr = len(low)
    HIGH: tl.constexpr = len(high)
    products = tl.zeros(low[0].shape, tl.float32)
    magic_sum = tl.zeros(column.shape, tl.float32)
    x_sum = tl.zeros(column.shape, tl.float32)
    for quad in tl.static_range(START // 4, (START + COLUMNS) // 4):
        packed = four_at(x_ptr, column + 4 * quad)
        low_word = low[quad * LOW // 8]
        # Without high fields, any word will do.
        high_word = low_word
        if HIGH > 0:
            high_word = high[quad * HIGH // 8]
        for e in tl.static_range(4):
            x = one_of(x_ptr, packed, column + 4 * quad, e)
            value, magic = raised(low_word, high_word, exponent, 4 * quad + e, LOW, HIGH)
            products += value * x[:, None]
            magic_sum += magic * x
            x_sum += x
    return products, magic_sum, x_sum


@triton.jit
def gemv_kernel(
    x_ptr, out_ptr, bias_ptr, low_ptr, high_ptr, scale_ptr, zero_ptr, statistics_ptr,
    slot_start_ptr, slot_column_ptr, slot_value_ptr, step_ptr, out_features, exponent,
    UNITS: tl.constexpr, GROUPS: tl.constexpr, GROUP_HALVES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, CENTRE: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_UNITS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Program (tile, split): 16 outputs from SPAN units; with several splits float32 parts [splits, out], no bias."""
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 16)
    # Groups of an odd number of half units end within a unit.
    PARTS: tl.constexpr = 1 if GROUP_HALVES % 2 == 0 else 2
    COLUMNS: tl.constexpr = 32 // PARTS
    total = tl.zeros([BLOCK_UNITS, 16], tl.float32)
    wanted = split * SPAN + tl.arange(0, BLOCK_UNITS)
    # Behind the last unit that one is read again, for nothing.
    unit = tl.minimum(wanted, UNITS - 1)
    low, high = words_of(low_ptr, tile * UNITS + unit, row, LOW), words_of(high_ptr, tile * UNITS + unit, row, HIGH)
    for _ in range(0, SPAN, BLOCK_UNITS):
        # The next words are under way while these are used.
        following = tl.minimum(wanted + BLOCK_UNITS, UNITS - 1)
        next_low = words_of(low_ptr, tile * UNITS + following, row, LOW)
        next_high = words_of(high_ptr, tile * UNITS + following, row, HIGH)
        for part in tl.static_range(PARTS):
            products, magic_sum, x_sum = products_of(x_ptr, low, high, unit * 32, exponent, part * COLUMNS, COLUMNS)
            # The second half of the last unit may lie behind the last group.
            group = tile * GROUPS + tl.minimum((unit * 2 + part) // GROUP_HALVES, GROUPS - 1)
            scale, zero = grid_at(scale_ptr, zero_ptr, statistics_ptr, group[:, None], row[None, :], KIND, CENTRE)
            scale = tl.where((wanted < UNITS)[:, None], scale, 0.0)
            total += scale * (products - (magic_sum[:, None] + zero * x_sum[:, None]))
        low, high, unit, wanted = next_low, next_high, following, wanted + BLOCK_UNITS
    sums = tl.sum(total, axis=0)
    if slot_value_ptr is not None:
        sums += slot_sums(
            x_ptr, slot_start_ptr, slot_column_ptr, slot_value_ptr, step_ptr, tile, split, SPLITS, BLOCK_SLOTS
        )
    out = tile * 16 + row
    there = out < out_features
    if SPLITS == 1 and bias_ptr is not None:
        sums += tl.load(bias_ptr + out, mask=there, other=0).to(tl.float32)
    tl.store(out_ptr + split * out_features + out, sums.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def slot_sums(
    x_ptr, start_ptr, column_ptr, value_ptr, step_ptr, tile, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """What the outliers of `tile` in every SPLITS-th BLOCK of slots add to its 16 outputs."""
    row = tl.arange(0, 16)
    slot = tl.load(start_ptr + tile) + split * BLOCK
    end = tl.load(start_ptr + tile + 1)
    total = tl.zeros([BLOCK, 16], tl.float32)
    # A tile has as many slots as it needs: no loop bound is known beforehand.
    while slot < end:
        some = slot + tl.arange(0, BLOCK)
        live = (some < end)[:, None]
        place = some[:, None] * 16 + row[None, :]
        value = tl.load(value_ptr + place, mask=live, other=0).to(tl.float32)
        column = tl.load(column_ptr + place, mask=live, other=0).to(tl.int32)
        if column_ptr.dtype.element_ty == tl.int16:
            column = column & 0xFFFF
        total += value * tl.load(x_ptr + column, mask=live, other=0).to(tl.float32)
        slot += SPLITS * BLOCK
    sums = tl.sum(total, axis=0)
    if step_ptr is not None:
        sums *= tl.load(step_ptr + tile * 16 + row).to(tl.float32)
    return sums


@triton.jit
def reduce_kernel(
    parts_ptr, out_ptr, bias_ptr, count, out_features, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`parts` float32 [splits, rows · out] summed in order, plus `bias` [out]: rows · out = `count` outputs."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = place < count
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * count + place, mask=live, other=0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + place % out_features, mask=live, other=0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=live)
