"""Qwen2 and Qwen2.5: Llama's block with biases on query, key and value, which follow their rows."""

from __future__ import annotations

from bitwright.models.adapter import Adapter
from bitwright.models.edges import Config
from bitwright.models.llama import llama


def qwen2(config: Config) -> Adapter:
    """Adapter of a Qwen2 checkpoint; PlanError if `config` lacks the sizes of a block."""
    # transformers' Qwen2Config assumes 32 key-value heads where the key is absent
    return llama({"num_key_value_heads": 32, **config})
