"""The formats `pack-quantized` and `int-quantized` of the compressed-tensors library: one matrix as named tensors.

Codes there are signed, `code - 2**(bits-1)`, and so are zeros; packed words hold them plus `2**(bits-1)`, which is what
bitwright holds. Nothing is computed on the way: codes, scales and zeros move. `docs/formats/compressed_tensors.md` has
the layouts, read from the library (0.20). Between 0.17.1 and 0.18.0 it changed the layout of 3, 5, 6 and 7 bits
without changing its name, from whole codes in each word to dense ones: see `dense_layout`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.bits import has_padding_bits, pack_rows, row_words, unpack_rows
from bitwright.formats.layout import TensorEntry, beyond_plain_codes
from bitwright.numeric.grid import Grid
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import SCALE_DTYPES, WeightSpec

QUANT_METHOD = "compressed-tensors"
# The oldest version of the library that reads all that is written here.
OLDEST_READER = "0.18.0"
PACKED, INT8 = "pack-quantized", "int-quantized"
PART_NAMES = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

_DENSE_SINCE = (0, 18, 0)
_VERSION = re.compile(r"\d+(\.\d+)+")


@dataclass(frozen=True)
class WeightArgs:
    """What a config group says of weights.

    Attributes:
        bits: of a code.
        symmetric: zeros are `2**(bits-1)` and are not stored.
        strategy: what shares a scale.
        group_size: of strategy "group", else None.
        format: PACKED, or INT8: one code to a byte.
    """

    bits: int
    symmetric: bool
    strategy: Literal["group", "channel", "tensor"]
    group_size: int | None
    format: str

    @staticmethod
    def of(entry: TensorEntry, format_name: str) -> WeightArgs:
        """The arguments of a matrix; one group per row is strategy "channel", however its spec says so."""
        spec, in_features = entry.spec, entry.shape[1]
        if spec.groups(in_features) == 1:
            return WeightArgs(spec.bits, spec.symmetric, "channel", None, format_name)
        return WeightArgs(spec.bits, spec.symmetric, "group", spec.group_size, format_name)

    def groups(self, in_features: int) -> int:
        """Scales in one row of `weight_scale`."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)


def refusal(entry: TensorEntry, odd_bits: bool = False) -> str | None:
    """Why the formats cannot hold a matrix, and what to do about it; None if they can.

    `odd_bits` admits 3, 5, 6 and 7 bits, which versions of the library before `OLDEST_READER` misread.
    """
    spec, in_features = entry.spec, entry.shape[1]
    if (problem := beyond_plain_codes(entry)) is not None:
        return problem
    if 32 % spec.bits and not odd_bits:
        return (
            f"has {spec.bits} bits, which compressed-tensors before {OLDEST_READER} misreads without an error, needed "
            "2, 4 or 8; quantize with w4 or w8 in the scheme"
        )
    width = spec.group_width(in_features)
    if in_features % width:
        return f"has {in_features} inputs in groups of {width}, needed whole groups; quantize with no g in the scheme"
    return None


def pack(q: QTensor, format_name: str) -> dict[str, Tensor]:
    """The tensors of `q` by local name; `unpack` returns `q` exactly.

    Args:
        q: a matrix that `refusal` has nothing against.
        format_name: PACKED or INT8.

    Raises:
        FormatError: `q` is inconsistent, or a scale is not representable as stored.
    """
    q.validate("QTensor")
    if q.spec.bilevel is not None or q.spec.zero == "float" or (q.outliers is not None and q.outliers.count):
        raise FormatError(f"{q.spec.label()}: {refusal(TensorEntry.of(q), odd_bits=True)}")
    spec, scale = q.spec, q.grid.scale.to(q.spec.storage_dtype)
    if not torch.equal(scale.float(), q.grid.scale):
        raise FormatError(f"a scale is not representable in {spec.scale_dtype}; round it with stored_scale first")
    parts = {"weight_scale": scale}
    zero = q.grid.zero.to(torch.uint8)
    if format_name == INT8:
        parts["weight"] = _signed(q.codes, spec.bits)
        if not spec.symmetric:
            parts["weight_zero_point"] = _signed(zero, spec.bits)
    else:
        parts["weight_packed"] = pack_rows(q.codes, spec.bits)
        parts["weight_shape"] = torch.tensor(q.shape)
        if not spec.symmetric:
            parts["weight_zero_point"] = pack_rows(zero.T.contiguous(), spec.bits).T
    return {name: part.contiguous() for name, part in parts.items()}


