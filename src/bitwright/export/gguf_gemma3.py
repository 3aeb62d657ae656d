"""Gemma 3 (text) GGUF files as a source of float weights; the other architectures are `checkpoint.gguf`'s.

The file says little of what the architecture fixes: five sliding blocks for every full one, RoPE of base 10000 in the
sliding ones, embeddings times the root of their width, a query scale that follows from the sizes. Keys that would say
otherwise are refused. Norms are stored as one plus their weight, in float32. Subtracting the one again is exact for
every sum that a weight can make; a weight between -0.5 and 0.5 comes back as the neighbour that has the same sum with
one, which is all that the model computes with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.checkpoint.gguf_config import TOKEN_IDS
from bitwright.checkpoint.gguf_file import (
    PLAIN,
    GgufHeader,
    GgufTensor,
    check_types,
    read_gguf_header,
    read_gguf_tensor,
)
from bitwright.checkpoint.shard import TensorInfo
from bitwright.checkpoint.source import Source
from bitwright.errors import CheckpointError
from bitwright.export.gguf_model import ARCHITECTURES, gguf_model
from bitwright.export.gguf_tokenizer_import import write_tokenizer

ARCHITECTURE = "gemma3"
_HEAD = "output.weight"
_ARCHITECTURE = ARCHITECTURES["gemma3_text"]
_LOCAL_ROPE_THETA = 10000.0
_PATTERN = 6
# llama.cpp's own exception for the largest of the family
_BLOCKS_OF_LARGEST = 62
_WIDTHS_OF_A_HEAD = (
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "rope.dimension_count",
    "rope.dimension_count_swa",
)
# What the graph of llama.cpp, or transformers' class as this config calls it, would compute otherwise.
_FIXED: dict[str, object] = {
    "attention.sliding_window_pattern": _PATTERN,
    "rope.freq_base_swa": _LOCAL_ROPE_THETA,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "expert_count": 0,
    "attention.causal": True,
}


class Gemma3Source(Source):
    """One `.gguf` file of `general.architecture` gemma3."""

    def __init__(self, path: Path):
        """Read the header of the file at `path`.

        Raises:
            CheckpointError: the file is damaged, not Gemma 3, or lacks metadata or tensors.
        """
        self.path, self.label = path, str(path)
        header = read_gguf_header(path)
        check_types(path, header.tensors)
        self.config = _Metadata(path, header).config()
        self._place = _place(path, header.tensors, self.config)
        self.tensors = {name: TensorInfo(entry.shape, entry.dtype) for name, entry in self._place.items()}

    def read(self, name: str) -> Tensor:
        """See `Source.read`; quantized tensors come as float32, others in the dtype of the file."""
        if name not in self._place:
            raise CheckpointError(f"{self.path}: no tensor {name}; needed one of its {len(self._place)}")
        values = read_gguf_tensor(self.path, name, self._place[name])
        return values.float() - _ARCHITECTURE.norm_offset if values.ndim == 1 else values

    def files(self) -> list[Path]:
        """See `Source.files`."""
        return [self.path]

    def write_side_files(self, folder: Path) -> list[str]:
        """See `Source.write_side_files`: the tokenizer of the file."""
        write_tokenizer(self.path, self.config, folder)
        return []


class _Metadata:
    """The header of `path`, read as the description of a model."""

    def __init__(self, path: Path, header: GgufHeader):
        self.path, self.values, self.tensors = path, header.metadata, header.tensors
        found = self.values.get("general.architecture")
        if found != ARCHITECTURE:
            raise CheckpointError(f"{path}: general.architecture is {str(found)[:60]}, needed {ARCHITECTURE}")
        for key, allowed in _FIXED.items():
            value = self.values.get(f"{ARCHITECTURE}.{key}", allowed)
            if value != allowed:
                raise self.wrong(key, value, str(allowed))

    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        hidden, heads = self.integer("embedding_length"), self.integer("attention.head_count")
        kv_heads = self.integer("attention.head_count_kv", heads)
        if heads % kv_heads:
            raise self.wrong("attention.head_count_kv", kv_heads, f"a divisor of {heads} heads")
        head_dim = self.integer("attention.key_length")
        for key in _WIDTHS_OF_A_HEAD:
            if (value := self.integer(key, head_dim)) != head_dim:
                raise self.wrong(key, value, f"the width of a head ({head_dim})")
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path}: no tensor token_embd.weight; download a complete file")
        blocks = self.integer("block_count")
        if blocks > len(self.tensors):
            raise self.wrong("block_count", blocks, f"fewer than its {len(self.tensors)} tensors")
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": self.dtype(),
            "head_dim": head_dim,
            "hidden_activation": _ARCHITECTURE.activation,
            "hidden_size": hidden,
            "intermediate_size": self.integer("feed_forward_length"),
            "layer_types": [
                "full_attention" if (index + 1) % _PATTERN == 0 else "sliding_attention" for index in range(blocks)
            ],
            "max_position_embeddings": self.integer("context_length"),
            "model_type": "gemma3_text",
            "num_attention_heads": heads,
            "num_hidden_layers": blocks,
            "num_key_value_heads": kv_heads,
            "query_pre_attn_scalar": hidden // heads if blocks == _BLOCKS_OF_LARGEST else head_dim,
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "rope_parameters": {
                "full_attention": self.rope(),
                "sliding_attention": {"rope_theta": _LOCAL_ROPE_THETA, "rope_type": "default"},
            },
            "sliding_window": self.integer("attention.sliding_window"),
            "tie_word_embeddings": _HEAD not in self.tensors,
            "vocab_size": embedding.shape[0],
            **self.token_ids(embedding.shape[0]),
        }

    def rope(self) -> dict[str, Any]:
        """`rope_parameters` of the blocks with full attention."""
        theta = self.number("rope.freq_base")
        kind = self.values.get(f"{ARCHITECTURE}.rope.scaling.type", "none")
        if kind == "none":
            return {"rope_theta": theta, "rope_type": "default"}
        if kind != "linear":
            raise self.wrong("rope.scaling.type", kind, "none or linear")
        return {"rope_theta": theta, "rope_type": "linear", "factor": self.number("rope.scaling.factor")}

    def dtype(self) -> str:
        """The common dtype of all matrices, float32 if they differ or are quantized."""
        kinds = {PLAIN.get(entry.kind, torch.float32) for entry in self.tensors.values() if len(entry.shape) > 1}
        return str(kinds.pop() if len(kinds) == 1 else torch.float32).removeprefix("torch.")

    def token_ids(self, vocab_size: int) -> dict[str, int]:
        """The special tokens that the file names."""
        ids = {name: self.values[key] for name, key in TOKEN_IDS.items() if key in self.values}
        for name, value in ids.items():
            if not isinstance(value, int) or not 0 <= value < vocab_size:
                raise CheckpointError(
                    f"{self.path}: {TOKEN_IDS[name]} is {str(value)[:60]}, needed a token below {vocab_size}; "
                    "convert the model again"
                )
        return ids

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer of the architecture."""
        value = self.values.get(f"{ARCHITECTURE}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, value, "a positive integer")
        return value

    def number(self, key: str) -> float:
        """A positive number of the architecture."""
        value = self.values.get(f"{ARCHITECTURE}.{key}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def wrong(self, key: str, value: object, needed: str) -> CheckpointError:
        found = "missing" if value is None else f"{str(value)[:60]}"
        return CheckpointError(
            f"{self.path}: {ARCHITECTURE}.{key} is {found}, needed {needed}; convert the model again, or start from "
            "the Hugging Face checkpoint"
        )


def _place(path: Path, tensors: Mapping[str, GgufTensor], config: Mapping[str, Any]) -> dict[str, GgufTensor]:
    """The tensors of the file by the checkpoint's names, in the order of the file; no fewer and no more."""
    expected = _expected(config)
    names = {theirs: name for name, theirs in gguf_model(config, expected).names.items()}
    for theirs, name in names.items():
        if theirs not in tensors:
            raise CheckpointError(f"{path}: no tensor {theirs}, needed for {name}; download a complete file")
        if tensors[theirs].shape != expected[name]:
            raise CheckpointError(
                f"{path}: tensor {theirs} has shape {list(tensors[theirs].shape)}, needed {list(expected[name])} by "
                "the metadata; the file is damaged: download it again"
            )
    if extra := sorted(tensors.keys() - names.keys()):
        raise CheckpointError(
            f"{path}: tensor {extra[0]} ({len(extra)} such) is not known in a Gemma 3 text model; "
            "start from the Hugging Face checkpoint instead"
        )
    return {names[theirs]: entry for theirs, entry in tensors.items()}


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the model has, by the checkpoint's names."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    block |= {norm: (head,) if norm.startswith("self_attn") else (hidden,) for norm in _ARCHITECTURE.norms}
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}
    expected["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = (config["vocab_size"], hidden)
    return expected
