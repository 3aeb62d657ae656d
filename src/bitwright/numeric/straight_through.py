"""Straight-through: rounding that learning can see past.

The forward values are those of `numeric.grid`, to the last bit: what is trained is what will be stored. Gradients
pass through roundings as if they were not there (Bengio et al. 2013); a clamp blocks them outside its range. As in
OmniQuant (Shao et al. 2023, section 3.2), the zero takes no part in gradients: they reach a group's range through its
scale alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.numeric.grid import expand_groups
from bitwright.numeric.spec import WeightSpec


class _Replace(torch.autograd.Function):
    """The values of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, of: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def straight_through(value: Tensor, of: Tensor) -> Tensor:
    """`value`, whose gradient goes to `of` (of the same shape) as if the two were equal."""
    return _Replace.apply(value.detach(), of)  # type: ignore[no-any-return, no-untyped-call]


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, spec: WeightSpec) -> Tensor:
    """What `Grid(scale, zero, spec)` decodes its nearest codes of `weight` to, float32 [out, in], with gradients.

    Args:
        weight: float32 [out, in].
        scale: [out, groups], as stored; gradients reach it.
        zero: [out, groups], as stored; gradients do not.
        spec: of the codes.
    """
    wide_scale = expand_groups(scale, spec, weight.shape[1])
    wide_zero = expand_groups(zero.detach(), spec, weight.shape[1])
    position = weight / wide_scale + wide_zero
    codes = torch.clamp(straight_through(torch.round(position.detach()), position), 0, spec.max_code)
    return wide_scale * (codes - wide_zero)
