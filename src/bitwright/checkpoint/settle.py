"""Settling a source: its tensors are those of the model, and who owns the weight of the head is decided.

What the checkpoint stores decides that, as it does where transformers loads it. With `tie_word_embeddings` in
`config.json` (or as the class has it by default) and a class that shares the two weights:

    stored                      the model has
    embedding                   one weight for both
    head                        one weight for both
    both, equal                 one weight for both
    both, different             two weights

Everywhere else there are two, and a head that is not stored is refused. Where this differs from the flag, the config of
the settled source says what was decided.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.checkpoint.agreement import Agreement, agree
from bitwright.checkpoint.shard import TensorInfo
from bitwright.checkpoint.source import Source

TIE = "tie_word_embeddings"


def settled(source: Source) -> Source:
    """`source` itself if all of it is the model's as its config says, else with what differs put right.

    Two equal weights are read to tell that they are; nothing else is.

    Raises:
        CheckpointError: config and tensors contradict each other; see `agree`.
        PlanError: transformers cannot build the model of the config.
    """
    found = agree(source.label, source.config, source.tensors)
    changes, aliases = _tie(source, found)
    if not found.left_out and not changes and not aliases:
        return source
    return _SettledSource(source, found.left_out, changes, aliases)


def _tie(source: Source, found: Agreement) -> tuple[dict[str, Any], dict[str, str]]:
    """What the config should say, and the stored name of a weight that is stored under the other one's name."""
    if found.head is None or found.embedding is None or found.flag is None:
        return {}, {}
    head, embedding = found.head in source.tensors, found.embedding in source.tensors
    one = found.ties and (not (head and embedding) or _equal(source, found.head, found.embedding))
    changes = {} if one == found.flag else {TIE: one}
    return changes, {found.embedding: found.head} if one and not embedding else {}


def _equal(source: Source, one: str, other: str) -> bool:
    first, second = source.read(one), source.read(other)
    return first.shape == second.shape and bool(torch.equal(first.to(second.dtype), second))


class _SettledSource(Source):
    """A source without some tensors, with some stored under other names, and another config."""

    def __init__(self, source: Source, left_out: tuple[str, ...], changes: dict[str, Any], aliases: dict[str, str]):
        self.label, self.config = source.label, {**source.config, **changes}
        self._source, self._aliases = source, aliases
        self.left_out = left_out
        hidden = {*left_out, *aliases.values()}
        tensors: dict[str, TensorInfo] = {name: info for name, info in source.tensors.items() if name not in hidden}
        self.tensors = tensors | {name: source.tensors[stored] for name, stored in aliases.items()}

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        return self._source.read(self._aliases.get(name, name))

    def files(self) -> list[Path]:
        """See `Source.files`."""
        return self._source.files()

    def write_side_files(self, folder: Path) -> list[str]:
        """See `Source.write_side_files`."""
        return self._source.write_side_files(folder)
