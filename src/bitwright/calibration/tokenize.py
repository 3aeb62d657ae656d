"""Tokens of long texts, piece by piece: those that the tokenizer gives for the whole, without its memory.

A tokenizer takes some 150 bytes for every byte of a text. Here it is given pieces of some 100,000 characters, each
with the end of the one before in front. Where both have cut their common part alike over many tokens, neither the end
of the first piece nor the start of the second is felt any more, and the one is followed up to there, the other from
there on. A piece that never agrees with its neighbour is put together with it, in the end with the whole text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.large import LargeText
from bitwright.calibration.text import AnyText

PIECE_CHARACTERS = 2**17
SHARED_CHARACTERS = 2**12
"""Of two neighbouring pieces."""
AGREEING_TOKENS = 16
"""On either side of the place where one piece takes over from the other."""


def token_ids(tokenizer: Any, text: AnyText, *, special: bool = True, enough: int | None = None) -> Tensor:
    """The tokens of a text, int64 [tokens], as the tokenizer cuts it whole.

    Args:
        tokenizer: of the model.
        text: read as far as needed.
        special: with the tokenizer's own special tokens; a text that a chat template has written never gets them.
        enough: so many tokens of the start will do, and there may be a few more; None: all.
    """
    found = array("q")  # a quarter of what a list takes
    for ids in _streamed(tokenizer, _pieces(text), special and not text.templated):
        found.extend(ids)
        if enough is not None and len(found) >= enough:
            break
    return torch.frombuffer(found, dtype=torch.int64) if found else torch.empty(0, dtype=torch.int64)


def plain_ids(tokenizer: Any, content: str, special: bool = True) -> list[int]:
    """The tokens of one text, cut in one go."""
    options = {} if special else {"add_special_tokens": False}
    # verbose=False: the text is meant to be longer than the model's context
    return [int(token) for token in tokenizer(content, verbose=False, **options)["input_ids"]]


def _pieces(text: AnyText) -> Iterable[str]:
    if isinstance(text, LargeText):
        return text.pieces()
    step = PIECE_CHARACTERS
    return (text.content[start : start + step] for start in range(0, max(1, len(text.content)), step))


@dataclass(frozen=True)
class _Cut:
    """A piece as the tokenizer cuts it: tokens, and the character at which each begins."""

    text: str
    ids: list[int]
    starts: list[int]


def _streamed(tokenizer: Any, pieces: Iterable[str], special: bool) -> Iterator[list[int]]:
    """The tokens of the joined pieces, a part at a time."""
    parts = iter(pieces)
    first = next(parts, "")
    second = next(parts, None)
    if second is None or not getattr(tokenizer, "is_fast", False):  # only fast ones tell where a token begins
        yield plain_ids(tokenizer, first + (second or "") + "".join(parts), special)
        return
    current, before, after = _first_cut(tokenizer, first, special)
    yield before
    done = 0
    while second is not None:
        shared = current.text[-SHARED_CHARACTERS:]
        following = _cut(tokenizer, shared + second)
        place = _meeting(current, following, len(current.text) - len(shared))
        if place is None:
            current = _cut(tokenizer, current.text + second)
        else:
            yield current.ids[done : place[0]]
            current, done = following, place[1]
        second = next(parts, None)
    yield current.ids[done:]
    yield after


def _cut(tokenizer: Any, text: str) -> _Cut:
    found = tokenizer(text, verbose=False, add_special_tokens=False, return_offsets_mapping=True)
    return _Cut(text, found["input_ids"], [start for start, _ in found["offset_mapping"]])


def _first_cut(tokenizer: Any, text: str, special: bool) -> tuple[_Cut, list[int], list[int]]:
    """The first piece, and the special tokens that the tokenizer puts before and behind a text."""
    cut = _cut(tokenizer, text)
    if not special:
        return cut, [], []
    ids = plain_ids(tokenizer, text)
    extra = len(ids) - len(cut.ids)
    before = next((count for count in range(extra + 1) if ids[count : count + len(cut.ids)] == cut.ids), extra)
    return cut, ids[:before], ids[before + len(cut.ids) :]


def _meeting(one: _Cut, other: _Cut, offset: int) -> tuple[int, int] | None:
    """Tokens (of one, of the other) that begin at the same character, the same ones on either side of them.

    `offset` is the character of `one` at which `other` begins. The place nearest to the middle of what they share is
    taken, the farthest from the end of the one and the start of the other.
    """
    middle = offset + (len(one.text) - offset) // 2
    places = {
        start + offset: index for index, start in reversed(list(enumerate(other.starts))) if start < SHARED_CHARACTERS
    }
    shared = [index for index in range(1, len(one.ids)) if one.starts[index] > one.starts[index - 1] >= offset]
    for index in sorted(shared, key=lambda index: abs(one.starts[index] - middle)):
        there = places.get(one.starts[index])
        if there is None or min(index, there) < AGREEING_TOKENS:
            continue
        left = one.ids[index - AGREEING_TOKENS : index + AGREEING_TOKENS]
        right = other.ids[there - AGREEING_TOKENS : there + AGREEING_TOKENS]
        if len(left) == 2 * AGREEING_TOKENS and left == right:
            return index, there
    return None
