"""Overlap: whether an evaluation text holds windows that a model was calibrated on.

A shingle is 32 consecutive tokens, a fingerprint the hash of one. Eight shingles of every calibration window are
hashed, evenly spaced, and those of the evaluation tokens at every position. A window overlaps where at least
half of its fingerprints are found: one alone proves little, for texts of one kind share phrases (the two halves
of the built-in text have runs of up to 144 tokens in common, though no paragraph).

The hash is a polynomial in the token ids modulo 2**64, finished by splitmix64 (Steele et al., OOPSLA 2014)
because its low bits alone are weak. 53 bits are kept, which every reader of JSON can hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

SHINGLE_TOKENS = 32
SHINGLES = 8
"""Fingerprints of one window."""
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token is multiplied away
_KEPT_BITS = 53


def fingerprints(ids: Tensor) -> list[list[int]]:
    """Up to 8 hashes of each window of `ids` [windows, tokens]; none where windows are shorter than a shingle."""
    hashes = _hashes(ids)
    last = hashes.shape[1] - 1
    if last < 0:
        return [[] for _ in hashes]
    starts = np.unique(np.linspace(0, last, SHINGLES).round().astype(int))
    return [[int(value) for value in row] for row in hashes[:, starts]]


def overlap(ids: Tensor, known: Sequence[Sequence[int]]) -> int:
    """How many calibration windows lie in an evaluation text.

    Args:
        ids: [windows, tokens] of the evaluation text, consecutive.
        known: fingerprints of every calibration window.
    """
    every = np.array([value for window in known for value in window], dtype=np.uint64)
    hits = iter(np.isin(every, _hashes(ids.reshape(1, -1))))
    counts = [(sum(bool(next(hits)) for _ in window), len(window)) for window in known]
    return sum(2 * count >= size > 0 for count, size in counts)


def _hashes(ids: Tensor) -> NDArray[np.uint64]:
    """Hashes of the shingles at every position: [windows, max(0, tokens - 31)]."""
    tokens = ids.numpy().astype(np.uint64)
    count = max(0, tokens.shape[1] - SHINGLE_TOKENS + 1)
    hashes = np.zeros((tokens.shape[0], count), dtype=np.uint64)
    for offset in range(SHINGLE_TOKENS):
        # one more than the id, so that a leading token 0 counts; unsigned arrays wrap around silently
        hashes = hashes * _BASE + tokens[:, offset : offset + count] + np.uint64(1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    kept: NDArray[np.uint64] = hashes >> np.uint64(64 - _KEPT_BITS)
    return kept
