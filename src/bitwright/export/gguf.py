"""Export to GGUF, which llama.cpp and its relatives load: one file with weights, metadata and tokenizer.

Codes move, and nothing is rounded: every block's bytes are decoded with the gguf package before they are written, and
must give the weights that the native folder gives. What cannot move is refused before the first byte, or, if that is
allowed, rounded by as little as GGUF permits: codes under scales in fp16, else Q8_0, else F16.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from torch import Tensor

from bitwright.checkpoint.gguf_file import PLAIN, read_gguf_header
from bitwright.checkpoint.manifest import read_manifest
from bitwright.checkpoint.place import appearing, refuse_existing
from bitwright.errors import FormatError
from bitwright.export.folder import ExportResult, ExportRow, NativeFolder, Progress, Say, silent, unseen
from bitwright.export.gguf_model import GgufModel, gguf_model, rope_pairs
from bitwright.export.gguf_tokenizer import read_tokenizer
from bitwright.formats.gguf import TYPES, check_values, dequantized, encode, gguf_type, rounded_type, tolerance
from bitwright.formats.native import packed_bytes
from bitwright.numeric.hadamard import hadamard_blocks
from bitwright.numeric.measure import sqnr_db, squared_error
from bitwright.numeric.qtensor import QTensor

"""Called with the tensor that is done, weights done so far, and weights in all."""
TARGET = "gguf"
_KV_CACHE = "the KV cache"
_PIECE_WEIGHTS = 1 << 21
# How a file of mostly one type is called.
_FILE_TYPES = {"F32": "ALL_F32", "Q2_K": "MOSTLY_Q2_K", "Q6_K": "MOSTLY_Q6_K"}
_FILE_TYPES |= {name: f"MOSTLY_{name}_S" for name in ("Q3_K", "Q4_K", "Q5_K")}


@dataclass(frozen=True)
class GgufRow(ExportRow):
    """What became of one tensor; `action` "float" stands for everything that was rounded.

    Attributes:
        name: in the file.
        kind: its GGUF type.
    """

    name: str = ""
    kind: str = ""

    def line(self) -> str:
        """The row in one line."""
        error = "nothing lost" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB"
        return f"{self.tensor}: {self.note}; as {self.kind}, {self.bytes - self.source_bytes:+,} bytes, {error}"


@dataclass(frozen=True)
class _Job:
    """One tensor of the file.

    Attributes:
        tensor: its name in the native folder, or that of the weight of the quantized `module`.
        name: in the file.
        kind: its GGUF type.
        shape: slowest dimension first.
        how: "kept" floats; codes that move "exact", or under scales and offsets "rounded" to fp16; weights "decoded"
            and rounded anew.
        module: the quantized module; empty for floats.
        note: what keeps it from being all that the native folder says.
    """

    tensor: str
    name: str
    kind: str
    shape: tuple[int, ...]
    how: Literal["kept", "exact", "rounded", "decoded"] = "kept"
    module: str = ""
    note: str = ""

    @property
    def bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return int(prod(self.shape) // block * block_bytes)


def export_gguf(
    folder: str | Path,
    out: str | Path,
    *,
    allow_lossy: bool = False,
    tokenizer_pre: str | None = None,
    say: Say = silent,
    progress: Progress = unseen,
) -> ExportResult:
    """Write the native `folder` as the GGUF file `out`.

    Args:
        folder: what `quantize` made.
        out: must not exist.
        allow_lossy: round what no GGUF type holds, undo transforms of inputs, and leave inputs and the KV cache in
            float; the added error of each tensor is in its row.
        tokenizer_pre: llama.cpp's name for the way in which the tokenizer cuts text into words, where it is not known.
        say: is told of every tensor that is not exact, and of every note.
        progress: is told of every tensor.

    Raises:
        FormatError: before anything is written, `folder` is damaged, llama.cpp has no such model or tokenizer, or
            no type for a tensor, and `allow_lossy` is false; later, decoded bytes are not the weights.
        CheckpointError: the tokenizer is missing or cannot be read.
        ResumeError: `out` exists.
    """
    out, native = Path(out), NativeFolder.open(folder)
    refuse_existing(out)
    model = gguf_model(native.config, _shapes(native))
    problems = _problems(native)
    if problems and not allow_lossy:
        name, problem = next(iter(problems.items()))
        more = f" ({len(problems)} such)" if len(problems) > 1 else ""
        raise FormatError(f"{name}{more}: {problem}")
    tokenizer = read_tokenizer(Path(folder), model.metadata["vocab_size"], tokenizer_pre)
    jobs = [_job(native, tensor, name, problems) for tensor, name in model.names.items()]
    notes = tuple(f"{name}: {problem}" for name, problem in problems.items() if name == _KV_CACHE)
    for note in notes:
        say(note)
    metadata = _general(native, jobs) | {f"{model.architecture.name}.{key}": v for key, v in model.metadata.items()}
    rows = []
    done, total = 0, sum(prod(job.shape) for job in jobs)
    with _atomic(out) as temporary:
        for row in _write(temporary, native, model, jobs, metadata | tokenizer):
            rows.append(row)
            done += prod(jobs[len(rows) - 1].shape)
            if row.note:
                say(row.line())
            progress(row.tensor, done, total)
    return ExportResult(out, TARGET, tuple(rows), notes)


# --- planning ----------------------------------------------------------------------------------------------


def _shapes(native: NativeFolder) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by the checkpoint's names, those of quantized weights among them.

    Raises:
        FormatError: there is no head, nor an embedding that serves as one.
    """
    shapes = {name: info.shape for name, info in native.kept.items()}
    shapes |= {f"{module}.weight": entry.shape for module, entry in native.entries.items()}
    tied = native.tied or native.tied_weights or native.config.get("tie_word_embeddings")
    if "lm_head.weight" not in shapes and not tied:
        raise FormatError("lm_head.weight: missing, and no embedding is tied to it; the folder is incomplete")
    return shapes


