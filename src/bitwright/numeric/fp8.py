"""fp8 caches, simulated: values over one fixed scale, rounded to e4m3 and saturated, stay floats.

e4m3 (OCP 8-bit floating point specification, version 1.0, section 5; `torch.float8_e4m3fn`): one bit of sign, four of
exponent with bias 7, three of mantissa, no infinities. Its greatest value is 448, its least 2**-9.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, field_validator
from torch import Tensor

from bitwright.numeric.settings import Settings

E4M3_MAX = 448.0
"""The greatest value of e4m3."""


class KvScales(Settings):
    """The fixed scales of one attention's KV cache, float32: `k` of its keys, `v` of its values."""

    k: float = Field(gt=0, allow_inf_nan=False)
    v: float = Field(gt=0, allow_inf_nan=False)

    @field_validator("k", "v")
    @classmethod
    def _is_a_float32(cls, scale: float) -> float:
        # A double above the greatest float32 becomes inf there, and one below the least becomes 0.
        if torch.tensor(scale, dtype=torch.float32).item() != scale:
            raise ValueError(f"scale {scale!r} is not a float32")
        return scale

    @staticmethod
    def of(k_absmax: float, v_absmax: float) -> KvScales:
        """The scales of keys and values whose greatest magnitudes were these.

        Raises:
            ValueError: one is negative or not finite.
        """
        return KvScales(k=fp8_scale(k_absmax), v=fp8_scale(v_absmax))


def fp8_scale(absmax: float) -> float:
    """The scale, a float32, by which a magnitude of `absmax` becomes the greatest value of e4m3.

    Raises:
        ValueError: `absmax` is negative or not finite.
    """
    if not (math.isfinite(absmax) and absmax >= 0):
        raise ValueError(f"a greatest magnitude of {absmax}; needed a finite one, 0 or above")
    # The least normal number stands for the scale of what is 0 throughout, as in integer grids.
    scale = (torch.tensor(absmax, dtype=torch.float32) / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return float(scale)


def round_e4m3(x: Tensor) -> Tensor:
    """`x` float32 rounded to the nearest values of e4m3, ties to even codes; beyond 448 it is 448. NaN stays NaN.

    Rounding passes gradients on as if it were not there; what is saturated gets none.
    """
    kept = x.clamp(-E4M3_MAX, E4M3_MAX)
    # Both differences are exact: a value and what it is rounded to differ by at most a factor of two, or one is 0.
    return kept + (kept.detach().to(torch.float8_e4m3fn).float() - kept).detach()


def fake_quantize_fp8(x: Tensor, scale: float) -> Tensor:
    """`scale * e4m3(x / scale)` in the dtype of `x`, computed in float32; `scale` is a float32."""
    # A tensor, since GPUs multiply by the reciprocal of a number.
    step = torch.full((), scale, dtype=torch.float32, device=x.device)
    return (round_e4m3(x.float() / step) * step).to(x.dtype)
