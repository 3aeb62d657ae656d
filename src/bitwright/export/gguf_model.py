"""What llama.cpp calls the tensors of a model, in which order it wants their rows, and the metadata of a model.

The table below has one line per architecture. llama.cpp computes each with a graph of its own, so everything in
`config.json` that the graph does not do is refused by name: other activations, partial RoPE, unknown RoPE scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.models.edges import BlockShape

Config = Mapping[str, Any]

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ALL_LINEARS = (*_ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Architecture:
    """One architecture as llama.cpp has it.

    Attributes:
        name: `general.architecture`.
        activation: what `hidden_act` must be.
        pairs: query and key rows of a head are stored with the two of a RoPE pair side by side.
        norm_offset: added to the weights of norms, which llama.cpp multiplies by as they are.
        norms: of a block.
        biased: the linears that may have a bias.
    """

    name: str
    activation: str = "silu"
    pairs: bool = False
    norm_offset: float = 0.0
    norms: tuple[str, ...] = _NORMS
    biased: tuple[str, ...] = ()


ARCHITECTURES = {
    "llama": Architecture("llama", pairs=True, biased=_ALL_LINEARS),
    "mistral": Architecture("llama", pairs=True),
    "qwen2": Architecture("qwen2", biased=_ATTENTION),
    "qwen3": Architecture("qwen3", norms=(*_NORMS, *_HEAD_NORMS)),
    "gemma3_text": Architecture(
        "gemma3",
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        norms=(*_NORMS, *_HEAD_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}
"""By `model_type`."""


@dataclass(frozen=True)
class GgufModel:
    """A model as GGUF describes it.

    Attributes:
        architecture: how llama.cpp computes it.
        metadata: keys without the architecture in front, and values: integers, floats and strings.
        names: the tensors of the file by the checkpoint's names, in the order of the file.
        heads: of the tensors whose rows are reordered, the number of heads.
        divisors: of the RoPE frequencies, float32 [head_dim / 2]; None where there are none.
    """

    architecture: Architecture
    metadata: dict[str, Any]
    names: dict[str, str]
    heads: dict[str, int] = field(default_factory=dict)
    divisors: Tensor | None = None

    def rows(self, name: str, values: Tensor) -> Tensor:
        """`values` [rows, ...] of the tensor called `name`, its rows in llama.cpp's order."""
        return rope_pairs(values, self.heads[name]) if name in self.heads else values


def gguf_model(config: Config, tensors: Mapping[str, tuple[int, ...]]) -> GgufModel:
    """The model whose `config.json` is `config` and whose `tensors` have these shapes by name.

    Raises:
        FormatError: an architecture, setting or tensor that llama.cpp does not have, or a tensor that is missing.
        PlanError: a size in `config` is missing or impossible.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise FormatError(
            f"config.json: model_type is {kind!r}, and GGUF is written for {', '.join(ARCHITECTURES)}; "
            "export to another format"
        )
    architecture = ARCHITECTURES[kind]
    config = _complete(config)
    shape = BlockShape.from_config(config)
    rope, divisors = _rope(config, shape.head_dim)
    metadata = {
        **_sizes(config, shape),
        **rope,
        **(_gemma3(config, shape) if architecture.name == "gemma3" else _refuse_unlike_llama(config)),
    }
    activation = config.get("hidden_act", config.get("hidden_activation"))
    if activation != architecture.activation:
        raise _unlike("hidden_act", activation, architecture.activation)
    names = _names(architecture, int(metadata["block_count"]), tensors)
    heads: dict[str, int] = {}
    if architecture.pairs:
        counts = {"q_proj": shape.heads, "k_proj": shape.kv_heads}
        heads = {name: counts[part] for name in names if (part := name.split(".")[-2]) in counts}
    return GgufModel(architecture, metadata, names, heads, divisors)


def _complete(config: Config) -> dict[str, Any]:
    """`config` with what transformers assumes for absent keys, all as its version 5 spells them."""
    # importing transformers takes seconds
    from transformers import AutoConfig

    complete: dict[str, Any] = AutoConfig.for_model(**config).to_dict()
    return complete


def rope_pairs(values: Tensor, heads: int) -> Tensor:
    """Rows [heads * head_dim, ...] with RoPE pairs (j, j + head_dim / 2) -> pairs (2j, 2j + 1)."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def rope_halves(values: Tensor, heads: int) -> Tensor:
    """Inverse of `rope_pairs`."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _names(architecture: Architecture, blocks: int, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """GGUF names of `tensors` in the order of the file, all of which the model must have and know."""
    table = gguf.get_tensor_name_map(_arch_id(architecture), blocks)
    wanted = ["model.embed_tokens.weight"]
    for index in range(blocks):
        inside = [f"{module}.weight" for module in (*architecture.norms, *_ALL_LINEARS)]
        inside += [
            name for module in architecture.biased if f"model.layers.{index}.{(name := f'{module}.bias')}" in tensors
        ]
        wanted += [f"model.layers.{index}.{name}" for name in inside]
    wanted += ["model.norm.weight"] + ["lm_head.weight"] * ("lm_head.weight" in tensors)
    if missing := [name for name in wanted if name not in tensors]:
        raise FormatError(f"{missing[0]}: missing ({len(missing)} such); the folder is incomplete")
    if unknown := [name for name in tensors if name not in wanted]:
        raise FormatError(
            f"{unknown[0]}: llama.cpp's {architecture.name} has no such tensor ({len(unknown)} such); "
            "export to another format"
        )
    return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in wanted}


def _arch_id(architecture: Architecture) -> Any:
    """The gguf package's number of an architecture."""
    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)


