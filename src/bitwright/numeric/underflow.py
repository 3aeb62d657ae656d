"""Underflow: weights so small that what is stored of them, a scale or a residual, is not.

Scales are never stored as zero: what is below the smallest number of their type becomes that number, and weights far
below it all decode to zero. A few such groups in a matrix of ordinary weights are no loss. Where they hold what the
matrix is made of, the result would be worthless without a word, whichever range or rounding chose it.
"""

from __future__ import annotations

from torch import Tensor

from bitwright.numeric.grid import expand_groups, group_rows, smallest_scale, ungroup_rows
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec

_SHARE = 0.01
"""Of a matrix's energy (sum of squares) that may lie where scales are too small to be stored."""
_TIMES = 4.0
"""How many times the error of the grid that was needed, steps squared over 12, is underflow: 6 dB."""
_LEAST_LOSS = 1e-3
"""Share of the energy there whose loss is of no interest: 30 dB."""
_TINY_RESIDUAL = 2.0**-20
"""Residuals in float16 below it have four bits or fewer."""


def underflow(weight: Tensor, q: QTensor) -> str | None:
    """What is too small to be stored in `q`, made of `weight` [out, in]; None where nothing that matters is."""
    least = smallest_scale(q.spec)
    low = q.grid.scale.abs() <= least
    kept = None if q.outliers is None else q.outliers.residual.abs() <= _TINY_RESIDUAL
    if not bool(low.any()) and (kept is None or not bool(kept.any())):
        return None
    weight = weight.double()
    energy, lost = weight.square(), (weight - q.dequantize().double()).square()
    total = energy.sum()
    steps = _steps(weight, q.spec)
    low &= steps < least
    here = expand_groups(low, q.spec, q.shape[1])
    error = lost[here].sum()
    expected = expand_groups(steps.square() / 12, q.spec, q.shape[1])[here].sum()
    matters = energy[here].sum() > _SHARE * total and error > _LEAST_LOSS * energy[here].sum()
    if matters and error > _TIMES * expected:
        largest = weight[here].abs().max().item()
        return f"weights up to {largest:.3g} need scales below {least:.3g}, the least of {q.spec.scale_dtype}"
    if q.outliers is not None and kept is not None:
        rows, columns = q.outliers.rows()[kept], q.outliers.column[kept]
        error = lost[rows, columns].sum()
        if error > lost.sum() / _TIMES and error > _LEAST_LOSS**2 * total:
            largest = weight[rows, columns].abs().max().item()
            return f"outliers up to {largest:.3g} need residuals below {_TINY_RESIDUAL:.3g}, too small for float16"
    return None


def lost_in_half(values: Tensor, stored: Tensor) -> bool:
    """Whether float16 holds less of the energy of `values` than it must, for being too coarse below 6e-8."""
    exact = values.double()
    return bool((exact - stored.double()).square().sum() > _SHARE * exact.square().sum())


def _steps(weight: Tensor, spec: WeightSpec) -> Tensor:
    """The step that spans each group from its least to its largest weight, [out, groups]."""
    spans = [part.amax(dim=1) - part.amin(dim=1) for part in group_rows(weight, spec)]
    return ungroup_rows(spans, weight.shape[0]) / spec.max_code
