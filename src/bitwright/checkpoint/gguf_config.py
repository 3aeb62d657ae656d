"""The metadata of a GGUF file as a `config.json` of the llama, qwen2 or qwen3 architecture.

Anything that would change the function and that the config cannot express is refused by name: experts,
partial RoPE, unknown RoPE scaling. Llama 3's RoPE scaling is stored as a tensor of divisors
(`rope_freqs.weight`); its parameters are recovered and checked against that tensor.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from bitwright.checkpoint.gguf_file import PLAIN, GgufHeader, read_gguf_tensor
from bitwright.errors import CheckpointError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""`general.architecture`, which is also the `model_type`, and the class of transformers."""

ROPE_DIVISORS = "rope_freqs.weight"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1, 3.2 and 3.3 has; only `factor` differs."""

TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}

# Keys that change the function in ways that the transformers class of the architecture cannot express.
_REFUSED_KEYS = (
    "expert_count",
    "attention.sliding_window",
    "attention.clamp_kqv",
    "attention.scale",
    "attention.logit_softcapping",
    "embedding_scale",
    "logit_scale",
    "residual_scale",
)


def gguf_config(path: Path, header: GgufHeader) -> dict[str, Any]:
    """The content of `config.json` for the file at `path`, in the form that transformers 5 reads and writes.

    Raises:
        CheckpointError: another architecture, a missing or impossible value, or a function that the
            transformers class of the architecture cannot compute.
    """
    return _Metadata(path, header).config()


class _Metadata:
    """The header of `path`, read as the description of a model."""

    def __init__(self, path: Path, header: GgufHeader):
        self.path = path
        self.values = header.metadata
        self.tensors = header.tensors
        self.architecture = str(self.values.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: general.architecture is {self.architecture[:60]}, needed one of "
                f"{', '.join(ARCHITECTURES)}; start from the Hugging Face checkpoint instead"
            )
        if self.values.get("split.count", 1) not in (0, 1):
            raise CheckpointError(
                f"{path}: one of {self.values['split.count']} parts; join them with llama-gguf-split --merge"
            )
        for key in _REFUSED_KEYS:
            if self.values.get(f"{self.architecture}.{key}"):
                raise CheckpointError(
                    f"{path}: {self.architecture}.{key} is {self.values[f'{self.architecture}.{key}']}, "
                    f"which {ARCHITECTURES[self.architecture]} lacks; "
                    "start from the Hugging Face checkpoint instead"
                )

    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        hidden = self.integer("embedding_length")
        heads = self.integer("attention.head_count")
        kv_heads = self.integer("attention.head_count_kv", default=heads)
        head_dim = self.integer("attention.key_length", default=hidden // heads)
        self.check_heads(heads, kv_heads, head_dim)
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path}: no tensor token_embd.weight; download a complete file")
        config = {
            "architectures": [ARCHITECTURES[self.architecture]],
            "attention_dropout": 0.0,
            "dtype": self.dtype(),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": self.integer("feed_forward_length"),
            "max_position_embeddings": self.integer("context_length"),
            "model_type": self.architecture,
            "num_attention_heads": heads,
            "num_hidden_layers": self.block_count(),
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self.rope(head_dim),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "vocab_size": embedding.shape[0],
            **self.token_ids(embedding.shape[0]),
        }
        if self.architecture != "qwen2":
            config["attention_bias"] = "blk.0.attn_q.bias" in self.tensors
        if self.architecture == "llama":
            config["mlp_bias"] = "blk.0.ffn_up.bias" in self.tensors
        return config

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer of the architecture."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number of the architecture."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def wrong(self, key: str, value: object, needed: str) -> CheckpointError:
        found = "missing" if value is None else f"{str(value)[:60]}"
        return CheckpointError(
            f"{self.path}: {self.architecture}.{key} is {found}, needed {needed}; convert the model again"
        )

    def block_count(self) -> int:
        """How many blocks the file says it has; bounded, for the tensors of each will be listed."""
        count = self.integer("block_count")
        if count > len(self.tensors):
            raise self.wrong("block_count", count, f"fewer than its {len(self.tensors)} tensors")
        return count

    def token_ids(self, vocab_size: int) -> dict[str, int]:
        """The special tokens that the file names."""
        ids = {name: self.values[key] for name, key in TOKEN_IDS.items() if key in self.values}
        for name, value in ids.items():
            if not isinstance(value, int) or not 0 <= value < vocab_size:
                raise CheckpointError(
                    f"{self.path}: {TOKEN_IDS[name]} is {str(value)[:60]}, "
                    f"needed a token below {vocab_size}; convert the model again"
                )
        return ids

    def check_heads(self, heads: int, kv_heads: int, head_dim: int) -> None:
        """Refuse attention that the transformers classes cannot express."""
        if heads % kv_heads:
            raise self.wrong("attention.head_count_kv", kv_heads, f"a divisor of {heads} heads")
        if head_dim % 2:
            raise self.wrong("attention.key_length", head_dim, "an even number")
        for key in ("attention.value_length", "rope.dimension_count"):
            if (value := self.integer(key, default=head_dim)) != head_dim:
                raise self.wrong(key, value, f"the width of a head ({head_dim})")

    def dtype(self) -> str:
        """The common dtype of all matrices, float32 if they differ or are quantized."""
        kinds = {entry.kind for entry in self.tensors.values() if len(entry.shape) > 1}
        common = PLAIN.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
        return str(common).removeprefix("torch.")

    def rope(self, head_dim: int) -> dict[str, Any]:
        """`rope_parameters`."""
        theta = self.number("rope.freq_base", default=10000.0)
        kind = self.values.get(f"{self.architecture}.rope.scaling.type", "none")
        if ROPE_DIVISORS in self.tensors:
            return {"rope_theta": theta, **self.llama3_rope(theta, head_dim)}
        if kind == "none":
            return {"rope_theta": theta, "rope_type": "default"}
        scaled = {"rope_theta": theta, "rope_type": kind, "factor": self.number("rope.scaling.factor")}
        if kind == "yarn":
            original = self.integer("rope.scaling.original_context_length")
            return {**scaled, "original_max_position_embeddings": original}
        if kind == "linear":
            return scaled
        raise self.wrong("rope.scaling.type", kind, "none, linear or yarn")

    def llama3_rope(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Llama 3's parameters, recovered from the divisors of the RoPE frequencies [head_dim / 2]."""
        entry = self.tensors[ROPE_DIVISORS]
        divisors = read_gguf_tensor(self.path, ROPE_DIVISORS, entry) if entry.shape == (head_dim // 2,) else None
        if divisors is not None:
            factor = float(divisors.max())
            low, high, context = LLAMA3_ROPE.values()
            turns = context / (2 * math.pi) * theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            if torch.allclose(divisors.double(), 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
                return {"rope_type": "llama3", "factor": round(factor, 4), **LLAMA3_ROPE}
        raise CheckpointError(
            f"{self.path}: tensor {ROPE_DIVISORS} does not follow Llama 3's RoPE scaling; "
            "start from the Hugging Face checkpoint instead"
        )
