"""Probes: the model's KL when one of its tensors alone is quantized, measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.logits import row_blocks, vocabulary_of
from bitwright.calibration.stream import Stream
from bitwright.checkpoint.source import Source
from bitwright.evaluate.divergence import kl_divergence
from bitwright.evaluate.logits import row_chunks
from bitwright.models.adapter import Adapter

_KEPT_ELEMENTS = 2**27
"""Of the float model's logits in a batch; where they are more, its hidden states are kept and the logits made again."""


class Prober:
    """The float model on some windows, any one linear of which may be replaced.

    Whole in memory. What precedes a block is run once and not again: `advance` from block to block.
    """

    def __init__(
        self, source: Source, adapter: Adapter, ids: Tensor, rotated: tuple[str, ...] = (), folder: Path | None = None
    ):
        """Run the float model once.

        Args:
            source: of the float weights.
            adapter: of the architecture.
            ids: windows to measure on, int64 [windows, tokens].
            rotated: as `BlockRunner` takes it.
            folder: where hidden states and logits go that are too large for memory.

        Raises:
            CheckpointError, CalibrationError: as `BlockRunner` does.
        """
        self._runner = BlockRunner(source, adapter, ids, rotated=rotated)
        self._blocks = [self._runner.block(index) for index in range(self._runner.blocks)]
        self._resources = ExitStack()
        self._folder = folder
        self._inputs = self._resources.enter_context(self._runner.first_inputs(folder=folder))
        self._next = 0
        self._logits_of = self._resources.enter_context(self._runner.head())
        with self._inputs.copy() as stream:
            self._run(0, stream)
            self._vocabulary = vocabulary_of(self._logits_of, stream.read(0))
            self._wide = stream.batch * ids.shape[1] * self._vocabulary > _KEPT_ELEMENTS
            self._reference = self._resources.enter_context(stream.copy() if self._wide else self._kept(stream))

    def __enter__(self) -> Prober:
        """Itself; leaving frees the model."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free streams and head."""
        self._resources.close()
        self._blocks = []

    def advance(self) -> None:
        """From now on the linears of the next block may be replaced."""
        self._runner.advance(self._next, self._blocks[self._next], self._inputs)
        self._next += 1

    def kl(self, linear: str, weight: Tensor) -> float:
        """Mean KL to the float model in nats per token when `linear`, of the current block, has another `weight`.

        `weight` is float32 [out, in]; `linear` is named relative to the block. As in `evaluate`, the last position of
        a window is left out.
        """
        place = self._blocks[self._next].get_parameter(f"{linear}.weight")
        before, total, count = place.data, 0.0, 0
        place.data = weight.to(place.dtype)
        try:
            with self._inputs.copy() as stream:
                self._run(self._next, stream)
                for number, hidden in enumerate(stream):
                    for one, other in self._pairs(self._reference.read(number), hidden):
                        rows = row_chunks(*one.shape)
                        total += sum(float(kl_divergence(one[some], other[some]).sum()) for some in rows)
                        count += len(one)
        finally:
            place.data = before
        return total / count

    def _run(self, first: int, stream: Stream) -> None:
        for index in range(first, len(self._blocks)):
            self._runner.advance(index, self._blocks[index], stream)

    def _kept(self, stream: Stream) -> Stream:
        """The logits of the float model's last hidden states."""
        kept = Stream((*self._runner.ids.shape, self._vocabulary), stream.batch, folder=self._folder)
        for number, hidden in enumerate(stream):
            kept.write(number, self._logits(hidden))
        return kept

    def _pairs(self, kept: Tensor, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [rows, vocabulary] of the float model, from what is kept of a batch, and of `hidden` in its place."""
        if not self._wide:
            yield from zip(kept[:, :-1], self._logits(hidden)[:, :-1], strict=True)
            return
        for one, other in zip(kept, hidden, strict=True):
            for rows in row_blocks(len(one) - 1, self._vocabulary):
                yield self._logits(one[None, rows])[0], self._logits(other[None, rows])[0]

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        return self._logits_of(hidden).float()
