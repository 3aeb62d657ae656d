"""The native format, version 1: one quantized matrix as a handful of named tensors.

`docs/formats/native.md` is the specification; this file follows it. A stored tensor never has a layout that
its `TensorEntry` does not determine, so sizes are known before any weight is read (`parts`, `packed_bytes`)
and a reader can refuse a file from its headers alone. Changing any layout means a new version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.bits import has_padding_bits, pack_rows, row_words, unpack_rows
from bitwright.numeric.grid import Grid
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.settings import Settings
from bitwright.numeric.spec import WeightSpec

QUANT_METHOD = "bitwright"
FORMAT_NAME = "bitwright-native"
FORMAT_VERSION = 1

PART_NAMES = ("weight_packed", "weight_scale", "weight_zero", "outlier_ptr", "outlier_idx", "outlier_val")
# Names of the two-level grid to come. A reader of version 1 must refuse them, not ignore them.
RESERVED_NAMES = ("scale_codes", "zero_codes", "scale_statistics")

# Above every real matrix by far, and small enough that no byte count below overflows 64 bits.
_MAX_FEATURES = 1 << 27
# Outlier columns up to 65535 fit 16 bits.
_SHORT_INDEX = 1 << 16
_NEWER = "it was written by a newer bitwright; upgrade bitwright to read it"


@dataclass(frozen=True)
class TensorEntry:
    """All that determines the stored layout of one matrix: `spec`, `shape` (out, in) and how many `outliers`.

    Raises:
        FormatError: a size below 1, or more outliers than weights.
    """

    spec: WeightSpec
    shape: tuple[int, int]
    outliers: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that no matrix has."""
        if not all(1 <= size <= _MAX_FEATURES for size in self.shape):
            raise FormatError(f"shape {list(self.shape)}: needed two sizes between 1 and {_MAX_FEATURES}")
        if not 0 <= self.outliers <= min(prod(self.shape), 2**31 - 1):
            raise FormatError(f"{self.outliers} outliers in a matrix of shape {list(self.shape)}")

    @staticmethod
    def of(q: QTensor) -> TensorEntry:
        """The entry of `q`; a `q` with an empty list of outliers has none."""
        return TensorEntry(q.spec, q.shape, 0 if q.outliers is None else q.outliers.count)


def parts(entry: TensorEntry) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Local name -> (shape, dtype) of every tensor stored for `entry`, in the order of the specification."""
    out_features, in_features = entry.shape
    spec = entry.spec
    groups = spec.groups(in_features)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": ((out_features, row_words(spec.bits, in_features)), torch.int32),
        "weight_scale": ((out_features, groups), spec.storage_dtype),
    }
    if spec.zero == "float":
        layout["weight_zero"] = ((out_features, groups), spec.storage_dtype)
    elif not spec.symmetric:
        # One stream for all rows: padding every row would cost up to 31 bits per row.
        layout["weight_zero"] = ((row_words(spec.bits, out_features * groups),), torch.int32)
    if entry.outliers:
        layout["outlier_ptr"] = ((out_features + 1,), torch.int32)
        index = torch.uint16 if in_features <= _SHORT_INDEX else torch.int32
        layout["outlier_idx"] = ((entry.outliers,), index)
        layout["outlier_val"] = ((entry.outliers,), torch.float16)
    return layout


def packed_bytes(entry: TensorEntry) -> int:
    """Bytes of all tensors stored for `entry`."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in parts(entry).values())


