"""The calibration-sensitivity matrix: what the calibration set, and the draw from it, change in the quantized model.

    recipe x calibration set x seed -> quantize -> KL and loss against the float model on every evaluation set

The question of Paglieri et al. (arXiv 2405.20835), asked of one model, with the seed varied too: sets differ only
where their means are further apart than draws of one set. Recipes that need no data are run with every set as well
(one seed): their rows must be equal to the last bit, which checks the whole measurement.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any, get_args

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from bitwright.__about__ import __version__
from bitwright.analyze.model import Interval, MatrixRow, MatrixSection, Measure, VarianceRow
from bitwright.analyze.sets import CalibrationSet
from bitwright.calibration.overlap import fingerprints, overlap
from bitwright.calibration.stream import Stream
from bitwright.calibration.tokens import Calibration
from bitwright.checkpoint.load import load_model
from bitwright.checkpoint.open import open_source
from bitwright.checkpoint.place import Place, private_folder
from bitwright.checkpoint.shard import write_shard, write_text
from bitwright.checkpoint.source import Source
from bitwright.errors import CalibrationError, EvaluationError
from bitwright.evaluate import Windows, compare, paired_interval
from bitwright.evaluate.divergence import Divergence
from bitwright.evaluate.logits import forward_logits
from bitwright.pipeline import RunOptions, quantize
from bitwright.plan import make_plan, rotated_as_asked
from bitwright.recipe import Recipe
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.json_file import read_json

_DRAWS = 100_000
"""Of the F distribution, for its quantiles: right to a percent."""


@dataclass(frozen=True)
class MatrixOptions:
    """What is compared, and on what.

    Attributes:
        recipes: by the name that rows carry; their calibration is replaced by the sets.
        evaluations: draws to measure on, none of whose windows may be among those of calibration.
        folder: finished cells are kept in its `matrix.json`, so that an interrupted run goes on; models that are being
            measured lie there too.
        progress: told what is being done, cells done, and cells in all.
    """

    recipes: Mapping[str, Recipe]
    evaluations: Sequence[CalibrationSet]
    folder: Path
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


@dataclass(frozen=True)
class _Cell:
    name: str
    recipe: Recipe
    draw: CalibrationSet
    data_free: bool


def measure_matrix(model: str, draws: Sequence[CalibrationSet], options: MatrixOptions) -> MatrixSection:
    """Quantize `model` by every recipe with every draw, and measure each result on every evaluation set.

    Args:
        model: as `quantize` takes it. The whole float model, and after it each quantized one, must fit into memory.
        draws: of the calibration sets, at least two seeds of each to tell sets from draws.
        options: recipes and evaluation sets.

    Raises:
        CalibrationError: evaluation windows are among those of calibration.
        RecipeError, PlanError, CheckpointError: a recipe cannot be applied to the model; before any work.
    """
    _check_disjoint(draws, options.evaluations)
    source = open_source(model)
    cells = _cells(source, draws, options.recipes)
    folder = options.folder
    private_folder(folder)
    place = folder / "matrix.json"
    known: dict[str, list[dict[str, Any]]] = kept_cells(place) if place.exists() else {}
    keys = [_key(source, cell, options.evaluations) for cell in cells]
    missing = [number for number, key in enumerate(keys) if key not in known]
    if missing:
        options.progress("the float model", len(cells) - len(missing), len(cells))
        with _Float(model, options.evaluations, folder) as reference:
            for done, number in enumerate(missing, len(cells) - len(missing)):
                cell = cells[number]
                what = f"{cell.name}, {cell.draw.name}, seed {cell.draw.seed}"
                options.progress(what, done, len(cells))
                rows = _measured(model, cell, reference, folder)
                known[keys[number]] = [row.model_dump(mode="json") for row in rows]
                write_text(place, json.dumps(known))
    options.progress("matrix", len(cells), len(cells))
    found = tuple(MatrixRow.model_validate(row) for key in keys for row in known[key])
    windows, tokens = options.evaluations[0].ids.shape
    return MatrixSection(
        protocol=f"gptq:{tokens}",
        windows=windows,
        window_tokens=tokens,
        rows=found,
        variance_ratio=tuple(variance_rows(found)),
        notes=tuple(_uneven(found)),
    )


def kept_cells(place: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of finished cells that an earlier run kept in the file `place`.

    Raises:
        EvaluationError: it is damaged.
    """
    cells = read_json(place, EvaluationError)
    with reading(place, EvaluationError, f"remove {place} to measure anew"):
        TypeAdapter(dict[str, list[MatrixRow]]).validate_python(cells)
    return cells


