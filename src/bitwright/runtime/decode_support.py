"""Which models the lean decode path covers, and why it refuses the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitwright.runtime import cpu, ops
from bitwright.runtime.linear import PackedModule, QuantizedEmbedding, QuantizedLinear, TiedLinear

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Kinds of RoPE whose frequencies do not depend on how long the text has become.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ATTENTIONS = ("eager", "sdpa")
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


def supports(model: Any, max_length: int | None = None) -> str | None:
    """Why `LeanDecoder` does not serve `model` for texts of `max_length` tokens (default: any); None where it does."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if type(model).__name__ != _CLASSES.get(str(kind)):
        return f"it is a {type(model).__name__} of type {kind}, needed one of {', '.join(_CLASSES.values())}"
    return _unlike(model) or _window(model.config, max_length) or _unpacked(model)


def _unlike(model: Any) -> str | None:
    """What else than its family's plain forward pass `model` computes."""
    attentions = [model.config._attn_implementation]
    attentions += [layer.self_attn.config._attn_implementation for layer in model.model.layers]
    if odd := [name for name in attentions if name not in _ATTENTIONS]:
        quantized = " (a quantized KV cache)" if str(odd[0]).startswith("bitwright_kv") else ""
        return f"its attention is {odd[0]}{quantized}, needed one of {', '.join(_ATTENTIONS)}"
    rotary = model.model.rotary_emb
    if rotary.rope_type not in _ROPE_TYPES:
        return f"its RoPE is of type {rotary.rope_type}, needed one of {', '.join(_ROPE_TYPES)}"
    attention = model.model.layers[0].self_attn
    if 2 * rotary.inv_freq.numel() != attention.head_dim:
        return f"RoPE turns {2 * rotary.inv_freq.numel()} of {attention.head_dim} features of a head, needed all"
    if model.config.hidden_act != "silu":
        return f"its activation function is {model.config.hidden_act}, needed silu"
    if model.training:
        return "it is in training mode, needed model.eval()"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"{name or 'the model'} has a hook or a forward of its own"
    return None


def _window(config: Any, max_length: int | None) -> str | None:
    """A sliding window is no matter to texts that fit into it."""
    window = getattr(config, "sliding_window", None)
    if window is None or (max_length is not None and max_length <= window):
        return None
    return f"attention slides over a window of {window} tokens, needed texts no longer than that"


def _unpacked(model: Any) -> str | None:
    """A weight that is not as the products need it."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            return f"{name} is {parameter.dtype} on {parameter.device}, needed torch.float32 on cpu"
    modules = {"lm_head": model.lm_head}
    for index, layer in enumerate(model.model.layers):
        modules |= {f"layers.{index}.{name}": getattr(layer.self_attn, name) for name in _ATTENTION_LINEARS}
        modules |= {f"layers.{index}.{name}": getattr(layer.mlp, name) for name in _MLP_LINEARS}
    for name, module in modules.items():
        if type(module) not in (nn.Linear, QuantizedLinear, TiedLinear):
            return f"{name} is a {type(module).__name__}, needed nn.Linear or QuantizedLinear"
        if isinstance(module, QuantizedLinear) and module.site is not None:
            return f"{name} quantizes or transforms its inputs ({module.site.label()})"
        owner = module.embedding if isinstance(module, TiedLinear) else module
        if isinstance(owner, PackedModule) and (ops.cpu_kernel() is None or not cpu.available()):
            return "the compiled CPU kernels are missing or turned off, the slow reference serves"
        if isinstance(owner, PackedModule) and not cpu.supports(owner.packed()):
            return f"{name} is packed in groups or on a device that the CPU kernels do not take"
    embedding = model.model.embed_tokens
    if type(embedding) not in (nn.Embedding, QuantizedEmbedding):
        return f"the embedding is a {type(embedding).__name__}, needed nn.Embedding or QuantizedEmbedding"
    if isinstance(embedding, QuantizedEmbedding) and embedding.output_dtype != torch.float32:
        return f"the embedding gives {embedding.output_dtype}, needed torch.float32"
    return None
