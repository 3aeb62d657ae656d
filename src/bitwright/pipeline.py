"""The spine: one weight's journey from checkpoint to artefact, unit by unit.

    source -> plan -> [ read -> range + round -> pack -> verify ] per tensor -> shard -> journal -> publish

Data-free recipes need no block inputs, so tensors are independent and flow through in order: one thread reads
ahead, this one computes on all processors, and one writes each unit's shard behind. Calibrated recipes walk from
block to block, each rounded under the inputs that the blocks before it give (see `walk`).
Killed at any moment and started again, the job continues after its last finished shard and ends with the same
bytes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright import __about__
from bitwright.calibration.blocks import check_windows
from bitwright.calibration.sample import sample_from_model
from bitwright.calibration.tokens import TokenWindows, calibration_windows
from bitwright.checkpoint.journal import CLASS, Journal
from bitwright.checkpoint.load import load_model, load_tokenizer
from bitwright.checkpoint.open import check_unchanged, find_source
from bitwright.checkpoint.settle import settled
from bitwright.checkpoint.shard import read_shard, write_shard
from bitwright.checkpoint.skeleton import build_skeleton
from bitwright.checkpoint.source import Source
from bitwright.errors import BitwrightError, FallbackError, FormatError, ResumeError
from bitwright.execute.local import ahead, default_workers, own_threads, torch_threads
from bitwright.execute.memory import peak_rss_bytes
from bitwright.execute.shown import Shown
from bitwright.formats.native import FORMAT_VERSION
from bitwright.journey import Outcome, Record, check_finished, check_values, process_row, read_row
from bitwright.machine import Estimate, check_machine, estimate
from bitwright.plan import Plan, make_plan, rotated_as_asked
from bitwright.publish import check_written, finish, finished_manifest, silent
from bitwright.recipe import Recipe, as_recipe
from bitwright.rounding.gptq import NEAREST
from bitwright.rows import Row, Unit
from bitwright.walk import Values, Walk

WeightProgress = Callable[[str, int, int], None]
FinishedUnit = tuple[str, dict[str, Tensor], list[dict[str, Any]]]
"""Name of the shard, its tensors, and their records."""


@dataclass(frozen=True, repr=False)
class Summary(Shown):
    """What `quantize` made."""

    out: Path
    records: list[dict[str, Any]]
    """One per tensor, as in the manifest."""
    seconds: float
    peak_rss_bytes: int
    resumed_shards: int
    """Shards that an earlier run of the same job had finished."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of a calibrated job by phase; what is missing is reading, packing, verifying and writing."""
    notes: tuple[str, ...] = ()
    """What to know of the result, such as files of the source that it does not have."""

    @property
    def bytes(self) -> int:
        """Bytes of all weights on disk."""
        return sum(record["bytes"] for record in self.records)

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, from bytes written: codes, scales, zeros, outliers and their indices."""
        return bits_per_weight(self.records)

    def facts(self) -> dict[str, str]:
        """See `Shown.facts`."""
        quantized = sum(record["action"] == "quantize" for record in self.records)
        return {
            "out": str(self.out),
            "tensors": f"{quantized} of {len(self.records)} quantized",
            "bits per weight": f"{self.bits_per_weight:.3f}",
            "bytes": f"{self.bytes:,}",
            "seconds": f"{self.seconds:.1f}",
        }

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
            "phases": self.phases,
            "notes": list(self.notes),
            "tensors": self.records,
        }


def bits_per_weight(records: Sequence[Mapping[str, Any]]) -> float:
    """Bits per quantized weight of manifest records; NaN when nothing was quantized."""
    quantized = [record for record in records if record["action"] == "quantize"]
    weights = sum(math.prod(record["shape"]) for record in quantized)
    return 8 * sum(record["bytes"] for record in quantized) / weights if weights else math.nan


@dataclass(frozen=True)
class RunOptions:
    """How to run a job. Of a data-free one nothing here changes a byte; see `workers` for calibrated ones."""

    workers: int | None = None
    """Processors to compute on; None: all. With other numbers calibrated results may differ in their last digits."""
    restart: bool = False
    """Discard an unfinished run instead of continuing it."""
    accept_other_machine: bool = False
    """Continue a calibrated run that was begun in another numeric class, as its manifest will tell."""
    announce: Callable[[Plan, Estimate], None] | None = None
    """Called once, with the plan and what it is expected to need, before any work."""
    progress: WeightProgress | None = None
    """Called with what just finished or is being done, weights done so far, and weights in all."""
    max_fallbacks: float = 0.0
    """Share of the calibrated tensors that may be rounded to nearest because their Hessian is of no use."""


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
        ResumeError: `out` or its unfinished folder belongs to another job, is damaged, or is not ours; or a finished
            shard was changed by others before it could be published.
        CheckpointError: the source changed meanwhile.
        WeightError: a tensor holds NaN or Inf, or does not fit its stored types. What was finished is kept.
    """
    started = time.perf_counter()
    out = Path(out)
    resolved = as_recipe(recipe, method, scheme)
    found = find_source(model)
    identity, opened = found.identity(), settled(found)
    source = rotated_as_asked(opened, resolved)
    plan = make_plan(source, resolved)
    if not os.path.lexists(out):
        # before anything that takes long: text, samples of the model, blocks
        check_values(opened, plan.rows(), plan.inputs is not None)
    windows = _calibration(source, plan)
    job = _job(source, plan, windows)
    if os.path.lexists(out):
        manifest = finished_manifest(out, source, job, options.progress or silent)
        seconds = time.perf_counter() - started
        return Summary(out, manifest["tensors"], seconds, peak_rss_bytes(), len(manifest["shards"]))
    workers = options.workers or default_workers()
    if windows is not None:
        check_windows(windows.ids, build_skeleton(source.config).config)
    needs = estimate(plan, workers)
    check_machine(needs, out)
    if options.announce is not None:
        options.announce(plan, needs)
    threads = own_threads
    if needs.numeric_class is not None:
        threads, job[CLASS] = torch_threads, [needs.numeric_class]
    check = partial(_check_shard, plan)
    unfinished = Journal(out, job, options.restart, check, options.accept_other_machine)
    with threads(workers), unfinished as journal, _finished_is_kept(journal):
        resumed, report = len(journal.done), _Report(plan, journal, options)
        phases = _quantize_units(source, plan, journal, windows, report)
        records, notes = finish(source, plan, journal, journal.job, windows)
        check_unchanged(found, identity)
        report.say("checking what was written")
        check_written(journal)
        journal.publish()
    return Summary(out, records, time.perf_counter() - started, peak_rss_bytes(), resumed, phases, notes)


