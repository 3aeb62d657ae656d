"""The native format, version 3: one quantized matrix as a handful of named tensors.

`docs/formats/native.md` is the specification; this file follows it, with `layout` (which tensors an entry has),
`bits` (dense streams of codes), `sparse` (outliers) and `config` (config.json).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.bits import has_padding_bits, pack_rows, unpack_rows
from bitwright.formats.config import (
    FORMAT_NAME,
    FORMAT_VERSION,
    QUANT_METHOD,
    Sites,
    quantization_config,
    read_quantization_config,
    read_sites,
    read_tied,
)
from bitwright.formats.layout import PART_NAMES, TensorEntry, check_layout, check_part, packed_bytes, parts
from bitwright.formats.sparse import check_outliers, pack_outliers, unpack_outliers
from bitwright.numeric.bilevel import SecondLevel
from bitwright.numeric.grid import Grid
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "PART_NAMES",
    "QUANT_METHOD",
    "Sites",
    "TensorEntry",
    "check_layout",
    "check_part",
    "check_parts",
    "pack",
    "packed_bytes",
    "parts",
    "quantization_config",
    "read_quantization_config",
    "read_sites",
    "read_tied",
    "unpack",
    "unpack_grid",
    "unpack_outliers",
]


def pack(q: QTensor) -> dict[str, Tensor]:
    """The tensors of `q` by local name, as in `parts(TensorEntry.of(q))`; `unpack` returns `q` exactly.

    Raises:
        FormatError: `q` is inconsistent, or a scale, zero or residual is not representable as stored.
    """
    q.validate("QTensor")
    packed = {"weight_packed": pack_rows(q.codes, q.spec.bits), **_pack_grid(q.grid)}
    if q.outliers is not None and q.outliers.count:
        if q.outliers.step is None:
            _exactly("outlier residual", q.outliers.residual, torch.float16)
        else:
            _exactly("step of outlier residuals", q.outliers.step, torch.float16)
        packed |= pack_outliers(q.outliers, q.shape)
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def _pack_grid(grid: Grid) -> dict[str, Tensor]:
    spec, zero, levels, bilevel = grid.spec, grid.zero, grid.levels, grid.spec.bilevel
    packed = {}
    if bilevel is None:
        packed["weight_scale"] = _exactly("scale", grid.scale, spec.storage_dtype)
    if spec.symmetric:
        if bool((zero != spec.centre).any()):
            raise FormatError(f"zeros of symmetric codes must all be {spec.centre}")
    elif spec.zero == "int":
        if bool((zero < 0).any() or (zero > spec.max_code).any()):
            raise FormatError(f"integer zeros lie in {zero.min():g}..{zero.max():g}, needed 0..{spec.max_code}")
        packed["weight_zero"] = _one_stream(_exactly("zero", zero, torch.uint8), spec.bits)
    elif bilevel is None or bilevel.zero_bits is None:
        packed["weight_zero"] = _exactly("zero", zero, spec.storage_dtype)
    if bilevel is not None and levels is not None:
        packed["scale_codes"] = _one_stream(levels.scale_codes, bilevel.scale_bits)
        if levels.zero_codes is not None and bilevel.zero_bits is not None:
            packed["zero_codes"] = _one_stream(levels.zero_codes, bilevel.zero_bits)
        packed["superblock_statistics"] = _exactly("superblock statistic", levels.statistics, spec.storage_dtype)
    return packed


def _one_stream(codes: Tensor, bits: int) -> Tensor:
    """All rows of `codes` [out, groups] as one stream: padding every row would cost up to 31 bits per row."""
    return pack_rows(codes.reshape(1, -1), bits)[0]


def unpack(name: str, stored: Mapping[str, Tensor], entry: TensorEntry) -> QTensor:
    """The QTensor that `pack` stored; `name` (of the module) goes into messages.

    Raises:
        FormatError: `stored` breaks any rule of the specification.
    """
    check_parts(name, stored, entry)
    codes = unpack_rows(stored["weight_packed"], entry.spec.bits, entry.shape[1])
    outliers = unpack_outliers(stored, entry.shape) if entry.outliers else None
    return QTensor(codes, unpack_grid(stored, entry.spec, entry.shape), outliers)


def unpack_grid(stored: Mapping[str, Tensor], spec: WeightSpec, shape: tuple[int, int]) -> Grid:
    """The grid of a matrix of `shape` (out, in) from its parts; their layout is that of `parts`, values unchecked."""
    groups = (shape[0], spec.groups(shape[1]))
    if spec.bilevel is None:
        scale = stored["weight_scale"].float()
        return Grid(scale, _unpack_zero(stored.get("weight_zero"), spec, scale), spec)
    levels = _unpack_levels(stored, spec, groups)
    scale, zero = levels.decode(spec)
    zero = _unpack_zero(stored.get("weight_zero"), spec, scale) if zero is None else zero
    return Grid(scale, zero, spec, levels)


def _unpack_zero(stored: Tensor | None, spec: WeightSpec, scale: Tensor) -> Tensor:
    """Zeros float32 [out, groups] (the shape of `scale`) from `weight_zero`: absent, packed or floats."""
    if stored is None:
        return torch.full_like(scale, float(spec.centre))
    if stored.dtype == torch.int32:
        return unpack_rows(stored[None], spec.bits, scale.numel()).reshape(scale.shape).float()
    return stored.float()


def _unpack_levels(stored: Mapping[str, Tensor], spec: WeightSpec, groups: tuple[int, int]) -> SecondLevel:
    assert spec.bilevel is not None
    codes = {}
    for part, bits in (("scale_codes", spec.bilevel.scale_bits), ("zero_codes", spec.bilevel.zero_bits)):
        if bits is not None:
            codes[part] = unpack_rows(stored[part][None], bits, groups[0] * groups[1]).reshape(groups)
    return SecondLevel(codes["scale_codes"], codes.get("zero_codes"), stored["superblock_statistics"].float())


def check_parts(name: str, stored: Mapping[str, Tensor], entry: TensorEntry) -> None:
    """Refuse everything the specification forbids, without unpacking a code of a weight.

    Any pattern of bits is a legal code, so after this no kernel can read out of bounds or produce NaN.

    Raises:
        FormatError: naming the tensor, what was found and what was needed.
    """
    check_layout(name, stored, entry)
    spec, shape = entry.spec, entry.shape
    groups = (shape[0], spec.groups(shape[1]))
    _check_padding(name, stored, spec, shape)
    for part in ("weight_scale", "weight_zero"):
        values = stored.get(part)
        if values is not None and values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise FormatError(f"{name}.{part}: holds NaN or Inf, needed finite values; the file is damaged")
    if spec.bilevel is not None:
        _unpack_levels(stored, spec, groups).validate(name, groups, spec)
    if entry.outliers:
        check_outliers(name, stored, entry.outliers, shape)


def _check_padding(name: str, stored: Mapping[str, Tensor], spec: WeightSpec, shape: tuple[int, int]) -> None:
    numbers, bilevel = shape[0] * spec.groups(shape[1]), spec.bilevel
    streams = [("weight_packed", spec.bits, shape[1]), ("weight_zero", spec.bits, numbers)]
    if bilevel is not None:
        streams += [("scale_codes", bilevel.scale_bits, numbers), ("zero_codes", bilevel.zero_bits or 8, numbers)]
    for part, bits, n in streams:
        words = stored.get(part)
        # Zeros stored as floats are no stream.
        if words is None or words.is_floating_point():
            continue
        if has_padding_bits(words if words.dim() == 2 else words[None], bits, n):
            raise FormatError(f"{name}.{part}: padding bits are set, needed zeros; the file is damaged")


def _exactly(what: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as `dtype`, refused when that changes any of them: codes were chosen for the exact grid."""
    stored = values.to(dtype)
    if not torch.equal(stored.to(values.dtype), values):
        raise FormatError(f"a {what} is not representable in {dtype}; round it with stored_scale or stored_zero first")
    return stored
