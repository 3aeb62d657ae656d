"""`analyze`: calibration sets -> one streaming pass -> sensitivity -> matrix -> advice, recipe and report.

A budget says how far down this line to go: the first pass costs minutes, the matrix quantizes the model many times.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from bitwright import __about__
from bitwright.analyze.advice import advise, suggested_recipe
from bitwright.analyze.allocate import recipe_toml
from bitwright.analyze.choices import parse_choice, parse_recipe
from bitwright.analyze.matrix import MatrixOptions, measure_matrix
from bitwright.analyze.model import MatrixSection, ModelSection, Report, RunSection, SensitivitySection
from bitwright.analyze.outliers import Collector
from bitwright.analyze.report import write_report
from bitwright.analyze.sections import allocation_section, sensitivity_section
from bitwright.analyze.sensitivity import Probes, Run, measure_sensitivity
from bitwright.analyze.sets import CalibrationSet, SetMaker, SetSpec, parse_set
from bitwright.analyze.summary import Summary
from bitwright.analyze.target import TargetResult
from bitwright.checkpoint.finite import check_source
from bitwright.checkpoint.open import open_source
from bitwright.checkpoint.source import Source
from bitwright.errors import PlanError
from bitwright.execute.memory import available_memory_bytes, peak_rss_bytes
from bitwright.models import Adapter, adapter_for, block_count
from bitwright.numeric.settings import Settings, known_name, nearest_name
from bitwright.recipe import Recipe

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""


@dataclass(frozen=True)
class Budget:
    """How much is looked at.

    Attributes:
        windows, window_tokens: of a draw; there is one for each of `seeds` of each of `sets`.
        probes: tensors whose KL is measured, beside the cheap measures of sensitivity; None: no sensitivity at all.
        matrix: recipes of the calibration-sensitivity matrix, as `choices.parse_recipe` reads them; none: no matrix.
        evaluations: sets to measure the matrix on, `evaluation_windows` windows each; none: those of `sets` that have
            a half for evaluation.
    """

    name: str
    windows: int
    window_tokens: int
    seeds: tuple[int, ...]
    sets: tuple[str, ...]
    probes: int | None = None
    matrix: tuple[str, ...] = ()
    evaluations: tuple[str, ...] = ()
    evaluation_windows: int = 8


STATIC = "activations.granularity=tensor"
"""Of activations: one range for a whole tensor, seen while calibrating."""
MATRIX = ("rtn:w4a16g64", "gptq:w4a16g64", "awq:w4a16g64", f"rtn:w8a8:{STATIC}", f"smoothquant:w8a8:{STATIC}")
"""The recipes of the study (arXiv 2405.20835), and the control."""
SENSITIVITY = tuple(f"rtn:w{bits}a16g64" for bits in (2, 3, 4, 8))
_PROBE_WINDOWS = 2
_SETS = ("text", "task", "code", "nonsense", "random", "self")
_HALVES = ("text", "task", "code", "language")
BUDGETS = {
    budget.name: budget
    for budget in (
        Budget("quick", 8, 256, (0,), ("text", "nonsense")),
        Budget("standard", 16, 256, (0, 1, 2), _SETS, probes=0),
        Budget("full", 16, 256, (0, 1, 2), _SETS, probes=48, matrix=MATRIX),
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
    """Look at `model` on calibration sets, as far as the budget goes, and write the report into the folder `out`.

    Args:
        model: a Hugging Face folder, a hub id, a `.gguf` file, or `demo`.
        out: made where it is missing; files of an earlier report are replaced. Keeps the model's own samples, and the
            finished part of a matrix, with which an interrupted run goes on.
        budget: `quick`, `standard`, `full`, or one of your own.
        sets: as `sets.parse_set` reads them; None: those of the budget. Of those, `self` is left out, with a note,
            where the model would take more than half of the memory that is available.
        recipe: what the user means to do; None: one is suggested. Becomes `recipe.toml`.
        progress: told what is being done.

    Raises:
        PlanError: the budget is unknown, or the architecture cannot be run block by block.
        RecipeError: a recipe of the matrix is not understood.
        CheckpointError: the model cannot be read.
        CalibrationError: a set cannot be drawn, an activation is not finite, or the matrix is to be measured on windows
            that it calibrates on.
        OSError: a file cannot be written.
    """
    started = time.perf_counter()
    say = progress or (lambda what, done, total: None)
    chosen = budget if isinstance(budget, Budget) else named_budget(budget)
    recipes = {text.replace(":", " "): parse_recipe(text) for text in chosen.matrix}
    analysis = observe_model(model, Path(out), budget=chosen, sets=sets, recipe=recipe, progress=progress)
    if chosen.probes is not None:
        analysis = _timed(analysis, "sensitivity", partial(_sensitivity, analysis, chosen.probes, say))
    if recipes:
        analysis = _timed(analysis, "matrix", partial(_matrix, analysis, recipes, Path(out), say))
    return finish(analysis, Path(out), started)


def _timed(analysis: Analysis, phase: str, section: Callable[[], Settings]) -> Analysis:
    """With one more section of the report."""
    started = time.perf_counter()
    report = analysis.report.model_copy(update={phase: section()})
    phases = report.run.phases | {phase: time.perf_counter() - started}
    report = report.model_copy(update={"run": report.run.model_copy(update={"phases": phases})})
    return replace(analysis, report=report)


def _sensitivity(analysis: Analysis, probed: int, say: Progress) -> SensitivitySection:
    """Of every linear to the bits of `SENSITIVITY`, on the first draw; probes on the evaluation half of its set."""
    draw, blocks = analysis.draws[0], analysis.report.model.blocks
    steps = count(1)

    def told(what: str) -> None:
        say(what, min(next(steps), 3 * blocks), 3 * blocks)

    probes = Probes(_probe_windows(analysis, draw), probed) if probed else None
    choices = tuple(parse_choice(text) for text in SENSITIVITY)
    found = measure_sensitivity(analysis.source, choices, draw.ids, Run(probes, analysis.recipe, progress=told))
    return sensitivity_section(found, label=draw.name, shape=draw.ids.shape)


def _probe_windows(analysis: Analysis, draw: CalibrationSet) -> Tensor:
    """Windows of the set of `draw` that it does not hold."""
    if draw.spec.kind in _HALVES:
        return analysis.maker.draw(draw.spec, 0, "evaluation").ids[:_PROBE_WINDOWS]
    maker = SetMaker(analysis.source, len(draw.ids) + _PROBE_WINDOWS, draw.ids.shape[1])
    more = maker.draw(draw.spec, draw.seed, "evaluation").ids
    return more[~(more[:, None] == draw.ids[None]).all(-1).any(-1)][:_PROBE_WINDOWS]


def _matrix(analysis: Analysis, recipes: dict[str, Recipe], out: Path, say: Progress) -> MatrixSection:
    budget = analysis.budget
    specs = dict.fromkeys(draw.spec for draw in analysis.draws if draw.spec.kind in _HALVES)
    wanted = [parse_set(text) for text in budget.evaluations] or list(specs) or [parse_set("text")]
    maker = SetMaker(analysis.source, budget.evaluation_windows, budget.window_tokens)
    evaluations = [maker.draw(spec, 0, "evaluation") for spec in wanted]
    options = MatrixOptions(recipes, evaluations, out / "matrix", say)
    return measure_matrix(analysis.source.label, analysis.draws, options)


def observe_model(
    model: str,
    out: Path,
    *,
    budget: Budget,
    sets: Sequence[str] | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """The part of `analyze` before the advice: draws, statistics, and a report that holds them; errors as there."""
    started = time.perf_counter()
    source = open_source(model)
    check_source(source)
    adapter = adapter_for(source.config)
    maker = SetMaker(source, budget.windows, budget.window_tokens, out / "samples")
    specs, notes = _specs(budget, sets, maker)
    if progress is not None:
        progress("calibration sets", 0, block_count(source.config))
    draws = tuple(maker.draw(spec, seed) for spec in specs for seed in budget.seeds)
    drawn = time.perf_counter()
    collector = Collector(source, adapter, [draw.ids for draw in draws])
    summary = Summary([draw.name for draw in draws], budget.window_tokens)
    for found in collector.blocks(progress):
        summary.add(found)
    notes += [collector.note] if collector.note else []
    phases = {"sets": drawn - started, "activations": time.perf_counter() - drawn}
    report = Report(
        model=_model(source, adapter),
        run=_run(budget.name, budget.seeds, phases),
        sets=tuple(draw.row() for draw in draws),
        outliers=summary.outliers(),
        transfer=summary.transfer(),
        notes=tuple(notes),
    )
    return Analysis(source, adapter, budget, recipe, maker, draws, report, summary.tensors)


def finish(analysis: Analysis, out: Path, started: float) -> Report:
    """Advice and recipe from all sections that `analysis.report` has, and every file written.

    `started` is what `time.perf_counter` told when the job began. Raises OSError where a file cannot be written.
    """
    report = analysis.report
    run = report.run.model_copy(update={"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()})
    report = report.model_copy(update={"advice": advise(report), "recipe_toml": _recipe(analysis), "run": run})
    write_report(report, out, analysis.tensors)
    return report


def report_on_target(model: str, reached: TargetResult, out: str | Path) -> Report:
    """Write the report on a target into the folder `out`: what every tensor lost and was given, predicted and measured.

    `model` is what was quantized. Raises OSError where a file cannot be written.
    """
    source, allocation = open_source(model), allocation_section(reached)
    report = Report(
        model=_model(source, adapter_for(source.config)),
        run=_run(f"target {reached.target}", (reached.chosen.recipe.seed,), {}),
        sets=(),
        sensitivity=sensitivity_section(reached.sensitivity),
        allocation=allocation,
        recipe_toml=allocation.recipe_toml or "",
    )
    report = report.model_copy(update={"advice": advise(report)})
    write_report(report, Path(out), {})
    return report


def _recipe(analysis: Analysis) -> str:
    allocation = analysis.report.allocation
    if allocation is not None and allocation.recipe_toml is not None:
        return allocation.recipe_toml
    return recipe_toml(analysis.recipe or suggested_recipe(analysis.report))


def named_budget(name: str) -> Budget:
    """One of `BUDGETS`; PlanError where there is none of that name."""
    found = known_name(name, BUDGETS)
    if found is None:
        raise PlanError(f"budget {name!r} is unknown{nearest_name(name, BUDGETS)}")
    return BUDGETS[found]


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


def _run(budget: str, seeds: tuple[int, ...], phases: dict[str, float]) -> RunSection:
    return RunSection(
        bitwright=__about__.__version__,
        torch=torch.__version__,
        transformers=version("transformers"),
        text_python=platform.python_version(),
        budget=budget,
        seeds=seeds,
        seconds=sum(phases.values()),
        peak_rss_bytes=peak_rss_bytes(),
        phases=phases,
    )
