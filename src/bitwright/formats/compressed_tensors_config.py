"""`quantization_config` of compressed-tensors: which modules are quantized how, as that library writes and reads it.

A *group* holds the arguments of weights and of inputs, and `targets`: names of modules, regular expressions (`re:`), or
classes (`Linear`). `ignore` lists modules that a class would hit and that are not quantized. `kv_cache_scheme` has the
arguments of keys and values. Read strictly: an argument that is not known here and says something (is not null, false
or empty) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.compressed_tensors import INT8, OLDEST_READER, PACKED, QUANT_METHOD, WeightArgs
from bitwright.numeric.activation import ActivationSpec, KvSpec
from bitwright.numeric.fp8 import KvScales
from bitwright.untrusted.patterns import Pattern, compiled

_KNOWN_ARGS = frozenset({"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder"})
# They tell how scales were found, or repeat a type that the stored tensors have.
_IDLE_ARGS = frozenset({"observer", "observer_kwargs", "zp_dtype", "scale_dtype"})
_CLASSES = ("Linear", "Embedding")
# e4m3 with one scale, which an attention's tensors `k_scale` and `v_scale` hold.
_FP8_KV = {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"}
KV_PARTS = ("k_scale", "v_scale")
# Some writers store zeros of symmetric codes as well.
_KV_ZEROS = ("k_zero_point", "v_zero_point")
# What other settings of keys, values and queries store.
_OTHER_KV_PARTS = ("q_scale", "q_zero_point", "kv_scale")


@dataclass(frozen=True)
class Scheme:
    """How the modules of one group are quantized: their weights, and their inputs (None: not at all)."""

    weights: WeightArgs
    activation: ActivationSpec | None


@dataclass(frozen=True)
class Group:
    """A scheme and the `targets` it is for."""

    scheme: Scheme
    targets: tuple[str, ...]
    patterns: Mapping[str, Pattern] = field(default_factory=dict, compare=False)
    """Those of `targets` that are expressions, by their text."""


def activation_refusal(spec: ActivationSpec) -> str | None:
    """Why the format cannot say how inputs are quantized, and what to do about it; None if it can."""
    if spec.clip != 1:
        return f"clips the ranges of its inputs to {spec.clip:g}, needed 1; quantize with --set activations.clip=1"
    return None


def kv_refusal(spec: KvSpec) -> str | None:
    """Why the format cannot say how the KV cache is quantized, and what to do about it; None if it can."""
    if spec.grid == "fp8":
        return None
    return (
        "is quantized for each token and head, needed fixed scales or floats; quantize with kv8 in the scheme "
        "and --set activations.kv.grid=fp8, or without kv"
    )


def kv_tensors(scales: Mapping[str, KvScales]) -> dict[str, Tensor]:
    """The stored tensors of attentions' `scales`, float32 [1] each."""
    found = {}
    for name, pair in scales.items():
        for part, scale in zip(KV_PARTS, (pair.k, pair.v), strict=True):
            found[f"{name}.{part}"] = torch.tensor([scale], dtype=torch.float32)
    return found


def read_kv_scales(stored: Mapping[str, Tensor]) -> dict[str, KvScales]:
    """The inverse of `kv_tensors`; 16-bit scales and those without an axis are read as well.

    Raises:
        FormatError: an attention has one scale and not the other, or one that is not a positive number.
    """
    found: dict[str, dict[str, float]] = {}
    for name, tensor in stored.items():
        attention, _, part = name.rpartition(".")
        if part in _KV_ZEROS and not bool(tensor.to(torch.float32).any()):
            continue
        if part in _KV_ZEROS:
            raise FormatError(f"{name}: is not 0, and kv_cache_scheme says symmetric; the file is damaged")
        if part in _OTHER_KV_PARTS or tensor.numel() != 1 or not tensor.is_floating_point():
            raise FormatError(f"{name}: {tensor.dtype} {list(tensor.shape)}, needed one float in k_scale and v_scale")
        found.setdefault(attention, {})[part[0]] = float(tensor.to(torch.float32))
    scales = {}
    for attention, pair in found.items():
        try:
            scales[attention] = KvScales.model_validate(pair)
        except ValidationError as error:
            first = error.errors()[0]
            raise FormatError(f"{attention}.{first['loc'][0]}_scale: {first['msg']}; the file is damaged") from None
    return scales


