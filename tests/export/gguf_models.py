"""Tiny models quantized into native folders, for exports to GGUF."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import bitwright
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
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, value in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, value.contents(), value.types[0], value.types[-1])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