def _problems(native: NativeFolder) -> dict[str, str]:
    """Why modules, or the KV cache, cannot move as they are; what to do about it."""
    problems = {}
    if native.sites.kv_cache is not None:
        problems[_KV_CACHE] = (
            f"quantized to {native.sites.kv_cache.bits} bits, which a GGUF file cannot say; quantize with a scheme "
            "without kv, or export with --allow-lossy and start llama.cpp with --cache-type-k and --cache-type-v"
        )
    for module in native.entries:
        problem = _problem(native, module)
        if problem is not None:
            problems[module] = problem
    return problems


def _problem(native: NativeFolder, module: str) -> str | None:
    entry, site = native.entries[module], native.sites.inputs.get(module)
    if entry.outliers:
        return (
            f"{entry.outliers} outliers have no place in a GGUF block; quantize with "
            "--set outliers.name=none, or export with --allow-lossy"
        )
    if site is not None and site.transform is not None:
        return (
            f"its inputs take a {site.transform} transform, which llama.cpp does not compute; quantize with "
            "--set rotate.online_down=false, or export with --allow-lossy"
        )
    if site is not None:
        return (
            "its inputs are quantized, and llama.cpp has its own way with inputs; quantize with a16 in the "
            "scheme, or export with --allow-lossy, which leaves them in float"
        )
    try:
        _exact_type(native, module)
    except FormatError as error:
        return str(error)
    return None


def _exact_type(native: NativeFolder, module: str) -> str:
    """The type that holds the codes and the grid of a module; FormatError where there is none."""
    entry = native.entries[module]
    kind = gguf_type(entry.spec, entry.shape[1])
    # The twins of Q4_1 and Q5_1 are exact for some values only.
    if TYPES[kind].minimum and TYPES[kind].scale_bits is None:
        check_values(native.grid(module), entry.shape[1], kind)
    return kind


def _job(native: NativeFolder, tensor: str, name: str, problems: dict[str, str]) -> _Job:
    module = tensor.removesuffix(".weight")
    if module not in native.entries:
        info = native.kept[tensor]
        # llama.cpp multiplies and adds vectors in float32 alone.
        dtype = torch.float32 if len(info.shape) == 1 else info.dtype
        kinds = [kind.name for kind, plain in PLAIN.items() if plain == dtype]
        if not kinds:
            raise FormatError(f"{tensor}: {info.dtype}, needed float32, float16 or bfloat16")
        return _Job(tensor, name, kinds[0], info.shape)
    note = problems.get(module, "").partition(";")[0]
    return _Job(tensor, name, *_place(native, module), module=module, note=note)


def _place(native: NativeFolder, module: str) -> tuple[str, tuple[int, ...], Literal["exact", "rounded", "decoded"]]:
    """Type, shape and manner of a quantized module: exact, or what rounds it least."""
    entry, site = native.entries[module], native.sites.inputs.get(module)
    spec, in_features = entry.spec, entry.shape[1]
    if not entry.outliers and (site is None or site.transform is None):
        try:
            return _exact_type(native, module), entry.shape, "exact"
        except FormatError:
            kind = rounded_type(spec, in_features)
        if kind is not None:
            return kind, entry.shape, "rounded"
    return "F16" if in_features % TYPES["Q8_0"].weights else "Q8_0", entry.shape, "decoded"


# --- writing -----------------------------------------------------------------------------------------------


@contextmanager
def _atomic(out: Path) -> Iterator[Path]:
    """A file to write, which becomes `out` when the block ends, and vanishes when it fails; see `appearing`."""
    with appearing(out) as temporary:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        read_gguf_header(temporary)


