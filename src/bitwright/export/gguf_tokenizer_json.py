"""What GGUF's own keys do not tell of a `tokenizer.json`, in one key of ours: an import then writes the same file.

GGUF holds the vocabulary and the merges, or scores in their place, and names how text is cut into words. It has no
place for normalizers, decoders, templates and how added tokens are matched. `bitwright.tokenizer` has these as JSON:
`tokenizer.json` and `tokenizer_config.json`, from the first of which vocabulary and merges are left out where the other
keys give them back. Programs that do not know the key ignore it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gguf.constants import TokenType

KEY = "bitwright.tokenizer"
NEVER_MERGED = -1e6
_VERSION = 1


def remainder(content: Mapping[str, Any], config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """The value of `KEY`: what `restored` needs besides `metadata` to give `content` back.

    Args:
        content: `tokenizer.json`, its model a BPE.
        config: `tokenizer_config.json`.
        metadata: `tokenizer.ggml.*` of the file, lists for arrays.
    """
    vocabulary = content["model"]["vocab"]
    apart = sorted(entry["id"] for entry in content["added_tokens"] if entry["content"] not in vocabulary)
    kept = {**content, "model": {**content["model"], "vocab": None, "merges": None}}
    stored = {"version": _VERSION, "tokenizer": kept, "config": dict(config), "apart": apart}
    built = restored(stored, metadata)[0]["model"]
    for part in ("vocab", "merges"):
        if built[part] != content["model"][part]:
            kept["model"][part] = content["model"][part]
    return json.dumps(stored, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def restored(stored: Mapping[str, Any], metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`tokenizer.json` and `tokenizer_config.json` of what `remainder` made, parsed, and of the file's other keys.

    Raises:
        KeyError, TypeError, ValueError: they are not what `remainder` made.
    """
    if stored["version"] != _VERSION:
        raise ValueError(f"version {stored['version']}, needed {_VERSION}")
    kept: dict[str, Any] = stored["tokenizer"]
    model = dict(kept["model"])
    tokens, apart = metadata["tokenizer.ggml.tokens"], frozenset(stored["apart"])
    if model["vocab"] is None:
        types = metadata["tokenizer.ggml.token_type"]
        model["vocab"] = {
            token: number
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind != TokenType.UNUSED and number not in apart
        }
    if model["merges"] is None:
        model["merges"] = merges_of(metadata)
    return {**kept, "model": model}, dict(stored["config"])


def merges_of(metadata: Mapping[str, Any]) -> list[list[str]]:
    """The merges that the file lists, or those that its scores imply: all halves of a token, best tokens first."""
    if "tokenizer.ggml.merges" in metadata:
        return [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: number for number, token in enumerate(tokens)}
    best = sorted((-score, token) for token, score in zip(tokens, scores, strict=True) if score > NEVER_MERGED)
    merges = []
    for _, token in best:
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in halves if left in ids and right in ids]
        merges += [list(pair) for pair in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    return merges