def is_kv_part(name: str) -> bool:
    """Whether the tensor called `name` belongs to the KV cache."""
    return name.rpartition(".")[2] in (*KV_PARTS, *_KV_ZEROS, *_OTHER_KV_PARTS)


def quantization_config(
    modules: Mapping[str, Scheme], ignored: Collection[str], kv_cache: KvSpec | None = None
) -> dict[str, Any]:
    """`quantization_config` for quantized linears `modules` by name; `ignored` are linears that are not quantized, and
    `kv_cache` one that `kv_refusal` has nothing against.

    One scheme targets the class Linear. Several target names (whole families of them as regular expressions), since
    vLLM looks for a class before it looks into the linears that it fuses.
    """
    schemes = list(dict.fromkeys(modules.values()))
    groups = {}
    for number, scheme in enumerate(schemes):
        members = [name for name in modules if modules[name] == scheme]
        targets = ["Linear"] if len(schemes) == 1 else _targets(members, set(modules) | set(ignored))
        groups[f"group_{number}"] = {
            "format": scheme.weights.format,
            "input_activations": None if scheme.activation is None else _input_args(scheme.activation),
            "output_activations": None,
            "targets": targets,
            "weights": _weight_args(scheme.weights),
        }
    formats = list(dict.fromkeys(scheme.weights.format for scheme in schemes))
    return {
        "config_groups": groups,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None if kv_cache is None else {**_FP8_KV, "group_size": None},
        "moe_sparsity_config": None,
        "quant_method": QUANT_METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": OLDEST_READER,
    }


def _targets(members: Sequence[str], others: set[str]) -> list[str]:
    """Names of `members`; one expression for all modules of a last name that no other module has."""
    families: dict[str, list[str]] = {}
    for name in members:
        families.setdefault(name.rpartition(".")[2], []).append(name)
    targets = []
    for leaf, names in families.items():
        alike = [name for name in others if name.rpartition(".")[2] == leaf]
        whole = len(alike) == len(names) and all("." in name for name in names)
        targets += [rf"re:.*\.{re.escape(leaf)}$"] if whole and len(names) > 1 else names
    return targets


def _weight_args(args: WeightArgs) -> dict[str, Any]:
    return {
        "dynamic": False,
        "group_size": args.group_size,
        "num_bits": args.bits,
        "strategy": args.strategy,
        "symmetric": args.symmetric,
        "type": "int",
    }


def _input_args(spec: ActivationSpec) -> dict[str, Any]:
    return {
        "dynamic": spec.granularity == "token",
        "group_size": None,
        "num_bits": spec.bits,
        "strategy": spec.granularity,
        "symmetric": spec.symmetric,
        "type": "int",
    }


def read_groups(config: Mapping[str, Any]) -> list[Group]:
    """The groups of a `quantization_config`, the inverse of `quantization_config`.

    Raises:
        FormatError: another method, format or status; something that the native form has no place for.
    """
    _need("quant_method", config.get("quant_method", QUANT_METHOD), (QUANT_METHOD,))
    _need("quantization_status", config.get("quantization_status"), ("compressed",))
    for key in ("transform_config", "sparsity_config"):
        if config.get(key) and config[key].get("format", "") != "dense":
            raise FormatError(f"quantization_config.{key}: is set, needed none; this cannot be imported")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError("quantization_config.config_groups: needed an object of groups; the file is damaged")
    return [_read_group(f"config_groups.{name}", group, config.get("format")) for name, group in groups.items()]


def read_kv_cache(config: Mapping[str, Any]) -> KvSpec | None:
    """How `config` says that keys and values are quantized.

    Raises:
        FormatError: in another way than in e4m3 with fixed scales.
    """
    args = config.get("kv_cache_scheme")
    if args is None:
        return None
    _check_args("kv_cache_scheme", args, "float")
    for key, value in _FP8_KV.items():
        _need(f"kv_cache_scheme.{key}", args.get(key), (value,))
    return KvSpec(bits=8, grid="fp8")


