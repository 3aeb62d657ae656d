"""The spine: one weight's journey from checkpoint to artefact, unit by unit.

    source -> plan -> [ read -> range + round -> pack -> verify ] per tensor -> shard -> journal -> publish

Data-free recipes need no block inputs, so tensors are independent and flow through in order: one thread reads
ahead, this one computes on all processors, and one writes each unit's shard behind.
Killed at any moment and started again, the job continues after its last finished shard and ends with the same
bytes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright import __about__
from bitwright.checkpoint.journal import Journal
from bitwright.checkpoint.manifest import read_manifest, write_manifest
from bitwright.checkpoint.open import open_source
from bitwright.checkpoint.shard import read_header, tensor_sha256, write_shard, write_text
from bitwright.checkpoint.source import Source
from bitwright.errors import FormatError, ResumeError
from bitwright.execute.local import ahead, default_workers, torch_threads
from bitwright.execute.memory import peak_rss_bytes
from bitwright.formats.native import FORMAT_VERSION, TensorEntry, quantization_config
from bitwright.journey import process_row, read_row
from bitwright.machine import Estimate, check_machine, estimate
from bitwright.plan import Plan, make_plan
from bitwright.recipe import Recipe, as_recipe

WeightProgress = Callable[[str, int, int], None]
FinishedUnit = tuple[str, dict[str, Tensor], list[dict[str, Any]]]
"""Name of the shard, its tensors, and their records."""


@dataclass(frozen=True)
class Summary:
    """What `quantize` made."""

    out: Path
    records: list[dict[str, Any]]
    """One per tensor, as in the manifest."""
    seconds: float
    peak_rss_bytes: int
    resumed_shards: int
    """Shards that an earlier run of the same job had finished."""

    @property
    def bytes(self) -> int:
        """Bytes of all weights on disk."""
        return sum(record["bytes"] for record in self.records)

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, from bytes written: codes, scales, zeros, outliers and their indices."""
        return bits_per_weight(self.records)

    def to_json(self) -> dict[str, Any]:
        """The summary for `quantize --json`; keys are stable."""
        weights = sum(math.prod(r["shape"]) for r in self.records if r["action"] == "quantize")
        return {
            "out": str(self.out),
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "quantized_weights": weights,
            "seconds": self.seconds,
            "weights_per_second": weights / self.seconds if self.seconds else None,
            "peak_rss_bytes": self.peak_rss_bytes,
            "resumed_shards": self.resumed_shards,
            "tensors": self.records,
        }


def bits_per_weight(records: Sequence[Mapping[str, Any]]) -> float:
    """Bits per quantized weight of manifest records; NaN when nothing was quantized."""
    quantized = [record for record in records if record["action"] == "quantize"]
    weights = sum(math.prod(record["shape"]) for record in quantized)
    return 8 * sum(record["bytes"] for record in quantized) / weights if weights else math.nan


@dataclass(frozen=True)
class RunOptions:
    """How to run a job; nothing here changes a byte of its result."""

    workers: int | None = None
    """Processors to compute on; None: all."""
    restart: bool = False
    """Discard an unfinished run instead of continuing it."""
    announce: Callable[[Plan, Estimate], None] | None = None
    """Called once, with the plan and what it is expected to need, before any work."""
    progress: WeightProgress | None = None
    """Called with what just finished, weights done so far, and weights in all."""


_DEFAULTS = RunOptions()


def quantize(
    model: str,
    out: str | Path,
    method: str | None = None,
    scheme: str | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    options: RunOptions = _DEFAULTS,
) -> Summary:
    """Quantize `model` into the folder `out`.

    The other arguments are those of `plan`. An unfinished run of the same job is continued; a finished one is
    left as it is.

    Raises:
        RecipeError, PlanError, CheckpointError: before any work; see `plan`.
        ResumeError: `out` or its unfinished folder belongs to another job.
        WeightError: a tensor holds NaN or Inf, or does not fit its stored types. What was finished is kept.
    """
    started = time.perf_counter()
    out = Path(out)
    source = open_source(model)
    plan = make_plan(source, as_recipe(recipe, method, scheme))
    job = _job(source, plan)
    if out.exists():
        return _already_done(out, source, job, started)
    workers = options.workers or default_workers()
    needs = estimate(plan, workers)
    check_machine(needs, out)
    if options.announce is not None:
        options.announce(plan, needs)
    with torch_threads(workers), Journal(out, job, options.restart) as journal:
        resumed = len(journal.done)
        _quantize_units(source, plan, journal, options.progress)
        records = _finish(source, plan, journal, job)
        journal.publish()
    return Summary(out, records, time.perf_counter() - started, peak_rss_bytes(), resumed)


