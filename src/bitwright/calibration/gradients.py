"""Gradients: how much the model's loss cares about each linear's output for each token.

Layer-wise rounding minimises the squared error of a linear's output, every token counting alike. The model does
not see it so: an error of the same size costs much at one token and nothing at another. With g_t the gradient of
the loss with respect to the linear's output for token t, weighing tokens by `|g_t|**2` turns the layer's
objective into a second-order estimate of the model's own loss (empirical Fisher; GuidedQuant, Kim et al. 2025,
section 3, with one group of output channels).

The gradients take one pass forward, which keeps every block's inputs (in memory or on disk), and one backward,
block by block. At no time is more than one block in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.logits import head_gradient
from bitwright.calibration.stream import Stream
from bitwright.errors import CalibrationError

TokenWeights = dict[tuple[int, str], Tensor]
"""(block, linear relative to the block) -> float32 [windows, tokens], the squared gradient norm of each output."""

Progress = Callable[[str], None]


def token_weights(
    runner: BlockRunner, memory_bytes: int | None = None, folder: Path | None = None, progress: Progress | None = None
) -> TokenWeights:
    """The squared norm of the loss gradient at every linear's output, token by token.

    The loss is the sum over tokens of the negative log likelihood of the next one. `memory_bytes` bounds what the
    inputs of all blocks together may take in memory, beyond which they go to files in `folder`.

    Raises:
        CalibrationError: a gradient is not finite.
    """
    say = progress or (lambda _: None)
    share = None if memory_bytes is None else memory_bytes // (runner.blocks + 1)
    found: TokenWeights = {}
    seen: dict[str, list[Tensor]] = {name: [] for name in runner.adapter.linears}

    def note(name: str, grad: Tensor) -> None:
        squares = grad.detach().float().square().sum(dim=-1)
        seen[name].append(squares.reshape(-1, runner.ids.shape[1]))  # some blocks flatten windows and tokens

    def head(stream: Stream) -> None:
        _loss_gradients(runner, stream)

    passes = backward_blocks(runner, head, note, lambda what: say(f"gradients: {what}"), share, folder)
    with closing(passes) as blocks:
        for index in blocks:
            for name, parts in seen.items():
                weights = found[(index, name)] = torch.cat(parts)
                parts.clear()
                if not bool(torch.isfinite(weights).all()):
                    raise CalibrationError(
                        f"{name} of block {index}: gradients are NaN or infinite; use --set inputs.weighting=uniform"
                    )
    return found


def backward_blocks(
    runner: BlockRunner,
    head: Callable[[Stream], None],
    note: Callable[[str, Tensor], None],
    say: Progress,
    stream_bytes: int | None = None,
    folder: Path | None = None,
) -> Generator[int, None, None]:
    """One pass forward and one backward; yields each block's index, the last first, once its gradients are known.

    Args:
        runner: of the blocks.
        head: replaces the last block's outputs by the gradients with respect to them.
        note: told a linear, named relative to the block, and the gradient of its output, batch by batch.
        say: told what is being done.
        stream_bytes: a block's inputs that take more go to a file in `folder`; None: see `Stream`.
        folder: see `Stream`.
    """
    with ExitStack() as stack:
        inputs = [stack.enter_context(runner.first_inputs(stream_bytes, folder))]
        for index in range(runner.blocks):
            say(f"forward, block {index}")
            inputs.append(stack.enter_context(inputs[-1].copy()))
            runner.advance(index, runner.block(index), inputs[-1])
        say("head")
        gradient = inputs.pop()
        head(gradient)
        for index in reversed(range(runner.blocks)):
            say(f"backward, block {index}")
            with inputs.pop() as stream:
                _backward(runner, index, stream, gradient, note)
            yield index


def _loss_gradients(runner: BlockRunner, stream: Stream) -> None:
    """Replace the last block's outputs in `stream` by the gradient of the loss with respect to them."""
    with runner.head() as logits_of:
        for number, hidden in enumerate(stream):
            ids = runner.ids[number * runner.batch :][: len(hidden)]
            # Window by window, and rows by rows: logits are the widest thing there is.
            pieces = [
                head_gradient(logits_of, window[None], partial(_next_token_loss, tokens))
                for window, tokens in zip(hidden.unbind(), ids.unbind(), strict=True)
            ]
            stream.write(number, torch.cat(pieces))


def _next_token_loss(tokens: Tensor, logits: Tensor, rows: slice) -> Tensor:
    """Of some rows of the logits of a window of `tokens`; nothing follows the last one."""
    targets = tokens[1:][rows]
    return nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum")


def _backward(
    runner: BlockRunner, index: int, stream: Stream, gradient: Stream, note: Callable[[str, Tensor], None]
) -> None:
    """Take `gradient` from one block's outputs to its inputs."""
    block = runner.block(index)
    with ExitStack() as hooks:
        for name in runner.adapter.linears:
            handle = block.get_submodule(name).register_forward_hook(partial(_watch, partial(note, name)))
            hooks.callback(handle.remove)
        for number, hidden in enumerate(stream):
            leaf = hidden.detach().clone().requires_grad_(True)
            runner.run(index, block, leaf).backward(gradient.read(number))  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            gradient.write(number, leaf.grad)


def _watch(note: Callable[[Tensor], None], module: nn.Module, args: object, output: Tensor) -> None:
    """Have `note` called with the gradient of `output`, once that is known."""
    output.register_hook(note)  # type: ignore[no-untyped-call]
