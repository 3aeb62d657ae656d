"""How far a quantized tensor is from its target."""

from __future__ import annotations

import math

from torch import Tensor


def squared_error(target: Tensor, result: Tensor) -> tuple[float, float]:
    """(sum of squared errors, sum of squared targets), accumulated in float64."""
    target64 = target.double()
    return float((result.double() - target64).square().sum()), float(target64.square().sum())


def sqnr_db(error: float, signal: float) -> float:
    """Signal-to-quantization-noise ratio in dB from two sums of squares; inf for a perfect result.

    A zero signal with an error counts as -inf: nothing was there and something is now.
    """
    if error == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / error)
