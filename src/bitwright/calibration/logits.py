"""Logits, the widest thing there is, a block of rows at a time where a vocabulary is large.

A row of logits depends on one row of hidden states alone, so rows may be made in any blocks. Matrix products give
every row the same bits in blocks as together on the processors and libraries that this is tested on; smaller logits are
nevertheless made in one go, so that numbers and bytes of known models cannot move on others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WHOLE_ELEMENTS = 2**26
"""Of the logits of one window: 256 MiB in float32. More are made in blocks."""
BLOCK_ELEMENTS = 2**25


def row_blocks(tokens: int, vocabulary: int, whole_elements: int | None = None) -> Iterator[slice]:
    """Slices that cover the rows of logits [tokens, vocabulary]: one, or blocks of a power of two of rows.

    Logits of more than `whole_elements` come in blocks; None: of more than `WHOLE_ELEMENTS`.
    """
    step = tokens
    if tokens * vocabulary > (WHOLE_ELEMENTS if whole_elements is None else whole_elements):
        step = 2 ** max(0, (BLOCK_ELEMENTS // vocabulary).bit_length() - 1)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def vocabulary_of(logits_of: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    """Columns of the logits that `logits_of` makes of hidden states [windows, tokens, features]."""
    with torch.no_grad():
        return logits_of(hidden[:1, :1]).shape[-1]


def head_gradient(
    logits_of: Callable[[Tensor], Tensor], window: Tensor, loss: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """The gradient with respect to the hidden states before the head, in their shape [1, tokens, features].

    Args:
        logits_of: the head.
        window: the hidden states.
        loss: of float32 logits [rows, vocabulary] and which rows they are; the losses of all rows are added up.
    """
    pieces = []
    for rows in row_blocks(window.shape[1], vocabulary_of(logits_of, window)):
        leaf = window[:, rows].detach().clone().requires_grad_(True)
        loss(logits_of(leaf)[0].float(), rows).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        pieces.append(leaf.grad)
    return torch.cat(pieces, dim=1)
