"""Targets: choose bits, groups, method and outliers of every layer for a loss, a number of bits or a size; keep it.

    sensitivity of every tensor -> allocation -> quantize -> measure on held-out text -> adjust -> again, until it holds

What is measured is what is promised: perplexity or KL on windows of the calibration text that calibration never saw,
or the bytes of the weight files. A loss that comes out otherwise than predicted rescales the prediction.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bitwright.__about__ import __version__
from bitwright.analyze.allocate import Allocation, Option, allocate, allocated_recipe
from bitwright.analyze.choices import Choice, check_mixable, default_choices
from bitwright.analyze.promise import Target
from bitwright.analyze.rounds import SENSITIVITY, SUFFIX, Rounds, refuse_existing
from bitwright.analyze.sensitivity import Cost, Measure, Probes, Run, Sensitivity, measure_sensitivity, withheld
from bitwright.calibration.sample import sample_from_model
from bitwright.calibration.tokens import TokenWindows, calibration_windows
from bitwright.checkpoint.finite import check_source
from bitwright.checkpoint.load import load_model, load_tokenizer
from bitwright.checkpoint.open import open_source
from bitwright.checkpoint.shard import write_text
from bitwright.errors import PlanError, ResumeError
from bitwright.evaluate import Windows, compare, paired_interval
from bitwright.execute.shown import Shown
from bitwright.pipeline import RunOptions, quantize
from bitwright.plan import Plan, make_plan, rotated_as_asked
from bitwright.recipe import Recipe
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.json_file import read_json

_HEADER_BYTES = 1024
"""Of a weight file for each tensor, at most: names, shapes and offsets of its parts."""
_CLOSE = 0.8
"""A loss that holds and is at least this share of the limit is not adjusted further."""
_STEP = 4.0
"""Largest factor between the predicted losses of two rounds while only one side of the limit is known."""


@dataclass(frozen=True)
class TargetOptions:
    """How a target is pursued.

    Attributes:
        choices: what may be mixed; empty: `choices.DEFAULT_CHOICES`.
        base: seed, calibration and stored types; its method, scheme and rules count for nothing.
        measure: the cheap measure that losses are predicted by.
        rounds: quantizations at most.
        sensitivity_windows: of the calibration windows that sensitivity is measured on, the first so many.
        probes: tensors whose KL is measured, each once while there are as many: that sets the scale of its predictions,
            and all together tell whether to trust them.
        probe_tokens: of each window for that, the first so many.
        probe_windows, held_out_windows: as those of the calibration, none of which it sees.
        together: linears of one input take one choice, which lets the runtime join them to one matrix.
        say: called with what is being done.
    """

    choices: tuple[Choice, ...] = ()
    base: Recipe | None = None
    measure: Measure = "fisher"
    rounds: int = 3
    sensitivity_windows: int = 16
    probes: int = 256
    probe_tokens: int = 256
    probe_windows: int = 2
    held_out_windows: int = 16
    together: bool = False
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Round:
    """One quantization.

    Attributes:
        allocation: what every tensor was given, with the predictions as they were scaled then.
        recipe: that carried it out.
        predicted_kl: of all tensors together, nats per token.
        kl, delta_ln_ppl: measured on the held-out windows.
        delta_interval, kl_interval: 95 %, over windows; None for fewer than 6.
        bits_per_weight, bytes: as written; `bytes` are those of the weight files.
        holds: whether the target is kept.
    """

    allocation: Allocation
    recipe: Recipe
    predicted_kl: float
    kl: float
    delta_ln_ppl: float
    kl_interval: tuple[float, float] | None
    delta_interval: tuple[float, float] | None
    bits_per_weight: float
    bytes: int
    holds: bool

    def value(self, target: Target) -> float:
        """What `target` limits."""
        by_kind = {"perplexity": self.delta_ln_ppl, "kl": self.kl, "bits": self.bits_per_weight, "size": self.bytes}
        return by_kind[target.kind]


@dataclass(frozen=True, repr=False)
class TargetResult(Shown):
    """What became of a target.

    Attributes:
        target: that was asked for.
        met: whether `chosen` keeps it.
        chosen: the round that lies in `out`: the smallest that keeps a loss, the best within bits or bytes, or where
            none keeps the target the nearest to it.
        rounds: all of them, in order.
        sensitivity: that the allocation rests on.
        notes: what else to know, such as why predictions are not to be trusted.
    """

    out: Path
    target: Target
    met: bool
    chosen: Round
    rounds: tuple[Round, ...]
    sensitivity: Sensitivity
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, str]:
        """See `Shown.facts`."""
        return {"out": str(self.out), "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """One sentence: what was promised, whether it holds, and what was predicted and measured."""
        chosen = self.chosen
        found = {
            "perplexity": f"perplexity {math.expm1(chosen.delta_ln_ppl):+.2%}",
            "kl": f"KL {chosen.kl:.4g} nats",
            "bits": f"{chosen.bits_per_weight:.3f} bits per weight",
            "size": f"{chosen.bytes} bytes",
        }[self.target.kind]
        kept = "holds" if self.met else f"cannot be kept in {len(self.rounds)} rounds; the nearest"
        return (
            f"target {self.target}: {kept}: {found} at {chosen.bits_per_weight:.3f} bits per weight, "
            f"{chosen.bytes} bytes; KL {chosen.predicted_kl:.4g} predicted, {chosen.kl:.4g} measured on held-out text"
        )


_DEFAULTS = TargetOptions()


def quantize_to_target(
    model: str,
    out: str | Path,
    target: Target,
    options: TargetOptions = _DEFAULTS,
    run: RunOptions | None = None,
) -> TargetResult:
    """Quantize `model` into the folder `out` so that `target` holds, as well or as small as the choices allow.

    A run that was killed and is started again goes on with the sensitivity and the rounds it had finished.

    Args:
        model: a Hugging Face folder, a hub id, a `.gguf` file, or `demo`.
        out: folder to be made; rounds lie in a folder beside it meanwhile.
        target: see `Target.of`.
        options: choices and effort.
        run: how each quantization is run.

    Raises:
        RecipeError, PlanError: the choices do not go together, cannot be applied to the model, or even the smallest
            are beyond the bits or the size; before any work.
        CalibrationError: the calibration text is too short for held-out windows as well.
        ResumeError: `out` exists, or its unfinished folder belongs to another job.
    """
    out = Path(out)
    refuse_existing(out)
    job = _Job(model, out, target, options, run or RunOptions())
    with Rounds(out) as place:
        sensitivity = job.sensitivity()
        rounds = job.pursue(sensitivity)
        chosen = job.best(rounds)
        place.publish(rounds.index(chosen) + 1)
    doubt = withheld(sensitivity, options.measure)
    notes = (f"predictions are not to be trusted: {doubt}",) if doubt else ()
    return TargetResult(out, target, chosen.holds, chosen, tuple(rounds), sensitivity, notes)


class _Job:
    """One target on its way."""

    def __init__(self, model: str, out: Path, target: Target, options: TargetOptions, run: RunOptions):
        self.model, self.target, self.options, self.run = model, target, options, run
        self.folder = out.with_name(out.name + SUFFIX)
        self.choices = options.choices or default_choices()
        check_mixable(self.choices)
        first = Recipe(method=self.choices[0].method, scheme=self.choices[0].scheme)
        self.base = options.base or first
        self.source = open_source(model)
        check_source(self.source)
        self.budget = self._budget()
        own, held = self._windows()
        self.calibration, self.held_out = own, held[options.probe_windows :]
        self.probes = held[: options.probe_windows, : options.probe_tokens]

    def _plan(self, choice: Choice) -> Plan:
        recipe = self.base.model_copy(update={"method": choice.method, "scheme": choice.scheme, "rules": ()})
        recipe = recipe.model_copy(update={"bits_per_weight": None})
        return make_plan(rotated_as_asked(self.source, recipe), recipe)

    def _budget(self) -> float | None:
        """Bytes for the quantized tensors; None where the loss is the target."""
        if self.target.kind not in ("bits", "size"):
            return None
        plans = [self._plan(choice) for choice in self.choices]
        quantized = [{row.tensor: row for row in plan.rows() if row.action == "quantize"} for plan in plans]
        weights = plans[0].quantized_weights
        kept = sum(row.bytes for row in plans[0].rows() if row.action != "quantize")
        files = kept + _HEADER_BYTES * sum(1 for _ in plans[0].rows())
        budget = self.target.limit * weights / 8 if self.target.kind == "bits" else self.target.limit - files
        least = sum(min(rows[name].bytes for rows in quantized) for name in quantized[0])
        if least > budget:
            needed = f"{8 * least / weights:.3f} bits" if self.target.kind == "bits" else f"{least + files} bytes"
            raise PlanError(
                f"target {self.target}: even the smallest choices need {needed}"
                + ("" if self.target.kind == "bits" else f", {kept} of them for what stays in float")
                + "; ask for more, or give choices of fewer bits"
            )
        return budget

    def _windows(self) -> tuple[TokenWindows, Tensor]:
        """The calibration's windows, exactly those that `quantize` will draw, and others of the same text."""
        settings, seed = self.base.calibration, self.base.seed
        tokenizer = load_tokenizer(self.source) if settings.needs_tokenizer else None
        vocabulary = self.source.config.get("vocab_size")
        draw = partial(calibration_windows, tokenizer=tokenizer, seed=seed, vocabulary=vocabulary)
        if settings.text == "self":
            draw = partial(draw, sample=partial(sample_from_model, load_model(self.model).model))
        extra = self.options.probe_windows + self.options.held_out_windows
        own = draw(settings)
        more = draw(settings.model_copy(update={"windows": settings.windows + extra})).ids
        seen = (more[:, None] == own.ids[None]).all(-1).any(-1)
        return own, more[~seen][:extra]

    def sensitivity(self) -> Sensitivity:
        """Measured, or read where an interrupted run had measured it."""
        ids = self.calibration.ids[: self.options.sensitivity_windows]
        probes = Probes(self.probes, self.options.probes, self.base.seed) if self.options.probes else None
        key = self._key(ids)
        path = self.folder / SENSITIVITY
        if path.exists():
            stored = read_json(path, ResumeError)
            if stored.get("key") != key:
                raise ResumeError(
                    f"{self.folder}: holds the rounds of another target; remove it, or choose another folder"
                )
            with reading(path, ResumeError, f"remove {path} to measure anew"):
                costs = (Cost(**row | {"choice": self.choices[row["choice"]]}) for row in stored["costs"])
                return Sensitivity(tuple(costs))
        found = measure_sensitivity(
            self.source, self.choices, ids, Run(probes, self.base, self.folder, self.options.say)
        )
        numbers = {choice: number for number, choice in enumerate(self.choices)}
        rows = [vars(cost) | {"choice": numbers[cost.choice]} for cost in found.costs]
        write_text(path, json.dumps({"key": key, "costs": rows}))
        return found

    def _key(self, ids: Tensor) -> str:
        """Of all that the sensitivity and the rounds depend on."""
        choices = [[choice.method.model_dump(mode="json"), str(choice.scheme)] for choice in self.choices]
        effort = [self.options.measure, self.options.probes, self.options.together, self.base.model_dump(mode="json")]
        windows = [TokenWindows(some, "").sha256 for some in (ids, self.probes, self.held_out)]
        parts = [__version__, self.source.fingerprint(), str(self.target), choices, effort, windows]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def pursue(self, sensitivity: Sensitivity) -> list[Round]:
        """Rounds until the target holds (and a loss is close), no other allocation is left, or they are used up."""
        table = sensitivity.options(self.options.measure)
        if self.budget is not None:
            return self._within_bytes(table, self.budget)
        return self._within_loss(table)

    def _within_bytes(self, table: dict[str, list[Option]], budget: float) -> list[Round]:
        rounds: list[Round] = []
        while len(rounds) < self.options.rounds:
            try:
                allocation = allocate(table, max_bytes=budget, together=self._together())
            except PlanError:
                if not rounds:
                    raise
                break
            rounds.append(self._round(allocation, len(rounds) + 1))
            if rounds[-1].holds:
                break
            # Outliers are counted only when they are kept: what was written may be more than was expected.
            budget = allocation.bytes * (self.target.limit / rounds[-1].value(self.target)) ** 2
        return rounds

    def _within_loss(self, table: dict[str, list[Option]]) -> list[Round]:
        rounds: list[Round] = []
        holding: list[float] = []  # predicted losses that held, and that did not
        failing: list[float] = []
        best = self._least_loss(table)
        wanted = self.target.limit
        while len(rounds) < self.options.rounds:
            allocation = allocate(table, max_loss=max(wanted, best), together=self._together())
            if any(allocation.picks == known.allocation.picks for known in rounds):
                break
            rounds.append(self._round(allocation, len(rounds) + 1))
            found = rounds[-1].value(self.target)
            (holding if rounds[-1].holds else failing).append(allocation.loss)
            if rounds[-1].holds and found >= _CLOSE * self.target.limit:
                break
            if not rounds[-1].holds and wanted <= best:
                break
            ratio = self.target.limit / found if found > 0 else _STEP
            wanted = next_wanted(allocation.loss * ratio, holding, failing)
        return rounds

    def _least_loss(self, table: dict[str, list[Option]]) -> float:
        every = sum(max(option.bytes for option in rows) for rows in table.values())
        return allocate(table, max_bytes=every, together=self._together()).loss

    def _together(self) -> Sequence[Sequence[str]]:
        if not self.options.together:
            return ()
        plan = self._plan(self.choices[0])
        blocks = {unit.block for unit in plan.units if unit.block is not None}
        prefixes = [plan.adapter.block_prefix(block) for block in sorted(blocks)]
        groups = plan.adapter.shared_inputs
        return [[f"{prefix}{name}.weight" for name in group] for prefix in prefixes for group in groups]

    def _round(self, allocation: Allocation, number: int) -> Round:
        """Quantize and measure."""
        recipe = allocated_recipe(allocation, self.base)
        self.options.say(f"round {number}: quantizing to {allocation.bytes} bytes of codes, scales and outliers")
        folder = self.folder / f"round-{number}"
        summary = quantize(self.model, folder, recipe=recipe, options=self.run)
        self.options.say(f"round {number}: measuring")
        kl, differences = self._measured(folder)
        nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found = Round(
            allocation=allocation,
            recipe=recipe,
            predicted_kl=allocation.loss,
            kl=float(kl.mean()),
            delta_ln_ppl=float(differences.mean()),
            kl_interval=paired_interval(kl),
            delta_interval=paired_interval(differences),
            bits_per_weight=summary.bits_per_weight,
            bytes=nbytes,
            holds=False,
        )
        return replace(found, holds=found.value(self.target) <= self.target.limit)

    def _measured(self, folder: Path) -> tuple[Tensor, Tensor]:
        """Mean KL, and difference of the mean losses, of each held-out window: [windows] each, in nats."""
        windows = Windows(self.held_out, f"held-out:{self.held_out.shape[1]}", 0, self.held_out.numel())
        with torch.no_grad():
            found = compare(load_model(str(folder)).model, load_model(self.model).model, windows)
        return found.kl.mean(1), found.losses - found.reference_losses

    def best(self, rounds: Sequence[Round]) -> Round:
        """Of those that hold the smallest for a loss, the least KL within bits or bytes; else the nearest."""
        holding = [one for one in rounds if one.holds]
        if not holding:
            return min(rounds, key=lambda one: one.value(self.target))
        return min(holding, key=lambda one: one.bytes if self.budget is None else one.kl)


def next_wanted(guess: float, holding: Sequence[float], failing: Sequence[float]) -> float:
    """The predicted loss to try next: `guess`, kept between the largest that held and the smallest that did not."""
    low, high = max(holding, default=None), min(failing, default=None)
    if low is not None and high is not None:
        return guess if low < guess < high else math.sqrt(low * high)
    if low is not None:
        return min(max(guess, low * 1.05), low * _STEP)
    assert high is not None
    return max(min(guess, high * 0.95), high / _STEP)
