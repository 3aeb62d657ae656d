"""Gemma 3 (text): Llama's attention and gated feed-forward between norms before and behind them, and QK norms.

Norms multiply by one plus their stored weight. The norms behind attention and feed-forward feed the residual, where
nothing could take a scale back: they have no edge. They read whole vectors that the other edges leave alone.
"""

from __future__ import annotations

from dataclasses import replace

from bitwright.models.adapter import Adapter
from bitwright.models.edges import Config, LinearEdge, NormEdge, RotaryEdge
from bitwright.models.llama import GATE_UP, QUERY_KEY_VALUE, llama


def gemma3_text(config: Config) -> Adapter:
    """Adapter of a Gemma 3 text checkpoint; PlanError if `config` lacks the sizes of a block."""
    # transformers' Gemma3TextConfig assumes these where the keys are absent
    base = llama({"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, **config})
    return replace(
        base,
        edges=(
            NormEdge("input_layernorm", QUERY_KEY_VALUE, offset=1.0),
            RotaryEdge("self_attn.q_norm", "self_attn.k_norm", shared=True, offset=1.0),
            LinearEdge("self_attn.v_proj", "self_attn.o_proj", attention=True),
            NormEdge("pre_feedforward_layernorm", GATE_UP, offset=1.0),
            LinearEdge("mlp.up_proj", "mlp.down_proj"),
        ),
        norms=(
            "input_layernorm",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    )
