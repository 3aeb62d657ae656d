"""Sections of the report that sensitivity and targets fill."""

from __future__ import annotations

from collections.abc import Sequence

from bitwright.analyze.allocate import recipe_toml
from bitwright.analyze.model import (
    AllocationPoint,
    AllocationRow,
    AllocationSection,
    Interval,
    SensitivityRow,
    SensitivitySection,
    TauRow,
)
from bitwright.analyze.sensitivity import MEASURES, Cost, Measure, Sensitivity, withheld
from bitwright.analyze.target import Round, TargetResult


def sensitivity_section(
    found: Sensitivity, measure: Measure = "fisher", *, label: str | None = None, shape: Sequence[int] | None = None
) -> SensitivitySection:
    """Rows, tau of every measure, and whether advice by `measure` is withheld.

    `label` names the calibration set, `shape` is (windows, tokens) of what was measured on.
    """
    rows = tuple(
        SensitivityRow(
            tensor=cost.tensor,
            block=cost.block,
            bits=cost.choice.bits,
            group_size=cost.choice.group_size,
            method=cost.choice.method.name,
            bits_per_weight=cost.bits_per_weight,
            weights=cost.weights,
            weight_error_db=cost.weight_error_db,
            hessian_error=cost.hessian_error,
            fisher=cost.fisher,
            measured_kl=cost.measured_kl,
        )
        for cost in found.costs
    )
    windows, tokens = (None, None) if shape is None else shape
    taus = tuple(_taus(found)) if found.measured else ()
    reason = withheld(found, measure)
    return SensitivitySection(
        rows=rows, kendall_tau=taus, set=label, windows=windows, window_tokens=tokens, withheld=reason
    )


def _taus(found: Sensitivity) -> list[TauRow]:
    counts: dict[int | None, int] = {None: len(found.measured)}
    for cost in found.measured:
        counts[cost.choice.bits] = counts.get(cost.choice.bits, 0) + 1
    return [
        TauRow(measure=measure, tau=found.tau(measure, bits), rows=rows, bits=bits)
        for measure in MEASURES
        for bits, rows in counts.items()
    ]


def allocation_section(result: TargetResult) -> AllocationSection:
    """What every tensor was given, predicted and measured; the rounds are the points."""
    chosen = result.chosen
    costs = {(cost.tensor, cost.choice): cost for cost in result.sensitivity.costs}
    rows = tuple(
        _row(costs[(tensor, option.choice)], option.loss) for tensor, option in chosen.allocation.picks.items()
    )
    return AllocationSection(
        target=str(result.target),
        met=result.met,
        rows=rows,
        predicted_kl=chosen.predicted_kl,
        measured_kl=chosen.kl,
        measured_kl_interval=Interval.of(chosen.kl_interval),
        bits_per_weight=chosen.bits_per_weight,
        bytes=chosen.bytes,
        points=tuple(_point(f"round {number}", one) for number, one in enumerate(result.rounds, start=1)),
        recipe_toml=recipe_toml(chosen.recipe),
        notes=(result.verdict, *result.notes),
    )


def _row(cost: Cost, predicted: float) -> AllocationRow:
    return AllocationRow(
        tensor=cost.tensor,
        block=cost.block,
        bits=cost.choice.bits,
        group_size=cost.choice.group_size,
        method=cost.choice.method.name,
        outlier_share=cost.choice.outlier_share,
        bits_per_weight=cost.bits_per_weight,
        bytes=cost.bytes,
        weights=cost.weights,
        predicted_kl=predicted,
        measured_kl=cost.measured_kl,
    )


def _point(label: str, one: Round) -> AllocationPoint:
    return AllocationPoint(
        label=label,
        uniform=False,
        bytes=one.bytes,
        bits_per_weight=one.bits_per_weight,
        predicted_kl=one.predicted_kl,
        measured_kl=one.kl,
        measured_kl_interval=Interval.of(one.kl_interval),
    )
