"""Charts as inline SVG, in the colours of the page that they stand in.

Nothing here has a colour of its own: marks have classes (`s0` to `s7`, `cell`, `grid`) that the page's style sheet
paints, light or dark. Every mark has a `<title>`, which browsers show as a tooltip. Numbers become positions with
one decimal, so that the same data give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from bitwright.execute.shown import visible

SERIES = 8
"""Series with a colour of their own; more begin again."""
ScaleKind = Literal["linear", "log", "symlog"]
_WIDTH, _HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 26, 32
_CHARACTER = 6.2  # width of one, at the page's 11 px


@dataclass(frozen=True)
class Line:
    """A series: y for x = 0, 1, 2, ...; None leaves a gap. `colour` is the number of the series."""

    label: str
    values: Sequence[float | None]
    colour: int


@dataclass(frozen=True)
class Mark:
    """A point of a scatter chart; `ring` draws it hollow."""

    label: str
    x: float
    y: float
    colour: int
    ring: bool = False


@dataclass(frozen=True)
class Axes:
    """Title and axes of a chart. `x_names` replaces the numbers of a line chart's x."""

    title: str
    x: str
    y: str = ""
    y_scale: ScaleKind = "linear"
    x_scale: ScaleKind = "linear"
    x_names: Sequence[str] = ()


@dataclass(frozen=True)
class _Scale:
    kind: ScaleKind
    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        low, high, at = (_warp(v, self.kind) for v in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + (self.stop - self.start) * share

    def ticks(self) -> list[float]:
        if self.kind == "linear":
            return _linear_ticks(self.low, self.high)
        largest = max(abs(self.low), abs(self.high), 1e-300)
        first = math.floor(math.log10(self.low)) if self.kind == "log" else 0
        decades = list(range(first, math.floor(math.log10(largest)) + 1))
        factors = (1, 2, 5) if len(decades) <= 2 else (1,)
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        if self.kind == "symlog":
            found = [0.0, *found]
        found = [value for value in found if self.low <= value <= self.high]
        return found[:: max(1, math.ceil(len(found) / 6))]


def line_chart(axes: Axes, lines: Sequence[Line]) -> Markup:
    """Lines over a common x of whole numbers."""
    values = [v for line in lines for v in line.values if v is not None]
    count = max((len(line.values) for line in lines), default=1)
    x = _Scale("linear", 0, max(count - 1, 1), _LEFT, _WIDTH - _RIGHT)
    y = _y_scale(values, axes.y_scale)
    body = [_frame(axes, y), _x_names(axes, x, count)]
    for line in lines:
        places = [None if v is None else (x.place(i), y.place(_inside(v, y))) for i, v in enumerate(line.values)]
        body.append(_path(places, line))
        body += [
            _dot(place, line.colour, f"{line.label}, {axes.x} {_x_name(axes, i)}: {number(value)}", small=True)
            for i, (place, value) in enumerate(zip(places, line.values, strict=True))
            if place is not None and value is not None
        ]
    return _svg(axes.title, _WIDTH, _HEIGHT, body)


def scatter_chart(axes: Axes, marks: Sequence[Mark], joined: Sequence[Sequence[int]] = ()) -> Markup:
    """Points; `joined` lists marks, by number, that a line connects."""
    x_values, y_values = [mark.x for mark in marks], [mark.y for mark in marks]
    low, high = _bounds(x_values, axes.x_scale)
    x = _Scale(axes.x_scale, low, high, _LEFT + 6, _WIDTH - _RIGHT - 6)
    y = _y_scale(y_values, axes.y_scale)
    body = [_frame(axes, y)]
    for tick in x.ticks():
        body.append(_text(x.place(tick), _HEIGHT - _BOTTOM + 14, _tick(tick), "middle"))
    places = [(x.place(_inside(mark.x, x)), y.place(_inside(mark.y, y))) for mark in marks]
    for chain in joined:
        body.append(_path([places[index] for index in chain], Line("", (), marks[chain[0]].colour)))
    for mark, place in zip(marks, places, strict=True):
        body.append(_dot(place, mark.colour, f"{mark.label}: {number(mark.x)}, {number(mark.y)}", ring=mark.ring))
    return _svg(axes.title, _WIDTH, _HEIGHT, body)


@dataclass(frozen=True)
class Table:
    """A heat map's content: `values[row][column]`, None for an empty cell.

    `shade` turns a value into 0 (blank) to 1 (full colour). `write` gives the text in a cell, None for cells too small
    to write in; `tell` that of the tooltip.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    shade: Callable[[float], float]
    tell: Callable[[float], str]
    write: Callable[[float], str] | None = None
    corner: str = ""


def heat_map(table: Table, cell: tuple[int, int] | None = None) -> Markup:
    """A table of shaded cells, `cell` wide and high; by default as the text needs it."""
    width, height = cell or (64, 26)
    left = int(max([len(row) for row in table.rows] + [len(table.corner)], default=0) * _CHARACTER) + 12
    slanted = any(len(column) * _CHARACTER > width for column in table.columns)
    head = int(max((len(column) for column in table.columns), default=0) * _CHARACTER * 0.75) + 14 if slanted else 20
    top = head + 22
    body = []
    every = max(1, math.ceil(11 / width)) if not slanted else max(1, math.ceil(12 / width))
    for number_, column in enumerate(table.columns):
        if number_ % every == 0:
            at = left + (number_ + 0.5) * width
            body.append(_slanted(at, top - 5, column) if slanted else _text(at, top - 6, column, "middle"))
    body.append(_text(left - 6, top - 6, table.corner, "end", "axis"))
    skip = max(1, math.ceil(11 / height))
    for row_number, (row, values) in enumerate(zip(table.rows, table.values, strict=True)):
        y = top + row_number * height
        if row_number % skip == 0:
            body.append(_text(left - 6, y + height / 2 + 4, row, "end"))
        for number_, (column, value) in enumerate(zip(table.columns, values, strict=True)):
            body.append(_cell(table, (left + number_ * width, y, width, height), f"{row}, {column}", value))
    right = int(head * 0.8) if slanted else 8
    return _svg(
        table.title, left + width * len(table.columns) + right, top + height * len(table.rows) + 6, body, natural=True
    )


def number(value: float) -> str:
    """Three significant digits, as people write them."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 100:
        return f"{value:,.0f}".replace(",", "\u202f") if size >= 10_000 else f"{value:.0f}"
    return f"{value:.3g}"


def _tick(value: float) -> str:
    return number(value) if abs(value) < 1e5 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def _svg(title: str, width: float, height: float, body: Sequence[Markup], natural: bool = False) -> Markup:
    size = Markup(' style="width:{}px"').format(int(width)) if natural else Markup("")
    heading = Markup('<text class="title" x="{}" y="14">{}</text>').format(4 if natural else _LEFT - 40, title)
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"{}>{}{}</svg>').format(
        int(width), int(height), title, size, heading, Markup("").join(body)
    )


