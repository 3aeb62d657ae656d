"""What all exports of folders share: a native folder to read, a new folder that appears whole, and the result.

An export never works on more than one shard at a time. Everything that can be refused is refused before the first
byte is written; what is written lies in `OUT.exporting` until it is complete, and is removed when anything fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bitwright.checkpoint.finite import check_finite
from bitwright.checkpoint.native_folder import check_sums, read_native
from bitwright.checkpoint.open import model_name
from bitwright.checkpoint.place import appearing
from bitwright.checkpoint.shard import TensorInfo, read_tensor, write_shard, write_text
from bitwright.checkpoint.side_files import copy_side_files
from bitwright.errors import CheckpointError, FormatError, PlanError
from bitwright.execute.shown import Shown
from bitwright.formats.folder import PLAIN_INDEX
from bitwright.formats.native import (
    Sites,
    TensorEntry,
    parts,
    unpack,
    unpack_grid,
)
from bitwright.models import adapter_for
from bitwright.numeric.fp8 import KvScales
from bitwright.numeric.grid import Grid
from bitwright.numeric.hadamard import hadamard_blocks
from bitwright.numeric.qtensor import QTensor

Say = Callable[[str], None]


Progress = Callable[[str, int, int], None]
"""Told what was just done, how much of all is done, and all."""


def silent(line: str) -> None:
    """Say nothing."""


def unseen(what: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class ExportRow:
    """What became of one tensor.

    Attributes:
        tensor: its name, that of the weight where several tensors stand for it.
        action: "exact" (codes moved, or numbers of config.json), "float" (decoded and rounded to a float type), "kept"
            (was a float already).
        source_bytes: what it takes in the folder that was read.
        bytes: what it takes in the new one.
        note: why it could not be exact; empty otherwise.
        sqnr_db: of the rounded floats against the decoded weights, in dB; None where nothing changed.
    """

    tensor: str
    action: Literal["exact", "float", "kept"]
    source_bytes: int
    bytes: int
    note: str = ""
    sqnr_db: float | None = None

    def line(self) -> str:
        """The row in one line."""
        error = "" if self.sqnr_db is None else f", {self.sqnr_db:.1f} dB"
        return f"{self.tensor}: {self.note}; in floats, {self.bytes - self.source_bytes:+,} bytes{error}"


@dataclass(frozen=True, repr=False)
class ExportResult(Shown):
    """What an export made: the folder `out`, one row per tensor, and what to know before it is used."""

    out: Path
    target: str
    rows: tuple[ExportRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.bytes for row in self.rows)

    @property
    def lossy(self) -> tuple[ExportRow, ...]:
        """The rows that could not be exact."""
        return tuple(row for row in self.rows if row.note)

    def facts(self) -> dict[str, str]:
        """See `Shown.facts`."""
        return {
            "out": str(self.out),
            "format": self.target,
            "tensors": f"{len(self.rows)}, {len(self.lossy)} not exact",
            "bytes": f"{self.bytes:,}",
        }

    def to_json(self) -> dict[str, Any]:
        """The result for `export --json`; keys are stable."""
        rows = [{**vars(row)} for row in self.rows]
        return {
            "out": str(self.out),
            "target": self.target,
            "bytes": self.bytes,
            "tensors": rows,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class NativeFolder:
    """A folder that bitwright wrote, read one tensor at a time."""

    folder: Path
    config: dict[str, Any]
    """`config.json` without `quantization_config` and the note to loaders."""
    entries: dict[str, TensorEntry]
    sites: Sites
    tied: dict[str, str]
    place: dict[str, tuple[Path, TensorInfo]] = field(repr=False)
    """Every tensor's shard and header entry."""
    tied_weights: tuple[str, ...] = ()
    """Weights that the model shares with another and that no shard holds, such as `lm_head.weight`."""

    @staticmethod
    def open(folder: str | Path) -> NativeFolder:
        """The folder, its files and headers checked against its manifest, its config and the model (see `read_native`).

        Raises:
            FormatError: the folder is not a complete bitwright result, or its parts contradict each other.
            CheckpointError: a shard is missing or damaged.
        """
        folder = Path(model_name(folder))
        found = read_native(folder)
        check_kv_scales(found.place, found.sites.kv_scales)
        check_sums(folder, found.manifest)
        quantized = {*found.entries, *found.tied}
        shared = tuple(name for name in _shared(found.manifest, found.config, quantized) if name not in found.place)
        return NativeFolder(folder, found.config, found.entries, found.sites, found.tied, found.place, shared)

    def read(self, name: str) -> Tensor:
        """One stored tensor.

        Raises:
            CheckpointError: its shard is damaged.
            WeightError: it holds NaN or Inf.
        """
        path, info = self.place[name]
        values = read_tensor(path, name, info)
        check_finite(name, values)
        return values

    def unpack(self, module: str) -> QTensor:
        """The matrix of a quantized module."""
        entry = self.entries[module]
        return unpack(module, {part: self.read(f"{module}.{part}") for part in parts(entry)}, entry)

    def grid(self, module: str) -> Grid:
        """The grid of a quantized module; its codes are not read."""
        entry = self.entries[module]
        names = [part for part in parts(entry) if part != "weight_packed" and not part.startswith("outlier")]
        return unpack_grid({part: self.read(f"{module}.{part}") for part in names}, entry.spec, entry.shape)

    def weight(self, module: str, q: QTensor | None = None) -> Tensor:
        """The weights of a quantized module, float32 [out, in], for inputs as they come: a transform is undone."""
        weight = (q or self.unpack(module)).dequantize()
        site = self.sites.inputs.get(module)
        # The transform is its own transpose: what it does to inputs, it does to the rows of the weight.
        return weight if site is None or site.transform is None else hadamard_blocks(weight)

    def embedding(self) -> str | None:
        """The token embedding, if it is quantized.

        Raises:
            PlanError: it cannot be told, for an architecture that is not known.
        """
        outside = [module for module in self.entries if not any(part.isdigit() for part in module.split("."))]
        name = adapter_for(self.config).embedding if outside else None
        return name if name in outside else None

    @property
    def kept(self) -> dict[str, TensorInfo]:
        """The float tensors by name, those of quantized modules' biases included."""
        packed = {f"{module}.{part}" for module, entry in self.entries.items() for part in parts(entry)}
        return {name: info for name, (_, info) in self.place.items() if name not in packed}

    def unquantized(self) -> list[str]:
        """Modules with a float matrix, and those that share one: what a class of linears would hit by mistake."""
        kept = [name for name, info in self.kept.items() if len(info.shape) == 2]
        return sorted(
            {name.removesuffix(".weight") for name in (*kept, *self.tied_weights) if name.endswith(".weight")}
        )

    def shards(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """Every shard in order: its name, the quantized modules in it, and the float tensors in it."""
        kept, first = self.kept, {module: f"{module}.weight_packed" for module in self.entries}
        for path in dict.fromkeys(path for path, _ in self.place.values()):
            modules = [module for module, name in first.items() if self.place[name][0] == path]
            yield path.name, modules, [name for name in kept if self.place[name][0] == path]


def _shared(manifest: dict[str, Any], config: dict[str, Any], quantized: set[str]) -> Iterator[str]:
    """Weights that are another's if no shard holds them: those that the source stored twice, and a float head."""
    stored_twice = [record["tensor"] for record in manifest["tensors"] if record["action"] == "tied"]
    yield from stored_twice
    try:
        head = adapter_for(config).head
    except PlanError:
        head = "lm_head"
    if head not in quantized and f"{head}.weight" not in stored_twice:
        yield f"{head}.weight"


def check_kv_scales(tensors: Iterable[str], scales: Mapping[str, KvScales]) -> None:
    """Refuse `scales` of an fp8 KV cache, if there are any, that are not those of every attention among `tensors`.

    Raises:
        FormatError: naming an attention that has none, or a name that is no attention.
    """
    attentions = {name.partition(".k_proj.")[0] for name in tensors if ".k_proj." in name}
    if scales and (odd := sorted(attentions ^ scales.keys())):
        found = "has no scales of keys and values" if odd[0] in attentions else "is no attention, and has scales"
        raise FormatError(f"{odd[0]}: {found}; the KV cache needs those of every attention, {len(attentions)} in all")


def refuse(target: str, problems: Mapping[str, str], allow_lossy: bool) -> None:
    """Raise FormatError for the first of `problems` (by module), unless they are allowed."""
    if problems and not allow_lossy:
        name, problem = next(iter(problems.items()))
        more = f" ({len(problems)} tensors cannot be exported)" if len(problems) > 1 else ""
        raise FormatError(f"{name}: {problem}{more}; or export with --allow-lossy, which writes floats")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends; after an error nothing of it stays.

    Raises:
        ResumeError: `out` exists, another process is writing it, or `OUT.exporting` is not ours.
    """
    with appearing(out) as working:
        working.mkdir()
        yield working


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file durably."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


class FolderWriter:
    """Shards and their index, in a folder that is not yet published."""

    def __init__(self, folder: Path, metadata: Mapping[str, str] | None = None):
        """Write into `folder`; `metadata` goes into every shard's header."""
        self.folder = folder
        self.sums: dict[str, str] = {}
        self._metadata = {"format": "pt", **(metadata or {})}
        self._weight_map: dict[str, str] = {}
        self._bytes = 0

    def shard(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard.

        Raises:
            CheckpointError: an earlier shard holds a tensor of the same name.
        """
        if twice := self._weight_map.keys() & tensors.keys():
            raise CheckpointError(f"{min(twice)}: two tensors of this name; the source folder is damaged")
        if not tensors:
            return
        self.sums[name] = write_shard(self.folder / name, tensors, self._metadata)
        self._weight_map.update(dict.fromkeys(tensors, name))
        self._bytes += sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())

    def finish(self, config: Mapping[str, Any], index_name: str = PLAIN_INDEX) -> None:
        """Write the index, under the name that the format has for it, and `config.json`."""
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._weight_map.items()))}
        write_json(self.folder / index_name, index)
        write_json(self.folder / "config.json", config)


@dataclass(frozen=True)
class Conversion:
    """What an export does with a native folder.

    Attributes:
        target: name of the format.
        convert: quantized module -> its tensors by whole name, and its row.
        keep: name and value of a float tensor -> what is stored of it.
        config: content of the new `config.json`.
        files: further JSON files by name.
        added: tensors of no module by whole name; they go into the first shard.
    """

    target: str
    convert: Callable[[str], tuple[dict[str, Tensor], ExportRow]]
    config: Mapping[str, Any]
    keep: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)


def write_export(
    native: NativeFolder,
    out: Path,
    conversion: Conversion,
    notes: tuple[str, ...],
    say: Say,
    progress: Progress = unseen,
) -> ExportResult:
    """Write `out` shard by shard; lossy rows and `notes` are said as well as returned; `progress` counts tensors."""
    rows = [
        ExportRow(name, "exact", 0, tensor.numel() * tensor.dtype.itemsize) for name, tensor in conversion.added.items()
    ]
    total = len(native.entries) + len(native.kept)
    with new_folder(out) as working:
        writer = FolderWriter(working)
        for number, (shard, modules, kept) in enumerate(native.shards()):
            tensors = dict(conversion.added) if number == 0 else {}
            for module in modules:
                converted, row = conversion.convert(module)
                tensors |= converted
                rows.append(row)
                if row.note:
                    say(row.line())
                progress(module, len(rows) - len(conversion.added), total)
            for name in kept:
                stored = conversion.keep(name, native.read(name))
                nbytes = stored.numel() * stored.dtype.itemsize
                tensors[name] = stored
                rows.append(ExportRow(name, "kept", native.place[name][1].bytes, nbytes))
                progress(name, len(rows) - len(conversion.added), total)
            writer.shard(shard, tensors)
        notes += tuple(copy_side_files(native.folder, working))
        for name, content in conversion.files.items():
            write_json(working / name, content)
        writer.finish(conversion.config)
    for note in notes:
        say(note)
    return ExportResult(out, conversion.target, tuple(rows), notes)
