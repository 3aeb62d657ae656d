"""Fisher information of every linear's output: how much the model's answers move with it, token by token and output
by output.

The gradients are those of the negative log likelihood of tokens drawn from the model's own answers, not of the text:
the mean of their outer products is the Hessian of KL itself. With the text's tokens it is not, and ranks tensors
worse (see `benchmarks/allocation.py` and LOG.md). One token is drawn for each position.

One pass forward, one backward, block by block, as in `calibration.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.gradients import TokenWeights, backward_blocks
from bitwright.calibration.logits import head_gradient
from bitwright.calibration.stream import Stream
from bitwright.errors import CalibrationError
from bitwright.evaluate.logits import row_chunks


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
    tokens: dict[str, list[Tensor]] = {name: [] for name in runner.adapter.linears}
    outputs: dict[str, Tensor] = {}

    def note(name: str, grad: Tensor) -> None:
        squares = grad.detach().float().square()
        tokens[name].append(squares.sum(-1).reshape(-1, runner.ids.shape[1]))  # some blocks flatten windows
        batch = squares.flatten(0, -2).double().sum(0)
        outputs[name] = outputs[name] + batch if name in outputs else batch

    def head(stream: Stream) -> None:
        _head_gradients(runner, stream, seed)

    def say(what: str) -> None:
        progress(f"Fisher information: {what}")

    with closing(backward_blocks(runner, head, note, say, folder=folder)) as blocks:
        for index in blocks:
            for name, parts in tokens.items():
                total = outputs.pop(name)
                if not bool(total.isfinite().all()):
                    raise CalibrationError(
                        f"{name} of block {index}: gradients are NaN or infinite; check the weights for NaN"
                    )
                found.tokens[(index, name)] = torch.cat(parts)
                found.outputs[(index, name)] = total / runner.ids.numel()
                parts.clear()
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
            numbers = uniform[number * runner.batch :][: len(hidden)]
            pieces = [
                head_gradient(logits_of, window[None], partial(_drawn_token_loss, some))
                for window, some in zip(hidden.unbind(), numbers.unbind(), strict=True)
            ]
            stream.write(number, torch.cat(pieces))


def _drawn_token_loss(uniform: Tensor, logits: Tensor, rows: slice) -> Tensor:
    """Of tokens that some rows of the logits of a window themselves give, drawn by its numbers `uniform` [tokens]."""
    numbers = uniform[rows]
    chunks = row_chunks(len(logits), logits.shape[-1])
    drawn = torch.cat([draw_tokens(logits.detach()[some], numbers[some]) for some in chunks])
    return nn.functional.cross_entropy(logits, drawn, reduction="sum")
