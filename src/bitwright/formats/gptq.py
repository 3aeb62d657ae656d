"""GPTQ and AWQ checkpoints: one matrix as `qweight`, `qzeros`, `scales` and, for GPTQ, `g_idx`.

Both hold the transpose of what bitwright holds: `scales` are [groups, out]. GPTQ packs codes along `in` and zeros
along `out`, as dense bit streams, 3 bits included. Its version 1 stores `zero - 1` in the field of a zero, version 2
the zero. AWQ packs both along `out`, eight 4-bit codes to a word in an order that suits its kernel.

Source: the layouts of AutoGPTQ and GPTQModel (`gptq`, `gptq_v2`) and of AutoAWQ (`gemm`). Programs do not agree on a
version 1 zero of 0: its field would be -1, which some read as 2**bits. It is refused in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.bits import pack_rows, row_words, unpack_rows
from bitwright.formats.layout import TensorEntry, beyond_plain_codes
from bitwright.numeric.grid import Grid
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import SCALE_DTYPES, WeightSpec

GPTQ_BITS = (2, 3, 4, 8)
PART_NAMES = ("qweight", "qzeros", "scales", "g_idx")
GPTQ_PARTS, AWQ_PARTS = frozenset(PART_NAMES), frozenset({"qweight", "qzeros", "scales"})
Version = Literal[1, 2]

_AWQ_BITS = 4
# Field i of an AWQ word, from the least significant one, holds column _AWQ_ORDER[i] of its eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def refusal(entry: TensorEntry, awq: bool = False) -> str | None:
    """Why the format cannot hold a matrix, and what to do about it; None if it can, as far as its entry tells."""
    spec, (out_features, in_features) = entry.spec, entry.shape
    bits = (_AWQ_BITS,) if awq else GPTQ_BITS
    if (problem := beyond_plain_codes(entry)) is not None:
        return problem
    if spec.bits not in bits:
        return f"has {spec.bits} bits, needed {', '.join(str(one) for one in bits)}; quantize with w4 in the scheme"
    if in_features % spec.group_width(in_features):
        return (
            f"has {in_features} inputs in groups of {spec.group_size}, needed whole groups; quantize with no g in the "
            "scheme"
        )
    if out_features * spec.bits % 32 or (not awq and in_features * spec.bits % 32):
        return (
            f"is {list(entry.shape)} of {spec.bits} bits, needed sizes that fill 32-bit words; leave it in float with "
            "--set keep=NAME"
        )
    return None


def grid_refusal(grid: Grid, version: Version | None) -> str | None:
    """The same for its scales and zeros; `version` None for AWQ."""
    if _scales(grid) is None:
        return (
            f"has {grid.spec.scale_dtype} scales beyond float16, needed 16-bit ones; quantize with "
            "--set scale_dtype=float16"
        )
    if version == 1 and bool((grid.zero < 1).any()):
        return "has a zero of 0, which version 1 cannot hold; quantize with a symmetric scheme (-sym)"
    return None


def pack_gptq(q: QTensor, version: Version) -> dict[str, Tensor]:
    """The tensors of `q` by local name; `unpack_gptq` returns it exactly, with 16-bit scales.

    Raises:
        FormatError: `refusal` or `grid_refusal` has something against `q`.
    """
    _check(q, version)
    bits, (_, in_features) = q.spec.bits, q.shape
    zeros = q.grid.zero.to(torch.uint8) - (1 if version == 1 else 0)
    return {
        "qweight": pack_rows(q.codes, bits).T.contiguous(),
        "qzeros": pack_rows(zeros.T.contiguous(), bits),
        "scales": _stored_scales(q.grid),
        "g_idx": _group_index(in_features, q.spec.group_width(in_features)),
    }


def pack_awq(q: QTensor) -> dict[str, Tensor]:
    """The tensors of `q` by local name, zeros of symmetric codes included; `unpack_awq` returns its codes and grid.

    Raises:
        FormatError: `refusal` or `grid_refusal` has something against `q`.
    """
    _check(q, None)
    return {
        "qweight": _pack_interleaved(q.codes.T),
        "qzeros": _pack_interleaved(q.grid.zero.to(torch.uint8).T),
        "scales": _stored_scales(q.grid),
    }


def unpack_gptq(
    name: str, stored: Mapping[str, Tensor], bits: int, group_size: int | None, version: Version
) -> QTensor:
    """The matrix that a GPTQ checkpoint stores; `name` (of the module) goes into messages.

    Zeros that are all `2**(bits-1)` make it symmetric, whatever config.json calls it.

    Args:
        name: of the module.
        stored: its tensors by local name.
        bits: of a code, one of GPTQ_BITS.
        group_size: columns of a group; None: all.
        version: of the checkpoint format.

    Raises:
        FormatError: a part is missing, or has another type or shape than `bits` and `group_size` say; groups are not
            runs of columns; a zero is one on which readers do not agree.
    """
    words = _part(name, stored, "qweight", torch.int32)
    in_features, out_features = words.shape[0] * 32 // bits, words.shape[1]
    if words.shape[0] != row_words(bits, in_features) or words.shape[0] * 32 % bits:
        raise FormatError(f"{name}.qweight: {words.shape[0]} rows are no whole number of {bits}-bit codes")
    width = in_features if group_size is None else group_size
    order = stored.get("g_idx")
    runs = _group_index(in_features, width)
    if order is not None and (order.dtype != runs.dtype or order.shape != runs.shape):
        raise FormatError(
            f"{name}.g_idx: is {_found(order)}, needed {_found(runs)}, as qweight has {words.shape[0]} rows of "
            f"{bits}-bit codes; the file is damaged or config.json names other bits"
        )
    if order is not None and not torch.equal(order, runs):
        column = int((order != runs).nonzero()[0])
        raise FormatError(
            f"{name}.g_idx: column {column} is in group {int(order[column])}, needed {column // width}, as groups must "
            f"be runs of {width} columns; correct group_size in config.json, or quantize again without desc_act"
        )
    groups = -(-in_features // width)
    zero_words = _part(name, stored, "qzeros", torch.int32, (groups, row_words(bits, out_features)))
    codes = unpack_rows(words.T.contiguous(), bits, in_features)
    zeros = unpack_rows(zero_words, bits, out_features)
    if version == 1:
        if bool((zeros == (1 << bits) - 1).any()):
            raise FormatError(
                f"{name}.qzeros: a version 1 field holds {(1 << bits) - 1}, which some programs read as zero 0 and "
                f"others as zero {1 << bits}; convert the checkpoint to gptq_v2 with the program that wrote it"
            )
        zeros = zeros + 1
    return _matrix(name, stored, codes, zeros.T, (bits, group_size))


def unpack_awq(name: str, stored: Mapping[str, Tensor], group_size: int | None) -> QTensor:
    """The matrix that an AWQ checkpoint (`gemm`, 4 bits) stores; without `qzeros` all zeros are 8.

    Raises:
        FormatError: a part is missing, or has another type or shape than `group_size` says.
    """
    words = _part(name, stored, "qweight", torch.int32)
    in_features, out_features = words.shape[0], words.shape[1] * 8
    groups = 1 if group_size is None else -(-in_features // group_size)
    codes = _unpack_interleaved(words)
    if "qzeros" in stored:
        zeros = _unpack_interleaved(_part(name, stored, "qzeros", torch.int32, (groups, words.shape[1])))
    else:
        zeros = torch.full((groups, out_features), 8, dtype=torch.uint8)
    return _matrix(name, stored, codes.T.contiguous(), zeros.T, (_AWQ_BITS, group_size))


def _check(q: QTensor, version: Version | None) -> None:
    q.validate("QTensor")
    problem = refusal(TensorEntry.of(q), awq=version is None) or grid_refusal(q.grid, version)
    if problem is not None:
        raise FormatError(f"a matrix of {q.spec.label()} {problem}")


def _group_index(in_features: int, width: int) -> Tensor:
    return torch.arange(in_features, dtype=torch.int32) // width


def _scales(grid: Grid) -> Tensor | None:
    """Scales [out, groups] as float16, or as bfloat16 where that alone is exact; None where neither is."""
    for dtype in (torch.float16, torch.bfloat16):
        stored = grid.scale.to(dtype)
        if torch.equal(stored.float(), grid.scale):
            return stored
    return None


def _stored_scales(grid: Grid) -> Tensor:
    stored = _scales(grid)
    assert stored is not None  # refused by `_check`
    return stored.T.contiguous()


def _pack_interleaved(codes: Tensor) -> Tensor:
    """uint8 [rows, n] to int32 [rows, n / 8]."""
    ordered = codes.reshape(codes.shape[0], -1, 8)[:, :, list(_AWQ_ORDER)]
    return pack_rows(ordered.flatten(1).contiguous(), _AWQ_BITS)


def _unpack_interleaved(words: Tensor) -> Tensor:
    """Inverse of `_pack_interleaved`."""
    fields = unpack_rows(words, _AWQ_BITS, words.shape[1] * 8).reshape(words.shape[0], -1, 8)
    codes = torch.empty_like(fields)
    codes[:, :, list(_AWQ_ORDER)] = fields
    return codes.flatten(1)


def _matrix(
    name: str, stored: Mapping[str, Tensor], codes: Tensor, zeros: Tensor, layout: tuple[int, int | None]
) -> QTensor:
    """The matrix of `codes` [out, in] and `zeros` uint8 [out, groups]; `layout` is bits and group size."""
    bits, group_size = layout
    scales = _part(name, stored, "scales", None, (zeros.shape[1], zeros.shape[0]))
    kind = next((kind for kind, dtype in SCALE_DTYPES.items() if dtype == scales.dtype), None)
    if kind is None:
        raise FormatError(f"{name}.scales: is {scales.dtype}, needed one of {', '.join(SCALE_DTYPES)}")
    if not bool(torch.isfinite(scales).all()):
        raise FormatError(f"{name}.scales: holds NaN or Inf, needed finite values; the file is damaged")
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    spec = WeightSpec.model_validate(
        {"bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": kind}
    )
    grid = Grid(scales.T.float().contiguous(), zeros.float().contiguous(), spec)
    return QTensor(codes, grid)


def _part(
    name: str,
    stored: Mapping[str, Tensor],
    part: str,
    dtype: torch.dtype | None,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    tensor = stored.get(part)
    if tensor is None:
        raise FormatError(f"{name}.{part}: missing; the checkpoint is incomplete")
    wrong_shape = tensor.dim() != 2 or 0 in tensor.shape if shape is None else tuple(tensor.shape) != shape
    if wrong_shape or (dtype is not None and tensor.dtype != dtype):
        needed = "a matrix" if shape is None else list(shape)
        raise FormatError(
            f"{name}.{part}: is {_found(tensor)}, needed {needed} of {dtype or 'floats'}; the file is damaged or "
            "config.json names other bits or groups"
        )
    return tensor


def _found(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