@contextmanager
def _finished_is_kept(journal: Journal) -> Iterator[None]:
    """Within, a refusal says what becomes of the shards that are finished: its remedy may be another recipe."""
    try:
        yield
    except BitwrightError as error:
        if not journal.done or isinstance(error, ResumeError) or "--restart" in str(error):
            raise
        kept = f"{len(journal.done)} finished shards are kept in {journal.folder}"
        raise type(error)(
            f"{error} ({kept}: the same command goes on behind them, another recipe needs --restart)"
        ) from error


def _check_shard(plan: Plan, path: Path, records: list[Record]) -> None:
    """Refuse a finished shard of an earlier run that is none of this plan."""
    rows = {plan.shard_name(index): unit.rows for index, unit in enumerate(plan.units)}.get(path.name)
    if rows is None:
        raise FormatError(f"no shard of this job is called {path.name}")
    check_finished(rows, read_shard(path), records)


def _calibration(source: Source, plan: Plan) -> TokenWindows | None:
    """The windows that calibrated rows are shown; None when there are none."""
    if plan.inputs is None:
        return None
    settings, seed = plan.recipe.calibration, plan.recipe.seed
    if settings.text == "self":
        return calibration_windows(settings, None, seed, partial(sample_from_model, load_model(plan.source).model))
    tokenizer = load_tokenizer(source) if settings.needs_tokenizer else None
    return calibration_windows(settings, tokenizer, seed, vocabulary=source.config.get("vocab_size"))


