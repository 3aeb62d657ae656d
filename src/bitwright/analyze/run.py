"""`analyze`: calibration sets -> one streaming pass -> advice, recipe and report."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from bitwright import __about__
from bitwright.analyze.advice import advise, suggested_recipe
from bitwright.analyze.allocate import recipe_toml
from bitwright.analyze.model import ModelSection, Report, RunSection
from bitwright.analyze.outliers import Collector
from bitwright.analyze.report import write_report
from bitwright.analyze.sets import CalibrationSet, SetMaker, SetSpec, parse_set
from bitwright.analyze.summary import Summary
from bitwright.checkpoint.open import open_source
from bitwright.checkpoint.source import Source
from bitwright.errors import PlanError
from bitwright.execute.memory import available_memory_bytes, peak_rss_bytes
from bitwright.models import Adapter, adapter_for, block_count
from bitwright.numeric.settings import nearest_name
from bitwright.recipe import Recipe

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""


@dataclass(frozen=True)
class Budget:
    """How much is looked at: draws of `windows` windows of `window_tokens` tokens, one for each seed of each set."""

    name: str
    windows: int
    window_tokens: int
    seeds: tuple[int, ...]
    sets: tuple[str, ...]


BUDGETS = {
    budget.name: budget
    for budget in (
        Budget("quick", 8, 256, (0,), ("text", "nonsense")),
        Budget("standard", 16, 256, (0, 1, 2), ("text", "task", "code", "nonsense", "random", "self")),
        Budget("full", 32, 512, (0, 1, 2), ("text", "task", "code", "nonsense", "random", "self")),
    )
}


@dataclass(frozen=True)
class Analysis:
    """A report in the making, with what later steps need.

    Attributes:
        source, adapter, budget, recipe, maker: of the job; `recipe` None: one is suggested.
        draws: every draw of every calibration set.
        report: so far; sections are added by `report.model_copy(update=...)`.
        tensors: mean square and absmax by channel, for `statistics.safetensors`.
    """

    source: Source
    adapter: Adapter
    budget: Budget
    recipe: Recipe | None
    maker: SetMaker
    draws: tuple[CalibrationSet, ...]
    report: Report
    tensors: dict[str, Tensor]


def analyze(
    model: str,
    out: str | Path,
    *,
    budget: str | Budget = "quick",
    sets: Sequence[str] | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> Report:
    """Look at the activations of `model` on calibration sets and write the report into the folder `out`.

    Args:
        model: a Hugging Face folder, a hub id, a `.gguf` file, or `demo`.
        out: made where it is missing; files of an earlier report are replaced. Keeps the model's own samples.
        budget: `quick`, `standard`, `full`, or one of your own.
        sets: as `sets.parse_set` reads them; None: those of the budget. Of those, `self` is left out, with a note,
            where the model would take more than half of the memory that is available.
        recipe: what the user means to do; None: one is suggested. Becomes `recipe.toml`.
        progress: told what is being done.

    Raises:
        PlanError: the budget is unknown, or the architecture cannot be run block by block.
        CheckpointError: the model cannot be read.
        CalibrationError: a set cannot be drawn, or an activation is not finite.
        OSError: a file cannot be written.
    """
    started = time.perf_counter()
    analysis = observe_model(model, Path(out), budget=budget, sets=sets, recipe=recipe, progress=progress)
    return finish(analysis, Path(out), started)


def observe_model(
    model: str,
    out: Path,
    *,
    budget: str | Budget = "quick",
    sets: Sequence[str] | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """The part of `analyze` before the advice: draws, statistics, and a report that holds them; errors as there."""
    started = time.perf_counter()
    chosen = budget if isinstance(budget, Budget) else _budget(budget)
    source = open_source(model)
    adapter = adapter_for(source.config)
    maker = SetMaker(source, chosen.windows, chosen.window_tokens, out / "samples")
    specs, notes = _specs(chosen, sets, maker)
    if progress is not None:
        progress("calibration sets", 0, block_count(source.config))
    draws = tuple(maker.draw(spec, seed) for spec in specs for seed in chosen.seeds)
    drawn = time.perf_counter()
    collector = Collector(source, adapter, [draw.ids for draw in draws])
    summary = Summary([draw.name for draw in draws], chosen.window_tokens)
    for found in collector.blocks(progress):
        summary.add(found)
    notes += [collector.note] if collector.note else []
    phases = {"sets": drawn - started, "activations": time.perf_counter() - drawn}
    report = Report(
        model=_model(source, adapter),
        run=_run(chosen, phases),
        sets=tuple(draw.row() for draw in draws),
        outliers=summary.outliers(),
        transfer=summary.transfer(),
        notes=tuple(notes),
    )
    return Analysis(source, adapter, chosen, recipe, maker, draws, report, summary.tensors)


def finish(analysis: Analysis, out: Path, started: float) -> Report:
    """Advice and recipe from all sections that `analysis.report` has, and every file written.

    `started` is what `time.perf_counter` told when the job began. Raises OSError where a file cannot be written.
    """
    report = analysis.report
    run = report.run.model_copy(update={"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()})
    report = report.model_copy(update={"advice": advise(report), "recipe_toml": _recipe(analysis), "run": run})
    write_report(report, out, analysis.tensors)
    return report


def _recipe(analysis: Analysis) -> str:
    allocation = analysis.report.allocation
    if allocation is not None and allocation.recipe_toml is not None:
        return allocation.recipe_toml
    return recipe_toml(analysis.recipe or suggested_recipe(analysis.report))


def _budget(name: str) -> Budget:
    if name not in BUDGETS:
        raise PlanError(f"budget {name!r} is unknown{nearest_name(name, list(BUDGETS))}")
    return BUDGETS[name]


def _specs(budget: Budget, sets: Sequence[str] | None, maker: SetMaker) -> tuple[list[SetSpec], list[str]]:
    """The sets to draw, and a note on any that was left out; sets that the user asked for never are."""
    if sets is not None:
        specs = [parse_set(text) for text in sets]
        names = [spec.name for spec in specs]
        if not specs or len(set(names)) < len(names):
            raise PlanError(f"calibration sets {names}: needed at least one, each with a name of its own: NAME=SET")
        return specs, []
    specs, notes = [parse_set(text) for text in budget.sets], []
    needed, available = maker.sampling_bytes(), available_memory_bytes()
    if available is not None and needed > available / 2 and any(spec.kind == "self" for spec in specs):
        specs = [spec for spec in specs if spec.kind != "self"]
        notes.append(
            f"the set self was left out: the float model takes {needed / 1e9:.1f} GB, more than half of the "
            f"{available / 1e9:.1f} GB of memory available; name the set to have it all the same"
        )
    return specs, notes


def _model(source: Source, adapter: Adapter) -> ModelSection:
    names = (
        f"{adapter.block_prefix(b)}{name}.weight" for b in range(block_count(source.config)) for name in adapter.linears
    )
    return ModelSection(
        label=source.label,
        model_type=adapter.model_type,
        fingerprint=source.fingerprint(),
        blocks=block_count(source.config),
        hidden=adapter.shape.hidden,
        weights=sum(math.prod(source.tensors[name].shape) for name in names if name in source.tensors),
    )


def _run(budget: Budget, phases: dict[str, float]) -> RunSection:
    return RunSection(
        bitwright=__about__.__version__,
        torch=torch.__version__,
        transformers=version("transformers"),
        text_python=platform.python_version(),
        budget=budget.name,
        seeds=budget.seeds,
        seconds=sum(phases.values()),
        peak_rss_bytes=peak_rss_bytes(),
        phases=phases,
    )
