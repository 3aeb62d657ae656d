"""Quantized KV caches, simulated: the real attention of transformers over keys and values that were rounded.

    with quantize_kv(model, KvSpec(bits=4)):
        ...  # forward passes and generation of `model` see 4-bit keys and values

Attention functions are looked up in `config._attn_implementation`; the model gets a config of its own that names one
of ours, so models with other specs, or none, are not touched. The function rounds keys and values, each token of each
head in its own range, or all by the fixed scales of their attention, and calls the function that was there before. A
cache holds floats and is rounded when read: a range needs nothing but its token, so every step finds the same codes,
and decoding step by step equals one pass over all tokens. Keys quantized before RoPE are rounded on their way into
the cache, by a hook behind `k_proj` or its norm. `watched_kv` tells what fixed scales are made of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitwright.numeric.activation import KvSpec, fake_quantize
from bitwright.numeric.fp8 import KvScales, fake_quantize_fp8

_PREFIX = "bitwright_kv"
# What an attention holds while it is quantized with fixed scales, or watched.
_SCALES, _SEEN = "_bitwright_kv_scales", "_bitwright_kv_seen"
# Arguments that change what attention computes; the explicit form below knows none of them.
_OTHER_ATTENTION = ("softcap", "s_aux", "position_bias", "cache")


class KvQuantization:
    """A model's quantized KV cache, in force until `remove()` or the end of a `with`."""

    def __init__(
        self, configs: list[tuple[nn.Module, Any]], hooks: list[RemovableHandle], scaled: list[nn.Module]
    ) -> None:
        """`configs`: modules and the configs that they had before; `hooks`: of keys before RoPE; `scaled`: attentions
        that hold fixed scales.
        """
        self._configs, self._hooks, self._scaled = configs, hooks, scaled

    def remove(self) -> None:
        """The model computes in float again; a second call changes nothing."""
        for module, config in self._configs:
            module.config = config
        for hook in self._hooks:
            hook.remove()
        for attention in self._scaled:
            delattr(attention, _SCALES)
        self._configs, self._hooks, self._scaled = [], [], []

    def __enter__(self) -> KvQuantization:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it."""
        self.remove()


def quantize_kv(model: nn.Module, spec: KvSpec, scales: Mapping[str, KvScales] | None = None) -> KvQuantization:
    """Quantize keys and values of `model`, a transformers model or a decoder block of one, from now on.

    Args:
        model: whose attentions are meant.
        spec: how.
        scales: of each attention by name, relative to `model`, for the grid fp8; None or empty for integers.

    Raises:
        ValueError: an attention of `model` does not go through transformers' AttentionInterface, has no `k_proj`
            where `spec.rope` needs it, or is quantized already; or there is none; `scales` are not those of all
            attentions.
    """
    attentions = _attentions(model)
    _check_scales(spec, scales or {}, attentions)
    keys = [_before_rope(name, attention) for name, attention in attentions.items() if spec.rope == "before"]
    owners = _replace_attention(model, partial(_register, spec))
    hooks = [
        module.register_forward_hook(partial(_quantize_keys, spec=spec, head_dim=head_dim)) for module, head_dim in keys
    ]
    for name, pair in (scales or {}).items():
        # A tuple, which torch.compile takes for constants.
        setattr(attentions[name], _SCALES, (pair.k, pair.v))
    return KvQuantization(owners, hooks, [attentions[name] for name in scales or {}])


def _check_scales(spec: KvSpec, scales: Mapping[str, KvScales], attentions: Mapping[str, nn.Module]) -> None:
    needed = attentions.keys() if spec.grid == "fp8" else set()
    if missing := [name for name in needed if name not in scales]:
        raise ValueError(f"no scales for {missing[0]} and {len(missing) - 1} more; fp8 needs those of every attention")
    if strangers := [name for name in scales if name not in needed]:
        raise ValueError(f"scales for {strangers[0]}, which is no attention with an fp8 cache; leave them out")


@contextmanager
def watched_kv(model: nn.Module) -> Iterator[dict[str, list[float]]]:
    """Within, the greatest magnitudes of keys and values that attentions of `model` read, by name: [key, value].

    Keys are caught where `quantize_kv` rounds them, behind RoPE and norms. All are 0 until the model runs.

    Raises:
        ValueError: as `quantize_kv`.
    """
    attentions = _attentions(model)
    seen = {name: [0.0, 0.0] for name in attentions}
    owners = _replace_attention(model, _register_watch)
    for name, attention in attentions.items():
        setattr(attention, _SEEN, seen[name])
    try:
        yield seen
    finally:
        for module, config in owners:
            module.config = config
        for attention in attentions.values():
            delattr(attention, _SEEN)


def _replace_attention(model: nn.Module, register: Callable[[str], str]) -> list[tuple[nn.Module, Any]]:
    """Let all configs in `model` name the function that `register` makes of theirs; modules and their old configs."""
    owners = [(module, config) for module in model.modules() if (config := _config(module)) is not None]
    # One memo for all, so that modules that shared a config share its copy.
    memo: dict[int, Any] = {}
    for module, config in owners:
        module.config = deepcopy(config, memo)
    copies = (_config(module) for module, _ in owners)
    for config in {id(config): config for config in copies}.values():
        config._attn_implementation = register(config._attn_implementation or "eager")
    return owners


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The causal attentions of `model` by name, all of which can be quantized."""
    found = {}
    for name, module in model.named_modules():
        config = _config(module)
        if config is None or getattr(module, "is_causal", False) is not True:
            continue
        if "ALL_ATTENTION_FUNCTIONS" not in _globals(module):
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose attention transformers does not let be replaced; "
                "leave the KV cache of this architecture in float"
            )
        if (config._attn_implementation or "").startswith(_PREFIX):
            raise ValueError(f"the KV cache of {name} is quantized already; remove that first")
        found[name] = module
    if not found:
        raise ValueError(f"{type(model).__name__} has no causal attention; needed a decoder or one of its blocks")
    return found


