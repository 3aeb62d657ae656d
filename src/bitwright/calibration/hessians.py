"""Hessians of the linears of one block, gathered while its inputs run through it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.capture import group_inputs
from bitwright.calibration.gradients import TokenWeights
from bitwright.calibration.statistics import ChannelMoments, Hessian
from bitwright.calibration.stream import Stream


@dataclass(frozen=True)
class Evidence:
    """What calibration tells of one linear; linears that share inputs share the tensors.

    Attributes:
        hessian: mean of w x x^T over its inputs, float32 [in, in].
        tokens: inputs seen.
        cross: mean of w r x^T with the float model's inputs r, float32 [in, in]; None where it was not asked for.
        moments: extremes and means of its input channels; None where they were not asked for.
    """

    hessian: Tensor
    tokens: int
    cross: Tensor | None = None
    moments: ChannelMoments | None = None


class Reference:
    """What the linears of one block are given in the float model, kept for the passes that compare with it.

    Attributes:
        outputs: of the block, hence the next block's inputs.
    """

    def __init__(self, runner: BlockRunner, index: int, block: nn.Module, stream: Stream, folder: Path | None = None):
        """Run the float `block` once on the float model's `stream`; `folder` takes what is too large for memory."""
        adapter = runner.adapter
        self.outputs = stream.copy()
        self._inputs: dict[str, Stream] = {}
        for number, hidden in enumerate(stream):
            captured = group_inputs(runner, index, block, hidden, adapter.linears, whole=True)
            for group in adapter.shared_inputs:
                inputs = captured.inputs[group[0]]
                if group[0] not in self._inputs:
                    shape = (*stream.shape[:2], inputs.shape[1])
                    self._inputs[group[0]] = Stream(shape, stream.batch, folder=folder)
                self._inputs[group[0]].write(number, inputs.reshape(*hidden.shape[:2], -1))
            assert captured.output is not None
            self.outputs.write(number, captured.output)
        self._leaders = {name: group[0] for group in adapter.shared_inputs for name in group}

    def inputs(self, linear: str, number: int) -> Tensor:
        """What `linear`, named relative to the block, is given in batch `number`: float32 [tokens, in]."""
        return self._inputs[self._leaders[linear]].read(number).flatten(0, 1)

    def close(self) -> None:
        """Free the inputs; `outputs` stays."""
        for stream in self._inputs.values():
            stream.close()


class HessianPass:
    """Gathers the Hessians of one set of windows, weighed by `weights` (None: tokens count alike)."""

    def __init__(self, runner: BlockRunner, weights: TokenWeights | None):
        """Nothing is run yet."""
        self._runner, self._weights = runner, weights

    def gather(
        self,
        index: int,
        block: nn.Module,
        stream: Stream,
        linears: Sequence[str],
        reference: Reference | None = None,
        *,
        moments: bool = False,
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
        channels = {leader: ChannelMoments(hessian.features, hessian.name) for leader, hessian in sums.items()}
        for number, hidden in enumerate(stream) if sums else ():
            captured = group_inputs(self._runner, index, block, hidden, linears)
            for leader, hessian in sums.items():
                members = [name for name in linears if leaders[name] == leader]
                weights = self._batch_weights(index, members, number)
                others = None if reference is None else reference.inputs(leader, number)
                hessian.update(captured.inputs[leader], weights=weights, reference=others)
                if moments:
                    channels[leader].update(captured.inputs[leader])
        found = {
            leader: Evidence(
                hessian.mean,
                hessian.tokens,
                None if reference is None else hessian.cross_mean,
                channels[leader] if moments else None,
            )
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