def pack(q: QTensor) -> dict[str, Tensor]:
    """The tensors of `q` by local name, as in `parts(TensorEntry.of(q))`; `unpack` returns `q` exactly.

    Raises:
        FormatError: `q` is inconsistent, or a scale, zero or residual is not representable as stored.
    """
    q.validate("QTensor")
    spec = q.spec
    packed = {
        "weight_packed": pack_rows(q.codes, spec.bits),
        "weight_scale": _exactly("scale", q.grid.scale, spec.storage_dtype),
    }
    zero = q.grid.zero
    if spec.zero == "float":
        packed["weight_zero"] = _exactly("zero", zero, spec.storage_dtype)
    elif spec.symmetric:
        if bool((zero != spec.centre).any()):
            raise FormatError(f"zeros of symmetric codes must all be {spec.centre}")
    else:
        if bool((zero < 0).any() or (zero > spec.max_code).any()):
            raise FormatError(f"integer zeros lie in {zero.min():g}..{zero.max():g}, needed 0..{spec.max_code}")
        packed["weight_zero"] = pack_rows(_exactly("zero", zero, torch.uint8).reshape(1, -1), spec.bits)[0]
    if q.outliers is not None and q.outliers.count:
        layout = parts(TensorEntry.of(q))
        packed["outlier_ptr"] = q.outliers.row_pointer.to(torch.int32)
        packed["outlier_idx"] = q.outliers.column.to(layout["outlier_idx"][1])
        packed["outlier_val"] = _exactly("outlier residual", q.outliers.residual, torch.float16)
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def unpack(name: str, stored: Mapping[str, Tensor], entry: TensorEntry) -> QTensor:
    """The QTensor that `pack` stored; `name` (of the module) goes into messages.

    Raises:
        FormatError: `stored` breaks any rule of the specification.
    """
    check_parts(name, stored, entry)
    spec, in_features = entry.spec, entry.shape[1]
    scale = stored["weight_scale"].float()
    grid = Grid(scale, unpack_zero(stored.get("weight_zero"), scale, spec.bits), spec)
    codes = unpack_rows(stored["weight_packed"], spec.bits, in_features)
    return QTensor(codes, grid, _outliers(stored) if entry.outliers else None)


def unpack_zero(stored: Tensor | None, scale: Tensor, bits: int) -> Tensor:
    """Zeros float32 [out, groups] (the shape of `scale`) from `weight_zero`: absent, packed or floats."""
    if stored is None:
        return torch.full_like(scale, float(1 << (bits - 1)), dtype=torch.float32)
    if stored.dtype == torch.int32:
        return unpack_rows(stored[None], bits, scale.numel()).reshape(scale.shape).float()
    return stored.float()


def check_layout(name: str, stored: Mapping[str, Tensor], entry: TensorEntry) -> None:
    """Refuse missing and unknown tensors, wrong dtypes and wrong shapes; no value is read.

    Raises:
        FormatError: naming the tensor, what was found and what was needed.
    """
    layout = parts(entry)
    for part in stored.keys() - layout.keys():
        reason = _NEWER if part in RESERVED_NAMES else f"the entry {entry.spec.label()} has no such tensor"
        raise FormatError(f"{name}.{part}: unknown; {reason}")
    for part, (shape, dtype) in layout.items():
        if part not in stored:
            raise FormatError(f"{name}.{part}: missing; needed {dtype} {list(shape)}; the checkpoint is incomplete")
        check_part(f"{name}.{part}", tuple(stored[part].shape), stored[part].dtype, (shape, dtype))


def check_part(
    name: str, shape: tuple[int, ...], dtype: torch.dtype | str, needed: tuple[tuple[int, ...], torch.dtype]
) -> None:
    """Refuse a tensor whose `shape` or `dtype` (text for a type that no part has) is not the `needed` one."""
    if (shape, dtype) != needed:
        raise FormatError(
            f"{name}: found {dtype} {list(shape)}, needed {needed[1]} {list(needed[0])}; "
            "the tensor does not belong to this quantization_config"
        )


def check_parts(name: str, stored: Mapping[str, Tensor], entry: TensorEntry) -> None:
    """Refuse everything the specification forbids, without unpacking a code.

    Any pattern of bits is a legal code, so after this no kernel can read out of bounds or produce NaN.

    Raises:
        FormatError: naming the tensor, what was found and what was needed.
    """
    check_layout(name, stored, entry)
    spec, in_features = entry.spec, entry.shape[1]
    streams = [("weight_packed", stored["weight_packed"], in_features)]
    zero = stored.get("weight_zero")
    if zero is not None and zero.dtype == torch.int32:
        streams.append(("weight_zero", zero[None], stored["weight_scale"].numel()))
    for part, words, n in streams:
        if has_padding_bits(words, spec.bits, n):
            raise FormatError(f"{name}.{part}: padding bits are set, needed zeros; the file is damaged")
    for part in ("weight_scale", "weight_zero"):
        values = stored.get(part)
        if values is not None and values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise FormatError(f"{name}.{part}: holds NaN or Inf, needed finite values; the file is damaged")
    if entry.outliers:
        _outliers(stored).validate(name, entry.shape)