def _config(module: nn.Module) -> Any:
    """The transformers config that `module` itself holds; None where it holds none."""
    config = module.__dict__.get("config")
    return config if hasattr(config, "_attn_implementation") else None


def _globals(module: nn.Module) -> dict[str, Any]:
    """The names that the forward of `module` sees."""
    found: dict[str, Any] = inspect.unwrap(type(module).forward).__globals__
    return found


def _before_rope(name: str, attention: nn.Module) -> tuple[nn.Module, int]:
    """The last module before RoPE that gives keys, and the features of a head."""
    for child in ("k_norm", "k_layernorm", "k_proj"):
        module = getattr(attention, child, None)
        if isinstance(module, nn.Module) and isinstance(getattr(attention, "head_dim", None), int):
            return module, attention.head_dim  # type: ignore[return-value]
    raise ValueError(f"{name} ({type(attention).__name__}) has no k_proj; quantize its keys after RoPE")


def _quantize_keys(module: nn.Module, args: Any, keys: Tensor, *, spec: KvSpec, head_dim: int) -> Tensor:
    """Forward hook: `keys` [..., heads * head_dim] or [..., head_dim] rounded head by head."""
    return fake_quantize(keys.unflatten(-1, (-1, head_dim)), spec).flatten(-2)


def _register(spec: KvSpec, base: str) -> str:
    """The name of the attention function that quantizes by `spec` and computes as `base`; it tells both, so
    registering it again changes nothing.
    """
    # Explicit softmax needs a mask even where it is only causal, which others leave to the kernel.
    masks = "eager" if spec.past_only else base
    return _register_function(f"{_PREFIX}_{spec.label()}_{base}", partial(_attend, spec=spec, base=base), masks)


def _register_watch(base: str) -> str:
    """The name of the attention function that takes note of keys and values and computes as `base`."""
    return _register_function(f"{_PREFIX}_watched_{base}", partial(_watch, base=base), base)


def _register_function(name: str, function: Callable[..., Any], masks: str) -> str:
    """`name`, by which transformers knows `function` from now on; it gets the masks of the attention `masks`."""
    # Importing these takes seconds, which planning need not pay.
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(name, function)
    if masks in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks])
    return name


