"""Tiny models quantized into native folders, for exports to GGUF."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import bitwright
from bitwright.export.gguf import _add
from bitwright.recipe import Recipe

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}


def float_folder(folder: Path, tokenizer: Path, architecture: str, **changes: Any) -> Path:
    """A random float32 checkpoint whose norms and biases are not trivial, with the tokenizer of another folder."""
    config = AutoConfig.for_model(architecture, **{**SIZES, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    for path in tokenizer.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def quantize_into(folder: Path, tokenizer: Path, architecture: str, recipe: dict[str, Any], **changes: Any) -> Path:
    """The model quantized by a recipe whose method is rtn if none is named."""
    source = float_folder(folder / "float", tokenizer, architecture, **changes)
    out = folder / "native"
    bitwright.quantize(str(source), out, recipe=Recipe.model_validate({"method": "rtn", **recipe}))
    return out


def requantize(source: Path, path: Path, kind: str) -> None:
    """`source` with all matrices as `kind`, by the gguf package."""
    changed = {}
    for tensor in gguf.GGUFReader(source).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        stored = "F32" if values.ndim == 1 else kind
        changed[tensor.name] = (gguf.quants.quantize(values, gguf.GGMLQuantizationType[stored]), stored)
    rewrite(source, path, tensors=changed)


def rewrite(
    source: Path,
    path: Path,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[np.ndarray, str] | None] | None = None,
) -> Path:
    """`source` with other values of `keys` and other bytes and types of `tensors`; None leaves one out."""
    keys, tensors = keys or {}, tensors or {}
    reader = gguf.GGUFReader(source)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    architecture = keys.get("general.architecture", fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path, architecture)
    for key, field in fields.items():
        if key not in keys and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for key, value in keys.items():
        if value is not None and key != "general.architecture":
            _add(writer, key, value)
    stored = {tensor.name: (tensor.data, tensor.tensor_type.name) for tensor in reader.tensors}
    for name, found in (stored | dict(tensors)).items():
        if found is not None:
            writer.add_tensor(name, found[0], raw_dtype=gguf.GGMLQuantizationType[found[1]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Where the float16 numbers of a block are, by its type.
_FP16_AT = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
}
_FP16_AT |= {"Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,)}


def random_blocks(kind: str, shape: tuple[int, int], first: float | None = None) -> np.ndarray:
    """Rows of blocks of random bytes with scales below 0.01, or the very first scale `first`; uint8 [rows, bytes]."""
    generator = np.random.default_rng(len(kind) + shape[0])
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = generator.integers(0, 256, (shape[0] * shape[1] // weights, size), dtype=np.uint8)
    for position in _FP16_AT[kind]:
        numbers = (generator.random(len(raw)) * 0.01).astype(np.float16)
        if first is not None and position == _FP16_AT[kind][0]:
            numbers[0] = first
        raw[:, position : position + 2] = numbers[:, None].view(np.uint8)
    return raw.reshape(shape[0], -1)
