"""Budgets: how many outliers a number of bits per weight leaves room for.

Codes, scales and zeros are known from shapes alone, and so is what an outlier takes. What is left of the budget
is spent on outliers, the same share of every tensor whose policy is `obs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bitwright.errors import PlanError
from bitwright.formats.layout import TensorEntry, packed_bytes
from bitwright.rounding.sensitivity import Obs
from bitwright.rows import Row, Unit

# Outliers in the sample that tells what one takes; a multiple of what fills whole words.
_SAMPLE = 1 << 10


def within_budget(units: Sequence[Unit], bits_per_weight: float) -> tuple[Unit, ...]:
    """`units` whose outliers get the share that makes quantized weights take `bits_per_weight`.

    Only policies `obs` that keep a share take part; those with a threshold keep what is above it.

    Raises:
        PlanError: no tensor's outliers are free to choose, or there is no room for any.
    """
    quantized = [row for unit in units for row in unit.rows if row.action == "quantize"]
    free = [row for row in quantized if row.keeps_a_share]
    if not free:
        raise PlanError(
            f"bits_per_weight={bits_per_weight:g} needs a method whose outliers 'obs' keep a share; use --method spqr, "
            "or leave --bits-per-weight out"
        )
    fixed_bytes = sum(_bytes(row, 0) if row.keeps_a_share else row.bytes for row in quantized)
    # A first outlier brings a tensor's counts and steps; the others only themselves.
    first_bytes = sum(_bytes(row, 1) - _bytes(row, 0) for row in free)
    room_bytes = bits_per_weight * sum(row.weights for row in quantized) / 8 - fixed_bytes - first_bytes
    one_bytes = (_bytes(free[0], 1 + _SAMPLE) - _bytes(free[0], 1)) / _SAMPLE
    share = room_bytes / one_bytes / sum(row.weights for row in free)
    if share <= 0:
        least = 8 * (fixed_bytes + first_bytes) / sum(row.weights for row in quantized)
        raise PlanError(
            f"bits_per_weight={bits_per_weight:g} leaves no room for outliers: codes, scales and zeros take "
            f"{least:.3f}; use --bits-per-weight {least + 0.5:.1f}, or larger groups or fewer bits in the scheme"
        )
    if share > 1:
        raise PlanError(
            f"bits_per_weight={bits_per_weight:g} has room for more outliers than weights; use more bits in the scheme"
        )
    return tuple(replace(unit, rows=tuple(_with_share(row, share) for row in unit.rows)) for unit in units)


def _bytes(row: Row, outliers: int) -> int:
    assert row.spec is not None
    assert row.method is not None
    assert isinstance(row.method.outliers, Obs)
    value_bits = row.method.outliers.value_bits if outliers else 16
    outliers = min(outliers, row.weights)
    return packed_bytes(TensorEntry(row.spec, (row.shape[0], row.shape[1]), outliers, value_bits))


def _with_share(row: Row, share: float) -> Row:
    if not row.keeps_a_share:
        return row
    return replace(row.with_share(share), bytes=_bytes(row, max(1, round(share * row.weights))))
