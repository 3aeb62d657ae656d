"""Perplexity by the protocol of the GPTQ code (Frantar et al., arXiv 2210.17323), one window at a time.

The text is tokenized once, with the tokenizer's default special tokens, and cut into floor(n / length)
disjoint windows; the tail is dropped and counted. The loss of a window is the mean over its length - 1
targets, and perplexity is exp(mean of the window losses). The original code multiplies and divides by
`length`, which cancels.

`gptq+bos` puts the BOS token in front of every window: special tokens are off in the stream, and a window
is BOS plus length - 1 tokens, so it is no longer than the model was asked to read.

A protocol id names all that two numbers must share to be compared, for example
`gptq:2048|windows:8|text:builtin-evaluation-py3.11.7@439a1e240b75|tokens:0f3c9d1e2a4b`. The tokens part is
a hash of the token ids, so another tokenizer is another protocol.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from bitwright.calibration.large import LargeText
from bitwright.calibration.text import AnyText, Text
from bitwright.calibration.tokenize import token_ids
from bitwright.errors import EvaluationError
from bitwright.evaluate.logits import Model, logit_chunks
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.ids import TOKENIZER_REMEDY
from bitwright.words import Protocol

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Windows:
    """Token windows and where they came from.

    `ids` is [windows, length] int64. `total_tokens` is the length of the tokenized text and
    `dropped_tokens` its tail, too short for a window; windows beyond a limit are in neither. Both are None where the
    text was not read to its end.
    """

    ids: Tensor
    protocol: str
    dropped_tokens: int | None
    total_tokens: int | None

    @property
    def count(self) -> int:
        """Number of windows."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens per window, BOS included."""
        return self.ids.shape[1]


def token_windows(
    tokenizer: Any, text: AnyText, length: int = 2048, limit: int | None = None, protocol: Protocol = "gptq"
) -> Windows:
    """Cut `text` into windows of `length` tokens, the first `limit` of them (None: all).

    Of a large file only the start is read, as much as `limit` windows need.

    Raises EvaluationError where the text is too short for one window, or the protocol, its BOS token, the
    length or the limit cannot be used.
    """
    _check_request(tokenizer, length, limit, protocol)
    step = length - 1 if protocol == "gptq+bos" else length
    whole = not isinstance(text, LargeText) or limit is None
    with reading(f"{text.name}: its tokens", EvaluationError, TOKENIZER_REMEDY):
        tokens = token_ids(
            tokenizer, text, special=protocol != "gptq+bos", enough=None if whole or limit is None else limit * step
        )
    windows = len(tokens) // step
    if windows == 0:
        raise EvaluationError(
            f"text {text.name!r}: found {len(tokens)} tokens; one window needs {step}; "
            f"give a longer text, or use --length {max(2, len(tokens))} or less"
        )
    used = windows if limit is None else min(windows, limit)
    ids = tokens[: used * step].reshape(used, step)
    if protocol == "gptq+bos":
        ids = torch.cat([torch.full((used, 1), int(tokenizer.bos_token_id)), ids], dim=1)
    counted = whole and not (isinstance(text, Text) and not text.whole)
    dropped, total = (len(tokens) % step, len(tokens)) if counted else (None, None)
    return Windows(ids, _protocol_id(protocol, text, ids), dropped, total)


def given_windows(ids: Tensor, name: str, length: int, limit: int | None = None) -> Windows:
    """Windows of token ids [windows, tokens] that are there already: the first `limit`, cut to `length` tokens each.

    Windows shorter than `length` stay as they are. Raises EvaluationError where they have fewer than two tokens.
    """
    ids = ids[:limit, :length].contiguous()
    if ids.numel() == 0 or ids.shape[1] < 2:
        raise EvaluationError(
            f"token windows {name!r}: ids are {list(ids.shape)}, needed at least 1 window of 2 tokens"
        )
    if int(ids.min()) < 0:
        raise EvaluationError(f"token windows {name!r}: ids from {int(ids.min())} on, needed none below 0")
    digest = _sha256(ids)
    parts = (f"ids:{ids.shape[1]}", f"windows:{len(ids)}", f"text:{name.replace('|', '_')}", f"tokens:{digest[:12]}")
    return Windows(ids, "|".join(parts), 0, ids.numel())


def compare_protocols(a: str, b: str) -> None:
    """Raise EvaluationError unless two numbers were measured by the same protocol on the same tokens."""
    if a == b:
        return
    left, right = a.split("|"), b.split("|")
    if len(left) == len(right):
        pairs = [(x, y) for x, y in zip(left, right, strict=True) if x != y]
    else:
        pairs = [(a, b)]
    found = "; ".join(f"{x!r} against {y!r}" for x, y in pairs)
    raise EvaluationError(
        f"protocols differ: {found}; numbers compare only by the same protocol, windows, text and tokens; "
        "measure one of them again with the other's options"
    )


def window_losses(model: Model, windows: Windows, progress: Progress | None = None) -> Tensor:
    """Mean cross-entropy of each window in nats: [windows] float64.

    Log-softmax is float32 in chunks of rows, sums are float64. `progress(done, total)` counts windows.
    Raises EvaluationError where the model's answer has the wrong shape, holds NaN, or gives a target no
    probability at all.
    """
    losses = torch.zeros(windows.count, dtype=torch.float64)
    for index in range(windows.count):
        ids = windows.ids[index]
        total = 0.0
        for rows, logits in logit_chunks(model, ids, f"window {index}"):
            targets = ids[1:][rows].to(logits.device)
            total += float(target_losses(logits, targets, f"window {index}").sum(dtype=torch.float64))
        losses[index] = total / (len(ids) - 1)
        if progress is not None:
            progress(index + 1, windows.count)
    return losses


def perplexity_of(losses: Tensor) -> float:
    """exp(mean of the window losses [windows]); inf where that is beyond float64."""
    mean = float(losses.double().mean())
    return math.exp(mean) if mean < 709 else math.inf


def target_losses(logits: Tensor, targets: Tensor, where: str) -> Tensor:
    """-log softmax(logits)[target] per row: [rows] in the dtype of logits [rows, vocabulary]."""
    losses = logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]
    if not bool(losses.isfinite().all()):
        raise EvaluationError(
            f"{where}: the loss is not finite (NaN or infinite logits); needed finite logits; "
            "check the model's weights for NaN, or compute in float32"
        )
    return losses


def _check_request(tokenizer: Any, length: int, limit: int | None, protocol: str) -> None:
    if protocol not in get_args(Protocol):
        raise EvaluationError(f"found protocol {protocol!r}; needed one of {', '.join(get_args(Protocol))}")
    if length < 2:
        raise EvaluationError(f"found window length {length}; needed 2 or more: one token predicts the next")
    if limit is not None and limit < 1:
        raise EvaluationError(f"found a limit of {limit} windows; needed 1 or more, or None for all")
    if protocol == "gptq+bos" and getattr(tokenizer, "bos_token_id", None) is None:
        raise EvaluationError("protocol 'gptq+bos': this tokenizer has no BOS token; use --protocol gptq")


def _protocol_id(protocol: Protocol, text: AnyText, ids: Tensor) -> str:
    name = text.name.replace("|", "_")
    parts = (
        f"{protocol}:{ids.shape[1]}",
        f"windows:{ids.shape[0]}",
        f"text:{name}@{text.sha256[:12]}",
        f"tokens:{_sha256(ids)[:12]}",
    )
    return "|".join(parts)


def _sha256(ids: Tensor) -> str:
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
