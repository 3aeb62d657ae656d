"""GGUF files as a source of float weights, for the llama, qwen2 and qwen3 architectures.

The header becomes a `config.json`, names become those of the Hugging Face checkpoint, and `read` turns one
tensor at a time into floats: F32, F16 and BF16 as they are, quantized types into float32.

Conventions undone: llama.cpp stores the query and key rows of the llama architecture so that a RoPE pair is
(2j, 2j + 1); Hugging Face wants (j, j + head_dim / 2). Mistral is written as llama and read as such: it is
the same function but for a sliding window, which such files do not carry.

Departure from transformers' own reader, which ignores what it does not know: tensors that the model does not
have, and metadata that would change its function, are refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.checkpoint.gguf_config import ROPE_DIVISORS, TOKEN_IDS, gguf_config
from bitwright.checkpoint.gguf_file import GgufTensor, check_types, read_gguf_header, read_gguf_tensor
from bitwright.checkpoint.quiet import quiet_transformers
from bitwright.checkpoint.shard import TensorInfo, write_text
from bitwright.checkpoint.source import Source
from bitwright.errors import CheckpointError

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_TENSOR = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)")


class GgufSource(Source):
    """One `.gguf` file."""

    def __init__(self, path: Path, label: str | None = None):
        """Read the header of the file at `path`.

        Raises:
            CheckpointError: the file is damaged, of an unknown architecture, or lacks metadata or tensors.
        """
        self.path = path
        self.label = label or str(path)
        header = read_gguf_header(path)
        check_types(path, header.tensors)
        self.config = gguf_config(path, header)
        self._place = _rename(path, header.tensors)
        _check_complete(path, self._place, self.config)
        self.tensors = {name: TensorInfo(entry.shape, entry.dtype) for name, entry in self._place.items()}

    def read(self, name: str) -> Tensor:
        """See `Source.read`; quantized tensors come as float32, others in the dtype of the file."""
        if name not in self._place:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        values = read_gguf_tensor(self.path, name, self._place[name])
        heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config["num_key_value_heads"],
        }.get(name.split(".")[-2])
        if heads and self.config["model_type"] == "llama":
            return _rope_halves(values, heads)
        return values

    def files(self) -> list[Path]:
        """See `Source.files`."""
        return [self.path]

    def fingerprint(self) -> str:
        """See `Source.fingerprint`; the stored types count, too."""
        kinds = ",".join(f"{name}:{entry.kind.name}" for name, entry in sorted(self._place.items()))
        return hashlib.sha256(f"{super().fingerprint()} {kinds}".encode()).hexdigest()

    def write_side_files(self, folder: Path) -> list[str]:
        """See `Source.write_side_files`: the tokenizer of the file, rebuilt by transformers.

        Raises:
            CheckpointError: the file has no tokenizer, or one of a kind that transformers cannot rebuild.
        """
        # importing transformers takes seconds, which opening and reading need not pay
        from transformers import PreTrainedTokenizerFast

        # A folder of its own, so that a stray tokenizer.json beside the file cannot take precedence. The
        # class itself, for AutoTokenizer first parses the file with the slow reader (7 s instead of 0.6 s).
        with tempfile.TemporaryDirectory() as place, quiet_transformers():
            (Path(place) / "model.gguf").symlink_to(self.path.resolve())
            try:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(place, gguf_file="model.gguf")
            except Exception as error:  # missing keys and unknown kinds raise unrelated types
                raise CheckpointError(
                    f"{self.path}: transformers cannot rebuild its tokenizer "
                    f"({type(error).__name__}: {error}); start from the Hugging Face checkpoint instead"
                ) from error
            tokenizer.save_pretrained(folder)
        ids = {key: self.config[key] for key in TOKEN_IDS if key in self.config}
        content = {"_from_model_config": True, **ids}
        write_text(folder / "generation_config.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
        return []


def _rope_halves(values: Tensor, heads: int) -> Tensor:
    """Rows [heads * head_dim, ...] with RoPE pairs (2j, 2j + 1) -> pairs (j, j + head_dim / 2)."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


# --- names -------------------------------------------------------------------------------------------------


def _rename(path: Path, tensors: Mapping[str, GgufTensor]) -> dict[str, GgufTensor]:
    """Tensors by the name that the Hugging Face checkpoint has."""
    renamed = {}
    for name, entry in tensors.items():
        if name == ROPE_DIVISORS:
            continue  # is in the config
        match = _BLOCK_TENSOR.fullmatch(name)
        if name in OUTER_NAMES:
            renamed[OUTER_NAMES[name]] = entry
        elif match and match[2] in BLOCK_NAMES:
            renamed[f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{match[3]}"] = entry
        else:
            raise CheckpointError(
                f"{path}: tensor {name} is not known in a dense llama, qwen2 or qwen3 model; "
                "start from the Hugging Face checkpoint instead"
            )
    return renamed


def _check_complete(path: Path, place: Mapping[str, GgufTensor], config: Mapping[str, Any]) -> None:
    """The tensors must be those of the model, no fewer and no more."""
    wanted = _expected(config)
    for name, shape in wanted.items():
        if name not in place:
            raise CheckpointError(f"{path}: no tensor for {name} in the file; download a complete one")
        if place[name].shape != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(place[name].shape)}, needed {list(shape)} "
                "by the metadata; the file is damaged"
            )
    if extra := sorted(place.keys() - wanted.keys()):
        raise CheckpointError(
            f"{path}: holds {extra[0]} ({len(extra)} such), which {config['architectures'][0]} does "
            "not have; start from the Hugging Face checkpoint instead"
        )


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the model has, by Hugging Face name."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    biased = [name for name in linears if config.get("attention_bias") and name.startswith("self_attn")]
    biased += [name for name in linears if config.get("mlp_bias") and name.startswith("mlp")]
    if config["model_type"] == "qwen2":
        biased = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    block: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    block |= {f"{name}.bias": linears[name][:1] for name in biased}
    block |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if config["model_type"] == "qwen3":
        block |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{index}.{name}": shape for name, shape in block.items()}
    expected["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = (config["vocab_size"], hidden)
    return expected
