"""Hessians of the linears of one block, gathered while its inputs run through it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.capture import group_inputs
from bitwright.calibration.gradients import TokenWeights
from bitwright.calibration.statistics import Hessian
from bitwright.calibration.stream import Stream


@dataclass(frozen=True)
class Evidence:
    """What calibration tells of one linear; linears that share inputs share the tensors.

    Attributes:
        hessian: mean of w x x^T over its inputs, float32 [in, in].
        tokens: inputs seen.
        cross: mean of w r x^T with the float model's inputs r, float32 [in, in]; None where it was not asked for.
    """

    hessian: Tensor
    tokens: int
    cross: Tensor | None = None


@dataclass(frozen=True)
class Reference:
    """The block of the float model, and the inputs that the float model gives it, batch by batch."""

    block: nn.Module
    stream: Stream


class HessianPass:
    """Gathers the Hessians of one set of windows, weighed by `weights` (None: tokens count alike)."""

    def __init__(self, runner: BlockRunner, weights: TokenWeights | None):
        """Nothing is run yet."""
        self._runner, self._weights = runner, weights

    def gather(
        self, index: int, block: nn.Module, stream: Stream, linears: Sequence[str], reference: Reference | None = None
    ) -> dict[str, Evidence]:
        """The evidence of each of `linears`, names relative to block `index`; with `reference`, cross moments too.

        Raises:
            CalibrationError: an input is not finite or too large, or every token of a linear has weight 0.
        """
        groups = [[name for name in group if name in linears] for group in self._runner.adapter.shared_inputs]
        leaders = {name: group[0] for group in groups for name in group}
        sums = {
            leader: Hessian(
                block.get_parameter(f"{leader}.weight").shape[1],
                cross=reference is not None,
                name=f"{leader} of block {index}",
            )
            for leader in dict.fromkeys(leaders.values())
        }
        for number, hidden in enumerate(stream) if sums else ():
            captured = group_inputs(self._runner, index, block, hidden, linears)
            others: dict[str, Tensor] = {}
            if reference is not None:
                others = group_inputs(
                    self._runner, index, reference.block, reference.stream.read(number), linears
                ).inputs
            for leader, hessian in sums.items():
                members = [name for name in linears if leaders[name] == leader]
                weights = self._batch_weights(index, members, number)
                hessian.update(captured.inputs[leader], weights=weights, reference=others.get(leader))
        found = {
            leader: Evidence(hessian.mean, hessian.tokens, None if reference is None else hessian.cross_mean)
            for leader, hessian in sums.items()
        }
        return {name: found[leaders[name]] for name in linears}

    def _batch_weights(self, index: int, linears: Iterable[str], number: int) -> Tensor | None:
        """Of the tokens of batch `number`, [tokens]: what the loss cares about the outputs of `linears` together."""
        if self._weights is None:
            return None
        size = self._runner.batch
        together = torch.stack([self._weights[(index, name)] for name in linears]).sum(dim=0)
        return together[number * size : (number + 1) * size].flatten()
