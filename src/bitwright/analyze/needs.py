"""What an analysis will need, told before it starts: time and memory, and what it is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitwright.analyze.choices import parse_recipe
from bitwright.analyze.run import SENSITIVITY, Budget
from bitwright.analyze.sets import parse_set
from bitwright.checkpoint.open import open_source
from bitwright.checkpoint.source import Source
from bitwright.errors import PlanError
from bitwright.execute.local import default_workers
from bitwright.execute.memory import available_memory_bytes, current_rss_bytes
from bitwright.machine import BLOCK_OVERHEAD, Estimate, estimate, operations_per_second
from bitwright.models import adapter_for, block_count
from bitwright.plan import make_plan, rotated_as_asked

# A backward pass costs two forwards; statistics read every activation a few times, which costs about half a forward.
_STATISTICS, _BACKWARD = 0.5, 2.0
# Of the float model and of a quantized one: loading, beside what its bytes take to read.
_LOAD_SECONDS = 2.0


@dataclass(frozen=True)
class AnalysisNeeds:
    """Seconds and bytes that an analysis will take on this machine, and what it does in that time.

    Attributes:
        seconds, peak_rss_bytes: as `machine.Estimate` has them.
        parts: what is done, each in a few words.
    """

    seconds: float
    peak_rss_bytes: int
    parts: tuple[str, ...]

    def check(self) -> None:
        """Refuse an analysis that would not fit: PlanError tells how much is needed and free."""
        available = available_memory_bytes()
        growth = self.peak_rss_bytes - current_rss_bytes()
        if available is not None and growth > available:
            raise PlanError(
                f"needs about {growth / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free; the budgets quick "
                "and standard without --matrix hold a block at a time, not the model"
            )


def analysis_needs(model: str, budget: Budget, sets: Sequence[str] | None = None) -> AnalysisNeeds:
    """Of `analyze(model, budget=budget, sets=sets)`, from the sizes in the headers and this machine's speed right now.

    Sampling for the set `self` is not counted. Errors as in `analyze`.
    """
    source = open_source(model)
    names = list(dict.fromkeys(parse_set(text).name for text in sets or budget.sets))
    draws, draw_tokens = len(names) * len(budget.seeds), budget.windows * budget.window_tokens
    adapter = adapter_for(source.config)
    linears = [
        math.prod(source.tensors[name].shape)
        for block in range(block_count(source.config))
        for name in (f"{adapter.block_prefix(block)}{linear}.weight" for linear in adapter.linears)
        if name in source.tensors
    ]
    head = math.prod(source.tensors[f"{adapter.embedding}.weight"].shape)
    blocks_pass, whole_pass = 2.0 * BLOCK_OVERHEAD * sum(linears), 2.0 * (BLOCK_OVERHEAD * sum(linears) + head)
    speed = operations_per_second(default_workers())
    seconds = (1 + _STATISTICS) * blocks_pass * draws * draw_tokens / speed
    parts = [f"{draws} draws of {budget.windows} x {budget.window_tokens} tokens"]
    plain = estimate(make_plan(source, parse_recipe(SENSITIVITY[0])))
    peak = plain.peak_rss_bytes
    if budget.probes is not None:
        seconds += (1 + _BACKWARD) * whole_pass * draw_tokens / speed + len(SENSITIVITY) * plain.seconds
        seconds += budget.probes * whole_pass * 2 * budget.window_tokens / speed
        parts.append(f"sensitivity of {len(linears)} linears" + f", {budget.probes} measured" * (budget.probes > 0))
    if budget.matrix:
        cells, needs = _matrix_needs(source, budget, len(names))
        measured = budget.evaluation_windows * budget.window_tokens * max(1, len(budget.evaluations or names))
        seconds += sum(one.seconds for one in needs) + cells * (_LOAD_SECONDS + whole_pass * measured / speed)
        peak = max(peak, *(one.peak_rss_bytes for one in needs))
        parts.append(f"{cells} quantizations for the matrix")
    if budget.matrix or budget.probes:
        peak = max(peak, plain.peak_rss_bytes + 4 * sum(math.prod(info.shape) for info in source.tensors.values()))
    return AnalysisNeeds(seconds, peak, tuple(parts))


def _matrix_needs(source: Source, budget: Budget, sets: int) -> tuple[int, list[Estimate]]:
    """How many quantizations, and what each needs."""
    needs: list[Estimate] = []
    for text in budget.matrix:
        recipe = parse_recipe(text)
        calibration = {"windows": budget.windows, "window_tokens": budget.window_tokens}
        recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=calibration)})
        plan = make_plan(rotated_as_asked(source, recipe), recipe)
        runs = sets * (1 if plan.calibrated_method is None else len(budget.seeds))
        needs += [estimate(plan)] * runs
    return len(needs), needs
