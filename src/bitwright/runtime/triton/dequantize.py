"""Rows of the weight decoded to memory: for cuBLAS where there are many rows of inputs, and for embeddings.

Values are those of `QTensor.dequantize` exactly, rounded once to the type of the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitwright.runtime.triton.gemm import weight_block
from bitwright.runtime.triton.gemv import grid_at


@triton.jit
def dequantize_kernel(
    out_ptr, ids_ptr, low_ptr, high_ptr, scale_ptr, zero_ptr, statistics_ptr, first_row, rows, columns, exponent,
    UNITS: tl.constexpr, GROUPS: tl.constexpr, GROUP_HALVES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, CENTRE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_UNITS: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, block of units) of `out` [rows, columns]: rows `ids`, or those from `first_row` on."""
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = tl.program_id(1) * BLOCK_UNITS
    # Rows behind the last read others of its tile, for nothing.
    tile, row = tl.minimum((first_row + out) // 16, (first_row + rows - 1) // 16), out % 16
    if ids_ptr is not None:
        source = tl.load(ids_ptr + tl.minimum(out, rows - 1)).to(tl.int32)
        tile, row = source // 16, source % 16
    weight = weight_block(
        low_ptr, high_ptr, scale_ptr, zero_ptr, statistics_ptr, tile, row, first, exponent,
        UNITS, GROUPS, GROUP_HALVES, LOW, HIGH, KIND, CENTRE, BLOCK_UNITS,
    )  # fmt: skip
    column = first * 32 + tl.arange(0, BLOCK_UNITS * 32)
    place = out.to(tl.int64)[None, :] * columns + column[:, None]
    there = (out < rows)[None, :] & (column < columns)[:, None]
    tl.store(out_ptr + place, weight.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def outlier_kernel(
    out_ptr, ids_ptr, low_ptr, high_ptr, scale_ptr, zero_ptr, statistics_ptr,
    slot_start_ptr, slot_column_ptr, slot_value_ptr, step_ptr, first_row, columns, exponent,
    UNITS: tl.constexpr, GROUPS: tl.constexpr, GROUP_HALVES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, CENTRE: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Program (row): the outliers of that row of `out`, decoded anew, since a sum is to be rounded once."""
    out = tl.program_id(0)
    source = first_row + out
    if ids_ptr is not None:
        source = tl.load(ids_ptr + out).to(tl.int32)
    tile, row = source // 16, source % 16
    slot = tl.load(slot_start_ptr + tile)
    end = tl.load(slot_start_ptr + tile + 1)
    while slot < end:
        some = slot + tl.arange(0, BLOCK_SLOTS)
        residual = tl.load(slot_value_ptr + some * 16 + row, mask=some < end, other=0).to(tl.float32)
        column = tl.load(slot_column_ptr + some * 16 + row, mask=some < end, other=0).to(tl.int32)
        if slot_column_ptr.dtype.element_ty == tl.int16:
            column = column & 0xFFFF
        if step_ptr is not None:
            residual *= tl.load(step_ptr + source).to(tl.float32)
        weight = weight_at(
            low_ptr, high_ptr, scale_ptr, zero_ptr, statistics_ptr, tile, row, column,
            UNITS, GROUPS, GROUP_HALVES, LOW, HIGH, KIND, CENTRE,
        )  # fmt: skip
        # An unused slot has the residual 0, and another outlier's column.
        value = (weight + residual).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out.to(tl.int64) * columns + column, value, mask=residual != 0)
        slot += BLOCK_SLOTS


@triton.jit
def weight_at(
    low_ptr, high_ptr, scale_ptr, zero_ptr, statistics_ptr, tile, row, column,
    UNITS: tl.constexpr, GROUPS: tl.constexpr, GROUP_HALVES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """Weights of one row of one tile at `column` [n], float32 [n]."""
    unit = tile * UNITS + column // 32
    inner = column % 32
    low = tl.load(low_ptr + (unit * LOW + inner // (32 // LOW)) * 16 + row)
    code = (low >> (inner % (32 // LOW) * LOW)) & ((1 << LOW) - 1)
    if HIGH > 0:
        window = inner // (8 // LOW)
        place = 8 * (window // (LOW // HIGH)) + LOW * (inner % (8 // LOW)) + HIGH * (window % (LOW // HIGH))
        high = tl.load(high_ptr + (unit * HIGH + place // 32) * 16 + row)
        code = code | (((high >> (place % 32)) & ((1 << HIGH) - 1)) << LOW)
    group = tile * GROUPS + column // 16 // GROUP_HALVES
    scale, zero = grid_at(scale_ptr, zero_ptr, statistics_ptr, group, row, KIND, CENTRE)
    return (code.to(tl.float32) - zero) * scale
