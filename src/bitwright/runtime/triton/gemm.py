"""A few rows of inputs: tiles of the weight are decoded in registers and multiplied by tensor cores.

The weight is the left operand, W · Xᵀ: tensor cores of Hopper take the left operand from registers, so a decoded weight
need not pass through shared memory (that is up to the compiler). `weight_block` is shared with `dequantize`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitwright.runtime.triton.gemv import grid_at
from bitwright.runtime.triton.layout import ZERO_LEVELS, ZERO_TENSOR

_LEVELS, _TENSOR = tl.constexpr(ZERO_LEVELS), tl.constexpr(ZERO_TENSOR)


@triton.jit
def fields(words, BITS: tl.constexpr, LOW: tl.constexpr):
    """Fields of BITS of `words` [words, rows] as [words · 32/BITS, rows], by column; LOW: see `high_position`, or 0."""
    COUNT: tl.constexpr = 32 // BITS
    column = tl.arange(0, COUNT)
    if LOW == 0:
        place = column * BITS
    else:
        window = column // (8 // LOW)
        place = 8 * (window // (LOW // BITS)) + LOW * (column % (8 // LOW)) + BITS * (window % (LOW // BITS))
    found = (words[:, None, :] >> place[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(found, (words.shape[0] * COUNT, words.shape[1]))


@triton.jit
def repeated(values, COLUMNS: tl.constexpr):
    """`values` [n, rows], each COLUMNS / n times, as [COLUMNS, rows]."""
    shape: tl.constexpr = (values.shape[0], COLUMNS // values.shape[0], values.shape[1])
    return tl.reshape(tl.broadcast_to(values[:, None, :], shape), (COLUMNS, values.shape[1]))


@triton.jit
def weight_block(
    low_ptr, high_ptr, scale_ptr, zero_ptr, statistics_ptr, tile, row, first, exponent,
    UNITS: tl.constexpr, GROUPS: tl.constexpr, GROUP_HALVES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, CENTRE: tl.constexpr, BLOCK_UNITS: tl.constexpr,
):  # fmt: skip
    """Weights of rows `row` of tiles `tile` from unit `first` on, float32 [32 · BLOCK_UNITS, rows].

    A thread thus has few rows, hence few scales. What lies behind the last unit is a copy of other weights.
    """
    COLUMNS: tl.constexpr = 32 * BLOCK_UNITS
    word = tl.arange(0, BLOCK_UNITS * LOW)
    unit = tile[None, :] * UNITS + tl.minimum(first + word // LOW, UNITS - 1)[:, None]
    codes = fields(tl.load(low_ptr + (unit * LOW + (word % LOW)[:, None]) * 16 + row[None, :]), LOW, 0)
    if HIGH > 0:
        word = tl.arange(0, BLOCK_UNITS * HIGH)
        unit = tile[None, :] * UNITS + tl.minimum(first + word // HIGH, UNITS - 1)[:, None]
        high = tl.load(high_ptr + (unit * HIGH + (word % HIGH)[:, None]) * 16 + row[None, :])
        codes = codes | (fields(high, HIGH, LOW) << LOW)
    # One grid for the block where it lies in one group, else one for every unit or half.
    WHOLE: tl.constexpr = GROUP_HALVES % (2 * BLOCK_UNITS) == 0
    SHARED: tl.constexpr = COLUMNS if WHOLE else (32 if GROUP_HALVES % 2 == 0 else 16)
    half = tl.minimum(first * 2 + tl.arange(0, COLUMNS // SHARED) * (SHARED // 16), 2 * UNITS - 1)
    group = tl.minimum(half // GROUP_HALVES, GROUPS - 1)
    scale, zero = grid_at(
        scale_ptr, zero_ptr, statistics_ptr, tile[None, :] * GROUPS + group[:, None], row[None, :], KIND, CENTRE
    )
    # 2^23 + code: conversions of integers take longer. Differences of integers are exact, so one may do for two.
    value = (codes | exponent).to(tl.float32, bitcast=True)
    if KIND == _LEVELS or (KIND == _TENSOR and zero_ptr.dtype.element_ty != tl.uint8):
        value = value - 8388608.0
    else:
        zero = zero + 8388608.0
    return (value - repeated(zero, COLUMNS)) * repeated(scale, COLUMNS)


@triton.jit
def gemm_kernel(
    x_ptr, turned_ptr, out_ptr, bias_ptr, low_ptr, high_ptr, scale_ptr, zero_ptr, statistics_ptr,
    slot_start_ptr, slot_column_ptr, slot_value_ptr, step_ptr, rows, columns, out_features, exponent,
    UNITS: tl.constexpr, GROUPS: tl.constexpr, GROUP_HALVES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, CENTRE: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_UNITS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Program (block, split): BLOCK_OUT outputs of all rows of `x` [rows, columns] from SPAN units.

    With several splits float32 parts [splits, rows, out], without `bias`. `turned` is x transposed, for outliers.
    """
    out, split = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.program_id(1)
    token = tl.arange(0, BLOCK_ROWS)
    # Rows behind the last tile read that one, for nothing.
    tile = tl.minimum(out // 16, (out_features - 1) // 16)
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for begun in range(0, SPAN, BLOCK_UNITS):
        first = split * SPAN + begun
        weight = weight_block(
            low_ptr, high_ptr, scale_ptr, zero_ptr, statistics_ptr, tile, out % 16, first, exponent,
            UNITS, GROUPS, GROUP_HALVES, LOW, HIGH, KIND, CENTRE, BLOCK_UNITS,
        )  # fmt: skip
        column = first * 32 + tl.arange(0, BLOCK_UNITS * 32)
        live = (token < rows)[None, :] & (column < columns)[:, None]
        x = tl.load(x_ptr + token[None, :] * columns + column[:, None], mask=live, other=0)
        total = tl.dot(tl.trans(weight.to(x.dtype)), x, total)
    if slot_value_ptr is not None:
        total += slot_block(
            turned_ptr, slot_start_ptr, slot_column_ptr, slot_value_ptr, step_ptr,
            tile, out % 16, token, rows, split, SPLITS, BLOCK_SLOTS,
        )  # fmt: skip
    if SPLITS == 1 and bias_ptr is not None:
        total += tl.load(bias_ptr + out, mask=out < out_features, other=0).to(tl.float32)[:, None]
    there = (out < out_features)[:, None] & (token < rows)[None, :]
    place = (split * rows + token)[None, :] * out_features + out[:, None]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def slot_block(
    turned_ptr, start_ptr, column_ptr, value_ptr, step_ptr, tile, row, token, rows, split,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What outliers in every SPLITS-th BLOCK of slots add, [out, rows]; each meets a row of `turned` [in, rows]."""
    start = tl.load(start_ptr + tile)
    count = tl.load(start_ptr + tile + 1) - start
    longest = tl.max(count, axis=0)
    slot = split * BLOCK
    total = tl.zeros([tile.shape[0], token.shape[0]], tl.float32)
    while slot < longest:
        some = slot + tl.arange(0, BLOCK)
        live = some[:, None] < count[None, :]
        place = (start[None, :] + some[:, None]) * 16 + row[None, :]
        value = tl.load(value_ptr + place, mask=live, other=0).to(tl.float32)
        column = tl.load(column_ptr + place, mask=live, other=0).to(tl.int32)
        if column_ptr.dtype.element_ty == tl.int16:
            column = column & 0xFFFF
        there = live[:, :, None] & (token < rows)[None, None, :]
        x = tl.load(turned_ptr + column[:, :, None] * rows + token[None, None, :], mask=there, other=0)
        total += tl.sum(value[:, :, None] * x.to(tl.float32), axis=0)
        slot += SPLITS * BLOCK
    if step_ptr is not None:
        total *= tl.load(step_ptr + tile * 16 + row).to(tl.float32)[:, None]
    return total
