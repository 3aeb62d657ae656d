"""Logits of a window: from any model in one go, from a large vocabulary in blocks of rows.

A model of transformers is a body, which gives hidden states, and a head. Where the logits of a window would take more
than half a gigabyte, the body runs once and is left before the head; then the model runs again on some rows at a time,
its body replaced by those hidden states, so that everything that the class does behind its body is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibration.logits import row_blocks
from bitwright.calibration.skeleton import replaced_forward
from bitwright.errors import EvaluationError
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.ids import check_ids, embedding_rows

#: Takes ids [1, tokens] int64, returns logits [1, tokens, vocabulary] or an object that has `.logits`.
Model = Callable[..., Any]

WHOLE_ELEMENTS = 2**27
"""Of the logits of a window: 512 MiB in float32. More are made in blocks."""
_CHUNK_ELEMENTS = 2**23  # of logits worked on at once: 32 MiB in float32


def logit_chunks(model: Model, ids: Tensor, where: str) -> Iterator[tuple[slice, Tensor]]:
    """The logits of the tokens of one window, ids [tokens], that have a next one, a few rows at a time.

    Gives slices of rows, in order, and float32 [rows, vocabulary] on the model's device. Raises EvaluationError where
    the model's answer is not what it should be.
    """
    vocabulary = embedding_rows(model)
    hidden = None
    if vocabulary is not None and len(ids) * vocabulary > WHOLE_ELEMENTS:
        hidden = _before_head(model, ids, where)
    if hidden is None:
        logits = forward_logits(model, ids, where)
        for rows in row_chunks(len(ids) - 1, logits.shape[-1]):
            yield rows, logits[:-1][rows].float()
        return
    assert vocabulary is not None
    for block in row_blocks(len(ids) - 1, vocabulary, WHOLE_ELEMENTS):
        logits = _head(model, ids[block], hidden[:, block], where)
        for rows in row_chunks(len(logits), vocabulary):
            yield slice(block.start + rows.start, block.start + rows.stop), logits[rows].float()


def forward_logits(model: Model, ids: Tensor, where: str) -> Tensor:
    """Logits [tokens, vocabulary] of one window of ids [tokens], in the model's dtype and on its device."""
    answer = _answer(model, ids, where)
    logits = getattr(answer, "logits", answer)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (1, len(ids)):
        raise EvaluationError(
            f"{where}: the model answered {shape}; needed logits [1, {len(ids)}, vocabulary]; "
            "pass a causal language model that returns the logits of every position"
        )
    if int(ids.max()) >= logits.shape[-1]:
        raise EvaluationError(
            f"{where}: token id {int(ids.max())} is outside the model's vocabulary of {logits.shape[-1]}; "
            "use the tokenizer that belongs to this model"
        )
    return logits[0]


def _answer(model: Model, ids: Tensor, where: str) -> Any:
    """What the model says to ids [tokens]; None where it was left before its head."""
    device = getattr(model, "device", None)
    batch = ids[None].to(device) if isinstance(device, torch.device) else ids[None]
    check_ids(ids, embedding_rows(model), where, EvaluationError)
    remedy = f"check the model's config.json, or use --length {len(ids) // 2} or less"
    with torch.no_grad(), reading(f"{where}: running the model", EvaluationError, remedy):
        try:
            return model(batch)
        except _AtHead:
            return None


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices that cover `rows` rows of logits, small enough to work on several copies of each."""
    step = max(1, _CHUNK_ELEMENTS // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class _AtHead(Exception):
    """The body has run; the head need not."""


def _body(model: Any) -> nn.Module | None:
    """What gives the hidden states of a model of transformers; None where that cannot be told."""
    find = getattr(model, "get_decoder", None)
    body = None if find is None else find()
    return body if isinstance(body, nn.Module) and body is not model else None


def _before_head(model: Any, ids: Tensor, where: str) -> Tensor | None:
    """What the body of `model` gives for ids [tokens]: [1, tokens, features]; None: it has no body that can be told."""
    body = _body(model)
    if body is None:
        return None
    found: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0])
        raise _AtHead

    handle = body.register_forward_hook(note)
    try:
        _answer(model, ids, where)
    finally:
        handle.remove()
    return found[0] if found else None


def _head(model: Any, ids: Tensor, hidden: Tensor, where: str) -> Tensor:
    """Logits [rows, vocabulary] of hidden states [1, rows, features] as the body gives them for ids [rows]."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    body = _body(model)
    assert body is not None
    with replaced_forward(body, lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)):
        return forward_logits(model, ids, where)
