"""One GGUF file: read its header, read the values of one tensor.

Layout (GGUF versions 2 and 3, little-endian): magic `GGUF`, version u32, tensor count u64, metadata count
u64, then key-value pairs, then tensor entries (name, dimensions fastest first, type, offset into the data),
then padding to `general.alignment`, then the data.

`gguf.GGUFReader` maps the whole file and makes several numpy objects for each of the 100 000 strings of a
vocabulary (3.6 s for SmolLM2-135M); here strings of arrays are counted and skipped (0.05 s).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf.quants
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from bitwright.checkpoint.shard import TensorInfo, read_tensor
from bitwright.errors import CheckpointError

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
"""The types that hold values rather than blocks of codes."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# by type number, as `struct` spells them: u8 i8 u16 i16 u32 i32 f32 bool, then (10) u64 i64 f64
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_DEFAULT_ALIGNMENT_BYTES = 32
_LARGEST_RANK = 4  # ggml has no more
_LARGEST_NAME_BYTES = 65535  # of a key or a tensor, by the specification
_LARGEST_TEXT_BYTES = 64 << 20
# Of a header in all. The longest vocabularies have 300 000 tokens and 600 000 merges, models without stacks of experts
# some thousand tensors.
_MOST_KEYS = 65_536
_MOST_TENSORS = 262_144
_MOST_ELEMENTS = 4_000_000
_PIECE_VALUES = 1 << 20


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        shape: slowest dimension first, as torch has it.
        kind: how the values are stored.
        start: position of its first byte in the file.
        end: position behind its last byte.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """What `read_gguf_tensor` gives: float32 for quantized types."""
        return PLAIN.get(self.kind, torch.float32)


@dataclass(frozen=True)
class GgufHeader:
    """What precedes the data of a GGUF file.

    Attributes:
        metadata: values by key; an array of strings is represented by its length.
        tensors: by the name in the file.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of the GGUF file at `path`, in which every tensor lies inside the file and none overlap.

    Raises:
        CheckpointError: the file is missing, truncated, not GGUF, or contradicts itself.
    """
    try:
        with path.open("rb") as file:
            return _Parser(path, file, path.stat().st_size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def check_types(path: Path, tensors: Mapping[str, GgufTensor]) -> None:
    """Refuse now what could not be dequantized later: one block of zeros of each type is tried.

    Raises:
        CheckpointError: a tensor has a type that the gguf package cannot dequantize.
    """
    first: dict[GGMLQuantizationType, str] = {}
    for name, entry in tensors.items():
        first.setdefault(entry.kind, name)
    for kind, name in first.items():
        block_bytes = GGML_QUANT_SIZES[kind][1]
        try:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{path}: tensor {name} is stored as {kind.name}, which the gguf package cannot dequantize; "
                "take a file of another quantization"
            ) from error