def _watch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """As `_attend`, over keys and values as they come."""
    seen: list[float] | None = getattr(module, _SEEN, None)
    if seen is not None:
        seen[:] = [
            max(float(x.detach().float().abs().amax()), before) for before, x in zip(seen, (key, value), strict=True)
        ]
    return _ordinary(module, arguments.pop("base"))(module, query, key, value, attention_mask, **arguments)


def _ordinary(module: nn.Module, base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that transformers calls `base`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: Callable[..., tuple[Tensor, Tensor | None]]
    found = _globals(module)["eager_attention_forward"] if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
    return found


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention over quantized keys and values; `spec` and `base` are among the `arguments`.

    `query` [batch, heads, queries, head_dim], `key` and `value` [batch, kv heads, keys, head_dim] to
    [batch, queries, heads, head_dim] and, from some functions, the probabilities.
    """
    spec, ordinary = arguments.pop("spec"), _ordinary(module, arguments.pop("base"))
    if not getattr(module, "is_causal", True):
        # Encoders beside the decoder keep no cache.
        return ordinary(module, query, key, value, attention_mask, **arguments)
    if spec.grid == "fp8":
        k_scale, v_scale = getattr(module, _SCALES)
        key, value = fake_quantize_fp8(key, k_scale), fake_quantize_fp8(value, v_scale)
        return ordinary(module, query, key, value, attention_mask, **arguments)
    quantized_key = key if spec.rope == "before" else fake_quantize(key, spec)
    quantized_value = fake_quantize(value, spec)
    if not spec.past_only:
        return ordinary(module, query, quantized_key, quantized_value, attention_mask, **arguments)
    if other := [name for name in _OTHER_ATTENTION if arguments.get(name) is not None]:
        raise ValueError(f"past_only does not know the {other[0]} of {type(module).__name__}; set past_only=false")
    repeats = query.shape[1] // key.shape[1]
    keys = [states.repeat_interleave(repeats, dim=1) for states in (key, quantized_key)]
    values = [states.repeat_interleave(repeats, dim=1) for states in (value, quantized_value)]
    scaling = arguments.get("scaling")
    scores = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return past_only_attention(scores, (keys[0], keys[1]), (values[0], values[1]), attention_mask, _dropout(arguments))


def _dropout(arguments: dict[str, Any]) -> float:
    return float(arguments.get("dropout") or 0.0)


def past_only_attention(
    query: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    mask: Tensor | None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Causal attention in which each token sees its own key and value in float and those of others quantized.

    Args:
        query: [batch, heads, queries, head_dim], scaled.
        keys: in float, and quantized, each [batch, heads, keys, head_dim].
        values: likewise.
        mask: [batch or 1, heads or 1, queries, keys], added to the scores, or bool, true where a key is seen. The
            last key that a query sees is its own. None: the queries are the last tokens of the keys.
        dropout: of the probabilities.

    Returns:
        [batch, queries, heads, head_dim], and the probabilities [batch, heads, queries, keys].
    """
    count = keys[0].shape[2]
    positions = torch.arange(count, device=query.device)
    if mask is None:
        mask = positions <= positions[count - query.shape[2] :, None]
    if mask.dtype == torch.bool:
        seen, mask = mask, torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    else:
        seen = mask > torch.finfo(mask.dtype).min / 2
    own = torch.where(seen, positions, 0).amax(-1, keepdim=True).expand(*query.shape[:3], 1)
    scores = query @ keys[1].transpose(2, 3)
    own_score = (query * _at(keys[0], own)).sum(-1, keepdim=True)
    scores = scores.scatter(-1, own, own_score) + mask
    # As transformers' eager attention: probabilities in float32 even of half-precision models.
    shares = torch.softmax(scores, -1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    shares = nn.functional.dropout(shares, dropout)
    attended = shares @ values[1] + shares.gather(-1, own) * (_at(values[0], own) - _at(values[1], own))
    return attended.transpose(1, 2).contiguous(), shares


def _at(states: Tensor, places: Tensor) -> Tensor:
    """`states` [batch, heads, keys, head_dim] of the tokens `places` [batch, heads, queries, 1]."""
    return states.gather(2, places.expand(-1, -1, -1, states.shape[-1]))
