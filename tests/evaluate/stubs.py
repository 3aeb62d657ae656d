"""Stub models and a stub tokenizer: plain callables with known answers."""

from __future__ import annotations

from types import SimpleNamespace

import torch

VOCABULARY = 11


class Letters:
    """One token per character; BOS in front of the stream, as default special tokens have it."""

    bos_token_id = 0

    def __call__(self, text, *, add_special_tokens=True, verbose=True):
        assert not verbose, "the tokenizer may warn"
        ids = [1 + ord(letter) % (VOCABULARY - 1) for letter in text]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


class Table:
    """A bigram model: logits depend on the current token only."""

    def __init__(self, seed, vocabulary=VOCABULARY, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn(vocabulary, vocabulary, generator=generator)

    def __call__(self, ids):
        return SimpleNamespace(logits=self.table[ids])


def uniform(ids):
    return torch.zeros(*ids.shape, VOCABULARY)