def _check_disjoint(draws: Sequence[CalibrationSet], evaluations: Sequence[CalibrationSet]) -> None:
    for draw in draws:
        known = fingerprints(draw.ids)
        for evaluation in evaluations:
            if count := overlap(evaluation.ids, known):
                raise CalibrationError(
                    f"{count} windows of calibration set {draw.name!r} are part of evaluation set "
                    f"{evaluation.name!r}; measure on another text: --evaluation-set NAME=OTHER_FILE"
                )


def _cells(source: Source, draws: Sequence[CalibrationSet], recipes: Mapping[str, Recipe]) -> list[_Cell]:
    """Every recipe with every draw; those that see no data with the first draw of each set."""
    cells: list[_Cell] = []
    for name, recipe in recipes.items():
        plan = make_plan(rotated_as_asked(source, recipe), recipe)
        data_free = plan.calibrated_method is None
        firsts = {draw.name: draw for draw in reversed(draws)}
        chosen = [draw for draw in draws if not data_free or firsts[draw.name] is draw]
        cells += [_Cell(name, recipe, draw, data_free) for draw in chosen]
    return cells


def _key(source: Source, cell: _Cell, evaluations: Sequence[CalibrationSet]) -> str:
    """Of all that the rows of a cell depend on."""
    recipe = cell.recipe.model_dump(mode="json")
    parts = [__version__, source.fingerprint(), source.identity(), cell.name, recipe, cell.draw.name, cell.draw.seed]
    parts += [cell.draw.sha256, [[one.name, one.sha256] for one in evaluations]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Float:
    """The float model's logits on every evaluation set, computed once."""

    def __init__(self, model: str, evaluations: Sequence[CalibrationSet], folder: Path):
        self.evaluations = evaluations
        self._streams: dict[str, Stream] = {}
        loaded = load_model(model).model
        for one in evaluations:
            for number, ids in enumerate(one.ids):
                logits = forward_logits(loaded, ids, f"{one.name}, window {number}")
                if one.name not in self._streams:
                    self._streams[one.name] = Stream((*one.ids.shape, logits.shape[-1]), 1, folder=folder)
                self._streams[one.name].write(number, logits[None])

    def __enter__(self) -> _Float:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams.values():
            stream.close()

    def compare(self, model: Any, one: CalibrationSet) -> Divergence:
        """Of `model` to the float model on an evaluation set."""
        logits = iter(self._streams[one.name])

        def reference(_: Tensor) -> Tensor:
            return next(logits)

        return compare(model, reference, Windows(one.ids, f"gptq:{one.ids.shape[1]}", 0, one.ids.numel()))


def _measured(model: str, cell: _Cell, reference: _Float, folder: Path) -> list[MatrixRow]:
    """One quantization, measured on every evaluation set."""
    place = Place(folder / "cell", ".partial")
    try:
        # what a killed run left
        place.clear()
        windows = place.folder / f"{cell.draw.name.replace('/', '-')}-{cell.draw.seed}.safetensors"
        write_shard(windows, {"ids": cell.draw.ids.contiguous()}, {"format": "pt"})
        count, tokens = cell.draw.ids.shape
        calibration = Calibration(text=str(windows), windows=count, window_tokens=tokens)
        recipe = cell.recipe.model_copy(update={"calibration": calibration})
        # A set that leaves channels without a value is part of the answer, not an error.
        quantize(model, place.output, recipe=recipe, options=RunOptions(max_fallbacks=1.0))
        quantized = load_model(str(place.output)).model
        with torch.no_grad():
            return [_row(cell, one.name, reference.compare(quantized, one)) for one in reference.evaluations]
    finally:
        place.remove()


def _row(cell: _Cell, evaluation: str, found: Divergence) -> MatrixRow:
    kl, differences = found.kl.mean(1), found.losses - found.reference_losses
    return MatrixRow(
        recipe=cell.name,
        calibration=cell.draw.name,
        evaluation=evaluation,
        seed=cell.draw.seed,
        kl=float(kl.mean()),
        kl_interval=Interval.of(paired_interval(kl)),
        delta_nll=float(differences.mean()),
        delta_nll_interval=Interval.of(paired_interval(differences)),
        data_free=cell.data_free,
    )


# --- sets against seeds ------------------------------------------------------------------------------------


def variance_rows(rows: Sequence[MatrixRow]) -> list[VarianceRow]:
    """Between sets over between seeds, by recipe, evaluation set and measure, in the order of `rows`.

    One-way analysis of variance with random effects: `between_seeds` is the mean variance within a set,
    `between_sets` what the variance of the sets' means has beyond its share of that, at least 0. The interval of
    their ratio is exact for normal values (Searle, Casella and McCulloch 1992, section 3.6).
    """
    found = []
    for recipe, evaluation in dict.fromkeys((row.recipe, row.evaluation) for row in rows):
        some = [row for row in rows if (row.recipe, row.evaluation) == (recipe, evaluation)]
        for measure in get_args(Measure):
            values: dict[str, list[float]] = {}
            for row in some:
                values.setdefault(row.calibration, []).append(getattr(row, measure))
            found.append(_variance_row(recipe, evaluation, measure, list(values.values())))
    return found


def _variance_row(recipe: str, evaluation: str, measure: Measure, values: list[list[float]]) -> VarianceRow:
    names = {"recipe": recipe, "evaluation": evaluation, "measure": measure}
    every = [value for some in values for value in some]
    if all(value == every[0] for value in every):
        return VarianceRow(**names, between_sets=0.0, between_seeds=0.0, ratio=None, constant=True)
    seeds = min(len(some) for some in values)
    spread = variance([fmean(some) for some in values]) if len(values) > 1 else 0.0
    if seeds < 2:
        return VarianceRow(**names, between_sets=spread, between_seeds=0.0, ratio=None)
    within = fmean(variance(some) for some in values)
    between = max(0.0, spread - within / seeds)
    if within == 0 or len(values) < 2:
        return VarianceRow(**names, between_sets=between, between_seeds=within, ratio=None)
    low, high = _f_quantiles(len(values) - 1, len(values) * (seeds - 1))
    f = seeds * spread / within
    interval = Interval(low=max(0.0, (f / high - 1) / seeds), high=max(0.0, (f / low - 1) / seeds))
    return VarianceRow(**names, between_sets=between, between_seeds=within, ratio=between / within, interval=interval)


def _f_quantiles(between: int, within: int) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of the F distribution, from draws."""
    draws = np.random.default_rng(0).f(between, within, _DRAWS)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _uneven(rows: Sequence[MatrixRow]) -> list[str]:
    """The built-in control: rows of recipes that see no data are equal to the last bit."""
    values: dict[tuple[str, str], set[tuple[float, float]]] = {}
    for row in rows:
        if row.data_free:
            values.setdefault((row.recipe, row.evaluation), set()).add((row.kl, row.delta_nll))
    return [
        f"{recipe} sees no data, but came out differently with different sets on {evaluation}: "
        "do not trust this matrix, and report it"
        for (recipe, evaluation), found in values.items()
        if len(found) > 1
    ]
