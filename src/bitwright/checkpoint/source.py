"""Sources: where the float weights come from. Headers are read at once, tensors one at a time."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.checkpoint.shard import TensorInfo, read_header, read_tensor
from bitwright.checkpoint.side_files import copy_side_files
from bitwright.errors import CheckpointError
from bitwright.formats import compressed_tensors, config
from bitwright.formats.folder import INDEX, PLAIN_INDEX
from bitwright.untrusted.boundary import REMEDY
from bitwright.untrusted.json_file import read_json
from bitwright.untrusted.names import shards_of

# Of an index; models of a trillion weights have 200 000.
_MOST_TENSORS = 500_000
# What `bitwright import` reads, by the quant_method of its config.json.
IMPORTED = (compressed_tensors.QUANT_METHOD, "gptq", "awq")


class Source(ABC):
    """A float checkpoint: its config, what tensors it has, and their values on request."""

    label: str
    """How the user named it."""
    config: dict[str, Any]
    """The content of `config.json`."""
    tensors: Mapping[str, TensorInfo]
    """Every tensor by checkpoint name, from headers only."""
    left_out: tuple[str, ...] = ()
    """Tensors of the files that the model has no use for; they are not among `tensors`."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The values of one tensor, in memory of its own.

        Raises:
            CheckpointError: the tensor is missing or its file is damaged.
        """

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that the values come from; a change of any of them is a change of source."""

    @abstractmethod
    def write_side_files(self, folder: Path) -> list[str]:
        """Write tokenizer, templates, licences (all but `config.json` and weights) into `folder`.

        Returns a line for each that was left out, and why.
        """

    def identity(self) -> dict[str, str]:
        """Size and modification time of every file: what resume compares."""
        return {path.name: f"{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in self.files()}

    def fingerprint(self) -> str:
        """SHA-256 over config and tensor headers: names the source in the manifest, independent of place."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.shape} {info.dtype}\n".encode())
        return digest.hexdigest()


class HuggingFaceSource(Source):
    """A folder with `config.json` and safetensors weights, sharded or not."""

    def __init__(self, folder: Path, label: str | None = None):
        """Read config and headers; CheckpointError where they are damaged or already quantized."""
        self.folder = folder
        self.label = label or str(folder)
        self.config = read_json(folder / "config.json", CheckpointError, "a Hugging Face folder has one")
        # null, which tools that dequantize leave, means none
        if self.config.get("quantization_config") is not None:
            raise CheckpointError(f"{folder}: {_quantized_already(self.config['quantization_config'], folder)}")
        self._place = locate_tensors(folder)
        self.tensors = {name: info for name, (_, info) in self._place.items()}

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        if name not in self._place:
            raise CheckpointError(f"{self.folder}: no tensor {name}")
        path, info = self._place[name]
        return read_tensor(path, name, info)

    def files(self) -> list[Path]:
        """See `Source.files`."""
        return [self.folder / "config.json", *sorted({path for path, _ in self._place.values()})]

    def write_side_files(self, folder: Path) -> list[str]:
        """See `Source.write_side_files`."""
        return copy_side_files(self.folder, folder)


def _quantized_already(settings: Any, folder: Path) -> str:
    """What to do with a folder that some program quantized: its `quantization_config` says which."""
    method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else "unknown"
    if method == config.QUANT_METHOD:
        return "bitwright quantized it already; this needs the float model that it was made from"
    if method in IMPORTED:
        return (
            f"already quantized ({method}); read it code for code with: bitwright import {folder} -o OUT, or start "
            "from the float checkpoint"
        )
    return f"already quantized ({method}); start from the float checkpoint instead"


def locate_tensors(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Every tensor's file and header entry; the index and the shards must agree."""
    single = folder / "model.safetensors"
    found = [path for path in (folder / INDEX, folder / PLAIN_INDEX, single) if path.exists()]
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: both {found[0].name} and {found[1].name} are there, and programs differ in which they read; "
            "remove one of them"
        )
    if not found:
        raise CheckpointError(
            f"{folder}: neither model.safetensors nor {PLAIN_INDEX} found; "
            "convert older .bin weights with transformers' save_pretrained first"
        )
    if found == [single]:
        return {name: (single, info) for name, info in read_header(single)[0].items()}
    (index_path,) = found
    weight_map = read_json(index_path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: no weight_map")
    if len(weight_map) > _MOST_TENSORS:
        raise CheckpointError(
            f"{index_path}: {len(weight_map):,} tensors, at most {_MOST_TENSORS:,} are read; {REMEDY}"
        )
    paths = shards_of(folder, weight_map.values(), index_path, CheckpointError)
    headers = {}
    for file_name, path in sorted(paths.items()):
        if not path.exists():
            raise CheckpointError(f"{path}: missing, but the index names it; download the checkpoint again")
        headers[file_name] = read_header(path)[0]
    place = {}
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise CheckpointError(f"{folder / file_name}: no tensor {name}, but the index places it there")
        place[name] = (folder / file_name, headers[file_name][name])
    return place
