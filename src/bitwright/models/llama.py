"""Llama and Mistral: RMSNorm, RoPE in halves, grouped-query attention, gated feed-forward.

Biases are optional (`attention_bias`, `mlp_bias`) and follow their rows. The gate passes through an
activation, so only `up_proj` has an exact edge to `down_proj`.
"""

from __future__ import annotations

from bitwright.models.adapter import Adapter
from bitwright.models.edges import BlockShape, Config, LinearEdge, NormEdge, RotaryEdge

QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def llama(config: Config) -> Adapter:
    """Adapter of a Llama checkpoint; PlanError if `config` lacks the sizes of a block."""
    return Adapter(
        model_type=config.get("model_type", "llama"),
        blocks="model.layers",
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        shape=BlockShape.from_config(config),
        shared_inputs=(QUERY_KEY_VALUE, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",)),
        edges=(
            NormEdge("input_layernorm", QUERY_KEY_VALUE),
            RotaryEdge("self_attn.q_proj", "self_attn.k_proj"),
            LinearEdge("self_attn.v_proj", "self_attn.o_proj", attention=True),
            NormEdge("post_attention_layernorm", GATE_UP),
            LinearEdge("mlp.up_proj", "mlp.down_proj"),
        ),
        norms=("input_layernorm", "post_attention_layernorm"),
        tied_head=bool(config.get("tie_word_embeddings", False)),
    )


def mistral(config: Config) -> Adapter:
    """Adapter of a Mistral checkpoint: Llama's block."""
    # transformers' MistralConfig assumes 8 key-value heads where the key is absent
    return llama({"num_key_value_heads": 8, **config})
