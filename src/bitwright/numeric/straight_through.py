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
from torch.nn import functional

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


class _FakeQuantize(torch.autograd.Function):
    """See `fake_quantize`; one buffer forward and a handful of passes back, where autograd's own take five times as
    many."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
        ctx.save_for_backward(weights, scale, zero)
        ctx.max_code = max_code
        steps = (weights / scale).add_(zero).round_().clamp_(0, max_code).sub_(zero)
        return steps.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weights, scale, zero = ctx.saved_tensors
        gradient = gradients[0]
        ideal = weights / scale
        codes = (ideal + zero).round_()
        steps = codes.clamp(0, ctx.max_code)
        inside = steps == codes
        of_weights = gradient * inside if ctx.needs_input_grad[0] else None
        of_scale = None
        if ctx.needs_input_grad[1]:
            # d/ds of s * (code - zero): the steps themselves, and of codes inside the range -w / s
            slope = steps.sub_(zero).sub_(ideal.mul_(inside)).mul_(gradient)
            of_scale = slope.sum(dim=2, keepdim=True)
        return of_weights, of_scale, None, None


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, spec: WeightSpec) -> Tensor:
    """What `Grid(scale, zero, spec)` decodes its nearest codes of `weight` to, float32 [out, in], with gradients.

    Args:
        weight: float32 [out, in]; gradients reach it where codes are inside their range.
        scale: [out, groups], as stored; gradients reach it.
        zero: [out, groups], as stored; gradients do not.
        spec: of the codes.
    """
    in_features, width = weight.shape[1], spec.group_width(weight.shape[1])
    padded = functional.pad(weight, (0, -in_features % width)) if in_features % width else weight
    groups = padded.reshape(weight.shape[0], -1, width)
    found: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        groups, scale.unsqueeze(2), zero.detach().unsqueeze(2), spec.max_code
    )
    return found.reshape(weight.shape[0], -1)[:, :in_features]