def read_gguf_tensor(path: Path, name: str, entry: GgufTensor) -> Tensor:
    """The values of one tensor, in memory of its own: float32 if it is quantized, else as stored.

    Raises:
        CheckpointError: the file ends before the tensor does.
    """
    if entry.kind in PLAIN:
        return read_tensor(path, name, TensorInfo(entry.shape, entry.dtype, entry.start, entry.end))
    # In pieces of rows: the package's dequantize holds its result twice, 230 MB for a small embedding.
    block, block_bytes = GGML_QUANT_SIZES[entry.kind]
    width = entry.shape[-1]
    row_bytes = width // block * block_bytes
    step = max(1, _PIECE_VALUES // width)
    values = torch.empty(prod(entry.shape[:-1]), width)
    for first in range(0, len(values), step):
        count = min(step, len(values) - first)
        start = entry.start + first * row_bytes
        info = TensorInfo((count, row_bytes), torch.uint8, start, start + count * row_bytes)
        raw = read_tensor(path, name, info).numpy()
        # damaged blocks may decode to NaN, which quantization refuses by name; numpy would only warn
        with np.errstate(all="ignore"):
            values[first : first + count] = torch.from_numpy(gguf.quants.dequantize(raw, entry.kind))
    return values.reshape(entry.shape)


class _Parser:
    """Reads values one after the other and never past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path = path
        self.file = file
        self.size = size
        self._elements = 0

    def header(self) -> GgufHeader:
        if self.file.read(4) != _MAGIC:
            raise CheckpointError(f"{self.path}: does not start with 'GGUF', so it is no GGUF file; download it again")
        version, tensor_count, metadata_count = self.numbers("IQQ")
        if version not in _VERSIONS:
            kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise CheckpointError(
                f"{self.path}: {kind} GGUF, needed little-endian version 2 or 3; convert the model again"
            )
        self.check_count("keys", metadata_count, _MOST_KEYS)
        self.check_count("tensors", tensor_count, _MOST_TENSORS)
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self.name("key")
            if key in metadata:
                raise CheckpointError(f"{self.path}: key {key} occurs twice")
            metadata[key] = self.value(key)
        entries = {}
        for _ in range(tensor_count):
            name, entry = self.tensor_entry()
            if name in entries:
                raise CheckpointError(f"{self.path}: tensor {name} occurs twice")
            entries[name] = entry
        return GgufHeader(metadata, self.placed(entries, metadata))

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        # the bound first: a damaged length must not become an allocation
        data = self.file.read(count) if count <= min(self.size, _LARGEST_TEXT_BYTES) else b""
        if len(data) != count:
            raise CheckpointError(
                f"{self.path}: the header does not end within the file's {self.size} bytes; "
                "the file is truncated or damaged: download it again"
            )
        return data

    def numbers(self, format_: str) -> tuple[Any, ...]:
        format_ = "<" + format_
        return struct.unpack(format_, self.take(struct.calcsize(format_)))

    def text(self, what: str, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8; the file is damaged") from error

    def name(self, what: str) -> str:
        """A key or the name of a tensor."""
        (length,) = self.numbers("Q")
        if length > _LARGEST_NAME_BYTES:
            raise CheckpointError(f"{self.path}: a {what} of {length} bytes; the file is damaged")
        return self.text(f"a {what}", self.take(length))

    def value(self, key: str) -> Any:
        """One metadata value; the length of an array of strings."""
        (kind,) = self.numbers("I")
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text(key, self.take(*self.numbers("Q")))
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: {key} has type {kind}, which GGUF does not define")
        kind, count = self.numbers("IQ")
        self._elements += count
        self.check_count(f"elements of arrays up to {key}", self._elements, _MOST_ELEMENTS)
        if kind in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[kind])
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * width)))
        if kind != _STRING:
            raise CheckpointError(f"{self.path}: {key} is an array of type {kind}, which is not supported")
        for _ in range(count):
            self.take(*self.numbers("Q"))
        return count

    def check_count(self, what: str, found: int, most: int) -> None:
        """Refuse counts that no model has, before so many things are made."""
        if found > most:
            raise CheckpointError(
                f"{self.path}: {found} {what}, at most {most} are read; the file is damaged: download it again"
            )

    def tensor_entry(self) -> tuple[str, GgufTensor]:
        """Name and entry of one tensor; `start` and `end` still count from the beginning of the data."""
        name = self.name("tensor name")
        (rank,) = self.numbers("I")
        if not 1 <= rank <= _LARGEST_RANK:
            raise CheckpointError(f"{self.path}: tensor {name} has {rank} dimensions, needed 1 to 4")
        shape = self.numbers(f"{rank}Q")[::-1]
        type_id, offset = self.numbers("IQ")
        try:
            kind = GGMLQuantizationType(type_id)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {type_id}, unknown to the installed gguf package; "
                "upgrade it, or take a file of another quantization"
            ) from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {list(shape)}, needed rows of whole {kind.name} "
                f"blocks ({block} values); the file is damaged"
            )
        return name, GgufTensor(shape, kind, offset, offset + prod(shape) // block * block_bytes)

    def placed(self, entries: Mapping[str, GgufTensor], metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
        """The entries with positions in the file; each must lie inside it and behind the one before."""
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT_BYTES)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment is {alignment!r}, needed a power of two; the file is damaged"
            )
        data_start = -(-self.file.tell() // alignment) * alignment
        position = data_start
        placed = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            start, end = data_start + entry.start, data_start + entry.end
            if start < position or entry.start % alignment:
                raise CheckpointError(
                    f"{self.path}: tensor {name} starts at byte {start}, inside the one before it or not "
                    f"aligned to {alignment} bytes; the file is damaged: download it again"
                )
            if end > self.size:
                raise CheckpointError(
                    f"{self.path}: tensor {name} ends at byte {end} of a file of {self.size} bytes; "
                    "the file is truncated: download it again"
                )
            placed[name] = GgufTensor(entry.shape, entry.kind, start, end)
            position = end
        return placed
