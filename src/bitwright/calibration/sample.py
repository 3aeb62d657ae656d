"""Calibration text from the model itself: sampled at temperature one, where no text of its own kind is at hand.

Williams et al. (NAACL 2025) find such text on a par with real text. A window starts with the model's BOS token,
or with a random token where it has none, and goes on for exactly as many tokens as asked: an end-of-text token
is followed by whatever the model expects next.

Each token is the inverse of the cumulative distribution at a uniform number that only the seed, the window and
the position decide. So windows do not depend on how many are sampled at once, as they would if all drew from
one generator in turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.errors import CalibrationError

BATCH = 8
"""Windows sampled at once: the weights are read once for all, but each has its own keys and values in memory."""


@torch.no_grad()
def sample_from_model(model: Any, windows: int, window_tokens: int, seed: int, *, batch: int = BATCH) -> Tensor:
    """Windows sampled from `model`: int64 [windows, window_tokens].

    Args:
        model: a causal LM of transformers in evaluation mode.
        windows: number of windows.
        window_tokens: their length, the first token included.
        seed: of all random numbers.
        batch: windows sampled at once.

    Raises:
        CalibrationError: the model's context is shorter than a window, or its logits are not finite.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and window_tokens > longest:
        raise CalibrationError(
            f"calibration windows of {window_tokens} tokens; the model reads at most {longest} "
            f"(max_position_embeddings); use --set calibration.window_tokens={longest} or less"
        )
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(windows, window_tokens, generator=generator, dtype=torch.float64)
    first = model.config.bos_token_id
    vocabulary = model.config.vocab_size
    starts = (uniform[:, 0] * vocabulary).long() if first is None else torch.full((windows,), int(first))
    parts = [
        _continue(model, starts[start : start + batch], uniform[start : start + batch])
        for start in range(0, windows, batch)
    ]
    return torch.cat(parts)


def _continue(model: Any, starts: Tensor, uniform: Tensor) -> Tensor:
    """Windows that begin with `starts` [windows], by the numbers `uniform` [windows, tokens]."""
    tokens = starts[:, None]
    found = [tokens]
    cache = None
    for position in range(1, uniform.shape[1]):
        answer = model(input_ids=tokens.to(model.device), past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        tokens = _inverse(answer.logits[:, -1].double().cpu(), uniform[:, position, None])
        found.append(tokens)
    return torch.cat(found, dim=1)


def _inverse(logits: Tensor, uniform: Tensor) -> Tensor:
    """Token [windows, 1] at which the cumulative distribution of `logits` [windows, vocabulary] passes `uniform`."""
    cumulative = logits.softmax(-1).cumsum(-1)
    if not bool(cumulative[:, -1].isfinite().all()):
        raise CalibrationError(
            "sampling calibration text: the model's logits are not finite; needed finite ones; check the "
            "checkpoint's weights for NaN, or use --calibration builtin"
        )
    # scaled by the last sum, which rounding keeps from being one exactly
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return tokens.clamp_max(logits.shape[-1] - 1)
