"""Windows of a text, drawn by a seed.

Of a text that is in memory every disjoint window is a candidate: the text is tokenized, cut from its start, and a
seeded permutation chooses. A large file is divided into *slots* of equal length instead, 16 bytes for every token of
a window, and the seed draws among those: a window is the first whole line behind the start of a slot and what follows.
Slots that were drawn before or do not hold enough tokens are passed over. Either way windows are disjoint, the same
seed gives the same ones, and fewer windows are the first of more. Where slots are too few, the whole file is
tokenized, in a stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.large import LargeRows, LargeText
from bitwright.calibration.text import AnyText
from bitwright.calibration.tokenize import plain_ids, token_ids
from bitwright.errors import CalibrationError

SLOT_BYTES = 16
"""Bytes of a slot for every token of a window. Text has 2 to 5 to a token."""
_USUAL_CHARACTERS = 6
"""Of a passage looked at first for every token needed; the rest only where that was not enough."""
EDGE_TOKENS = 16
"""Left out at either end of a passage, where words may be cut otherwise than in the text."""
_PASSED_OVER = 1024
_TRIES = 4
"""Slots looked at for every window, and so many besides."""
_WHOLE_BYTES = 64
"""For every token needed: a file of more is not tokenized whole."""


def draw_windows(tokenizer: Any, text: AnyText, windows: int, length: int, seed: int) -> Tensor:
    """Disjoint windows of `length` tokens, int64 [windows, length]; the same `seed` always gives the same ones.

    Raises:
        CalibrationError: there is too little text.
        EvaluationError: a part of a file is not text.
    """
    if isinstance(text, LargeText):
        found = _from_slots(tokenizer, text, windows, length, seed)
        if len(found) == windows:
            return torch.tensor(found, dtype=torch.int64)
        if text.size > windows * length * _WHOLE_BYTES:
            raise CalibrationError(
                f"calibration text {text.name!r}: {len(found)} of {windows} windows of {length} tokens were found in "
                f"{text.size} bytes, most of which hold too few tokens; give another text, or fewer or shorter windows"
            )
    return windows_of(token_ids(tokenizer, text), windows, length, seed, text.name)


def windows_of(tokens: Tensor, windows: int, length: int, seed: int, name: str) -> Tensor:
    """The same of the tokens of a text, int64 [tokens]; CalibrationError where they are too few."""
    found = len(tokens) // length
    if found < windows:
        remedy = f"windows={found}" if found else f"window_tokens={max(1, len(tokens) // windows)}"
        raise CalibrationError(
            f"calibration text {name!r}: found {len(tokens)} tokens; {windows} windows of {length} need "
            f"{windows * length}; give a longer text, or use --set calibration.{remedy} or less"
        )
    order = torch.randperm(found, generator=torch.Generator().manual_seed(seed))
    return tokens[: found * length].reshape(found, length)[order[:windows]]


def _from_slots(tokenizer: Any, text: LargeText, windows: int, length: int, seed: int) -> list[list[int]]:
    """Windows from the slots of a large file; fewer where slots are too few."""
    edge = 0 if isinstance(text, LargeRows) else EDGE_TOKENS  # rows begin where they begin
    size = (length + 2 * EDGE_TOKENS) * SLOT_BYTES
    tries = (_PASSED_OVER + _TRIES * windows,)  # a permutation of the slots of a huge file would be large itself
    order = torch.randint(max(1, text.size // size), tries, generator=torch.Generator().manual_seed(seed))
    found: list[list[int]] = []
    taken: list[tuple[int, int]] = []  # rows may be longer than slots
    for slot in order.tolist():
        if len(found) == windows:
            break
        part = text.passage(slot * size, size)
        if any(part.begin < end and begin < part.end for begin, end in taken):
            continue
        for content in (part.content[: (length + 2 * EDGE_TOKENS) * _USUAL_CHARACTERS], part.content):
            ids = plain_ids(tokenizer, content, special=False)[edge : edge + length + EDGE_TOKENS]
            if len(ids) == length + EDGE_TOKENS:
                taken.append((part.begin, part.end))
                found.append(ids[:length])
                break
    return found