def _outliers(stored: Mapping[str, Tensor]) -> Outliers:
    """The stored outliers, not yet checked."""
    pointer, column = stored["outlier_ptr"].to(torch.int64), stored["outlier_idx"].to(torch.int64)
    return Outliers(pointer, column, stored["outlier_val"].float())


def _exactly(what: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as `dtype`, refused when that changes any of them: codes were chosen for the exact grid."""
    stored = values.to(dtype)
    if not torch.equal(stored.to(values.dtype), values):
        raise FormatError(f"a {what} is not representable in {dtype}; round it with stored_scale or stored_zero first")
    return stored


class _StoredSpec(WeightSpec):
    """A WeightSpec as written in config.json."""

    # Not Literal[1], which would take true for 1.
    levels: int = Field(ge=1, le=1)

    @model_validator(mode="after")
    def _is_complete(self) -> _StoredSpec:
        # A default may change between releases; a file must not change its meaning with it.
        missing = type(self).model_fields.keys() - self.model_fields_set
        if missing:
            raise ValueError(f"missing {', '.join(sorted(missing))}")
        return self

    def weight_spec(self) -> WeightSpec:
        return WeightSpec(**self.model_dump(exclude={"levels"}))


class _StoredTensor(Settings):
    """One entry of `tensors`."""

    spec: int = Field(ge=0)
    shape: tuple[int, int]
    outliers: int = Field(default=0, ge=0)


class _StoredConfig(Settings):
    """The whole `quantization_config`."""

    quant_method: Literal["bitwright"]
    format: Literal["bitwright-native"]
    version: int
    specs: list[_StoredSpec]
    tensors: dict[str, _StoredTensor]
    tied: dict[str, str] = Field(default_factory=dict)


def quantization_config(entries: Mapping[str, TensorEntry], tied: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`quantization_config` of config.json for `entries` by module name; equal specs are written once.

    `tied` maps a head without tensors of its own to the quantized embedding it shares, such as
    `{"lm_head": "model.embed_tokens"}`.
    """
    specs = list(dict.fromkeys(entry.spec for entry in entries.values()))
    tensors: dict[str, Any] = {}
    for name, entry in entries.items():
        tensors[name] = {
            "spec": specs.index(entry.spec),
            "shape": list(entry.shape),
            "outliers": entry.outliers,
        }
    config: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "specs": [{**spec.model_dump(), "levels": 1} for spec in specs],
        "tensors": tensors,
    }
    if tied:
        config["tied"] = dict(tied)
    return config


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
            entries[name] = TensorEntry(specs[tensor.spec], tensor.shape, tensor.outliers)
        except FormatError as error:
            raise FormatError(f"quantization_config.tensors.{name}: {error}") from None
    return entries


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
    needed = {"quant_method": QUANT_METHOD, "format": FORMAT_NAME}
    for key, value in needed.items():
        if config.get(key) != value:
            raise FormatError(f"quantization_config.{key}: found {config.get(key)!r}, needed {value!r}")
    version = config.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = _NEWER if newer else "the file is damaged; quantize the model again"
        raise FormatError(f"quantization_config.version: found {version!r}, needed {FORMAT_VERSION}; {remedy}")
    specs = config.get("specs")
    for i, spec in enumerate(specs if isinstance(specs, list) else []):
        levels = spec.get("levels") if isinstance(spec, dict) else None
        if isinstance(levels, int) and levels > 1:
            raise FormatError(f"quantization_config.specs.{i}.levels: found {levels}, needed 1; {_NEWER}")
    try:
        # Through JSON, where strict mode takes lists for tuples but neither "4" nor true for 4.
        return _StoredConfig.model_validate_json(json.dumps(dict(config)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"quantization_config.{key}: {first['msg']}, found {str(first['input'])[:80]}") from None
    except TypeError as error:
        raise FormatError(f"quantization_config: not JSON ({error})") from None