def _general(native: NativeFolder, jobs: list[_Job]) -> dict[str, Any]:
    """`general.*`, besides the architecture."""
    weights: Counter[str] = Counter()
    for job in jobs:
        weights[job.kind] += prod(job.shape)
    kind = weights.most_common(1)[0][0]
    total = sum(weights.values())
    return {
        "general.type": "model",
        "general.name": Path(str(read_manifest(native.folder)["source_label"])).stem,
        "general.size_label": gguf.size_label(total, total, 0, 0),
        "general.file_type": int(LlamaFileType[_FILE_TYPES.get(kind, f"MOSTLY_{kind}")]),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
    }


def _write(
    path: Path, native: NativeFolder, model: GgufModel, jobs: list[_Job], metadata: dict[str, Any]
) -> Iterator[GgufRow]:
    """The whole file, tensor by tensor; gives what became of each when it is written."""
    writer = gguf.GGUFWriter(path, model.architecture.name)
    for key, value in metadata.items():
        _add(writer, key, value)
    if model.divisors is not None:
        shape = tuple(model.divisors.shape)
        writer.add_tensor_info("rope_freqs.weight", shape, np.float32, 4 * shape[0], GGMLQuantizationType.F32)
    for job in jobs:
        # Of the arguments that describe the values, the writer uses none beside the type.
        writer.add_tensor_info(job.name, job.shape, np.float32, job.bytes, GGMLQuantizationType[job.kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if model.divisors is not None:
            writer.write_tensor_data(model.divisors.numpy())
        for job in jobs:
            data, quality = _kept(native, model, job) if job.how == "kept" else _quantized(native, model, job)
            writer.write_tensor_data(data)
            yield _row(native, job, quality)
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _row(native: NativeFolder, job: _Job, quality: float | None) -> GgufRow:
    action: Literal["exact", "float", "kept"]
    if job.how == "kept":
        action, before = "kept", native.kept[job.tensor].bytes
    else:
        action, before = "exact" if job.how == "exact" else "float", packed_bytes(native.entries[job.module])
    return GgufRow(job.tensor, action, before, job.bytes, job.note, quality, job.name, job.kind)


def _kept(native: NativeFolder, model: GgufModel, job: _Job) -> tuple[np.ndarray, None]:
    """A float tensor as the file has it: nothing is lost."""
    values = model.rows(job.tensor, native.read(job.tensor))
    if len(job.shape) == 1:
        values = values.float()
        if job.tensor.removesuffix(".weight").endswith("norm"):
            values = values + model.architecture.norm_offset
    return values.contiguous().reshape(-1).view(torch.uint8).numpy(), None


def _quantized(native: NativeFolder, model: GgufModel, job: _Job) -> tuple[np.ndarray, float | None]:
    """A quantized matrix as the file has it, and the SQNR in dB of what rounding did to it (None: nothing)."""
    q, site = native.unpack(job.module), native.sites.inputs.get(job.module)
    transformed = site is not None and site.transform is not None
    rows = max(1, _PIECE_WEIGHTS // q.shape[1] // q.spec.row_multiple) * q.spec.row_multiple
    pieces, error, signal = [], 0.0, 0.0
    for start in range(0, q.shape[0], rows):
        piece = q.rows(slice(start, min(start + rows, q.shape[0])))
        # The transform is its own transpose: what it does to inputs, it does to the rows of the weight.
        weight = hadamard_blocks(piece.dequantize()) if transformed else piece.dequantize()
        raw, values = _encoded(job, piece, weight)
        if job.how != "exact":
            difference = squared_error(weight, values)
            error, signal = error + difference[0], signal + difference[1]
        elif not _agrees(values, weight, piece, job.kind):
            raise FormatError(f"{job.tensor}: its {job.kind} blocks do not decode to it; this is a bug in bitwright")
        pieces.append(raw)
    data = np.concatenate(pieces)
    if job.tensor in model.heads:
        data = data[rope_pairs(torch.arange(len(data)), model.heads[job.tensor]).numpy()]
    return np.ascontiguousarray(data), sqnr_db(error, signal) if error else None


def _agrees(values: Tensor, weight: Tensor, q: QTensor, kind: str) -> bool:
    """Whether what the blocks decode to is the weight of `q`."""
    return torch.equal(values, weight) or bool(((values - weight).abs() <= tolerance(q, kind)).all())


def _encoded(job: _Job, q: QTensor, weight: Tensor) -> tuple[np.ndarray, Tensor]:
    """Bytes [rows, bytes of a row] of the rows `q`, whose weights for inputs as they come are `weight`, and values."""
    if job.kind == "F16":
        half = weight.half()
        if not bool(torch.isfinite(half).all()):
            raise FormatError(f"{job.tensor}: a weight of {weight.abs().max().item():.3g} does not fit fp16")
        return half.view(torch.uint8).numpy(), half.float()
    if job.how == "decoded":
        raw = gguf.quants.quantize(weight.contiguous().numpy(), GGMLQuantizationType[job.kind])
    else:
        raw = encode(q, job.kind, rounded=job.how == "rounded")
    return raw, dequantized(job.kind, raw)
