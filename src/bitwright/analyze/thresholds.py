"""Figures of merit of a report, and limits on them for continuous integration.

limits = [parse_limit("max_median=500")]
for breach in breaches(report, limits): ...      # none: exit status 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bitwright.analyze.model import Report, SiteRow
from bitwright.errors import EvaluationError
from bitwright.numeric.settings import nearest_name


@dataclass(frozen=True)
class Figure:
    """One number of a report: the largest `value` over what was measured, and `where` that is."""

    value: float
    where: str


@dataclass(frozen=True)
class Limit:
    """`metric` must not be above `value`."""

    metric: str
    value: float


@dataclass(frozen=True)
class Breach:
    """A limit that a report does not keep."""

    limit: Limit
    found: Figure

    def __str__(self) -> str:
        """One line for people."""
        limit = self.limit
        return f"{limit.metric} is {self.found.value:.6g} ({self.found.where}), above the limit {limit.value:g}"


def parse_limit(text: str) -> Limit:
    """The limit that `METRIC=NUMBER` spells.

    Raises:
        EvaluationError: the metric is unknown or the number is none.
    """
    metric, _, number = text.partition("=")
    if metric not in METRICS:
        raise EvaluationError(f"limit {text!r}: no metric {metric!r}{nearest_name(metric, list(METRICS))}")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if value != value:
        raise EvaluationError(f"limit {text!r}: {number!r} is not a number; needed METRIC=NUMBER, as {metric}=100")
    return Limit(metric, value)


def breaches(report: Report, limits: Iterable[Limit]) -> tuple[Breach, ...]:
    """The limits that `report` does not keep, in their order.

    Raises:
        EvaluationError: a limit is on something that the report did not measure, which is no pass.
    """
    found = []
    for limit in limits:
        figure = METRICS[limit.metric](report)
        if figure is None:
            raise EvaluationError(
                f"limit {limit.metric}={limit.value:g}: this analysis did not measure it; give a larger budget or more "
                "calibration sets, or drop the limit"
            )
        if figure.value > limit.value:
            found.append(Breach(limit, figure))
    return tuple(found)


def metrics(report: Report) -> dict[str, Figure]:
    """Every figure that the report has, by name."""
    found = {name: figure(report) for name, figure in METRICS.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def largest(pairs: Iterable[tuple[float | None, str]]) -> Figure | None:
    """The pair with the largest number; None where no pair has one."""
    known = [(value, where) for value, where in pairs if value is not None]
    return Figure(*max(known, key=lambda pair: pair[0])) if known else None


def _of_inputs(value: Callable[[SiteRow], float | None]) -> Callable[[Report], Figure | None]:
    def figure(report: Report) -> Figure | None:
        rows: Sequence[SiteRow] = report.outliers.sites if report.outliers else ()
        return largest((value(row), where(row)) for row in rows if row.kind == "linear_input")

    return figure


def where(row: SiteRow) -> str:
    """A site and its set, in words."""
    return f"{row.site} of block {row.block}, set {row.set}"


def _first_ratio(report: Report) -> Figure | None:
    rows = [row for row in report.outliers.sites if row.kind == "residual"] if report.outliers else []
    pairs = (
        (row.first.absmax / row.rest.absmax, f"block {row.block}, set {row.set}")
        for row in rows
        if row.first is not None and row.rest.absmax > 0
    )
    return largest(pairs)


def _int8_channels(report: Report) -> Figure | None:
    if report.outliers is None:
        return None
    names = dict.fromkeys(row.name for row in report.sets)
    counts = {name: sum(row.set == name for row in report.outliers.int8_channels) for name in names}
    return largest((float(count), f"set {name}") for name, count in counts.items())


def _massive(report: Report) -> Figure | None:
    if report.outliers is None:
        return None
    channels = {row.channel for row in report.outliers.massive}
    listed = ", ".join(str(channel) for channel in sorted(channels)[:8])
    return Figure(float(len(channels)), f"channels {listed}" if channels else "none in any set")


def _clip_rate(report: Report) -> Figure | None:
    rows = report.transfer.rows if report.transfer else ()
    return largest(
        (row.worst_clip_rate, f"{row.worst_site}, range of {row.calibration} on {row.evaluation}") for row in rows
    )


def _matrix_kl(report: Report) -> Figure | None:
    rows = report.matrix.rows if report.matrix else ()
    return largest((row.kl, f"{row.recipe}, {row.calibration} on {row.evaluation}, seed {row.seed}") for row in rows)


def _delta_nll(report: Report) -> Figure | None:
    rows = report.matrix.rows if report.matrix else ()
    return largest(
        (row.delta_nll, f"{row.recipe}, {row.calibration} on {row.evaluation}, seed {row.seed}") for row in rows
    )


def _variance_ratio(report: Report) -> Figure | None:
    rows = report.matrix.variance_ratio if report.matrix else ()
    return largest((row.ratio, f"{row.recipe} on {row.evaluation}, {row.measure}") for row in rows)


def _allocated_kl(report: Report) -> Figure | None:
    found = report.allocation
    return None if found is None or found.measured_kl is None else Figure(found.measured_kl, f"target {found.target}")


METRICS: dict[str, Callable[[Report], Figure | None]] = {
    "absmax": _of_inputs(lambda row: row.rest.absmax),
    "max_median": _of_inputs(lambda row: row.rest.max_median),
    "kurtosis": _of_inputs(lambda row: row.rest.kurtosis),
    "channel_kurtosis": _of_inputs(lambda row: row.rest.channel_kurtosis),
    "int8_channels": _int8_channels,
    "massive": _massive,
    "first_token_ratio": _first_ratio,
    "clip_rate": _clip_rate,
    "kl": _matrix_kl,
    "delta_nll": _delta_nll,
    "variance_ratio": _variance_ratio,
    "allocated_kl": _allocated_kl,
}
"""What can be limited. Sizes are those of inputs of linears at positions 1 and on, the worst over blocks and sets."""
