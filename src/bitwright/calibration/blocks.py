"""Blocks: the real decoder blocks of `transformers`, run one at a time on calibration windows.

    runner = BlockRunner(source, adapter, windows.ids)
    with runner.first_inputs() as stream:
        for index in range(runner.blocks):
            block = runner.block(index)
            ...  # capture.group_inputs(runner, index, block, batch, linears) for each batch of the stream
            runner.advance(index, block, stream)

The model itself prepares everything that a block is called with: it runs on real tokens with its blocks replaced
by recorders, which note their arguments (masks, position embeddings) and let the hidden states through. Arguments
are recorded once for each batch size. They may depend on a block's index and on the length of the windows but
not on the tokens, which is checked by running on other tokens as well.

In memory at any time: what lies before the blocks while the first inputs are made (in essence the embedding),
then the block or blocks that the caller holds, and the stream (see `stream`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibration.skeleton import (
    drop_own,
    fill,
    fill_buffers,
    fill_own,
    read_float,
    replaced_forward,
    set_tensor,
)
from bitwright.calibration.stream import Stream
from bitwright.checkpoint.skeleton import build_skeleton
from bitwright.checkpoint.source import Source
from bitwright.errors import CalibrationError
from bitwright.models import Adapter, block_count
from bitwright.numeric.hadamard import hadamard_blocks

BATCH_TOKENS = 2048
"""Tokens in a batch by default: enough for matrix products at full speed, few enough for wide activations."""

#: Called as `block(hidden, *args, **kwargs)`; answers the new hidden states, perhaps first in a tuple.
Block = Callable[..., Any]


@dataclass(frozen=True)
class Arguments:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockRunner:
    """Runs the blocks of one checkpoint on one set of windows.

    Attributes:
        blocks: number of decoder blocks.
        batch: windows in a batch.
        ids: int64 [windows, tokens].
    """

    def __init__(
        self, source: Source, adapter: Adapter, ids: Tensor, batch: int | None = None, rotated: Sequence[str] = ()
    ):
        """Build the model without weights and record what its blocks are called with.

        Args:
            source: of the float weights.
            adapter: of the architecture.
            ids: token windows of equal length, int64 [windows, tokens].
            batch: windows run at once; None: as many as make 2048 tokens.
            rotated: linears, by name relative to a block, whose weights were made for inputs that went through
                `hadamard_blocks`; blocks put them through it.

        Raises:
            PlanError: transformers cannot build the model.
            CheckpointError: a tensor before the blocks is missing or has another shape.
            CalibrationError: the windows do not fit the model, or its blocks' arguments depend on the tokens.
        """
        self.source, self.adapter, self.ids, self._rotated = source, adapter, ids, tuple(rotated)
        self.blocks = block_count(source.config)
        self._skeleton = build_skeleton(source.config)
        check_windows(ids, self._skeleton.config)
        windows, tokens = ids.shape
        self.batch = min(windows, batch or max(1, BATCH_TOKENS // tokens))
        self._answers_tuples = False  # found out by the first run
        self._arguments: dict[int, list[Arguments]] = {}  # by batch size
        for name, module in self._skeleton.named_modules():
            if not name.startswith(f"{adapter.blocks}."):
                fill_buffers(self._skeleton, module)
        with self._before_blocks():
            for size in {self.batch, windows % self.batch or self.batch}:
                self._note_arguments(size)

    def first_inputs(self, memory_bytes: int | None = None, folder: Path | None = None) -> Stream:
        """The inputs of block 0, [windows, tokens, features]; the arguments are those of `Stream`.

        Raises:
            CheckpointError: a tensor before the blocks cannot be read.
            OSError: the stream's file cannot be made or is full.
        """
        with self._before_blocks():
            stream: Stream | None = None
            for index, start in enumerate(range(0, len(self.ids), self.batch)):
                hidden, _ = self._run_before_blocks(self.ids[start : start + self.batch])
                if stream is None:
                    stream = Stream((*self.ids.shape, hidden.shape[-1]), self.batch, memory_bytes, folder)
                stream.write(index, hidden)
        assert stream is not None  # there is at least one window
        return stream

    def block(self, index: int) -> nn.Module:
        """Block number `index` with float32 weights read from the source, its own copy; no gradients.

        Raises:
            CheckpointError: a tensor of the block is missing, damaged, or of another shape.
        """
        block: nn.Module = deepcopy(self._block(index))
        fill(self._skeleton, block, f"{self.adapter.blocks}.{index}", self.source)
        for name in self._rotated:
            block.get_submodule(name).register_forward_pre_hook(_rotate_input)
        return block.requires_grad_(False)

    def arguments(self, index: int, batch: int) -> Arguments:
        """What block `index` is called with besides hidden states of `batch` windows.

        Batch sizes met for the first time take a run of what lies before the blocks; use few of them.
        """
        if batch not in self._arguments:
            with self._before_blocks():
                self._note_arguments(batch)
        return self._arguments[batch][index]

    def run(self, index: int, block: Block, hidden: Tensor) -> Tensor:
        """Output of block `index` for `hidden` [batch, tokens, features], in the same shape.

        `block` need not be a module: learning passes a function. Gradients are recorded where `hidden` or the
        block's parameters ask for them, so not for blocks as `block` gives them.
        """
        arguments = self.arguments(index, len(hidden))
        output = block(hidden, *arguments.args, **arguments.kwargs)
        if not isinstance(output, tuple):
            return output  # type: ignore[no-any-return]
        self._answers_tuples = True  # a recorder of a model of one block cannot tell
        return output[0]  # type: ignore[no-any-return]

    def advance(self, index: int, block: Block, stream: Stream) -> None:
        """Replace every batch of `stream` by the block's output for it, without gradients.

        Raises:
            CalibrationError: an output is not finite.
        """
        with torch.no_grad():
            for number, hidden in enumerate(stream):
                output = self.run(index, block, hidden)
                if not bool(output.isfinite().all()):
                    bad = int((~output.isfinite()).sum())
                    raise CalibrationError(
                        f"output of block {index}: {bad} of {output.numel()} values of batch {number} are NaN or "
                        "infinite; needed finite ones; check the checkpoint's weights for NaN"
                    )
                stream.write(number, output)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Within, a function from outputs of the last block [batch, tokens, features] to logits [.., vocabulary].

        Gradients with respect to those outputs are recorded where they are asked for. What lies behind the blocks
        is in memory until the context is left.
        """
        head = self._skeleton.get_output_embeddings()
        embedding = self._skeleton.get_input_embeddings()
        names = (*self.adapter.kept, *filter(None, [self.adapter.final_norm]))
        with self._filled(names), ExitStack() as stack:
            self._fill_head(head)
            stack.callback(drop_own, head)
            # the embedding's answer is not used: the last block's place gives out the hidden states
            width = embedding.embedding_dim
            stack.enter_context(replaced_forward(embedding, lambda ids: torch.zeros(*ids.shape, width)))
            for index in range(self.blocks - 1):
                stack.enter_context(replaced_forward(self._block(index), self._let_through))
            yield self._logits

    def _logits(self, hidden: Tensor) -> Tensor:
        answer = (hidden,) if self._answers_tuples else hidden
        with replaced_forward(self._block(self.blocks - 1), lambda *_, **__: answer):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
            logits: Tensor = self._skeleton(input_ids=ids, use_cache=False).logits
        return logits

    def _block(self, index: int) -> nn.Module:
        """A block of the skeleton, without weights."""
        block: nn.Module = self._skeleton.get_submodule(f"{self.adapter.blocks}.{index}")
        return block

    def _let_through(self, *args: Any, **kwargs: Any) -> Any:
        """A block that does nothing."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self._answers_tuples else hidden

    @contextmanager
    def _filled(self, names: Iterable[str]) -> Iterator[None]:
        """Within, these modules outside the blocks have their own tensors (not those of modules in them)."""
        modules = {name: self._skeleton.get_submodule(name) for name in names}
        with ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(drop_own, module)
                fill_own(module, name, self.source)
            yield

    def _before_blocks(self) -> AbstractContextManager[None]:
        """Within, everything that runs before the blocks can run."""
        return self._filled((self.adapter.embedding, *self.adapter.kept))

    def _fill_head(self, head: nn.Module) -> None:
        for leaf, meta in list(head.named_parameters(recurse=False)):
            name = f"{self.adapter.head}.{leaf}"
            if self.adapter.tied_head and leaf == "weight":
                name = f"{self.adapter.embedding}.{leaf}"
            set_tensor(head, leaf, read_float(self.source, name, meta.shape))

    def _note_arguments(self, batch: int) -> None:
        """Note what every block is called with besides hidden states of `batch` windows."""
        chosen = self.ids[torch.arange(batch) % len(self.ids)]
        _, found = self._run_before_blocks(chosen)
        _, others = self._run_before_blocks(chosen.flip(1))
        for number, (one, other) in enumerate(zip(found, others, strict=True)):
            if not _equal(vars(one), vars(other)):
                raise CalibrationError(
                    f"block {number} of {self.adapter.model_type} is called with arguments that depend on the "
                    "tokens; needed arguments that all windows share; its blocks cannot be run one at a time"
                )
        self._arguments[batch] = found

    def _run_before_blocks(self, ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """The first block's input for `ids` [batch, tokens], and what every block is called with."""
        try:
            return self._record(ids)
        except _AnswersTuples:
            self._answers_tuples = True
            return self._record(ids)

    @torch.no_grad()
    def _record(self, ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        found: dict[int, Arguments] = {}
        first: list[Tensor] = []

        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            answer = self._let_through(*args, **kwargs)
            hidden = answer[0] if self._answers_tuples else answer
            if first and hidden.shape != first[0].shape:
                raise _AnswersTuples  # the model took item 0 of what it believed to be a tuple
            first.append(hidden)
            found[index] = Arguments(args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
            if len(found) == self.blocks:
                raise Seen  # what follows has no weights
            return answer

        with ExitStack() as stack:
            for index in range(self.blocks):
                stack.enter_context(replaced_forward(self._block(index), partial(record, index)))
            try:
                self._skeleton(input_ids=ids, use_cache=False)
            except Seen:
                return first[0], [found[index] for index in range(self.blocks)]
        raise CalibrationError(
            f"{self.adapter.model_type} ran blocks {sorted(found)} of {self.blocks}; needed every block once; its "
            "blocks cannot be run one at a time"
        )


def _rotate_input(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
    return (hadamard_blocks(args[0]), *args[1:])


class Seen(Exception):
    """Everything that was wanted has been seen; the rest of the model need not run."""


class _AnswersTuples(Exception):
    """The blocks of this model answer tuples."""


def check_windows(ids: Tensor, config: Any) -> None:
    """Refuse windows that the model of `config` (transformers') cannot read.

    Raises:
        CalibrationError: they are not int64 [windows, tokens], too long, or of tokens that it does not know.
    """
    if ids.ndim != 2 or ids.numel() == 0 or ids.dtype != torch.int64:
        raise CalibrationError(
            f"calibration windows: got {ids.dtype} {list(ids.shape)}, needed torch.int64 [windows, tokens] with at "
            "least one token; see calibration_windows"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        raise CalibrationError(
            f"calibration windows of {ids.shape[1]} tokens; the model reads at most {longest} "
            f"(max_position_embeddings); use --set calibration.window_tokens={longest} or less"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        raise CalibrationError(
            f"calibration windows hold the token ids {low} to {high}; the model knows 0 to {config.vocab_size - 1}; "
            "use the tokenizer that belongs to this model"
        )


def _equal(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are the same, down to the bits of tensors inside them."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)