def unpack(name: str, stored: Mapping[str, Tensor], args: WeightArgs, version: str | None) -> QTensor:
    """The matrix that a checkpoint stores; `name` (of the module) goes into messages.

    Args:
        name: of the module.
        stored: its tensors by local name; those that are no part of the weight are not looked at.
        args: what its config group says.
        version: of the library that wrote it, from config.json.

    Raises:
        FormatError: a part is missing, or has another type, shape or width than `args` and `version` say.
    """
    if args.format == INT8:
        codes = _unsigned(f"{name}.weight", _part(name, stored, "weight", torch.int8, None), args.bits)
        dense = True
    else:
        shape = _shape(name, _part(name, stored, "weight_shape", None, (2,)))
        words = _part(name, stored, "weight_packed", torch.int32, None)
        if words.dim() != 2 or words.shape[0] != shape[0]:
            raise FormatError(f"{name}.weight_packed: is {list(words.shape)}, needed {shape[0]} rows")
        dense = dense_layout(f"{name}.weight_packed", args.bits, shape[1], words.shape[1], version)
        codes = _unpack_words(f"{name}.weight_packed", words, args.bits, shape[1], dense)
    out_features, in_features = codes.shape
    if args.group_size is not None and in_features % args.group_size:
        raise FormatError(
            f"{name}: {in_features} inputs are no whole number of groups of {args.group_size}, which the library "
            "refuses; config.json does not belong to this checkpoint"
        )
    _check_order(name, stored, args, in_features)
    scale, scale_dtype = _scale(name, stored, args, (out_features, args.groups(in_features)))
    zero = _zero(name, stored, args, scale, dense)
    spec = WeightSpec(bits=args.bits, group_size=args.group_size, symmetric=args.symmetric, scale_dtype=scale_dtype)
    return QTensor(codes, Grid(scale, zero, spec))


