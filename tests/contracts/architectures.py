"""Tiny random models of every hand-written adapter, and how far an output moves when tensors change."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # packages that transformers imports where they are installed may warn of their own deprecations
    warnings.simplefilter("ignore")
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitwright.models import adapter_for
    from bitwright.models.discover import Float64

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
OPT = {**SIZES, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
ONE_NORM = {"num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
RELU = {"activation": "relu", "ffn_hidden_size": 96, "alibi": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS = {
    "llama": {**GATED, "model_type": "llama"},
    "llama-bias": {**GATED, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-one-kv-head": {**GATED, "model_type": "llama", "num_key_value_heads": 1, "head_dim": 6},
    "mistral": {**GATED, "model_type": "mistral", "sliding_window": 4},
    "qwen2": {**GATED, "model_type": "qwen2"},
    "qwen3": {**GATED, "model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "gemma3": {**GATED, "model_type": "gemma3_text", "head_dim": 16, "attention_bias": True},
    "falcon": {**SIZES, "model_type": "falcon"},
    "falcon-bias": {**SIZES, "model_type": "falcon", "bias": True},
    "falcon-new": {**SIZES, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "falcon-one-norm": {**SIZES, "model_type": "falcon", "new_decoder_architecture": True, **ONE_NORM},
    "falcon-serial": {**SIZES, "model_type": "falcon", "parallel_attn": False, "multi_query": False, **RELU},
    "mixtral": {**GATED, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**GATED, "model_type": "qwen3_moe", "head_dim": 16, **EXPERTS},
    "opt": OPT,
    "opt-post-norm": {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "opt-gelu": {**OPT, "activation_function": "gelu", "enable_bias": False},
    "opt-plain-norms": {**OPT, "layer_norm_elementwise_affine": False},
}
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


@cache
def build(name: str) -> nn.Module:
    """A random model whose norms and biases are far from one and zero, in float64."""
    torch.manual_seed(0)
    config = dict(CONFIGS[name])
    # the fast implementation of experts has no float64
    keywords = {"experts_implementation": "eager"} if adapter_for(config).routers else {}
    full = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForCausalLM.from_config(full, **keywords)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def logits(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    keywords = {"input_ids": tokens, "use_cache": False}
    tensors = {key: value.to(dtype) for key, value in {**dict(model.named_parameters()), **tensors}.items()}
    with Float64() if dtype == torch.float64 else nullcontext():
        return torch.func.functional_call(model, tensors, (), keywords).logits


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max()).item()
