"""Fisher information of every linear's output: how much the model's answers move with it, token by token and output
by output.

The gradients are those of the negative log likelihood of tokens drawn from the model's own answers, not of the text:
the mean of their outer products is the Hessian of KL itself. With the text's tokens it is not, and ranks tensors
worse (see `benchmarks/allocation.py` and LOG.md). One token is drawn for each position.

One pass forward, one backward, block by block, as in `calibration.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.gradients import TokenWeights
from bitwright.calibration.stream import Stream
from bitwright.errors import CalibrationError
from bitwright.evaluate.perplexity import row_chunks


@dataclass(frozen=True)
class Fisher:
    """Second moments of the gradients g [out] at the outputs of the linears, by (block, linear).

    Attributes:
        tokens: |g|^2 of every token, float32 [windows, tokens].
        outputs: mean over tokens of g^2, float64 [out].
    """

    tokens: TokenWeights
    outputs: dict[tuple[int, str], Tensor]


def fisher_information(
    runner: BlockRunner, seed: int = 0, folder: Path | None = None, progress: Callable[[str], None] = lambda _: None
) -> Fisher:
    """The Fisher information at every linear of every block; `folder` takes streams too large for memory.

    Raises:
        CalibrationError: a gradient is not finite.
    """
    found = Fisher({}, {})
    with ExitStack() as stack:
        inputs = [stack.enter_context(runner.first_inputs(folder=folder))]
        for index in range(runner.blocks):
            progress(f"Fisher information: forward, block {index}")
            inputs.append(stack.enter_context(inputs[-1].copy()))
            runner.advance(index, runner.block(index), inputs[-1])
        progress("Fisher information: head")
        gradient = inputs.pop()
        _head_gradients(runner, gradient, seed)
        for index in reversed(range(runner.blocks)):
            progress(f"Fisher information: backward, block {index}")
            with inputs.pop() as stream:
                _block_gradients(runner, index, stream, gradient, found)
    return found


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token for each row of `logits` [rows, vocabulary], by numbers `uniform` float64 [rows] in 0 .. 1."""
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return tokens[:, 0].clamp_max(logits.shape[-1] - 1)


def _head_gradients(runner: BlockRunner, stream: Stream, seed: int) -> None:
    """Replace the last block's outputs in `stream` by the gradients with respect to them."""
    uniform = torch.rand(runner.ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with runner.head() as logits_of:
        for number, hidden in enumerate(stream):
            pieces = []
            for offset, window in enumerate(hidden.unbind()):
                leaf = window[None].detach().clone().requires_grad_(True)
                logits = logits_of(leaf)[0].float()
                numbers = uniform[number * runner.batch + offset]
                rows = row_chunks(len(logits), logits.shape[-1])
                drawn = torch.cat([draw_tokens(logits.detach()[some], numbers[some]) for some in rows])
                nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
                assert leaf.grad is not None
                pieces.append(leaf.grad)
            stream.write(number, torch.cat(pieces))


def _block_gradients(runner: BlockRunner, index: int, stream: Stream, gradient: Stream, found: Fisher) -> None:
    """Add one block's information to `found`; `gradient` goes from the block's outputs to its inputs."""
    block, linears = runner.block(index), runner.adapter.linears
    tokens: dict[str, list[Tensor]] = {name: [] for name in linears}
    outputs = {name: torch.zeros(block.get_parameter(f"{name}.weight").shape[0]).double() for name in linears}

    def note(name: str, grad: Tensor) -> None:
        squares = grad.detach().float().square()
        tokens[name].append(squares.sum(-1).reshape(-1, runner.ids.shape[1]))  # some blocks flatten windows
        outputs[name].add_(squares.flatten(0, -2).double().sum(0))

    with ExitStack() as hooks:
        for name in linears:
            handle = block.get_submodule(name).register_forward_hook(partial(_watch, partial(note, name)))
            hooks.callback(handle.remove)
        for number, hidden in enumerate(stream):
            leaf = hidden.detach().clone().requires_grad_(True)
            runner.run(index, block, leaf).backward(gradient.read(number))  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            gradient.write(number, leaf.grad)
    for name in linears:
        if not bool(outputs[name].isfinite().all()):
            raise CalibrationError(f"{name} of block {index}: gradients are NaN or infinite; check the weights for NaN")
        found.tokens[(index, name)] = torch.cat(tokens[name])
        found.outputs[(index, name)] = outputs[name] / runner.ids.numel()


def _watch(note: Callable[[Tensor], None], module: nn.Module, args: object, output: Tensor) -> None:
    """Have `note` called with the gradient of `output`, once that is known."""
    output.register_hook(note)  # type: ignore[no-untyped-call]
