"""Import: a folder that another quantizer wrote becomes a native folder, exactly.

Codes, scales and zeros move; nothing is rounded again. What the native form has no place for is refused: no layout is
guessed, and nothing of an unfinished folder stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright import __about__
from bitwright.checkpoint.agreement import Agreement, agree
from bitwright.checkpoint.finite import check_finite
from bitwright.checkpoint.manifest import write_manifest
from bitwright.checkpoint.shard import TensorInfo, read_tensor, tensor_sha256
from bitwright.checkpoint.side_files import copy_side_files
from bitwright.checkpoint.source import locate_tensors as locate_tensors
from bitwright.errors import FormatError
from bitwright.export.folder import (
    ExportResult,
    ExportRow,
    FolderWriter,
    Progress,
    Say,
    check_kv_scales,
    new_folder,
    silent,
    unseen,
)
from bitwright.export.reading import Reader, reader_of
from bitwright.formats.compressed_tensors_config import is_kv_part, read_kv_scales
from bitwright.formats.folder import INDEX, native_config
from bitwright.formats.native import (
    FORMAT_VERSION,
    Sites,
    TensorEntry,
    pack,
    packed_bytes,
    quantization_config,
    unpack,
)
from bitwright.numeric.activation import InputSite
from bitwright.numeric.fp8 import KvScales
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.json_file import read_json

_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class _Parts:
    """Where the tensors of one quantized module lie, by local name."""

    read: Callable[[str], Tensor]
    infos: Mapping[str, TensorInfo]


def import_folder(path: str | Path, out: str | Path, *, say: Say = silent, progress: Progress = unseen) -> ExportResult:
    """Write the quantized folder `path` as a native folder `out`: compressed-tensors (`pack-quantized`,
    `int-quantized`), GPTQ (`gptq`, `gptq_v2`) or AWQ (`gemm`).

    Args:
        path: holds `config.json` with a `quantization_config` (or `quantize_config.json`), and safetensors.
        out: must not exist.
        say: is told what is being read.
        progress: is told of every shard.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors and config.json contradict each other.
        WeightError: a tensor in float holds NaN or Inf.
        FormatError: another format or version; a tensor of another type, width or shape than the config says;
            something that the native form cannot hold. Nothing is left of `out`.
        ResumeError: `out` exists.
    """
    path, out = Path(path), Path(out)
    config, quantization = _read_config(path)
    place = locate_tensors(path)
    reader = reader_of(quantization)
    with reading(path, FormatError):
        kv_scales = _take_kv_scales(place, reader)
        modules = _quantized_modules(place, reader)
    agreement = _agreement(path, config, place, modules)
    for name in agreement.left_out:
        say(f"{name}: left out, the model has no use for it")
        del place[name]
    config, tied = _tie(config, agreement, place, modules)
    say(f"{path}: {len(modules)} matrices of {reader.name}")
    with new_folder(out) as working:
        writer = FolderWriter(working, {"bitwright": str(FORMAT_VERSION)})
        done = _write_shards(writer, place, modules, reader, agreement, progress)
        inputs = {name: site for name, site in done.sites.items() if site is not None}
        sites = Sites(inputs, reader.kv_cache, kv_scales)
        writer.finish(native_config(config, quantization_config(done.entries, tied, sites)), INDEX)
        notes = tuple(copy_side_files(path, working))
        write_manifest(working, _manifest(path, config, quantization, writer, done.records), writer.sums)
    rows = tuple(
        ExportRow(r["tensor"], "exact" if r["action"] == "quantize" else "kept", r["source_bytes"], r["bytes"])
        for r in done.records
    )
    return ExportResult(out, f"bitwright, from {reader.name}", rows, notes)


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` without its quantization, and what says how the folder is quantized."""
    config = read_json(path / "config.json", FormatError)
    found = config.pop("quantization_config", None)
    if found is None and (path / "quantize_config.json").exists():
        found = {"quant_method": "gptq", **read_json(path / "quantize_config.json", FormatError)}
    if not isinstance(found, dict):
        raise FormatError(f"{path / 'config.json'}: no quantization_config; the folder is not quantized")
    return config, found


def _take_kv_scales(place: dict[str, tuple[Path, TensorInfo]], reader: Reader) -> dict[str, KvScales]:
    """The scales of the KV cache, where it has any; their tensors are taken out of `place`."""
    if reader.kv_cache is None:
        return {}
    stored = {}
    for name in [name for name in place if is_kv_part(name)]:
        path, info = place.pop(name)
        stored[name] = read_tensor(path, name, info)
    scales = read_kv_scales(stored)
    if not scales:
        raise FormatError("quantization_config.kv_cache_scheme: is set, and there are no tensors *.k_scale, *.v_scale")
    check_kv_scales(place, scales)
    return scales


def _quantized_modules(place: Mapping[str, tuple[Path, TensorInfo]], reader: Reader) -> dict[str, _Parts]:
    """The quantized modules in the order of the shards, each with its parts."""
    parts: dict[str, dict[str, tuple[Path, TensorInfo]]] = {}
    for name, where in place.items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = where
    found = {}
    for module, local in parts.items():
        if not reader.is_quantized({part: info for part, (_, info) in local.items()}):
            continue
        own = {part: where for part, where in local.items() if part != "bias"}
        if strangers := own.keys() - reader.parts:
            raise FormatError(
                f"{module}.{min(strangers)}: unknown, and {module} is quantized; {reader.name} has no such tensor"
            )
        found[module] = _Parts(_part_reader(module, own), {part: info for part, (_, info) in own.items()})
    if not found:
        raise FormatError(f"no tensors of {reader.name} found; config.json belongs to another checkpoint")
    return found


