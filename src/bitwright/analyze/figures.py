"""The figures of a report: each section's rows as charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from markupsafe import Markup

from bitwright.analyze.model import (
    AllocationSection,
    MatrixSection,
    OutlierSection,
    SensitivityRow,
    SensitivitySection,
    SiteRow,
    TransferSection,
)
from bitwright.analyze.svg import Axes, Line, Mark, ScaleKind, Table, heat_map, line_chart, number, scatter_chart

_DECADES = 4  # a heat map of errors is shaded over so many
_CELL = (9, 9)
_Loss = Callable[[SensitivityRow], float | None]


class Group(NamedTuple):
    """Charts that are read together, with a caption and the names of the series they share.

    `wide` charts keep their size and scroll; others share the width.
    """

    title: str
    caption: str
    charts: Sequence[Markup]
    legend: Sequence[tuple[int, str]] = ()
    wide: bool = False


def outlier_groups(section: OutlierSection) -> list[Group]:
    """Sizes and kurtosis by block, positions, and the map of channels."""
    sets = list(dict.fromkeys(row.set for row in section.sites))
    legend = list(enumerate(sets))
    groups = [
        Group(
            "Largest activation by block",
            "Largest |x| at positions 1 and on: inputs of linears (named by the first of those that share it), the "
            "residual stream, keys (after RoPE) and values. Logarithmic.",
            _site_charts(section, sets, lambda row: row.rest.absmax, "log"),
            legend,
        ),
        Group(
            "Excess kurtosis by block",
            "Of all values at positions 1 and on: 0 is a Gaussian, 3 a Laplace distribution; hundreds mean that few "
            "values are very large. The axis is linear near 0 and logarithmic beyond.",
            _site_charts(section, sets, lambda row: row.rest.kurtosis, "symlog"),
            legend,
        ),
        Group(
            "Where in the window the largest values are",
            "First: largest |x| in the residual stream over all blocks, by position in the window. Second: position 0 "
            "against all others, by block. Values that are large at position 0 alone act as biases.",
            [_profile_chart(section, sets), _first_chart(section, sets[0])],
            [*legend, (len(sets), f"position 0, {sets[0]}")],
        ),
    ]
    if section.channel_maps:
        groups.append(
            Group(
                "Channels that stand out in the residual stream",
                "Root mean square of a channel over that of the block's median channel, in powers of two, for the "
                f"{len(section.channel_maps[0].channels)} channels that stand out most. Columns in full colour are "
                "outlier channels.",
                [_channel_chart(section, index) for index in range(len(section.channel_maps))],
                wide=True,
            )
        )
    return groups


def transfer_groups(section: TransferSection) -> list[Group]:
    """What static settings of one set do on another."""
    names = list(dict.fromkeys(row.calibration for row in section.rows))
    rows = {(row.calibration, row.evaluation): row for row in section.rows}

    def chart(title: str, value: Callable[[tuple[str, str]], float | None], table: _Shading) -> Markup:
        values = [[value((one, other)) for other in names] for one in names]
        return heat_map(Table(title, names, names, values, *table, corner="calibrated on"))

    clip = _Shading(lambda v: (math.log10(max(v, 1e-7)) + 7) / 5, lambda v: f"{v:.5%}", lambda v: _percent(v))
    plain = _Shading(lambda v: 1 - v, lambda v: f"{v:.3f}", lambda v: f"{v:.2f}")
    return [
        Group(
            "What one set would do to another, without quantizing",
            "Rows are the set that settings come from, columns the set they are used on. Clipped: share of values "
            "beyond a static per-tensor range, at the worst site. Channels: Jaccard index of the largest channels. "
            "Ranks: Spearman's correlation of the diagonals of the Hessians. Both are means over inputs of linears.",
            [
                chart("Clipped at the worst site", lambda pair: rows[pair].worst_clip_rate, clip),
                chart("Same outlier channels", lambda pair: rows[pair].outlier_jaccard, plain),
                chart("Same ranks of channels", lambda pair: rows[pair].hessian_rank_correlation, plain),
            ],
            wide=True,
        )
    ]


def matrix_groups(section: MatrixSection) -> list[Group]:
    """KL by calibration and evaluation set, one chart for each recipe."""
    largest = max((row.kl for row in section.rows), default=0.0) or 1.0
    shading = _Shading(lambda v: max(v, 0.0) / largest, lambda v: f"{v:.5f} nats", number)
    charts = []
    for recipe in dict.fromkeys(row.recipe for row in section.rows):
        rows = [row for row in section.rows if row.recipe == recipe]
        ones = list(dict.fromkeys(row.calibration for row in rows))
        others = list(dict.fromkeys(row.evaluation for row in rows))
        values = [[_mean(r.kl for r in rows if (r.calibration, r.evaluation) == (a, b)) for b in others] for a in ones]
        charts.append(heat_map(Table(recipe, ones, others, values, *shading, corner="calibrated on")))
    return [
        Group(
            "Distance to the float model by calibration and evaluation text",
            "Mean KL in nats per token, mean over seeds. Rows are what the model was calibrated on, columns what it "
            "was measured on. Recipes that need no data have equal rows: a check of the measurement.",
            charts,
            wide=True,
        )
    ]


def sensitivity_groups(section: SensitivitySection) -> list[Group]:
    """Sensitivity by linear and block, and the cheap measures against the measured KL."""
    name, caption, value = _shown_loss(section.rows)
    charts = [
        _tensor_map([row for row in section.rows if row.bits == bits], value, f"{bits} bits: {name}")
        for bits in sorted({row.bits for row in section.rows})
    ]
    caption += " Of several choices with the same bits, the best one. Shaded by powers of ten."
    groups = [Group("What each tensor loses", caption, charts, wide=True)]
    pairs: list[tuple[str, _Loss]] = [
        ("Weight error", _weight_error),
        ("Output error", lambda row: row.hessian_error),
        ("Fisher estimate", lambda row: row.fisher),
    ]
    scatters = [chart for name, cheap in pairs if (chart := _against_measured(section.rows, name, cheap)) is not None]
    if scatters:
        bits = sorted({row.bits for row in section.rows if row.measured_kl is not None})
        groups.append(
            Group(
                "Cheap measures against the measured one",
                "Each point is a tensor at a number of bits. A measure is worth its price where points rise together.",
                scatters,
                [(index, f"{b} bits") for index, b in enumerate(bits)],
            )
        )
    return groups


def allocation_groups(section: AllocationSection) -> list[Group]:
    """Bits by tensor, and size against KL."""
    table = _tensor_table(
        {(row.tensor, row.block): row.bits_per_weight for row in section.rows},
        "Bits per weight",
        _Shading(lambda v: (v - 2) / 6, lambda v: f"{v:.3f} bits per weight", None),
    )
    groups = [Group("Bits by tensor", "Scales, zeros and outliers included.", [heat_map(table, (16, 16))], wide=True)]
    known = [point for point in section.points if point.measured_kl is not None or point.predicted_kl is not None]
    if known:
        marks: list[Mark] = []
        chains: dict[bool, list[int]] = {True: [], False: []}
        for point in sorted(known, key=lambda point: point.bytes):
            for kl, what, ring in ((point.measured_kl, "measured", False), (point.predicted_kl, "predicted", True)):
                if kl is not None:
                    if not ring:
                        chains[point.uniform].append(len(marks))
                    marks.append(Mark(f"{point.label}, {what}", point.bytes / 1e6, kl, int(point.uniform), ring))
        axes = Axes("Size against KL", "weights, MB", "KL, nats", y_scale="log")
        groups.append(
            Group(
                "Size and loss",
                "Filled: measured on the whole model. Rings: predicted. Lower and to the left is better.",
                [scatter_chart(axes, marks, [chain for chain in chains.values() if len(chain) > 1])],
                [(0, "allocated"), (1, "the same bits everywhere")],
            )
        )
    return groups


def _shown_loss(rows: Sequence[SensitivityRow]) -> tuple[str, str, _Loss]:
    """The measure that the maps show: measured KL where half of the rows have it, else the best that is there."""
    if sum(row.measured_kl is not None for row in rows) * 2 >= len(rows):
        caption = "Measured KL in nats per token of the model with that tensor alone quantized."
        return "measured KL", caption, lambda row: row.measured_kl
    if all(row.fisher is not None for row in rows):
        caption = "Loss in nats per token that Fisher information estimates for that tensor alone."
        return "Fisher estimate", caption, lambda row: row.fisher
    if any(row.hessian_error is not None for row in rows):
        caption = "Share of the linear's output energy that quantizing it destroys."
        return "output error", caption, lambda row: row.hessian_error
    caption = "Share of the weight's energy that quantizing it destroys."
    return "weight error", caption, _weight_error


def _weight_error(row: SensitivityRow) -> float | None:
    return None if row.weight_error_db is None else 10 ** (row.weight_error_db / 10)


class _Shading(NamedTuple):
    shade: Callable[[float], float]
    tell: Callable[[float], str]
    write: Callable[[float], str] | None


def _site_charts(
    section: OutlierSection, sets: Sequence[str], value: Callable[[SiteRow], float | None], scale: ScaleKind
) -> list[Markup]:
    charts = []
    for site in dict.fromkeys((row.kind, row.site) for row in section.sites):
        rows = [row for row in section.sites if (row.kind, row.site) == site]
        name = f"input of {site[1]}" if site[0] == "linear_input" else site[1]
        lines = [_by_block(rows, one, value, index) for index, one in enumerate(sets)]
        charts.append(line_chart(Axes(name, "block", y_scale=scale), lines))
    return charts


def _by_block(rows: Sequence[SiteRow], name: str, value: Callable[[SiteRow], float | None], colour: int) -> Line:
    known = {row.block: value(row) for row in rows if row.set == name}
    return Line(name, [known.get(block) for block in range(max(known) + 1)], colour)


def _profile_chart(section: OutlierSection, sets: Sequence[str]) -> Markup:
    names = [
        str(row.start) if row.stop == row.start + 1 else f"{row.start}\u2013{row.stop - 1}"
        for row in section.profiles
        if row.set == sets[0]
    ]
    lines = [
        Line(name, [max(row.absmax) for row in section.profiles if row.set == name], index)
        for index, name in enumerate(sets)
    ]
    return line_chart(Axes("by position", "position", y_scale="log", x_names=names), lines)


def _first_chart(section: OutlierSection, name: str) -> Markup:
    rows = [row for row in section.sites if row.kind == "residual"]
    sets = len({row.set for row in section.sites})
    lines = [
        _by_block(rows, name, lambda row: row.rest.absmax, 0),
        _by_block(rows, name, lambda row: None if row.first is None else row.first.absmax, sets),
    ]
    return line_chart(Axes(f"by block, {name}", "block", y_scale="log"), lines)


def _channel_chart(section: OutlierSection, index: int) -> Markup:
    found = section.channel_maps[index]
    shading = _Shading(lambda v: v / 6, lambda v: f"{2.0**v:.1f} times the median channel", None)
    blocks = [str(block) for block in range(len(found.rows))]
    return heat_map(
        Table(found.set, blocks, [str(c) for c in found.channels], found.rows, *shading, corner="block"), _CELL
    )


def _tensor_map(rows: Sequence[SensitivityRow], value: Callable[[SensitivityRow], float | None], title: str) -> Markup:
    values: dict[tuple[str, int | None], float | None] = {(row.tensor, row.block): None for row in rows}
    for row in rows:
        known = [loss for loss in (values[row.tensor, row.block], value(row)) if loss is not None]
        values[row.tensor, row.block] = min(known, default=None)
    largest = max((v for v in values.values() if v is not None), default=1.0)
    shading = _Shading(
        lambda v: 1 + math.log10(max(v, 1e-300) / max(largest, 1e-300)) / _DECADES, lambda v: f"{v:.3g}", None
    )
    return heat_map(_tensor_table(values, title, shading), (16, 16))


def _tensor_table(
    values: dict[tuple[str, int | None], float] | dict[tuple[str, int | None], float | None],
    title: str,
    shading: _Shading,
) -> Table:
    """Linears by block; tensors outside the blocks are left out."""
    inside = {(_local(tensor, block), block): value for (tensor, block), value in values.items() if block is not None}
    linears = list(dict.fromkeys(name for name, _ in inside))
    blocks = sorted({block for _, block in inside})
    cells = [[inside.get((name, block)) for block in blocks] for name in linears]
    return Table(title, linears, [str(block) for block in blocks], cells, *shading, corner="block")


def _local(tensor: str, block: int) -> str:
    """`model.layers.3.mlp.down_proj.weight` -> `mlp.down_proj`."""
    return tensor.removesuffix(".weight").partition(f".{block}.")[2] or tensor


def _against_measured(
    rows: Sequence[SensitivityRow], name: str, cheap: Callable[[SensitivityRow], float | None]
) -> Markup | None:
    bits = sorted({row.bits for row in rows if row.measured_kl is not None})
    marks = [
        Mark(f"{row.tensor}, {row.bits} bits", value, row.measured_kl, bits.index(row.bits))
        for row in rows
        if row.measured_kl is not None and (value := cheap(row)) is not None
    ]
    if len(marks) < 2:
        return None
    return scatter_chart(Axes(name, name.lower(), "measured KL, nats", "log", "log"), marks)


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _percent(share: float) -> str:
    return "0" if share == 0 else f"{share:.1%}" if share >= 0.001 else f"{share * 1e6:.0f} ppm"
