"""Qwen3: Llama's block with RMSNorm on each head of query and key.

The norms undo any scaling of the rows of `q_proj` and `k_proj`, so the query-key edge lives on the norms'
weights. These are [head_dim] and shared by all heads: one scale per RoPE pair.
"""

from __future__ import annotations

from dataclasses import replace

from bitwright.models.adapter import Adapter
from bitwright.models.edges import Config, RotaryEdge
from bitwright.models.llama import llama

QUERY_KEY = RotaryEdge("self_attn.q_norm", "self_attn.k_norm", shared=True)


def qwen3(config: Config) -> Adapter:
    """Adapter of a Qwen3 checkpoint; PlanError if `config` lacks the sizes of a block."""
    # transformers' Qwen3Config assumes these where the keys are absent
    base = llama({"num_key_value_heads": 32, "head_dim": 128, **config})
    return replace(
        base,
        edges=tuple(QUERY_KEY if isinstance(edge, RotaryEdge) else edge for edge in base.edges),
        norms=("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"),
    )