def dense_layout(name: str, bits: int, n: int, words: int, version: str | None) -> bool:
    """Whether `n` codes of `bits` bits in `words` 32-bit words of `name` are dense, rather than whole in each word.

    Both layouts are called `pack-quantized`: versions up to 0.17.1 write whole codes, from 0.18.0 on dense ones.
    2, 4 and 8 bits are the same in both. Version and width must agree, and one of them must decide.

    Raises:
        FormatError: they do not.
    """
    if not 2 <= bits <= 8:
        raise FormatError(f"{name}: {bits} bits, needed 2 to 8")
    per_word = 32 // bits
    widths = {True: row_words(bits, n), False: -(-n // per_word)}
    fits = [dense for dense, width in widths.items() if width == words]
    if not fits:
        raise FormatError(
            f"{name}: {words} words for {n} codes of {bits} bits, needed {widths[True]} "
            f"(or {widths[False]} before {OLDEST_READER}); the file is damaged or config.json names other bits"
        )
    if 32 % bits == 0 or n <= per_word:
        return True
    said = None
    if version is not None and _VERSION.fullmatch(version):
        said = tuple(int(number) for number in version.split(".")) >= _DENSE_SINCE
    if said is None and len(fits) == 2:
        raise FormatError(
            f"{name}: {bits}-bit codes whose layout neither their width nor version {version!r} tells (it changed in "
            f"{OLDEST_READER}); set quantization_config.version to that of the writer"
        )
    if said is not None and said not in fits:
        raise FormatError(
            f"{name}: {words} words for {n} codes of {bits} bits, needed {widths[said]} in files of version {version}; "
            "set quantization_config.version to that of the writer"
        )
    return fits[0] if said is None else said


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _unsigned(name: str, values: Tensor, bits: int) -> Tensor:
    """Codes uint8 from signed ones [rows, n]."""
    if values.dim() != 2 or 0 in values.shape:
        raise FormatError(f"{name}: is {list(values.shape)}, needed a matrix")
    codes = values.to(torch.int16) + (1 << (bits - 1))
    low, high = (int(limit) for limit in torch.aminmax(codes))
    if low < 0 or high >> bits:
        raise FormatError(f"{name}: a value is outside the range of {bits} bits; the file is damaged")
    return codes.to(torch.uint8)


def _unpack_words(name: str, words: Tensor, bits: int, n: int, dense: bool) -> Tensor:
    """Codes uint8 [rows, n] from int32 [rows, words] of either layout, of the right width."""
    if dense:
        if has_padding_bits(words, bits, n):
            raise FormatError(f"{name}: padding bits are set, needed zeros; the file is damaged")
        return unpack_rows(words.contiguous(), bits, n)
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words[:, :, None] >> shifts).bitwise_and_((1 << bits) - 1)
    return codes.flatten(1)[:, :n].to(torch.uint8)


def _part(
    name: str, stored: Mapping[str, Tensor], part: str, dtype: torch.dtype | None, shape: tuple[int, ...] | None
) -> Tensor:
    tensor = stored.get(part)
    if tensor is None:
        raise FormatError(f"{name}.{part}: missing; the checkpoint is incomplete or config.json names another format")
    if dtype is not None and tensor.dtype != dtype:
        raise FormatError(f"{name}.{part}: is {tensor.dtype}, needed {dtype}; config.json names another format")
    if shape is not None and tuple(tensor.shape) != shape:
        raise FormatError(f"{name}.{part}: is {list(tensor.shape)}, needed {list(shape)}; it belongs to another matrix")
    return tensor


def _shape(name: str, stored: Tensor) -> tuple[int, int]:
    if stored.dtype not in (torch.int64, torch.int32):
        raise FormatError(f"{name}.weight_shape: is {stored.dtype}, needed torch.int64")
    out_features, in_features = (int(size) for size in stored)
    # the limits of an entry are those of any matrix
    return TensorEntry(WeightSpec(bits=8), (out_features, in_features)).shape


def _check_order(name: str, stored: Mapping[str, Tensor], args: WeightArgs, in_features: int) -> None:
    """Refuse columns whose groups are not consecutive."""
    order = stored.get("weight_g_idx")
    if order is None:
        return
    _part(name, stored, "weight_g_idx", torch.int32, (in_features,))
    if not torch.equal(order, torch.arange(in_features, dtype=torch.int32) // (args.group_size or in_features)):
        raise FormatError(
            f"{name}.weight_g_idx: groups are not runs of columns (actorder 'group'), needed consecutive ones; "
            "quantize the model again, with actorder 'weight' or with bitwright"
        )


def _scale(
    name: str, stored: Mapping[str, Tensor], args: WeightArgs, shape: tuple[int, int]
) -> tuple[Tensor, Literal["float16", "bfloat16", "float32"]]:
    """Scales float32 [out, groups] and the type in which they are stored."""
    found = _part(name, stored, "weight_scale", None, None)
    kind = next((kind for kind, dtype in SCALE_DTYPES.items() if dtype == found.dtype), None)
    if kind is None:
        raise FormatError(f"{name}.weight_scale: is {found.dtype}, needed one of {', '.join(SCALE_DTYPES)}")
    if args.strategy == "tensor" and found.numel() == 1:
        found = found.reshape(1, 1).expand(shape)
    if tuple(found.shape) != shape:
        raise FormatError(f"{name}.weight_scale: is {list(found.shape)}, needed {list(shape)} ({args.strategy})")
    if not bool(torch.isfinite(found).all()):
        raise FormatError(f"{name}.weight_scale: holds NaN or Inf, needed finite values; the file is damaged")
    return found.float().contiguous(), kind  # type: ignore[return-value]  # a key of SCALE_DTYPES


def _zero(name: str, stored: Mapping[str, Tensor], args: WeightArgs, scale: Tensor, dense: bool) -> Tensor:
    """Zeros float32 [out, groups]."""
    found, full = stored.get("weight_zero_point"), f"{name}.weight_zero_point"
    centre, (out_features, groups) = float(1 << (args.bits - 1)), scale.shape
    if args.symmetric:
        # Older versions store the zeros of symmetric codes as well.
        if found is not None and bool((found != 0).any()):
            raise FormatError(f"{full}: is not 0, but config.json says symmetric; config.json belongs to another file")
        return torch.full_like(scale, centre)
    found = _part(name, stored, "weight_zero_point", None, None)
    if found.dtype == torch.int8:
        if args.strategy == "tensor" and found.numel() == 1:
            found = found.reshape(1, 1).expand(scale.shape)
        _part(name, {"weight_zero_point": found}, "weight_zero_point", torch.int8, (out_features, groups))
        return _unsigned(full, found, args.bits).float()
    words = row_words(args.bits, out_features) if dense else -(-out_features // (32 // args.bits))
    _part(name, stored, "weight_zero_point", torch.int32, (words, groups))
    return _unpack_words(full, found.T, args.bits, out_features, dense).T.float().contiguous()