def _frame(axes: Axes, y: _Scale) -> Markup:
    """Grid lines with their numbers, and the names of the axes."""
    parts = []
    for tick in y.ticks():
        at = _px(y.place(tick))
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, at, at)
        )
        parts.append(_text(_LEFT - 5, float(at) + 4, _tick(tick), "end"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 3, axes.x, "middle", "axis"))
    if axes.y:
        parts.append(_text(_WIDTH - _RIGHT, 14, axes.y, "end", "axis"))
    return Markup("").join(parts)


def _x_names(axes: Axes, x: _Scale, count: int) -> Markup:
    step = max(1, math.ceil(count / (8 if axes.x_names else 7)))
    if not axes.x_names and step > 2:
        step = math.ceil(step / 5) * 5
    marks = range(0, count, step)
    return Markup("").join(_text(x.place(i), _HEIGHT - _BOTTOM + 14, _x_name(axes, i), "middle") for i in marks)


def _x_name(axes: Axes, index: int) -> str:
    return axes.x_names[index] if index < len(axes.x_names) else str(index)


def _y_scale(values: Sequence[float], kind: ScaleKind) -> _Scale:
    low, high = _bounds(values, kind)
    return _Scale(kind, low, high, _HEIGHT - _BOTTOM, _TOP)


def _bounds(values: Sequence[float], kind: ScaleKind) -> tuple[float, float]:
    kept = [value for value in values if kind != "log" or value > 0]
    if not kept:
        return (0.1, 1.0) if kind == "log" else (0.0, 1.0)
    low, high = min(kept), max(kept)
    if kind == "log":
        return low / 1.15, high * 1.15
    if kind == "symlog":
        return min(low, 0.0), max(high, 1.0)
    room = 0.06 * (high - low) or 0.5
    return (0.0 if 0 <= low < 0.4 * high else low - room), high + room


def _inside(value: float, scale: _Scale) -> float:
    """`value` where the scale has a place for it: a log scale has none for zero."""
    return max(value, scale.low)


def _warp(value: float, kind: ScaleKind) -> float:
    if kind == "log":
        return math.log10(max(value, 1e-300))
    return math.asinh(value) if kind == "symlog" else value


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _path(places: Sequence[tuple[float, float] | None], line: Line) -> Markup:
    steps, pen = [], "M"
    for place in places:
        if place is None:
            pen = "M"
            continue
        steps.append(f"{pen}{_px(place[0])} {_px(place[1])}")
        pen = "L"
    return Markup('<path class="line s{}" d="{}"/>').format(line.colour % SERIES, "".join(steps))


def _dot(place: tuple[float, float], colour: int, tip: str, ring: bool = False, small: bool = False) -> Markup:
    kind = "ring" if ring else "dot"
    return Markup('<circle class="{} s{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
        kind, colour % SERIES, _px(place[0]), _px(place[1]), "2" if small else "4", tip
    )


def _cell(table: Table, box: tuple[float, float, float, float], where: str, value: float | None) -> Markup:
    x, y, width, height = box
    shape = Markup('x="{}" y="{}" width="{}" height="{}"').format(x, y, width - 1, height - 1)
    if value is None:
        return Markup('<rect class="empty" {}><title>{}: none</title></rect>').format(shape, where)
    share = min(max(table.shade(value), 0.0), 1.0)
    drawn = Markup('<rect class="cell" {} style="fill-opacity:{}"><title>{}: {}</title></rect>').format(
        shape, f"{share:.2f}", where, table.tell(value)
    )
    if table.write is None:
        return drawn
    strong = "on" if share > 0.6 else "in"
    return drawn + _text(x + (width - 1) / 2, y + height / 2 + 4, table.write(value), "middle", strong)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    name = Markup(' class="{}"').format(kind) if kind else Markup("")
    return Markup('<text{} x="{}" y="{}" text-anchor="{}">{}</text>').format(name, _px(x), _px(y), anchor, text)


def _slanted(x: float, y: float, text: str) -> Markup:
    turn = f"translate({_px(x)} {_px(y)}) rotate(-45)"
    return Markup('<text transform="{}">{}</text>').format(turn, escape(visible(text)))


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
