"""How far a quantized tensor is from its target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PIECE = 1 << 17


def not_finite(tensor: Tensor) -> int:
    """How many values of `tensor`, of any type and shape, are NaN or infinite."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return 0
    # In pieces: torch.isfinite makes three temporaries as large as its input.
    flat, starts = tensor.detach().reshape(-1), range(0, tensor.numel(), _PIECE)
    return sum(int((~torch.isfinite(flat[start : start + _PIECE])).sum().item()) for start in starts)


def exact_sum(values: Tensor) -> float:
    """Sum of float64 `values` [..., columns]: within rows in PyTorch's order, over rows exact.

    The same to the last bit whatever the number of threads: PyTorch splits rows among them, but cuts a sum of
    everything into as many parts as there are threads.
    """
    return math.fsum(values.sum(dim=-1).reshape(-1).tolist())


def squared_error(target: Tensor, result: Tensor) -> tuple[float, float]:
    """(sum of squared errors, sum of squared targets) of two tensors of one shape [..., columns].

    Within rows in the wider of the two types, over rows exact: the same to the last bit whatever the number of
    threads. The difference of nearly equal float32 values is itself nearly exact.
    """
    sums = (values.mul(values).sum(dim=-1).reshape(-1).tolist() for values in (result - target, target))
    error, signal = (math.fsum(rows) for rows in sums)
    return error, signal


def sqnr_db(error: float, signal: float) -> float:
    """Signal-to-quantization-noise ratio in dB from two sums of squares; inf for a perfect result.

    A zero signal with an error counts as -inf: nothing was there and something is now.
    """
    if error == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / error)
