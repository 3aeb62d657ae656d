"""Tiny GGUF files of random models, written with the gguf package in llama.cpp's conventions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM

from bitwright.checkpoint.gguf import BLOCK_NAMES, OUTER_NAMES

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 2.0**-17,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
METADATA = {
    "embedding_length": 64,
    "feed_forward_length": 96,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "context_length": 128,
    "attention.layer_norm_rms_epsilon": 2.0**-17,
    "rope.freq_base": 50000.0,
}


def tiny_model(architecture: str, **changes: Any) -> torch.nn.Module:
    """A random float32 model whose norms and biases are not trivial."""
    config = AutoConfig.for_model(
        architecture,
        **{
            **SIZES,
            "head_dim": 16,
            "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
            "tie_word_embeddings": False,
            **changes,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gguf_name(name: str) -> str:
    outer = {theirs: ours for ours, theirs in OUTER_NAMES.items()}
    if name in outer:
        return outer[name]
    _, _, index, module, kind = name.replace("self_attn.", "self_attn_").replace("mlp.", "mlp_").split(".")
    inner = {theirs.replace(".", "_"): ours for ours, theirs in BLOCK_NAMES.items()}
    return f"blk.{index}.{inner[module]}.{kind}"


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order, as its converter writes it."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def stored_tensors(model: torch.nn.Module, architecture: str) -> dict[str, np.ndarray]:
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = value.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            array = interleaved(array, heads)
        tensors[gguf_name(name)] = np.ascontiguousarray(array)
    return tensors


def write_gguf(
    path: Path,
    architecture: str,
    tensors: dict[str, np.ndarray],
    kind: Kind = Kind.F32,
    changes: dict[str, Any] | None = None,
) -> Path:
    """`tensors` with matrices stored as `kind`; `changes` adds metadata, or removes it where it is None."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    values = {**METADATA, "attention.key_length": 16, "attention.value_length": 16}
    values = {f"{architecture}.{key}": value for key, value in values.items()}
    values |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    values |= {f"{architecture}.vocab_size": 320, "tokenizer.ggml.padding_token_id": 1, **(changes or {})}
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, array in tensors.items():
        stored = kind if array.ndim > 1 else Kind.F32
        writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
