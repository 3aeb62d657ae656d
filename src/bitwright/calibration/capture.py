"""Capture: what the linears of one block are given, seen by hooks while the block runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibration.blocks import BlockRunner, Seen
from bitwright.calibration.statistics import ChannelMoments
from bitwright.calibration.stream import Stream


@dataclass(frozen=True)
class Captured:
    """What `group_inputs` saw of one batch.

    Attributes:
        inputs: of each requested linear, float32 [tokens, in], in order of execution; linears that share an
            input share the tensor. A linear that did not run, such as an expert that no token chose, is absent.
        output: of the block, [batch, tokens, features]; None where it was stopped early.
    """

    inputs: dict[str, Tensor]
    output: Tensor | None

    def coverage(self, linears: Iterable[str]) -> dict[str, int]:
        """How many tokens each of `linears` was given; in a dense block all of the batch's."""
        return {name: len(self.inputs[name]) if name in self.inputs else 0 for name in linears}


@torch.no_grad()
def group_inputs(
    runner: BlockRunner,
    index: int,
    block: nn.Module,
    hidden: Tensor,
    linears: Sequence[str],
    *,
    whole: bool = False,
) -> Captured:
    """What `linears` of block `index` are given for one batch `hidden` [batch, tokens, features].

    Linears are named relative to the block. One hook serves all requested linears that share an input, which
    `adapter.shared_inputs` tells. The block is stopped as soon as every input was seen, unless its output is
    wanted as well (`whole`). Hooks only look; they are gone afterwards, whatever happens.

    Raises:
        ValueError: a linear is not in the adapter.
    """
    if unknown := sorted(set(linears) - set(runner.adapter.linears)):
        raise ValueError(f"{runner.adapter.model_type}: blocks have no linears {unknown}; {runner.adapter.linears}")
    groups = [[name for name in group if name in linears] for group in runner.adapter.shared_inputs]
    leaders = [group[0] for group in groups if group]
    seen: dict[str, list[Tensor]] = {name: [] for name in leaders}

    def look(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value: Tensor = args[0] if args else kwargs["input"]
        # a copy: what follows in the block may work in place
        seen[name].append(value.detach().flatten(0, -2).clone())
        if not whole and all(seen.values()):
            raise Seen

    output = None
    with ExitStack() as hooks:
        for name in leaders:
            handle = block.get_submodule(name).register_forward_pre_hook(partial(look, name), with_kwargs=True)
            hooks.callback(handle.remove)
        try:
            output = runner.run(index, block, hidden)
        except Seen:
            output = None
    joined = {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in seen.items() if values}
    inputs = {name: joined[group[0]] for group in groups for name in group if group[0] in joined}
    return Captured(inputs, output if whole else None)


def input_extremes(
    runner: BlockRunner, index: int, block: nn.Module, stream: Stream, linears: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """The least and the greatest input of each of `linears` over all batches of `stream`."""
    found: dict[str, tuple[float, float]] = {}
    for hidden in stream:
        for name, inputs in group_inputs(runner, index, block, hidden, linears).inputs.items():
            low, high = (float(value) for value in inputs.aminmax())
            before = found.get(name, (low, high))
            found[name] = min(before[0], low), max(before[1], high)
    return found


def input_moments(
    runner: BlockRunner, index: int, block: nn.Module, stream: Stream, linears: Sequence[str]
) -> dict[str, ChannelMoments]:
    """Moments of the inputs of each of `linears` over all batches of `stream`; shared inputs share them.

    Raises:
        CalibrationError: an input is not finite or too large.
    """
    groups = [[name for name in group if name in linears] for group in runner.adapter.shared_inputs]
    leaders = {name: group[0] for group in groups for name in group}
    found = {
        leader: ChannelMoments(block.get_parameter(f"{leader}.weight").shape[1], f"{leader} of block {index}")
        for leader in dict.fromkeys(leaders.values())
    }
    for hidden in stream if found else ():
        for name, inputs in group_inputs(runner, index, block, hidden, list(found)).inputs.items():
            found[name].update(inputs)
    return {name: found[leaders[name]] for name in linears}
