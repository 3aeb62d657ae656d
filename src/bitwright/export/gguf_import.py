"""Import of a GGUF file: its blocks become native matrices with the very same codes, scales and offsets.

What `export.gguf` writes comes back, and so does what llama.cpp quantizes itself to Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, to
K-blocks, or to IQ4_NL and IQ4_XS. Nothing is rounded again; a type without a native grid is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright import __about__
from bitwright.checkpoint.agreement import agree
from bitwright.checkpoint.gguf import GgufSource
from bitwright.checkpoint.gguf_file import PLAIN, GgufHeader, GgufTensor, read_gguf_header
from bitwright.checkpoint.manifest import write_manifest
from bitwright.checkpoint.shard import TensorInfo, read_tensor, tensor_sha256
from bitwright.errors import CheckpointError, FormatError
from bitwright.export.folder import ExportResult, FolderWriter, Progress, Say, new_folder, silent, unseen
from bitwright.export.gguf import GgufRow
from bitwright.export.gguf_gemma3 import ARCHITECTURE as GEMMA3
from bitwright.export.gguf_gemma3 import Gemma3Source
from bitwright.export.gguf_model import GgufModel, gguf_model, rope_halves
from bitwright.export.gguf_tokenizer_import import write_tokenizer
from bitwright.formats.folder import INDEX, native_config
from bitwright.formats.gguf import TYPES, decode, dequantized, tolerance
from bitwright.formats.gguf_codebook import CODEBOOK_TYPES, decode_codebook
from bitwright.formats.native import FORMAT_VERSION, TensorEntry, pack, packed_bytes, quantization_config
from bitwright.models import adapter_for
from bitwright.untrusted.boundary import reading

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


@dataclass
class _Done:
    """What has been imported so far."""

    entries: dict[str, TensorEntry] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    rows: list[GgufRow] = field(default_factory=list)


def import_gguf(path: str | Path, out: str | Path, *, say: Say = silent, progress: Progress = unseen) -> ExportResult:
    """Write the GGUF file `path` as a native folder `out`.

    Args:
        path: a model of one of the architectures that `export_gguf` writes.
        out: must not exist.
        say: is told what is being read.
        progress: is told of every tensor.

    Raises:
        CheckpointError: the file is damaged, one part of several, of another architecture, or has no tokenizer that
            can be rebuilt.
        FormatError: a tensor of a type without a native grid, or with a scale or value that is NaN or Inf. Nothing is
            left of `out`.
        ResumeError: `out` exists.
    """
    path, out = Path(path), Path(out)
    with reading(path, CheckpointError):
        header = read_gguf_header(path)
        source = _source(path, header)
        agree(str(path), source.config, source.tensors)
        model = gguf_model(source.config, {name: info.shape for name, info in source.tensors.items()})
        place = {name: header.tensors[theirs] for name, theirs in model.names.items()}
        _check_types(path, place)
    quantized = [name for name, entry in place.items() if entry.kind not in PLAIN]
    say(f"{path}: {len(quantized)} matrices in blocks")
    with new_folder(out) as working:
        # before the weights, for it may be refused
        with reading(f"{path}, its tokenizer", CheckpointError):
            write_tokenizer(path, source.config, working)
        writer, done = FolderWriter(working, {"bitwright": str(FORMAT_VERSION)}), _Done()
        total = sum(math.prod(entry.shape) for entry in place.values())
        shards = list(_shards(place, adapter_for(source.config).blocks))
        weights = 0
        for number, names in enumerate(shards):
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors |= _import_tensor(source, model, name, place[name], done)
                weights += math.prod(place[name].shape)
                progress(name, weights, total)
            writer.shard(f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors", tensors)
        writer.finish(_config(source, done), INDEX)
        write_manifest(working, _manifest(source, writer, done), writer.sums)
    return ExportResult(out, "bitwright, from gguf", tuple(done.rows))


def _source(path: Path, header: GgufHeader) -> GgufSource | Gemma3Source:
    """What reads the floats of the file and makes its `config.json`."""
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointError(
            f"{path}: split.count is {str(parts)[:60]}, needed a whole file; join the parts with llama-gguf-split "
            "--merge FIRST-PART OUT.gguf"
        )
    return (Gemma3Source if header.metadata.get("general.architecture") == GEMMA3 else GgufSource)(path)


def _check_types(path: Path, place: dict[str, GgufTensor]) -> None:
    for name, entry in place.items():
        if entry.kind in PLAIN:
            continue
        if entry.kind.name not in (*TYPES, *CODEBOOK_TYPES):
            raise FormatError(
                f"{path}: {name} is stored as {entry.kind.name}, which has no native grid; take a file of another "
                f"quantization ({', '.join((*TYPES, *CODEBOOK_TYPES))}), or quantize this one anew: bitwright quantize "
                f"{path.name}"
            )
        if len(entry.shape) != 2:
            raise FormatError(
                f"{path}: {name} has shape {list(entry.shape)} and is stored as {entry.kind.name}; needed two sizes, "
                "or F32: convert the model again"
            )


def _shards(place: dict[str, GgufTensor], blocks: str) -> Iterator[list[str]]:
    """The tensors in the order of the file: one shard for each block, and for what lies between blocks."""
    groups: dict[str, list[str]] = {}
    for name in place:
        inside = name.startswith(f"{blocks}.")
        groups.setdefault(name.removeprefix(f"{blocks}.").partition(".")[0] if inside else name, []).append(name)
    yield from groups.values()


def _import_tensor(
    source: GgufSource | Gemma3Source, model: GgufModel, name: str, entry: GgufTensor, done: _Done
) -> dict[str, Tensor]:
    """The native tensors of one tensor of the file, by whole name; `done` learns of it."""
    before = entry.end - entry.start
    if entry.kind in PLAIN:
        values = source.read(name)
        if not bool(torch.isfinite(values).all()):
            raise FormatError(f"{name}: holds NaN or Inf, needed finite values; the file is damaged: download it again")
        done.records.append(_record(name, entry, values.numel() * values.dtype.itemsize, values))
        done.rows.append(GgufRow(name, "kept", before, before, name=model.names[name], kind=entry.kind.name))
        return {name: values}
    module, (rows, columns) = name.removesuffix(".weight"), entry.shape
    info = TensorInfo((rows, before // rows), torch.uint8, entry.start, entry.end)
    raw = read_tensor(source.path, name, info).numpy()
    if name in model.heads:
        raw = raw[rope_halves(torch.arange(rows), model.heads[name]).numpy()]
    q = (decode if entry.kind.name in TYPES else decode_codebook)(entry.kind.name, raw, columns, name)
    error = (dequantized(entry.kind.name, raw) - q.dequantize()).abs()
    allowed = tolerance(q, entry.kind.name) if entry.kind.name in TYPES else 0.0
    if not bool((error <= allowed).all()):
        raise FormatError(f"{name}: its {entry.kind.name} blocks are not what was imported; this is a bug in bitwright")
    parts, layout = pack(q), TensorEntry.of(q)
    done.entries[module] = layout
    done.records.append(_record(name, entry, packed_bytes(layout)) | _quantized(layout, entry))
    row = GgufRow(name, "exact", before, packed_bytes(layout), name=model.names[name], kind=entry.kind.name)
    done.rows.append(row)
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def _record(name: str, entry: GgufTensor, nbytes: int, values: Tensor | None = None) -> dict[str, Any]:
    """What the manifest says of a tensor; `values` of one that stays in float."""
    record = {"tensor": name, "shape": list(entry.shape), "rule": "imported", "bytes": nbytes}
    if values is None:
        return record | {"action": "quantize"}
    dtype = str(values.dtype).removeprefix("torch.")
    return record | {"action": "keep", "dtype": dtype, "source_sha256": tensor_sha256(values)}


def _quantized(layout: TensorEntry, entry: GgufTensor) -> dict[str, Any]:
    return {
        "source_bytes": entry.end - entry.start,
        "method": entry.kind.name,
        "spec": layout.spec.model_dump(mode="json"),
        "outliers": 0,
        "outlier_value_bits": layout.value_bits,
        "sqnr_db": None,
        "fallbacks": [],
    }


def _config(source: GgufSource | Gemma3Source, done: _Done) -> dict[str, Any]:
    """`config.json`; a head that is tied to a quantized embedding is tied to its packed form."""
    config = dict(source.config)
    tied = {}
    if config["tie_word_embeddings"]:
        shape = list(source.tensors[f"{_EMBEDDING}.weight"].shape)
        done.records.append(
            {"tensor": f"{_HEAD}.weight", "shape": shape, "action": "tied", "rule": "imported", "bytes": 0}
        )
        if _EMBEDDING in done.entries:
            tied, config["tie_word_embeddings"] = {_HEAD: _EMBEDDING}, False
    return native_config(config, quantization_config(done.entries, tied))


def _manifest(source: GgufSource | Gemma3Source, writer: FolderWriter, done: _Done) -> dict[str, Any]:
    return {
        "job": {
            "imported": {"quant_method": "gguf"},
            "model_type": source.config["model_type"],
            "weights": sum(math.prod(r["shape"]) for r in done.records if r["action"] == "quantize"),
            "bitwright": __about__.__version__,
            "torch": torch.__version__,
            "format_version": FORMAT_VERSION,
        },
        "source_label": source.path.name,
        "calibration": None,
        "recipe": {"imported": "gguf"},
        "shards": list(writer.sums),
        "tensors": done.records,
    }
