"""Clues: which keys of `config.json` are behind a tensor that does not fit, for the messages of `agreement`."""

from __future__ import annotations

from typing import Any

from bitwright.models.edges import Config

_BLOCK_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# What a tensor's size is the product of, by the canonical names of transformers; the first hint in its name decides.
_SIZES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("embed_positions", "wpe", "position_embed"), ("max_position_embeddings",)),
    (("embed", "lm_head", "wte", "output"), ("vocab_size",)),
    (("rotary_emb",), ("head_dim",)),
    (("q_norm", "k_norm"), ("head_dim",)),
    (("q_proj", "o_proj"), ("num_attention_heads", "head_dim")),
    (("k_proj", "v_proj"), ("num_key_value_heads", "head_dim")),
    (("expert",), ("num_experts",)),
    (("expert",), ("num_local_experts",)),
    (("expert",), ("moe_intermediate_size",)),
    (("mlp", "fc", "ffn", "feed_forward", "dense"), ("intermediate_size",)),
    ((), ("hidden_size",)),
)


def block_key(config: Config) -> tuple[str, int]:
    """The key that says how many blocks there are, and its value; 0 where there is none."""
    for key in _BLOCK_KEYS:
        count = config.get(key)
        if isinstance(count, int) and not isinstance(count, bool):
            return key, count
    return _BLOCK_KEYS[0], 0


def size_keys(config: Any, name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> str:
    """Which keys of `config` (transformers') ask for the first size in which `found` differs from `needed`."""
    different = next((n for n, f in zip(needed, found, strict=False) if n != f), None)
    if different is None:
        return ""
    halves = 2 if "rotary_emb" in name else 1
    for hints, keys in _SIZES:
        factors = [_size(config, key) for key in keys]
        product = 1
        for factor in factors:
            product *= factor or 0
        if product == different * halves and (not hints or any(hint in name for hint in hints)):
            said = " * ".join(f"{_spelled(config, key)} {factor}" for key, factor in zip(keys, factors, strict=True))
            return f", as config.json has {said}"
    equal = [key for key, value in config.to_dict().items() if type(value) is int and value == different]
    return f", as config.json has {equal[0]} {different}" if equal else ""


def missing_key(config: Any, name: str, is_head: bool) -> str:
    """Which key of `config` asks for a tensor that is not there."""
    if is_head and getattr(config, "tie_word_embeddings", False):
        return f", for {config.model_type} shares no weight with the embedding"
    if is_head:
        return ", as config.json has tie_word_embeddings false"
    asked = _bias_key(config, True) if name.endswith(".bias") else ""
    return asked or f", as config.json has model_type {config.model_type}"


def unexpected_key(config: Any, name: str) -> str:
    """Which key of `config` denies a tensor that is there."""
    denied = _bias_key(config, False) if name.endswith(".bias") else ""
    return denied or f", as config.json has model_type {config.model_type}"


def _bias_key(config: Any, value: bool) -> str:
    keys = [key for key, found in config.to_dict().items() if "bias" in key and found is value]
    return f", as config.json has {' and '.join(keys)} {str(value).lower()}" if keys else ""


def _size(config: Any, key: str) -> int | None:
    value = getattr(config, key, None)
    if key == "head_dim" and value is None:
        hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
        value = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _spelled(config: Any, key: str) -> str:
    """The key as the config file of this architecture spells it."""
    if key == "head_dim" and getattr(config, "head_dim", None) is None:
        return "hidden_size / num_attention_heads"
    return str(config.attribute_map.get(key, key))
