"""Sensitivity: what every choice costs at every linear, by measures from cheap to dear.

    weight error -> output error under the inputs' Hessian -> second-order estimate of the loss -> measured KL

The estimate (`fisher`) is in nats per token. With g_t the gradient at a linear's output for token t of the log
likelihood of a token drawn from the model's own answer, and D the change of the linear's weights,

    KL ~ 1/2 mean_t (g_t . D x_t)^2 ~ 1/2 sum_o F_o (D H_w D^T)_oo

to second order, tokens taken to be independent. F_o is the mean of g_to^2, and H_w the mean of x x^T weighed by
|g_t|^2 (of all linears that are given x): outputs matter and tokens matter, in ways that are taken to be unrelated.
(KFAC, Martens and Grosse 2015, has F whole and H unweighed; GuidedQuant, Kim et al. 2025, has H_w and all outputs
alike, which agrees less with measured KL.)

The last rung is climbed for a sample, and Kendall's tau tells how far the cheap ones agree with it. Everything but
the last rung streams, one block in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright.analyze.allocate import Option
from bitwright.analyze.choices import Choice, check_mixable
from bitwright.analyze.fisher import fisher_information
from bitwright.analyze.probe import Prober
from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.hessians import Evidence, HessianPass
from bitwright.checkpoint.source import Source
from bitwright.journey import process_row
from bitwright.method import Method, NoTransform
from bitwright.models import adapter_for
from bitwright.models.adapter import Adapter, block_count
from bitwright.plan import make_plan, rotated_as_asked
from bitwright.ranges import Clip, Mse
from bitwright.recipe import Recipe
from bitwright.rows import Row
from bitwright.transforms.rotate import online_hadamards
from bitwright.walk import decoded_tensors

Measure = Literal["weight_error", "hessian_error", "fisher"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
TAU_NEEDED = 0.4
"""Kendall's tau below which advice is withheld: at 0.4, 7 pairs in 10 are ranked as measured."""
FEWEST_PROBES = 8
"""Below this number tau says nothing."""