def _job(source: Source, plan: Plan) -> dict[str, Any]:
    """What must be equal for two runs to be the same job; `source_files` is for resume alone."""
    return {
        "source": source.fingerprint(),
        "source_files": source.identity(),
        "recipe": plan.recipe.sha256(),
        "seed": plan.recipe.seed,
        "bitwright": __about__.__version__,
        "torch": torch.__version__,
        "format_version": FORMAT_VERSION,
    }


def _already_done(out: Path, source: Source, job: dict[str, Any], started: float) -> Summary:
    """The summary of a finished `out` that is this very job's, down to the source's every value."""
    try:
        manifest = read_manifest(out) if out.is_dir() else None
    except FormatError:
        manifest = None
    if manifest is None:
        raise ResumeError(f"{out}: exists and is not a bitwright result; choose another folder or remove it")
    records = manifest["tensors"]
    changed = [key for key in ("source", "recipe", "seed") if manifest["job"].get(key) != job[key]]
    if not changed:
        read = [record for record in records if "source_sha256" in record]
        sums = ahead(lambda record: tensor_sha256(source.read(record["tensor"])), read)
        pairs = zip(read, sums, strict=True)
        changed = [f"source tensor {record['tensor']}" for record, found in pairs if found != record["source_sha256"]]
    if changed:
        raise ResumeError(
            f"{out}: already holds the result of another job (other {', '.join(changed[:3])}); "
            "choose another folder or remove it"
        )
    return Summary(out, records, time.perf_counter() - started, peak_rss_bytes(), len(manifest["shards"]))


def _quantize_units(source: Source, plan: Plan, journal: Journal, progress: WeightProgress | None) -> None:
    """Write every shard that the journal does not have yet."""
    todo = [index for index in range(len(plan.units)) if plan.shard_name(index) not in journal.done]
    total = sum(row.weights for row in plan.rows())
    done = total - sum(row.weights for index in todo for row in plan.units[index].rows)
    rows = [row for index in todo for row in plan.units[index].rows]
    values = ahead(lambda row: read_row(source, row), rows)

    def compute() -> Iterator[FinishedUnit]:
        nonlocal done
        for index in todo:
            parts: dict[str, Tensor] = {}
            records = []
            for row in plan.units[index].rows:
                row_parts, record = process_row(row, *next(values))
                parts.update(row_parts)
                records.append(record)
                done += row.weights
                if progress is not None:
                    progress(row.tensor, done, total)
            yield plan.shard_name(index), parts, records

    def write(unit: FinishedUnit) -> None:
        name, parts, records = unit
        sha256 = write_shard(journal.output / name, parts, {"format": "pt", "bitwright": str(FORMAT_VERSION)})
        journal.record(name, sha256, records)

    for _ in ahead(write, compute()):
        pass


def _finish(source: Source, plan: Plan, journal: Journal, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Write config, index, tokenizer and manifest beside the shards; returns every tensor's record."""
    folder = journal.output
    _remove_strangers(folder, set(journal.done))
    shards = [journal.done[plan.shard_name(index)] for index in range(len(plan.units))]
    records = [record for shard in shards for record in shard["records"]]
    config = source.config | {"quantization_config": _quantization_config(plan, records)}
    if plan.tied_head is not None:
        # transformers would otherwise tie the head to a float weight that no longer exists.
        config["tie_word_embeddings"] = False
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    weight_map = {name: shard["shard"] for shard in shards for name in read_header(folder / shard["shard"])[0]}
    index = {"metadata": {"total_size": sum(r["bytes"] for r in records)}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True) + "\n")
    source.write_side_files(folder)
    content = {
        "job": {key: value for key, value in job.items() if key != "source_files"},
        "source_label": plan.source,
        "recipe": plan.recipe.model_dump(mode="json"),
        "shards": [shard["shard"] for shard in shards],
        "tensors": records,
    }
    write_manifest(folder, content, {shard["shard"]: shard["sha256"] for shard in shards})
    return records


def _remove_strangers(folder: Path, shards: set[str]) -> None:
    """Drop what a killed run left half-written."""
    for path in folder.iterdir():
        if path.name not in shards:
            with suppress(FileNotFoundError):
                path.unlink()


def _quantization_config(plan: Plan, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    outliers = {record["tensor"]: record.get("outliers", 0) for record in records}
    entries = {
        row.module: TensorEntry(spec=row.spec, shape=(row.shape[0], row.shape[1]), outliers=outliers[row.tensor])
        for row in plan.rows()
        if row.spec is not None
    }
    config = quantization_config(entries)
    if plan.tied_head is not None:
        config["tied"] = {plan.tied_head: plan.adapter.embedding}
    return config
