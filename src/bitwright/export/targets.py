"""The formats that a native folder can be exported to, and imported from, by the names that users type."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from bitwright.checkpoint.open import model_name
from bitwright.errors import BitwrightError, FormatError, PlanError
from bitwright.export.compressed_tensors import export_compressed_tensors
from bitwright.export.engines import Obstacle, for_engine
from bitwright.export.float_folder import export_float
from bitwright.export.folder import ExportResult, Progress, Say, silent, unseen
from bitwright.export.gguf import export_gguf
from bitwright.export.gguf_import import import_gguf
from bitwright.export.gguf_model import gguf_model
from bitwright.export.gptq import export_awq, export_gptq
from bitwright.export.importing import import_folder
from bitwright.formats import compressed_tensors, gptq
from bitwright.formats.gguf import gguf_type
from bitwright.formats.native import TensorEntry
from bitwright.numeric.outliers import NoOutliers
from bitwright.numeric.settings import known_name, nearest_name
from bitwright.plan import Plan
from bitwright.words import Engine, Target

_OTHERWISE = "(or leave --format out, and export with --allow-lossy)"


def export_model(
    folder: str | Path,
    out: str | Path,
    target: Target,
    *,
    allow_lossy: bool = False,
    say: Say = silent,
    progress: Progress = unseen,
) -> ExportResult:
    """Write the native `folder` as `out` in the format `target`: a folder, or a file for `gguf`.

    Codes, scales and zeros move; nothing is rounded anew. What the format cannot hold is refused before anything is
    written, or with `allow_lossy` becomes float, which `say` and the result tell. `hf` is always float: bfloat16.
    `progress` is told what was just written, how much is done, and all.

    Raises:
        FormatError: the format cannot hold a tensor, there is no such format, or the folder is damaged.
        CheckpointError: a file of the folder cannot be read.
        ResumeError: `out` exists, or another process writes it.
    """
    target = _named(target, get_args(Target), "format", FormatError)
    if target == "gguf":
        return export_gguf(folder, out, allow_lossy=allow_lossy, say=say, progress=progress)
    if target == "compressed-tensors":
        return export_compressed_tensors(folder, out, allow_lossy=allow_lossy, say=say, progress=progress)
    if target == "gptq":
        return export_gptq(folder, out, allow_lossy=allow_lossy, say=say, progress=progress)
    if target == "awq":
        return export_awq(folder, out, allow_lossy=allow_lossy, say=say, progress=progress)
    return export_float(folder, out, say=say, progress=progress)


def import_model(path: str | Path, out: str | Path, *, say: Say = silent, progress: Progress = unseen) -> ExportResult:
    """Write a compressed-tensors, GPTQ or AWQ folder, or a .gguf file, as the native folder `out`, code for code.

    Raises:
        FormatError: the file's format, or its version, cannot be read exactly.
        CheckpointError: a file cannot be read.
        ResumeError: `out` exists, or another process writes it.
    """
    path = model_name(path)
    reader = import_gguf if Path(path).suffix == ".gguf" else import_folder
    return reader(path, out, say=say, progress=progress)


def refuse_early(plan: Plan, target: Target) -> None:
    """Refuse a plan whose result `export_model` would refuse, before any work.

    What only the finished codes tell, such as a zero that a reader would misread, is left to the export.

    Raises:
        FormatError: the format cannot hold the model or a tensor; the message names the first.
    """
    if target == "hf":
        return
    if target == "gguf":
        gguf_model(plan.config, {row.tensor: row.shape for row in plan.rows() if row.action != "tied"})
    for row in plan.rows():
        if row.spec is None:
            continue
        entry = TensorEntry(row.spec, (row.shape[0], row.shape[1]))
        problem = _problem(entry, target)
        if row.method is not None and not isinstance(row.method.outliers, NoOutliers):
            problem = "may keep outliers, which have no place there; use --set outliers.name=none"
        if problem is None and row.hadamard:
            problem = "has its input rotated at run time; use --set rotate.online_down=false"
        if problem is not None:
            raise FormatError(f"{row.tensor}: {problem} {_OTHERWISE}")
    if plan.kv_cache is not None and (target != "compressed-tensors" or plan.kv_cache.grid == "int"):
        raise FormatError(
            f"the KV cache is {plan.kv_cache.label()}, for which {target} has no place; leave kv out of the scheme, "
            f"or use --format compressed-tensors with --set activations.kv.grid=fp8 {_OTHERWISE}"
        )


def _problem(entry: TensorEntry, target: Target) -> str | None:
    if target == "gguf":
        try:
            gguf_type(entry.spec, entry.shape[1])
        except FormatError as error:
            return str(error)
        return None
    if target == "compressed-tensors":
        return compressed_tensors.refusal(entry)
    return gptq.refusal(entry, awq=target == "awq")


def obstacles(plan: Plan, engine: Engine) -> list[Obstacle]:
    """What stands in the way of serving the result of `plan` with `engine`; PlanError for an unknown engine."""
    engine = _named(engine, get_args(Engine), "engine", PlanError)
    return for_engine(engine, plan.rows(), kv_cache=plan.kv_cache, embedding=plan.adapter.embedding)


def _named(given: Any, known: tuple[str, ...], what: str, error: type[BitwrightError]) -> Any:
    """The one of `known` that is given, in capitals or not; else an `error` with what was perhaps meant."""
    found = known_name(str(given), known)
    if found is None:
        raise error(f"{what} {given!r} is unknown{nearest_name(str(given), known)}")
    return found
