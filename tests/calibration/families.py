"""Configurations of tiny models: every described family, and what discovered ones do differently."""

from __future__ import annotations

from typing import Any

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
OPT = {**SIZES, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
FALCON = {**SIZES, "model_type": "falcon", "ffn_hidden_size": 128}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**GATED, "model_type": "llama"},
    "llama-tied": {**GATED, "model_type": "llama", "tie_word_embeddings": True},
    "llama-rope": {**GATED, "model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "mistral": {**GATED, "model_type": "mistral", "sliding_window": 5},  # needs a mask, unlike the others
    "qwen2": {**GATED, "model_type": "qwen2"},
    "qwen3": {**GATED, "model_type": "qwen3"},
    "opt": OPT,
    "opt-350m": {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    # discovered ones: arguments that differ between blocks, scaled embeddings, parallel blocks, another head name,
    # biased heads, blocks that answer tuples, arguments [batch * heads, ...]
    "gemma3": {**GATED, "model_type": "gemma3_text", "sliding_window": 5, "num_hidden_layers": 6},
    "cohere": {**GATED, "model_type": "cohere"},
    "gpt_neox": {**GATED, "model_type": "gpt_neox"},
    "phi": {**GATED, "model_type": "phi"},
    "falcon": FALCON,
    "falcon-alibi": {**FALCON, "alibi": True},
    "falcon-one": {**FALCON, "num_hidden_layers": 1},
}