@dataclass(frozen=True)
class Cost:
    """What one choice costs at one tensor.

    Attributes:
        tensor: whole name.
        block: that it belongs to.
        weights: their number.
        choice: how it was quantized, on the float model's inputs.
        bytes: stored, outliers as they were kept.
        weight_error: |D|^2 / |W|^2 for the change D of the weights W.
        hessian_error: tr(D H D^T) / tr(W H W^T), H the mean of x x^T.
        fisher: second-order estimate of the loss in nats per token.
        measured_kl: nats per token with this tensor alone quantized; None where it was not measured.
    """

    tensor: str
    block: int
    weights: int
    choice: Choice
    bytes: int
    weight_error: float
    hessian_error: float
    fisher: float
    measured_kl: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Scales, zeros and outliers included."""
        return 8 * self.bytes / self.weights

    @property
    def weight_error_db(self) -> float | None:
        """10 log10 of the weight error; None where the choice is exact."""
        return 10 * math.log10(self.weight_error) if self.weight_error > 0 else None


@dataclass(frozen=True)
class Sensitivity:
    """Every tensor under every choice.

    Attributes:
        costs: by tensor in order of execution, then by choice.
    """

    costs: tuple[Cost, ...]

    @property
    def measured(self) -> tuple[Cost, ...]:
        """Those whose KL was measured."""
        return tuple(cost for cost in self.costs if cost.measured_kl is not None)

    def tau(self, measure: Measure, bits: int | None = None) -> float | None:
        """Kendall's tau-b of `measure` against the measured KL, of all choices together or of those of `bits`.

        None below two rows, or where one of the two does not vary. Over all choices it flatters: more bits cost
        less by any measure. See `tau_within`.
        """
        rows = [cost for cost in self.measured if bits is None or cost.choice.bits == bits]
        return kendall_tau([getattr(cost, measure) for cost in rows], _kl(rows))

    def tau_within(self, measure: Measure) -> float | None:
        """The same over pairs of rows of one choice only: how well tensors are told apart."""
        rows = self.measured
        choices = [cost.choice.label for cost in rows]
        return kendall_tau([getattr(cost, measure) for cost in rows], _kl(rows), choices)

    def scale(self, measure: Measure = "fisher") -> float:
        """What `measure` is multiplied with to be the KL of the measured rows, in the median; 1 without any."""
        ratios = [kl / value for cost in self.measured if (value := getattr(cost, measure)) > 0 and (kl := _one(cost))]
        return float(np.median(ratios)) if ratios else 1.0

    def scales(self, measure: Measure = "fisher") -> dict[str, float]:
        """The same by tensor: of its own measured rows (geometric mean), of all where it has none.

        What `fisher` leaves out is a tensor's own, much the same for every choice (LOG.md: a correlation of 0.93
        between the logarithms of its ratios to KL at 2 and at 4 bits): one measured row corrects the others.
        """
        ratios: dict[str, list[float]] = {}
        for cost in self.measured:
            if (value := getattr(cost, measure)) > 0 and (kl := _one(cost)) > 0:
                ratios.setdefault(cost.tensor, []).append(math.log(kl / value))
        overall = self.scale(measure)
        own = {tensor: math.exp(math.fsum(some) / len(some)) for tensor, some in ratios.items()}
        return {cost.tensor: own.get(cost.tensor, overall) for cost in self.costs}

    def options(self, measure: Measure = "fisher") -> dict[str, list[Option]]:
        """Tensor -> its options for `allocate`: `measure` in the scale of measured KL."""
        scales = self.scales(measure)
        found: dict[str, list[Option]] = {}
        for cost in self.costs:
            loss = scales[cost.tensor] * float(getattr(cost, measure))
            found.setdefault(cost.tensor, []).append(Option(cost.choice, cost.bytes, loss))
        return found


def withheld(sensitivity: Sensitivity, measure: Measure = "fisher", needed: float = TAU_NEEDED) -> str | None:
    """Why advice that rests on `measure` is not given; None where it may be."""
    rows = len(sensitivity.measured)
    if rows < FEWEST_PROBES:
        return f"{rows} measured tensors; needed {FEWEST_PROBES} to tell whether {measure} agrees with measured KL"
    tau = sensitivity.tau_within(measure)
    if tau is None:
        return f"{measure} or the measured KL is the same for all {rows} measured tensors"
    if tau < needed:
        return f"Kendall's tau of {measure} against measured KL is {tau:.2f} over {rows} tensors; needed {needed:g}"
    return None


def kendall_tau(x: Sequence[float], y: Sequence[float], strata: Sequence[str] | None = None) -> float | None:
    """Kendall's tau-b of two sequences of equal length; with `strata`, over the pairs within one of them.

    None where no pair differs in `x`, or none in `y` (Kendall 1945, "The treatment of ties in ranking problems").
    """
    one, other = _signs(x), _signs(y)
    if strata is not None:
        labels = np.array(strata)
        one, other = (np.where(labels[:, None] == labels, signs, 0.0) for signs in (one, other))
    norm = math.sqrt(float(np.abs(one).sum()) * float(np.abs(other).sum()))
    return float((one * other).sum()) / norm if norm else None


def _signs(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.array(values, dtype=np.float64)
    return np.sign(array[:, None] - array)


def _one(cost: Cost) -> float:
    return 0.0 if cost.measured_kl is None else cost.measured_kl


def _kl(rows: Iterable[Cost]) -> list[float]:
    return [_one(cost) for cost in rows]


@dataclass(frozen=True)
class Probes:
    """A sample to be measured: `count` pairs of a tensor and a choice, on windows `ids` int64 [windows, tokens]."""

    ids: Tensor
    count: int = 48
    seed: int = 0

    def chosen(self, rows: Mapping[str, Mapping[Choice, Row]]) -> set[tuple[str, Choice]]:
        """The pairs: tensors at random, under the least, the middle and the largest choice up to 4 bits in turn."""
        tensors = sorted(rows)
        choices = sorted(rows[tensors[0]], key=lambda choice: (rows[tensors[0]][choice].bytes, choice.label))
        low = [choice for choice in choices if choice.bits <= 4] or choices
        spread = list(dict.fromkeys(low[place] for place in (0, len(low) // 2, len(low) - 1)))
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(tensors), generator=generator).tolist()
        places = range(min(self.count, len(tensors) * len(spread)))
        rounds = [divmod(place, len(tensors)) for place in places]
        return {(tensors[order[place]], spread[(place + turn) % len(spread)]) for turn, place in rounds}


@dataclass(frozen=True)
class Run:
    """How to measure.

    Attributes:
        probes: what is measured; None: nothing, and the model is never whole in memory.
        base: seed and type of scales; None: a recipe's own.
        folder: where streams go that are too large for memory.
        progress: called with what is being done.
    """

    probes: Probes | None = None
    base: Recipe | None = None
    folder: Path | None = None
    progress: Callable[[str], None] = lambda _: None


_DEFAULTS = Run()


def measure_sensitivity(source: Source, choices: Sequence[Choice], ids: Tensor, run: Run = _DEFAULTS) -> Sensitivity:
    """What each of `choices` costs at each linear of each block.

    Each linear is quantized by itself on the float model's inputs. Methods that transform or learn blocks first are
    stood for by their range and rounding alone, on the range `mse` where theirs would be learned.

    Args:
        source: of the float weights.
        choices: what to try; one recipe must be able to mix them.
        ids: calibration windows, int64 [windows, tokens].
        run: what to measure besides, and where to work.

    Raises:
        RecipeError, PlanError: the choices do not go together, or cannot be applied to the model.
        CalibrationError: the windows cannot be used.
        WeightError: a tensor holds NaN or infinities.
    """
    rotation = check_mixable(choices)
    source = rotated_as_asked(source, _recipe(choices[0], run.base))
    adapter = adapter_for(source.config)
    rotated = tuple(online_hadamards(adapter, rotation)) if rotation is not None else ()
    rows = _rows(source, adapter, choices, run.base)
    chosen = run.probes.chosen(rows) if run.probes is not None else set()
    runner = BlockRunner(source, adapter, ids, rotated=rotated)
    seed = 0 if run.base is None else run.base.seed
    fisher = fisher_information(runner, seed, run.folder, run.progress)
    costs: list[Cost] = []
    with ExitStack() as stack:
        prober = None
        if run.probes is not None:
            prober = stack.enter_context(Prober(source, adapter, run.probes.ids, rotated, run.folder))
        stream = stack.enter_context(runner.first_inputs(folder=run.folder))
        for index in range(runner.blocks):
            run.progress(f"sensitivity: block {index}")
            block = runner.block(index)
            passes = (HessianPass(runner, some) for some in (None, fisher.tokens))
            uniform, weighed = (one.gather(index, block, stream, adapter.linears) for one in passes)
            for name in adapter.linears:
                tensor = f"{adapter.block_prefix(index)}{name}.weight"
                task = _Task(index, name, tensor, fisher.outputs[(index, name)])
                costs += task.costs(source, rows[tensor], (uniform[name], weighed[name]), prober, chosen)
            if index + 1 < runner.blocks:
                runner.advance(index, block, stream)
                if prober is not None:
                    prober.advance()
    return Sensitivity(tuple(costs))


@dataclass(frozen=True)
class _Task:
    """One linear of one block; `outputs` [out] is what the loss cares about its outputs."""

    block: int
    linear: str
    tensor: str
    outputs: Tensor

    def costs(
        self,
        source: Source,
        rows: Mapping[Choice, Row],
        evidence: tuple[Evidence, Evidence],
        prober: Prober | None,
        chosen: set[tuple[str, Choice]],
    ) -> list[Cost]:
        """The linear under every choice; `evidence` counts tokens alike, then by gradients."""
        stored = source.read(self.tensor)
        weight = stored.float()
        uniform, weighed = evidence
        signal = (float(weight.double().square().sum()), float(squared_outputs(weight, uniform.hessian).sum()))
        found = []
        for choice, row in rows.items():
            assert row.method is not None
            known = weighed if row.method.inputs.weighting == "gradient" else uniform
            record = {"tensor": self.tensor}
            outcome = process_row(row, stored, record, known)
            decoded = decoded_tensors([row], outcome.parts, [outcome.record])[self.tensor]
            change = decoded - weight
            cost = Cost(
                self.tensor,
                self.block,
                row.weights,
                choice,
                int(outcome.record["bytes"]),
                _ratio(float(change.double().square().sum()), signal[0]),
                _ratio(float(squared_outputs(change, uniform.hessian).sum()), signal[1]),
                0.5 * float(self.outputs @ squared_outputs(change, weighed.hessian)),
            )
            if prober is not None and (self.tensor, choice) in chosen:
                cost = replace(cost, measured_kl=prober.kl(self.linear, decoded))
            found.append(cost)
        return found


def squared_outputs(change: Tensor, hessian: Tensor) -> Tensor:
    """The diagonal of D H D^T for `change` D [out, in] and `hessian` H [in, in], float64 [out].

    It is the mean of (D x)^2 for each output, where H is the mean of x x^T.
    """
    return ((change @ hessian) * change).sum(dim=1, dtype=torch.float64).clamp_min(0)


def _ratio(error: float, signal: float) -> float:
    return error / signal if signal else 0.0


def _recipe(choice: Choice, base: Recipe | None) -> Recipe:
    kept = {} if base is None else {"seed": base.seed, "scale_dtype": base.scale_dtype}
    return Recipe.model_validate({"method": _by_itself(choice.method), "scheme": choice.scheme, **kept})


def _by_itself(method: Method) -> Method:
    """`method` without what it does to whole blocks but rotating the model."""
    if not method.prepares:
        return method
    ranging = Mse() if isinstance(method.range, Clip) else method.range
    return method.model_copy(update={"transform": NoTransform(), "learn": None, "range": ranging})


def _rows(
    source: Source, adapter: Adapter, choices: Sequence[Choice], base: Recipe | None
) -> dict[str, dict[Choice, Row]]:
    """Tensor -> choice -> what the plan makes of it."""
    linears = {
        f"{adapter.block_prefix(index)}{name}.weight"
        for index in range(block_count(source.config))
        for name in adapter.linears
    }
    found: dict[str, dict[Choice, Row]] = {}
    for choice in choices:
        for row in make_plan(source, _recipe(choice, base)).rows():
            if row.tensor in linears:
                found.setdefault(row.tensor, {})[choice] = row
    return found