def _read_group(where: str, group: Any, overall: object) -> Group:
    if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
        raise FormatError(f"quantization_config.{where}: needed an object with targets")
    if group.get("output_activations"):
        raise FormatError(f"quantization_config.{where}.output_activations: is set, needed null")
    name = group.get("format") or overall
    _need(f"{where}.format", name, (PACKED, INT8, "naive-quantized"))
    weights = _read_weights(f"{where}.weights", group.get("weights"), PACKED if name == PACKED else INT8)
    inputs = group.get("input_activations")
    activation = None if inputs is None else _read_inputs(f"{where}.input_activations", inputs)
    targets = tuple(str(target) for target in group["targets"])
    expressions = {target: target.removeprefix("re:") for target in targets if target.startswith("re:")}
    return Group(Scheme(weights, activation), targets, compiled(expressions, f"quantization_config.{where}.targets"))


def _read_weights(where: str, args: Any, format_name: str) -> WeightArgs:
    _check_args(where, args)
    bits, size = args.get("num_bits"), args.get("group_size")
    _need(f"{where}.num_bits", bits, range(2, 9))
    _need(f"{where}.dynamic", args.get("dynamic", False), (False,))
    strategy: Literal["group", "channel", "tensor"] = args.get("strategy")
    _need(f"{where}.strategy", strategy, ("group", "channel", "tensor"))
    _need(f"{where}.actorder", args.get("actorder"), (None, False, "weight", "static"))
    if strategy == "group" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise FormatError(f"quantization_config.{where}.group_size: found {size!r}, needed a positive integer")
    return WeightArgs(bits, _symmetric(where, args), strategy, size if strategy == "group" else None, format_name)


def _read_inputs(where: str, args: Any) -> ActivationSpec:
    _check_args(where, args)
    _need(f"{where}.num_bits", args.get("num_bits"), range(2, 9))
    granularity: Literal["token", "tensor"] = args.get("strategy")
    _need(f"{where}.strategy", granularity, ("token", "tensor"))
    _need(f"{where}.dynamic", args.get("dynamic", False), (granularity == "token",))
    return ActivationSpec(bits=args["num_bits"], granularity=granularity, symmetric=_symmetric(where, args))


def _check_args(where: str, args: Any, kind: Literal["int", "float"] = "int") -> None:
    if not isinstance(args, Mapping):
        raise FormatError(f"quantization_config.{where}: found {args!r}, needed an object")
    _need(f"{where}.type", args.get("type", "int"), (kind,))
    for key in args.keys() - _KNOWN_ARGS - _IDLE_ARGS:
        if args[key]:
            raise FormatError(f"quantization_config.{where}.{key}: unknown, and is {args[key]!r}; cannot be imported")


def _symmetric(where: str, args: Mapping[str, Any]) -> bool:
    _need(f"{where}.symmetric", args.get("symmetric", True), (True, False))
    return bool(args.get("symmetric", True))


def _need(key: str, value: Any, allowed: Collection[Any]) -> None:
    """Refuse a value that is not `allowed`, or of another JSON type (1 is not true)."""
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
        wanted = ", ".join(repr(one) for one in allowed)
        raise FormatError(f"quantization_config.{key}: found {value!r}, needed one of {wanted}; cannot be imported")


def scheme_of(module: str, groups: Sequence[Group]) -> Scheme:
    """The scheme of a quantized module: names go before expressions, and these before classes.

    Raises:
        FormatError: no group targets it, or classes of several groups might.
    """
    for wanted in (module, None):
        for group in groups:
            for target in group.targets:
                if target == wanted or (wanted is None and _matches(group, target, module)):
                    return group.scheme
    by_class = {group.scheme for group in groups if any(target in _CLASSES for target in group.targets)}
    if len(by_class) != 1:
        found = "no group" if not by_class else "classes of several groups"
        raise FormatError(f"quantization_config.config_groups: {found} for {module}; needed one that targets it")
    return by_class.pop()


def _matches(group: Group, target: str, module: str) -> bool:
    return target in group.patterns and group.patterns[target].matches(module)
