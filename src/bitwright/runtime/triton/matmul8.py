"""Products of 8-bit codes of weights and of activations: int8 summed in int32, e4m3 in float32.

Both operands are rows of PADDED codes, a multiple of 64, so that no read is masked or narrower than 16 bytes; the
weight is the left operand, as in `gemm`. Integers are summed exactly, in any order; zeros are corrected afterwards:
with codes q and zeros z less their centres, `Σ (q_x - z_x)(q_w - z_w) = Σ q_x q_w - z_x Σ q_w - z_w Σ (q_x - z_x)`.
"""

# Triton's own language: its compiler checks it.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finished(
    total, out, token, live_out, live_token, bias_ptr, w_scale_ptr, w_zero_ptr, w_sum_ptr,
    x_scale_ptr, x_zero_ptr, x_sum_ptr,
):  # fmt: skip
    """`total` [out, tokens], sums of products of codes, with zeros, scales and `bias`, in float32."""
    if x_zero_ptr is not None:
        w_sum = tl.load(w_sum_ptr + out, mask=live_out, other=0)
        total -= w_sum[:, None] * tl.load(x_zero_ptr + token, mask=live_token, other=0)[None, :]
    if w_zero_ptr is not None:
        zero = tl.load(w_zero_ptr + out, mask=live_out, other=0)[:, None]
        x_sum = tl.load(x_sum_ptr + token, mask=live_token, other=0)[None, :]
        if w_zero_ptr.dtype.element_ty == tl.int32:
            # As integers, the correction is exact, whatever cancels.
            value = (total - zero * x_sum).to(tl.float32)
        else:
            value = total.to(tl.float32) - zero * x_sum.to(tl.float32)
    else:
        value = total.to(tl.float32)
    w_scale = tl.load(w_scale_ptr + out, mask=live_out, other=0)
    x_scale = tl.load(x_scale_ptr + token, mask=live_token, other=0)
    value = value * w_scale[:, None] * x_scale[None, :]
    if bias_ptr is not None:
        value += tl.load(bias_ptr + out, mask=live_out, other=0).to(tl.float32)[:, None]
    return value


@triton.jit
def gemm8_kernel(
    w_ptr, x_ptr, out_ptr, bias_ptr, w_scale_ptr, w_zero_ptr, w_sum_ptr, x_scale_ptr, x_zero_ptr, x_sum_ptr,
    rows, out_features,
    PADDED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, block of outputs), of which GROUP blocks of rows share reads of the weight in the L2.

    e4m3: EXACT products are summed by the tensor core's short accumulator before float32 takes over.
    """
    i, j = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), GROUP)
    out, token = j * BLOCK_OUT + tl.arange(0, BLOCK_OUT), i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    # Rows behind the last read that one, for nothing.
    w_row = tl.minimum(out, out_features - 1).to(tl.int64) * PADDED
    x_row = tl.minimum(token, rows - 1).to(tl.int64) * PADDED
    ACCUMULATOR: tl.constexpr = tl.int32 if w_ptr.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], ACCUMULATOR)
    for first in range(0, PADDED, BLOCK_COLUMNS):
        w = tl.load(w_ptr + w_row[:, None] + (first + column)[None, :])
        x = tl.load(x_ptr + x_row[None, :] + (first + column)[:, None])
        total = tl.dot(w, x, total, max_num_imprecise_acc=EXACT, out_dtype=ACCUMULATOR)
    live_out, live_token = out < out_features, token < rows
    value = finished(
        total, out, token, live_out, live_token, bias_ptr, w_scale_ptr, w_zero_ptr, w_sum_ptr,
        x_scale_ptr, x_zero_ptr, x_sum_ptr,
    )  # fmt: skip
    place = token.to(tl.int64)[None, :] * out_features + out[:, None]
    there = live_out[:, None] & live_token[None, :]
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def gemv8_kernel(
    w_ptr, x_ptr, out_ptr, bias_ptr, w_scale_ptr, w_zero_ptr, w_sum_ptr, x_scale_ptr, x_zero_ptr, x_sum_ptr,
    out_features, PADDED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (block): BLOCK_OUT outputs of the only row of `x`, on ordinary cores."""
    out, chunk = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_COLUMNS // 16)
    column = chunk[:, None] * 16 + tl.arange(0, 16)[None, :]
    w_row = tl.minimum(out, out_features - 1).to(tl.int64) * PADDED
    ACCUMULATOR: tl.constexpr = tl.int32 if w_ptr.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros([BLOCK_OUT, BLOCK_COLUMNS // 16], ACCUMULATOR)
    for first in range(0, PADDED, BLOCK_COLUMNS):
        place = first + column
        # Whole chunks of 16 are there or are not.
        w = tl.load(w_ptr + w_row[:, None, None] + place[None, :, :], mask=(place < PADDED)[None, :, :], other=0.0)
        x = tl.load(x_ptr + place, mask=place < PADDED, other=0.0)
        # A chunk is one thread's: this sum crosses none.
        total += tl.sum(w.to(ACCUMULATOR) * x.to(ACCUMULATOR)[None, :, :], axis=2)
    token = tl.zeros([1], tl.int32)
    live_out = out < out_features
    value = finished(
        tl.sum(total, axis=1)[:, None], out, token, live_out, token == 0, bias_ptr, w_scale_ptr, w_zero_ptr, w_sum_ptr,
        x_scale_ptr, x_zero_ptr, x_sum_ptr,
    )  # fmt: skip
    tl.store(out_ptr + out[:, None] + token[None, :], value.to(out_ptr.dtype.element_ty), mask=live_out[:, None])