class _Report:
    """What the run tells on its way: progress, and fallbacks before they are too many."""

    def __init__(self, plan: Plan, journal: Journal, options: RunOptions):
        self._options = options
        self._total = sum(row.weights for row in plan.rows())
        names = {plan.shard_name(index): unit for index, unit in enumerate(plan.units)}
        self._done = sum(row.weights for name in journal.done for row in names[name].rows)
        self._allowed = int(options.max_fallbacks * sum(row.calibrated for row in plan.rows()))
        self._fallen = [r["tensor"] for shard in journal.done.values() for r in shard["records"] if _fell_back(r)]

    def say(self, what: str) -> None:
        """Tell what is being done."""
        if self._options.progress is not None:
            self._options.progress(what, self._done, self._total)

    def finished(self, row: Row, record: Record) -> None:
        """Count a tensor.

        Raises:
            FallbackError: it is one rounded to nearest too many.
        """
        self._done += row.weights
        if _fell_back(record):
            self._fallen.append(row.tensor)
            if len(self._fallen) > self._allowed:
                raise FallbackError(
                    f"{row.tensor}: {'; '.join(record['fallbacks'])}; that makes {len(self._fallen)} tensors rounded "
                    f"to nearest, and {self._allowed} are allowed; give more or other calibration text, or allow "
                    "as many as there are with --max-fallbacks 1"
                )
        self.say(row.tensor)


def _fell_back(record: Record) -> bool:
    return any(line.startswith(NEAREST) for line in record.get("fallbacks", ()))


def _job(source: Source, plan: Plan, windows: TokenWindows | None) -> dict[str, Any]:
    """What must be equal for two runs to be the same job; `source_files` is for resume alone."""
    return {
        "calibration": None if windows is None else windows.sha256,
        "source": source.fingerprint(),
        "source_files": source.identity(),
        "recipe": plan.recipe.sha256(),
        "seed": plan.recipe.seed,
        "bitwright": __about__.__version__,
        "torch": torch.__version__,
        "format_version": FORMAT_VERSION,
    }


def _quantize_units(
    source: Source, plan: Plan, journal: Journal, windows: TokenWindows | None, report: _Report
) -> dict[str, float]:
    """Write every shard that the journal does not have yet; gives the seconds of each phase of a calibrated job."""
    todo = [index for index in range(len(plan.units)) if plan.shard_name(index) not in journal.done]
    values = ahead(lambda row: read_row(source, row), [row for index in todo for row in plan.units[index].rows])

    def write(unit: FinishedUnit) -> None:
        name, parts, records = unit
        sha256 = write_shard(journal.output / name, parts, {"format": "pt", "bitwright": str(FORMAT_VERSION)})
        journal.record(name, sha256, records)

    if windows is None or not todo:
        for _ in ahead(write, (_unit(plan, index, _independent(plan.units[index], values), report) for index in todo)):
            pass
        return {}
    with Walk(source, plan, windows.ids, journal.folder, report.say) as walk:
        for _ in ahead(write, _walked_units(walk, plan, journal, values, report)):
            pass
        return walk.watch.seconds


def _walked_units(walk: Walk, plan: Plan, journal: Journal, values: Values, report: _Report) -> Iterator[FinishedUnit]:
    """The units that are left, in order; those that an earlier run has finished are replayed."""
    last = max(index for index in range(len(plan.units)) if plan.shard_name(index) not in journal.done)
    for index, unit in enumerate(plan.units[: last + 1]):
        done = journal.done.get(plan.shard_name(index))
        if done is None:
            rounded = _independent(unit, values) if unit.block is None else walk.process(unit, values)
            finished = _unit(plan, index, rounded, report)
            yield finished
            _, parts, records = finished
        else:
            records = done["records"]
            parts = read_shard(journal.output / done["shard"])
        if unit.block is None:
            walk.before_blocks(unit, parts, records)
        elif done is not None:
            walk.replay(unit, parts, records)


def _independent(unit: Unit, values: Values) -> Iterator[tuple[Row, Outcome]]:
    """Rows that need nothing but themselves."""
    return ((row, process_row(row, *next(values))) for row in unit.rows)


def _unit(plan: Plan, index: int, rounded: Iterable[tuple[Row, Outcome]], report: _Report) -> FinishedUnit:
    """Shard name, tensors and records of one unit, in the order of its rows."""
    outcomes: dict[str, Outcome] = {}
    for row, outcome in rounded:
        outcomes[row.tensor] = outcome
        report.finished(row, outcome.record)
    ordered = [outcomes[row.tensor] for row in plan.units[index].rows]
    parts = {name: part for outcome in ordered for name, part in outcome.parts.items()}
    return plan.shard_name(index), parts, [outcome.record for outcome in ordered]
