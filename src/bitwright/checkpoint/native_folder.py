"""A folder that bitwright wrote, from its headers: manifest, config, shards and the model must be of one opinion.

It is read here for everything that takes such a folder: export, inspect, eval, generate and bench.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.checkpoint.agreement import agree
from bitwright.checkpoint.bounds import check_bounds
from bitwright.checkpoint.manifest import MANIFEST, read_manifest
from bitwright.checkpoint.shard import TensorInfo, file_sha256, read_header
from bitwright.checkpoint.source import locate_tensors
from bitwright.errors import CheckpointError, FormatError, PlanError
from bitwright.formats.folder import INDEX, PLAIN_INDEX, WEIGHTS_KEY
from bitwright.formats.native import (
    Sites,
    TensorEntry,
    check_part,
    parts,
    read_quantization_config,
    read_sites,
    read_tied,
)
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.json_file import read_json
from bitwright.untrusted.names import shards_of


@dataclass(frozen=True)
class NativeHeaders:
    """What a native folder holds.

    Attributes:
        manifest: content of `manifest.json`.
        config: content of `config.json` without `quantization_config` and the note to loaders.
        entries: quantized modules by name.
        sites: what is quantized besides weights.
        tied: head -> quantized embedding whose tensors it shares.
        place: shard and header entry of every tensor that the model takes.
        left_out: tensors of the shards that the model has no use for.
    """

    manifest: dict[str, Any]
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    sites: Sites
    tied: dict[str, str]
    place: dict[str, tuple[Path, TensorInfo]]
    left_out: tuple[str, ...]


def read_native(folder: Path) -> NativeHeaders:
    """The headers of `folder`, checked against its manifest, its config and the model; no weight is read.

    Raises:
        FormatError: the folder is not a complete bitwright result, or its parts contradict each other.
        CheckpointError: a shard is missing or damaged.
    """
    with reading(folder, FormatError):
        return _read_native(folder)


def _read_native(folder: Path) -> NativeHeaders:
    manifest, config = read_manifest(folder), read_config(folder)
    quantization = config.pop("quantization_config")
    config.pop(WEIGHTS_KEY, None)
    entries, sites, tied = read_quantization_config(quantization), read_sites(quantization), read_tied(quantization)
    place = _headers(folder, manifest)
    packed = set()
    for module, entry in entries.items():
        for part, needed in parts(entry).items():
            name = f"{module}.{part}"
            if name not in place:
                raise FormatError(f"{folder}: {name} is missing; the folder is incomplete or damaged")
            check_part(name, place[name][1].shape, place[name][1].dtype, needed)
            packed.add(name)
    kept = {name: info for name, (_, info) in place.items() if name not in packed}
    _check_records(folder, manifest, entries, kept)
    left_out = _check_model(folder, config, kept, entries, tied)
    place = {name: where for name, where in place.items() if name not in left_out}
    return NativeHeaders(manifest, config, entries, sites, tied, place, left_out)


def check_saved(folder: Path) -> None:
    """Check the sizes in the config of a native folder without a manifest, as `save_pretrained` leaves it.

    Raises:
        FormatError: its `quantization_config` breaks the format.
        CheckpointError: a shard is missing or damaged, or no tensor is as large as the config says.
    """
    config = read_config(folder)
    with reading(folder, FormatError):
        entries = read_quantization_config(config.pop("quantization_config"))
        stored: dict[str, tuple[int, ...] | None] = {
            name: info.shape for name, (_, info) in locate_tensors(folder).items()
        }
        check_bounds(str(folder), config, stored | {name: entry.shape for name, entry in entries.items()})


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a quantized folder.

    Raises:
        FormatError: it is missing, unreadable, or of a model that bitwright did not quantize.
    """
    config = read_json(folder / "config.json", FormatError)
    # null, which tools that dequantize leave, means none
    if not isinstance(config.get("quantization_config"), dict):
        raise FormatError(f"{folder / 'config.json'}: no quantization_config; not a quantized model")
    return config


def check_sums(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Hash the shards, their index and the config against the `manifest` of `folder`; other files may be edited.

    Raises:
        FormatError: a file is not what was written.
    """
    files = manifest["files"]
    for name in (*manifest["shards"], INDEX, PLAIN_INDEX, "config.json"):
        path = folder / name
        if name in files and path.exists() and file_sha256(path) != files[name]:
            raise FormatError(
                f"{path}: its SHA-256 is not that of {folder / 'manifest.json'}; the file was damaged or changed: copy "
                "the folder again, or quantize the model again"
            )


def _headers(folder: Path, manifest: Mapping[str, Any]) -> dict[str, tuple[Path, TensorInfo]]:
    place: dict[str, tuple[Path, TensorInfo]] = {}
    for path in shards_of(folder, manifest["shards"], folder / MANIFEST, FormatError).values():
        found = read_header(path)[0]
        if twice := found.keys() & place.keys():
            raise FormatError(f"{path}: holds {min(twice)}, which {place[min(twice)][0].name} holds as well")
        place.update({name: (path, info) for name, info in found.items()})
    return place


def _check_records(
    folder: Path, manifest: Mapping[str, Any], entries: Mapping[str, TensorEntry], kept: Mapping[str, TensorInfo]
) -> None:
    """Refuse tensors that the manifest does not tell of, and records of tensors that are not there."""
    found = {f"{module}.weight" for module in entries} | kept.keys()
    told = {record["tensor"] for record in manifest["tensors"] if record["action"] != "tied"}
    for name in sorted(found ^ told):
        where = "config.json and the shards" if name in found else "manifest.json"
        other = "manifest.json" if name in found else "config.json and the shards"
        raise FormatError(f"{folder}: {where} have {name}, and {other} do not; the folder was damaged or changed")


def _check_model(
    folder: Path,
    config: Mapping[str, Any],
    kept: Mapping[str, TensorInfo],
    entries: Mapping[str, TensorEntry],
    tied: Mapping[str, str],
) -> tuple[str, ...]:
    """Tensors that the model has no use for."""
    quantized = {f"{module}.weight": entry.shape for module, entry in entries.items()}
    shared = {f"{head}.weight": entries[embedding].shape for head, embedding in tied.items()}
    try:
        return agree(str(folder), config, kept, {**quantized, **shared}).left_out
    except (CheckpointError, PlanError) as error:
        raise FormatError(str(error)) from error
