"""Activations quantized to 8 bits in one kernel: the range of each token, its scale, its codes.

Codes are those of `numeric.activation.fake_quantize` on the CPU exactly: divisions are rounded as IEEE 754 says, not
approximated, and halves go to even. (PyTorch on CUDA multiplies by reciprocals of constants; its codes can differ.)
e4m3 codes are those of `torch.Tensor.to(torch.float8_e4m3fn)` of `x / scale`, clamped to ±448.

A token that holds NaN or an infinity gets the scale NaN: all its outputs are NaN, as there.
"""

# Triton's own language: its compiler checks it.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: a float32 of up to 2^22 in magnitude is rounded to an integer, halves to even, by adding and subtracting.
_ROUND = tl.constexpr(12582912.0)
# The least normal float32, the step of a token that is 0 throughout.
_TINY = tl.constexpr(2.0**-126)
_E4M3_MOST = tl.constexpr(448.0)


@triton.jit
def rounded(value):
    """To the nearest integer, halves to even; float32, up to 2^22 in magnitude."""
    return (value + _ROUND) - _ROUND


@triton.jit
def rounded_e4m3(value):
    """The nearest value of e4m3, halves to even, of float32 up to 448 in magnitude, as a float32."""
    # The exponent of the quantum is 3 below the value's, which is at least -6; 23 more and 1.5 times make the magic.
    word = value.to(tl.int32, bitcast=True)
    exponent = tl.maximum((word >> 23) & 255, 121)
    magic = (((exponent + 20) << 23) | (1 << 22)).to(tl.float32, bitcast=True)
    found = (tl.abs(value) + magic) - magic
    # With its sign, which zeros have too.
    return (found.to(tl.int32, bitcast=True) | (word & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def range_of(x_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Least and greatest of COLUMNS numbers and 0, and how many are not finite; NaN may be missing from the range."""
    low, high, odd = 0.0, 0.0, 0
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, mask=column < COLUMNS, other=0).to(tl.float32)
        low = tl.minimum(low, tl.min(x, axis=0))
        high = tl.maximum(high, tl.max(x, axis=0))
        odd += tl.sum((~(tl.abs(x) < float("inf"))).to(tl.int32), axis=0)
    return low, high, odd


@triton.jit
def quantize_int8_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, sum_ptr, static_scale, static_zero, clip,
    COLUMNS: tl.constexpr, PADDED: tl.constexpr, LEAST: tl.constexpr, GREATEST: tl.constexpr, CENTRE: tl.constexpr,
    STATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (token) of `x` [tokens, COLUMNS]: codes less CENTRE [tokens, PADDED], 0 behind the last column.

    `zero` (None: symmetric) also less CENTRE, and `sum` (or None) of codes less zeros, both int32 [tokens].
    """
    token = tl.program_id(0)
    row_ptr = x_ptr + token.to(tl.int64) * COLUMNS
    low, high, odd = range_of(row_ptr, COLUMNS, BLOCK)
    if STATIC:
        scale, zero = static_scale, tl.full([], 0, tl.float32) + static_zero
    else:
        low, high = low * clip, high * clip
        if zero_ptr is None:
            scale = tl.maximum(tl.div_rn(tl.maximum(-low, high), CENTRE - 1.0), _TINY)
            zero = tl.full([], CENTRE, tl.float32)
        else:
            scale = tl.div_rn(high, GREATEST + 0.0) - tl.div_rn(low, GREATEST + 0.0)
            scale = tl.maximum(scale, _TINY)
            zero = tl.minimum(rounded(tl.div_rn(-low, scale)), GREATEST + 0.0)
    total = 0
    for first in range(0, PADDED, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = column < COLUMNS
        x = tl.load(row_ptr + column, mask=there, other=0).to(tl.float32)
        steps = tl.minimum(tl.maximum(tl.div_rn(x, scale + tl.zeros_like(x)) + zero, LEAST + 0.0), GREATEST + 0.0)
        # Codes of a range that is not finite mean nothing, but conversions of NaN are undefined.
        code = tl.where(there & (odd == 0), rounded(steps), CENTRE + 0.0).to(tl.int32)
        if sum_ptr is not None:
            total += tl.sum(tl.where(there & (odd == 0), code - zero.to(tl.int32), 0), axis=0)
        place = token.to(tl.int64) * PADDED + column
        tl.store(codes_ptr + place, (code - CENTRE).to(tl.int8), mask=column < PADDED)
    tl.store(scale_ptr + token, tl.where(odd == 0, scale, float("nan")))
    if zero_ptr is not None:
        tl.store(zero_ptr + token, tl.where(odd == 0, zero, CENTRE + 0.0).to(tl.int32) - CENTRE)
    if sum_ptr is not None:
        tl.store(sum_ptr + token, total)


@triton.jit
def quantize_e4m3_kernel(
    x_ptr, codes_ptr, scale_ptr, static_scale,
    COLUMNS: tl.constexpr, PADDED: tl.constexpr, STATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (token) of `x` [tokens, COLUMNS]: e4m3 codes [tokens, PADDED], and `scale` [tokens]."""
    token = tl.program_id(0)
    row_ptr = x_ptr + token.to(tl.int64) * COLUMNS
    low, high, odd = range_of(row_ptr, COLUMNS, BLOCK)
    if STATIC:
        scale = static_scale
    else:
        scale = tl.maximum(tl.div_rn(tl.maximum(-low, high), _E4M3_MOST), _TINY)
    for first in range(0, PADDED, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = column < COLUMNS
        x = tl.load(row_ptr + column, mask=there, other=0).to(tl.float32)
        steps = tl.minimum(tl.maximum(tl.div_rn(x, scale + tl.zeros_like(x)), -_E4M3_MOST), _E4M3_MOST)
        code = tl.where(there & (odd == 0), rounded_e4m3(steps), 0.0)
        place = token.to(tl.int64) * PADDED + column
        tl.store(codes_ptr + place, code.to(tl.float8e4nv), mask=column < PADDED)
    tl.store(scale_ptr + token, tl.where(odd == 0, scale, float("nan")))
