"""`quantization_config` of config.json: the entries of all quantized modules, what happens to their inputs, and the
KV cache, written and read strictly.

A default may change between releases, and a file must not change its meaning with it: every setting is written
and required, an unknown key or a value of another JSON type is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from bitwright.errors import FormatError
from bitwright.formats.layout import TensorEntry
from bitwright.numeric.activation import ActivationSpec, InputSite, KvSpec
from bitwright.numeric.fp8 import KvScales
from bitwright.numeric.settings import Settings
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.untrusted.boundary import reading

QUANT_METHOD = "bitwright"
FORMAT_NAME = "bitwright-native"
FORMAT_VERSION = 3

_NEWER = "it was written by a newer bitwright; upgrade bitwright to read it"
_OLDER = "it was written by a bitwright from before the first release; quantize the model again"


def _refuse_defaults(stored: Settings, except_for: tuple[str, ...] = ()) -> None:
    missing = type(stored).model_fields.keys() - stored.model_fields_set - set(except_for)
    if missing:
        raise ValueError(f"missing {', '.join(sorted(missing))}")


class _StoredBilevel(Bilevel):
    """A Bilevel as written in config.json."""

    @model_validator(mode="after")
    def _is_complete(self) -> _StoredBilevel:
        _refuse_defaults(self)
        return self


class _StoredSpec(WeightSpec):
    """A WeightSpec as written in config.json."""

    # Not Literal[1, 2], which would take true for 1.
    levels: int = Field(ge=1, le=2)
    bilevel: _StoredBilevel | None

    @model_validator(mode="after")
    def _is_complete(self) -> _StoredSpec:
        _refuse_defaults(self)
        if self.levels != (1 if self.bilevel is None else 2):
            raise ValueError(f"{self.levels} levels with bilevel {self.bilevel!r}; needed 1 with null, 2 with a table")
        return self

    def weight_spec(self) -> WeightSpec:
        return WeightSpec(**self.model_dump(exclude={"levels"}))


class _StoredActivation(ActivationSpec):
    """An ActivationSpec as written in config.json."""

    @model_validator(mode="after")
    def _is_complete(self) -> _StoredActivation:
        _refuse_defaults(self)
        return self


class _StoredKvCache(KvSpec):
    """A KvSpec as written in config.json: integers without `grid` and `scales`, fp8 with both."""

    scales: dict[str, KvScales] | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> _StoredKvCache:
        _refuse_defaults(self, except_for=("grid", "scales"))
        if (self.grid == "fp8") != bool(self.scales):
            raise ValueError("scales, at least those of one block, are given exactly where grid is 'fp8'")
        return self

    def spec(self) -> KvSpec:
        return KvSpec(**self.model_dump(exclude={"scales"}))


class _StoredInput(Settings):
    """What happens to the input of one module; `activation` is an index of `activations`."""

    transform: Literal["hadamard"] | None
    activation: int | None = Field(ge=0)
    scale: float | None
    zero: int | None


class _StoredTensor(Settings):
    """One entry of `tensors`."""

    spec: int = Field(ge=0)
    shape: tuple[int, int]
    outliers: int = Field(default=0, ge=0)
    value_bits: int = 16
    input: _StoredInput | None = None


class _StoredConfig(Settings):
    """The whole `quantization_config`."""

    quant_method: Literal["bitwright"]
    format: Literal["bitwright-native"]
    version: int
    specs: list[_StoredSpec]
    activations: list[_StoredActivation]
    kv_cache: _StoredKvCache | None
    tensors: dict[str, _StoredTensor]
    tied: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Sites:
    """Where a model quantizes what it computes.

    Attributes:
        inputs: of quantized modules by name.
        kv_cache: how keys and values are; None: not at all.
        kv_scales: of each attention by name, where the grid of `kv_cache` is fp8, else empty.
    """

    inputs: Mapping[str, InputSite] = field(default_factory=dict)
    kv_cache: KvSpec | None = None
    kv_scales: Mapping[str, KvScales] = field(default_factory=dict)


def quantization_config(
    entries: Mapping[str, TensorEntry], tied: Mapping[str, str] | None = None, sites: Sites | None = None
) -> dict[str, Any]:
    """`quantization_config` of config.json for `entries` by module name; equal specs are written once.

    `tied` maps a head without tensors of its own to the quantized embedding it shares, such as
    `{"lm_head": "model.embed_tokens"}`. Without `sites`, inputs and the KV cache stay in float.

    Raises:
        FormatError: a site is that of a module without an entry; scales of an fp8 cache are missing.
    """
    sites = sites or Sites()
    if strangers := sites.inputs.keys() - entries.keys():
        raise FormatError(f"the input of {min(strangers)} is quantized, and its weight is not; give it an entry")
    specs = list(dict.fromkeys(entry.spec for entry in entries.values()))
    activations = list(dict.fromkeys(site.activation for site in sites.inputs.values() if site.activation is not None))
    tensors: dict[str, Any] = {}
    for name, entry in entries.items():
        tensors[name] = {
            "spec": specs.index(entry.spec),
            "shape": list(entry.shape),
            "outliers": entry.outliers,
            "value_bits": entry.value_bits,
        }
        if name in sites.inputs:
            site = sites.inputs[name]
            index = None if site.activation is None else activations.index(site.activation)
            tensors[name]["input"] = {**site.model_dump(), "activation": index}
    config: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "specs": [{**spec.model_dump(), "levels": 1 if spec.bilevel is None else 2} for spec in specs],
        "activations": [spec.model_dump() for spec in activations],
        "kv_cache": None if sites.kv_cache is None else _kv_cache(sites.kv_cache, sites.kv_scales),
        "tensors": tensors,
    }
    if tied:
        config["tied"] = dict(tied)
    return config


def _kv_cache(spec: KvSpec, scales: Mapping[str, KvScales]) -> dict[str, Any]:
    """The table of the KV cache; that of integers is what it was before there was another grid."""
    if (spec.grid == "fp8") != bool(scales):
        raise FormatError(f"the KV cache is {spec.label()} with {len(scales)} scales; fp8, and no other, has them")
    if spec.grid == "int":
        return spec.model_dump(exclude={"grid"})
    return {**spec.model_dump(), "scales": {name: pair.model_dump() for name, pair in scales.items()}}


def read_quantization_config(config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Module name -> entry, the inverse of `quantization_config`.

    Raises:
        FormatError: another method, format, version or number of grid levels; an unknown key; a wrong value.
    """
    stored = _read(config)
    specs = [spec.weight_spec() for spec in stored.specs]
    entries = {}
    for name, tensor in stored.tensors.items():
        if tensor.spec >= len(specs):
            raise FormatError(f"quantization_config.tensors.{name}: spec {tensor.spec} of {len(specs)} specs")
        try:
            entries[name] = TensorEntry(specs[tensor.spec], tensor.shape, tensor.outliers, tensor.value_bits)
        except FormatError as error:
            raise FormatError(f"quantization_config.tensors.{name}: {error}") from None
    return entries