def _unlike(key: str, found: object, needed: object) -> FormatError:
    return FormatError(f"config.json: {key} is {found!r}, and llama.cpp computes with {needed!r}; export otherwise")


def _sizes(config: Config, shape: BlockShape) -> dict[str, Any]:
    context = int(config["max_position_embeddings"])
    return {
        "block_count": int(config["num_hidden_layers"]),
        "context_length": context,
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "vocab_size": int(config["vocab_size"]),
        "rope.dimension_count": shape.head_dim,
    }


def _refuse_unlike_llama(config: Config) -> dict[str, Any]:
    """What the graphs of llama, qwen2 and qwen3 add: full attention, so no more context than a sliding window sees."""
    window = config.get("sliding_window")
    # Qwen's configs name a window that their models use only when told so.
    if window is None or config.get("use_sliding_window", config["model_type"] == "mistral") is False:
        return {}
    return {"context_length": min(int(window), int(config["max_position_embeddings"]))}


def _gemma3(config: Config, shape: BlockShape) -> dict[str, Any]:
    """What Gemma 3 adds: a sliding window in five of six blocks, with RoPE of its own."""
    blocks = int(config["num_hidden_layers"])
    pattern = ["sliding_attention" if (index + 1) % 6 else "full_attention" for index in range(blocks)]
    if list(config["layer_types"]) != pattern:
        raise _unlike("layer_types", config["layer_types"], "five sliding, one full")
    query = config["query_pre_attn_scalar"]
    # llama.cpp's own exception for the largest of the family
    expected = config["hidden_size"] // shape.heads if blocks == 62 else shape.head_dim
    if query != expected:
        raise _unlike("query_pre_attn_scalar", query, expected)
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if config.get(key):
            raise _unlike(key, config[key], None)
    local = _rope_parameters(config, "sliding_attention")["rope_theta"]
    if local != 10000.0:
        raise _unlike("rope_parameters.sliding_attention.rope_theta", local, 10000.0)
    return {"attention.sliding_window": int(config["sliding_window"])}


# --- RoPE --------------------------------------------------------------------------------------------------

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_KNOWN_ROPE = {"rope_theta", "rope_type", *_LLAMA3}


def _rope_parameters(config: Config, layer: str = "full_attention") -> Config:
    """`rope_parameters` of one kind of block."""
    found = config["rope_parameters"]
    nested: Config = found.get(layer, found)
    return nested


def _rope(config: Config, head_dim: int) -> tuple[dict[str, Any], Tensor | None]:
    """Metadata of RoPE, and the divisors of its frequencies."""
    parameters = _rope_parameters(config)
    if unknown := [key for key in parameters.keys() - _KNOWN_ROPE if parameters[key] is not None]:
        raise _unlike(f"rope_parameters.{min(unknown)}", parameters[min(unknown)], None)
    theta = float(parameters["rope_theta"])
    metadata: dict[str, Any] = {"rope.freq_base": theta}
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return metadata, None
    if kind == "llama3":
        return metadata, _llama3_divisors(parameters, theta, head_dim)
    if kind not in ("linear", "yarn"):
        raise _unlike("rope_parameters.rope_type", kind, "default, linear, yarn or llama3")
    metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn":
        original = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
        metadata["rope.scaling.original_context_length"] = int(original)
    return metadata, None


def _llama3_divisors(parameters: Config, theta: float, head_dim: int) -> Tensor:
    """What divides each frequency in Llama 3's scaling (transformers' `_compute_llama3_parameters`)."""
    factor, low, high, context = (float(parameters[key]) for key in _LLAMA3)
    turns = context / (2 * math.pi) * theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