def _part_reader(module: str, own: Mapping[str, tuple[Path, TensorInfo]]) -> Callable[[str], Tensor]:
    return lambda part: read_tensor(own[part][0], f"{module}.{part}", own[part][1])


def _agreement(
    path: Path,
    config: Mapping[str, Any],
    place: Mapping[str, tuple[Path, TensorInfo]],
    modules: Mapping[str, _Parts],
) -> Agreement:
    """What the model of `config` makes of the folder's tensors; shapes of quantized weights are known once read."""
    packed = {f"{module}.{part}" for module, source in modules.items() for part in source.infos}
    floats = {name: info for name, (_, info) in place.items() if name not in packed}
    return agree(str(path), config, floats, {f"{module}.weight": None for module in modules})


def _tie(
    config: dict[str, Any],
    agreement: Agreement,
    place: Mapping[str, tuple[Path, TensorInfo]],
    modules: Mapping[str, _Parts],
) -> tuple[dict[str, Any], dict[str, str]]:
    """`config`, and the head that shares a quantized embedding: what is stored decides, see `checkpoint.settle`."""
    head, embedding = agreement.head, agreement.embedding
    if head is None or embedding is None or not agreement.flag:
        return config, {}
    outside = {name.removesuffix(".weight") for name in (head, embedding)} & modules.keys()
    if not agreement.ties or (
        outside and {f"{module}.weight" for module in outside} | place.keys() >= {head, embedding}
    ):
        return config | {"tie_word_embeddings": False}, {}
    if not outside:
        return config, {}
    module = min(outside)
    if f"{module}.weight" == head:
        raise FormatError(
            f"{embedding}: missing, and {head} is quantized; config.json has tie_word_embeddings, and an embedding "
            "that shares a quantized head cannot be imported: quantize the float checkpoint instead"
        )
    return config | {"tie_word_embeddings": False}, {head.removesuffix(".weight"): module}


@dataclass(frozen=True)
class _Done:
    entries: dict[str, TensorEntry]
    sites: dict[str, InputSite | None]
    records: list[dict[str, Any]]


def _write_shards(
    writer: FolderWriter,
    place: Mapping[str, tuple[Path, TensorInfo]],
    modules: Mapping[str, _Parts],
    reader: Reader,
    agreement: Agreement,
    progress: Progress,
) -> _Done:
    """One shard for each block, and one for what lies outside them."""
    shards: dict[int, list[str]] = {}
    floats = [name for name in place if name.rpartition(".")[0] not in modules or name.endswith(".bias")]
    for name in (*modules, *floats):
        match = _BLOCK.search(f".{name}.")
        shards.setdefault(-1 if match is None else int(match.group(1)), []).append(name)
    done = _Done({}, {}, [])
    for number, block in enumerate(sorted(shards)):
        tensors: dict[str, Tensor] = {}
        for name in shards[block]:
            if name in modules:
                tensors |= _import_module(name, modules[name], reader, done)
                _check_shape(name, done.entries[name], agreement)
            else:
                path, info = place[name]
                tensors[name] = read_tensor(path, name, info)
                check_finite(name, tensors[name])
                done.records.append(_kept_record(name, tensors[name]))
        writer.shard(f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors", tensors)
        progress("outside the blocks" if block < 0 else f"block {block}", number + 1, len(shards))
    return done


def _check_shape(module: str, entry: TensorEntry, agreement: Agreement) -> None:
    needed = agreement.shapes.get(f"{module}.weight")
    if needed not in (None, entry.shape):
        raise FormatError(
            f"{module}: is a matrix {list(entry.shape)}, and the model of config.json needs {list(needed or ())}; the "
            "folder is damaged, or its config.json belongs to another: download it again or correct the file"
        )


def _import_module(module: str, source: _Parts, reader: Reader, done: _Done) -> dict[str, Tensor]:
    """The native tensors of a module by whole name; `done` learns of it."""
    stored = {part: source.read(part) for part in source.infos}
    with reading(module, FormatError):
        q, site = reader.read(module, stored)
    entry, parts = TensorEntry.of(q), pack(q)
    if not torch.equal(unpack(module, parts, entry).codes, q.codes):
        raise FormatError(f"{module}: packed codes do not unpack to themselves; this is a bug in bitwright")
    done.entries[module], done.sites[module] = entry, site
    done.records.append(
        {
            "tensor": f"{module}.weight",
            "shape": list(entry.shape),
            "action": "quantize",
            "rule": "imported",
            "bytes": packed_bytes(entry),
            "source_bytes": sum(info.bytes for info in source.infos.values()),
            "method": reader.name,
            "spec": entry.spec.model_dump(mode="json"),
            "outliers": 0,
            "outlier_value_bits": entry.value_bits,
            "sqnr_db": None,
            "fallbacks": [],
        }
    )
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def _kept_record(name: str, tensor: Tensor) -> dict[str, Any]:
    nbytes = tensor.numel() * tensor.dtype.itemsize
    return {
        "tensor": name,
        "shape": list(tensor.shape),
        "action": "keep",
        "rule": "imported",
        "bytes": nbytes,
        "source_bytes": nbytes,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "source_sha256": tensor_sha256(tensor),
    }


def _manifest(
    path: Path,
    config: Mapping[str, Any],
    quantization: Mapping[str, Any],
    writer: FolderWriter,
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    weights = sum(math.prod(record["shape"]) for record in records if record["action"] == "quantize")
    return {
        "job": {
            "imported": dict(quantization),
            "model_type": config.get("model_type"),
            "weights": weights,
            "bitwright": __about__.__version__,
            "torch": torch.__version__,
            "format_version": FORMAT_VERSION,
        },
        "source_label": str(path),
        "calibration": None,
        "recipe": {"imported": str(quantization.get("quant_method"))},
        "shards": list(writer.sums),
        "tensors": records,
    }
