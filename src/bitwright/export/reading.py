"""Readers of quantized checkpoints: what each format's config says, and how a module's tensors become a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitwright.checkpoint.shard import TensorInfo
from bitwright.errors import FormatError
from bitwright.formats import compressed_tensors as ct
from bitwright.formats import gptq
from bitwright.formats.compressed_tensors_config import Group, read_groups, read_kv_cache, scheme_of
from bitwright.formats.gptq import Version
from bitwright.formats.native import QUANT_METHOD
from bitwright.numeric.activation import ActivationSpec, InputSite, KvSpec
from bitwright.numeric.qtensor import QTensor
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.patterns import compiled

_GPTQ_VERSIONS: dict[str, Version] = {"gptq": 1, "gptq_v2": 2}
# No float module has these: where codes are missing, the others tell.
_OF_GPTQ_AND_AWQ = frozenset({"qweight", "qzeros", "g_idx"})


class Reader(ABC):
    """One format with its settings."""

    name: str
    """Of the format, for people."""
    parts: frozenset[str]
    """Local names of all tensors that a quantized module may have, besides its bias."""
    kv_cache: KvSpec | None = None
    """How keys and values are quantized."""

    @abstractmethod
    def is_quantized(self, infos: Mapping[str, TensorInfo]) -> bool:
        """Whether the module with these tensors, by local name, is quantized."""

    @abstractmethod
    def read(self, module: str, stored: Mapping[str, Tensor]) -> tuple[QTensor, InputSite | None]:
        """The matrix that `stored` holds by local name, and what happens to its input.

        Raises:
            FormatError: `stored` does not follow the format or the config.
        """


def reader_of(config: Mapping[str, Any]) -> Reader:
    """The reader of a `quantization_config`.

    Raises:
        FormatError: a format, version or setting that cannot be imported.
    """
    with reading("quantization_config", FormatError):
        return _reader_of(config)


def _reader_of(config: Mapping[str, Any]) -> Reader:
    method = config.get("quant_method", config.get("method"))
    if method == ct.QUANT_METHOD:
        return CompressedTensorsReader(config)
    if method == "gptq":
        return GptqReader(config)
    if method == "awq":
        return AwqReader(config)
    if method == QUANT_METHOD:
        raise FormatError("quantization_config.quant_method: the folder is native already; there is nothing to import")
    raise FormatError(
        f"quantization_config.quant_method: found {method!r}, needed {ct.QUANT_METHOD!r}, 'gptq' or 'awq'; "
        "quantize the float checkpoint instead"
    )


class CompressedTensorsReader(Reader):
    """compressed-tensors: `pack-quantized` and `int-quantized`."""

    name = ct.QUANT_METHOD
    parts = frozenset({*ct.PART_NAMES, "input_scale", "input_zero_point"})

    def __init__(self, config: Mapping[str, Any]):
        """Read the groups of `config`."""
        self._groups: list[Group] = read_groups(config)
        self.kv_cache = read_kv_cache(config)
        version = config.get("version")
        self._version = version if isinstance(version, str) else None

    def is_quantized(self, infos: Mapping[str, TensorInfo]) -> bool:
        """See `Reader.is_quantized`."""
        return "weight_packed" in infos or "weight_scale" in infos

    def read(self, module: str, stored: Mapping[str, Tensor]) -> tuple[QTensor, InputSite | None]:
        """See `Reader.read`."""
        scheme = scheme_of(module, self._groups)
        other = "weight" if scheme.weights.format == ct.PACKED else "weight_packed"
        if other in stored:
            raise FormatError(f"{module}.{other}: unknown; config.json says {scheme.weights.format}")
        q = ct.unpack(module, stored, scheme.weights, self._version)
        site = None if scheme.activation is None else _input_site(module, stored, scheme.activation)
        return q, site


def _input_site(module: str, stored: Mapping[str, Tensor], spec: ActivationSpec) -> InputSite:
    if spec.granularity == "token":
        return InputSite(activation=spec)
    centre = 1 << (spec.bits - 1)
    scale = _number(module, stored, "input_scale")
    shift = 0.0 if spec.symmetric else _number(module, stored, "input_zero_point")
    zero = int(shift) + centre
    if not (scale > 0 and scale < float("inf")) or not 0 <= zero < 2 * centre:
        raise FormatError(f"{module}: static range of inputs with scale {scale} and zero point {shift}; it is damaged")
    return InputSite(activation=spec, scale=scale, zero=zero)


def _number(module: str, stored: Mapping[str, Tensor], part: str) -> float:
    """The one value of a stored tensor."""
    found = stored.get(part)
    if found is None or found.numel() != 1:
        got = "missing" if found is None else f"{list(found.shape)}"
        raise FormatError(f"{module}.{part}: is {got}, needed one number; the checkpoint does not fit config.json")
    return float(found.to(torch.float32))


class GptqReader(Reader):
    """GPTQ, versions 1 and 2, with settings of single modules (`dynamic`)."""

    parts = gptq.GPTQ_PARTS

    def __init__(self, config: Mapping[str, Any]):
        """Read the settings of `config`."""
        named = {config[key] for key in ("checkpoint_format", "format") if config.get(key) is not None}
        if config.get("is_marlin_format"):
            named.add("marlin")
        format_name = named.pop() if len(named) == 1 else "gptq" if not named else str(sorted(named))
        if format_name not in _GPTQ_VERSIONS:
            raise FormatError(
                f"quantization_config.checkpoint_format: found {format_name!r}, needed 'gptq' or 'gptq_v2'; "
                "convert it with the program that wrote it"
            )
        if config.get("pack_dtype", "int32") != "int32":
            raise FormatError(f"quantization_config.pack_dtype: found {config['pack_dtype']!r}, needed 'int32'")
        self.name = format_name
        self._version = _GPTQ_VERSIONS[format_name]
        self._config = dict(config)
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise FormatError(f"quantization_config.dynamic: found {dynamic!r}, needed an object")
        self._dynamic = dict(dynamic)
        where = "quantization_config.dynamic"
        expressions = {key: key.removeprefix("-:").removeprefix("+:") for key in self._dynamic}
        self._patterns = compiled(expressions, where)
        self._bits_and_group(config)

    def is_quantized(self, infos: Mapping[str, TensorInfo]) -> bool:
        """See `Reader.is_quantized`."""
        return not _OF_GPTQ_AND_AWQ.isdisjoint(infos)

    def read(self, module: str, stored: Mapping[str, Tensor]) -> tuple[QTensor, InputSite | None]:
        """See `Reader.read`."""
        bits, group_size = self._settings(module)
        if self._config.get("desc_act") and "g_idx" not in stored:
            raise FormatError(f"{module}.g_idx: missing, and config.json says desc_act; the checkpoint is incomplete")
        return gptq.unpack_gptq(module, stored, bits, group_size, self._version), None

    def _settings(self, module: str) -> tuple[int, int | None]:
        """Bits and group size of a module: the first `dynamic` expression that matches its name overrides."""
        config: Mapping[str, Any] = self._config
        for pattern, own in self._dynamic.items():
            if self._patterns[pattern].matches(module):
                if pattern.startswith("-:") or not isinstance(own, Mapping):
                    raise FormatError(f"quantization_config.dynamic: {pattern!r} says {module} is not quantized; it is")
                config = {**config, **own}
                break
        return self._bits_and_group(config)

    @staticmethod
    def _bits_and_group(config: Mapping[str, Any]) -> tuple[int, int | None]:
        bits = config.get("bits")
        if bits not in gptq.GPTQ_BITS or isinstance(bits, bool):
            raise FormatError(f"quantization_config.bits: found {bits!r}, needed one of {gptq.GPTQ_BITS}")
        return bits, _group_size(config.get("group_size"))


def _group_size(found: Any) -> int | None:
    if not isinstance(found, int) or isinstance(found, bool) or (found < 1 and found != -1):
        raise FormatError(f"quantization_config.group_size: found {found!r}, needed a positive integer or -1")
    return None if found == -1 else found


class AwqReader(Reader):
    """AWQ, version `gemm`, 4 bits."""

    name = "awq"
    parts = gptq.AWQ_PARTS

    def __init__(self, config: Mapping[str, Any]):
        """Read the settings of `config`."""
        bits, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
        if bits != 4 or isinstance(bits, bool):
            raise FormatError(f"quantization_config.bits: found {bits!r}, needed 4 for AWQ")
        if version != "gemm":
            raise FormatError(f"quantization_config.version: found {version!r}, needed 'gemm'; other orders of columns")
        self._group = _group_size(config.get("group_size", config.get("q_group_size")))

    def is_quantized(self, infos: Mapping[str, TensorInfo]) -> bool:
        """See `Reader.is_quantized`."""
        return not _OF_GPTQ_AND_AWQ.isdisjoint(infos)

    def read(self, module: str, stored: Mapping[str, Tensor]) -> tuple[QTensor, InputSite | None]:
        """See `Reader.read`."""
        return gptq.unpack_awq(module, stored, self._group), None
