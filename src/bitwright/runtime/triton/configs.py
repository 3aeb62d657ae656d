"""Blocks and warps by shape: pure functions, so that a call measures nothing and a result depends on shapes alone.

Chosen from what the compiler reports (registers, loads in flight) and the sizes of an H100, not by search.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.runtime.triton.layout import TILE

# Fewer programs than this leave multiprocessors (132 on an H100) idle: columns are then split between programs.
_LEAST_PROGRAMS = 128
# From this many rows on, decoding once and cuBLAS are taken to be faster.
MOST_GEMM_ROWS = 64
# Weights decoded at once for cuBLAS: 256 MiB in 16 bits.
DEQUANTIZED_WEIGHTS = 1 << 27


@dataclass(frozen=True)
class GemvConfig:
    """`splits` programs of `warps` for every tile; each takes `span` units, `block_units` at a time."""

    splits: int
    span: int
    block_units: int
    block_slots: int
    warps: int


@dataclass(frozen=True)
class GemmConfig:
    """As `GemvConfig`, with `block_out` rows of the weight and `block_rows` of inputs, pipelined in `stages`."""

    splits: int
    span: int
    block_units: int
    block_slots: int
    warps: int
    block_out: int
    block_rows: int
    stages: int


def gemv_config(tiles: int, units: int) -> GemvConfig:
    """For one row of inputs: four threads take the 16 rows of a unit, so 32 units make 4 warps and 64 make 8."""
    block = 64 if units > 32 else 32
    splits, span = _split(tiles, units, block, 4)
    return GemvConfig(splits, span, block, block, block // 8)


def gemm_config(out_features: int, units: int, rows: int) -> GemmConfig:
    """For 2 to 64 rows of inputs. 64 rows of the weight are the least that Hopper's warp group takes at once."""
    block_out, block_units = 64, 4
    # Two programs to a multiprocessor hide each other's waits.
    splits, span = _split(-(-out_features // block_out) // 2, units, 4 * block_units, 16)
    block_rows = 16 if rows <= 16 else 32 if rows <= 32 else 64
    return GemmConfig(splits, span, block_units, 128 // block_rows, 4, block_out, block_rows, 3)


@dataclass(frozen=True)
class Gemm8Config:
    """Blocks of `matmul8`, pipelined in `stages`; `block_rows` 0 is the kernel for one row."""

    block_out: int
    block_rows: int
    block_columns: int
    warps: int
    stages: int


def gemm8_config(out_features: int, padded: int, rows: int) -> Gemm8Config:
    """For any rows of 8-bit codes; `padded` columns, a multiple of 64."""
    if rows == 1:
        # Each of 128 threads takes 16 codes of every row at a time.
        block_out = next((block for block in (16, 8) if out_features // block >= 2 * _LEAST_PROGRAMS), 4)
        return Gemm8Config(block_out, 0, 2048, 4, 1)
    block_columns = 128 if padded % 128 == 0 else 64
    if rows > 64:
        # Hopper's warp groups take 64 rows of the weight each.
        return Gemm8Config(128, 128, block_columns, 8, 3)
    if rows > 32:
        return Gemm8Config(64, 64, block_columns, 4, 4)
    # With 32 rows of the weight Hopper uses older instructions, for e4m3 those of float16, which are enough for few
    # rows of inputs; twice the programs matter more.
    block_out = 64 if out_features // 64 >= _LEAST_PROGRAMS else 32
    return Gemm8Config(block_out, 16 if rows <= 16 else 32, block_columns, 4, 5)


def _split(programs: int, units: int, block: int, most: int) -> tuple[int, int]:
    """Splits, and units of each, a multiple of `block`: enough programs, but `most` splits and no empty one."""
    wanted = min(most, -(-_LEAST_PROGRAMS // max(programs, 1)))
    blocks = -(-units // block)
    span = -(-blocks // min(wanted, blocks)) * block
    return -(-units // span), span


def rows_per_dequantize(in_features: int) -> int:
    """Rows of the weight to decode at once, whole tiles."""
    return max(TILE, DEQUANTIZED_WEIGHTS // in_features // TILE * TILE)
