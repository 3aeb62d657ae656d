"""One safetensors file: read its header, read one tensor, write it whole and atomically.

Reading goes through `pread` into private memory rather than a memory map: pages of a map count as resident
until they are evicted, and a checkpoint larger than RAM must not look (or be) resident. Writing streams
tensors straight from their own memory and hashes on the way, so a shard costs no second copy.
The layout is that of the safetensors README: 8 bytes little-endian header length, JSON header, data without
holes. Files made here are read back with the safetensors package in the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.checkpoint.place import new_file
from bitwright.errors import CheckpointError
from bitwright.untrusted.boundary import REMEDY
from bitwright.untrusted.files import open_regular
from bitwright.untrusted.json_file import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER_BYTES = 100 * 1024 * 1024
_LARGEST_RANK = 16
_MOST_TENSORS = 250_000
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0
    end: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (offsets are absolute in the file) and metadata of a safetensors file, checked.

    Raises:
        CheckpointError: the file is missing, truncated, has holes or overlaps, or names impossible tensors.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length_bytes = file.read(8)
            length = int.from_bytes(length_bytes, "little")
            if len(length_bytes) < 8 or length > min(size - 8, _LARGEST_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: header of {length} bytes does not fit a file of {size} bytes; "
                    "the file is truncated or not safetensors: download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    # before anything is made of them; models of a trillion weights have 200 000 tensors in a hundred files
    if (count := text.count(b'"dtype"')) > _MOST_TENSORS:
        raise CheckpointError(f"{path}: {count:,} tensors, at most {_MOST_TENSORS:,} are read; {REMEDY}")
    raw = parse_json(text, f"{path}, its header", CheckpointError)
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is {type(metadata).__name__}, needed an object; {REMEDY}")
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in raw.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors, metadata


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype = DTYPES[entry["dtype"]]
        shape = tuple(map(_size, entry["shape"][: _LARGEST_RANK + 1]))
        start, end = map(_size, entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {name} has an unusable header entry {str(entry)[:99]}; {REMEDY}"
        ) from error
    info = TensorInfo(shape, dtype, data_start + start, data_start + end)
    if len(shape) > _LARGEST_RANK or end - start != info.bytes:
        raise CheckpointError(
            f"{path}: tensor {name} {list(shape)} {entry['dtype']} spans {end - start} bytes, needed {info.bytes}"
        )
    return info


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no size")
    return value


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            kind = "overlaps the tensor before it" if info.start < position else "follows a hole"
            raise CheckpointError(f"{path}: tensor {name} {kind}: starts at byte {info.start}, needed {position}")
        position = info.end
    if position != size:
        raise CheckpointError(
            f"{path}: {size} bytes long, needed {position} by its header; the file is truncated or padded"
        )


def read_tensor(path: Path, name: str, info: TensorInfo) -> Tensor:
    """One tensor of a safetensors file, in memory of its own.

    Raises:
        CheckpointError: the file ends before the tensor does.
    """
    buffer = torch.empty(info.bytes, dtype=torch.uint8)
    view = _bytes_of(buffer)
    with open_regular(path) as file:
        file.seek(info.start)
        done = 0
        while done < info.bytes:
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{path}: ends inside tensor {name} at byte {info.start + done}")
            done += count
    return buffer.view(info.dtype).reshape(info.shape)


def read_shard(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, in memory of its own.

    Raises:
        CheckpointError: the file is damaged.
    """
    return {name: read_tensor(path, name, info) for name, info in read_header(path)[0].items()}


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write `tensors` to `path` atomically (see `new_file`); returns the SHA-256 of the file.

    Tensors lie widest item type first, then by name; equal tensors give equal bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    # Widest items first keeps every tensor aligned to its own item size without padding.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, tensor in ordered:
        nbytes = tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    digest = hashlib.sha256()
    with new_file(path) as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            file.write(piece)
        for _, tensor in ordered:
            data = _bytes_of(tensor)
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory as bytes; no copy when it is contiguous."""
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def write_text(path: Path, content: str) -> str:
    """Write a small text file atomically and durably; returns the SHA-256 of its bytes."""
    data = content.encode()
    with new_file(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