def read_sites(config: Mapping[str, Any]) -> Sites:
    """What the model quantizes besides weights.

    Raises:
        FormatError: as `read_quantization_config`; a module's input that is described wrongly.
    """
    stored = _read(config)
    inputs = {}
    for name, tensor in stored.tensors.items():
        if tensor.input is not None:
            try:
                inputs[name] = _site(tensor.input, stored.activations)
            except ValueError as error:
                reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                raise FormatError(f"quantization_config.tensors.{name}.input: {reason}") from None
    if stored.kv_cache is None:
        return Sites(inputs)
    return Sites(inputs, stored.kv_cache.spec(), stored.kv_cache.scales or {})


def _site(stored: _StoredInput, activations: list[_StoredActivation]) -> InputSite:
    if stored.activation is None:
        spec = None
    elif stored.activation < len(activations):
        spec = ActivationSpec(**activations[stored.activation].model_dump())
    else:
        raise ValueError(f"activation {stored.activation} of {len(activations)} activations")
    return InputSite(transform=stored.transform, activation=spec, scale=stored.scale, zero=stored.zero)


def read_tied(config: Mapping[str, Any]) -> dict[str, str]:
    """Head -> quantized embedding whose tensors it shares; empty when nothing is tied.

    Raises:
        FormatError: as `read_quantization_config`; a tied module that is quantized itself or shares nothing.
    """
    stored = _read(config)
    for head, embedding in stored.tied.items():
        if head in stored.tensors or embedding not in stored.tensors:
            raise FormatError(
                f"quantization_config.tied: {head} -> {embedding}; "
                "needed a module without tensors of its own -> a quantized module"
            )
    return stored.tied


def _read(config: Mapping[str, Any]) -> _StoredConfig:
    """`config` checked key by key, what other programs and versions would have written first."""
    with reading("quantization_config", FormatError):
        return _checked(config)


def _checked(config: Mapping[str, Any]) -> _StoredConfig:
    needed = {"quant_method": QUANT_METHOD, "format": FORMAT_NAME}
    for key, value in needed.items():
        if config.get(key) != value:
            raise FormatError(f"quantization_config.{key}: found {config.get(key)!r}, needed {value!r}")
    version = config.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        remedy = "the file is damaged; quantize the model again"
        if isinstance(version, int) and not isinstance(version, bool) and version >= 1:
            remedy = _NEWER if version > FORMAT_VERSION else _OLDER
        raise FormatError(f"quantization_config.version: found {version!r}, needed {FORMAT_VERSION}; {remedy}")
    specs = config.get("specs")
    for i, spec in enumerate(specs if isinstance(specs, list) else []):
        levels = spec.get("levels") if isinstance(spec, dict) else None
        if isinstance(levels, int) and levels > 2:
            raise FormatError(f"quantization_config.specs.{i}.levels: found {levels}, needed 1 or 2; {_NEWER}")
    try:
        # Through JSON, where strict mode takes lists for tuples but neither "4" nor true for 4.
        return _StoredConfig.model_validate_json(json.dumps(dict(config)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"quantization_config.{key}: {first['msg']}, found {str(first['input'])[:80]}") from None
    except TypeError as error:
        raise FormatError(f"quantization_config: not JSON ({error})") from None
