"""The report as files: one page that needs nothing else, versioned JSON, tables as CSV, and the recipe.

out/report.html    one file without links or scripts; figures are inline SVG
out/report.json    the whole report (see `model.Report`); `read_report` reads it back
out/recipe.toml    for `bitwright plan --recipe` and `bitwright quantize --recipe`
out/*.csv          one table for each list of rows
out/statistics.safetensors   mean square and absmax of every channel at every site
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError
from torch import Tensor

from bitwright.analyze import figures
from bitwright.analyze.model import Report, SiteRow
from bitwright.analyze.svg import number
from bitwright.analyze.thresholds import metrics
from bitwright.checkpoint.shard import write_shard, write_text
from bitwright.errors import EvaluationError
from bitwright.execute.shown import visible
from bitwright.numeric.settings import Settings, explain
from bitwright.untrusted.json_file import read_json

TILES = {
    "int8_channels": "outlier channels by LLM.int8's rule",
    "channel_kurtosis": "kurtosis of channels, worst input of a linear",
    "max_median": "max / median, worst input of a linear",
    "first_token_ratio": "position 0 over all others, residual stream",
    "clip_rate": "clipped by a static range of another set, worst",
    "kl": "worst KL of the matrix, nats",
    "variance_ratio": "variance between sets over seeds, worst",
    "allocated_kl": "KL of the allocated model, nats",
}
"""Figures at the top of the page, by metric."""
_WORST_SITES = 12
# What a cell of a formula begins with.
_FORMULAS = ("=", "+", "-", "@")


def write_report(report: Report, out: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write all files of `report` into the folder `out`, which is made where it is missing; others are left alone.

    Raises:
        OSError: a file cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    if tensors:
        write_shard(out / "statistics.safetensors", tensors, {"format": "pt"})
    for name, rows in tables(report).items():
        write_text(out / f"{name}.csv", _csv(rows))
    if report.recipe_toml:
        write_text(out / "recipe.toml", report.recipe_toml)
    write_text(out / "report.html", render(report))
    write_text(out / "report.json", report.model_dump_json(indent=1) + "\n")


def read_report(path: Path) -> Report:
    """The report that `write_report` wrote to `path`, a `report.json`.

    Raises:
        EvaluationError: the file cannot be read, or is no report of this version.
    """
    content = read_json(path, EvaluationError, "needed the report.json of an analysis")
    version = content.get("version")
    if version != 1:
        raise EvaluationError(f"{path}: report version {version!r}; this bitwright reads 1; run the analysis again")
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        raise EvaluationError(f"{path}: {explain(error, Report)}") from error


def render(report: Report) -> str:
    """The page as one HTML file: no scripts, nothing fetched, light or dark as the reader's system is."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else _shown(value),
    )
    environment.filters["number"] = number
    template = resources.files("bitwright.analyze") / "report.html.j2"
    found = metrics(report)
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        report=report,
        style=Markup((resources.files("bitwright.analyze") / "report.css").read_text(encoding="utf-8")),
        tiles=[(label, found[name]) for name, label in TILES.items() if name in found],
        sections=_sections(report),
        worst=_worst_sites(report),
    )


def _shown(text: str) -> str:
    return visible(text, keep="\n")


def tables(report: Report) -> dict[str, Sequence[Settings]]:
    """Rows by the name of their CSV file; sections that are not there have none."""
    outliers, transfer, matrix = report.outliers, report.transfer, report.matrix
    found: dict[str, Sequence[Settings]] = {
        "sets": report.sets,
        "sites": outliers.sites if outliers else (),
        "outlier_channels": outliers.int8_channels if outliers else (),
        "massive_activations": outliers.massive if outliers else (),
        "transfer": transfer.rows if transfer else (),
        "matrix": matrix.rows if matrix else (),
        "variance": matrix.variance_ratio if matrix else (),
        "sensitivity": report.sensitivity.rows if report.sensitivity else (),
        "kendall_tau": report.sensitivity.kendall_tau if report.sensitivity else (),
        "allocation": report.allocation.rows if report.allocation else (),
        "allocation_points": report.allocation.points if report.allocation else (),
    }
    return {name: rows for name, rows in found.items() if rows}


def _sections(report: Report) -> list[tuple[str, list[figures.Group]]]:
    found = []
    if report.allocation:
        found.append(("Allocation", figures.allocation_groups(report.allocation)))
    if report.matrix:
        found.append(("Calibration sets", figures.matrix_groups(report.matrix)))
    if report.sensitivity:
        found.append(("Sensitivity", figures.sensitivity_groups(report.sensitivity)))
    if report.outliers and report.outliers.sites:
        found.append(("Activations", figures.outlier_groups(report.outliers)))
    if report.transfer:
        found.append(("From set to set", figures.transfer_groups(report.transfer)))
    return found


def _worst_sites(report: Report) -> list[SiteRow]:
    """Sites by max/median, each with the set where it is largest; not the residual stream, which is not quantized."""
    rows = [row for row in report.outliers.sites if row.kind != "residual"] if report.outliers else []
    worst: dict[tuple[int, str], SiteRow] = {}
    for row in sorted(rows, key=lambda row: -(row.rest.max_median or 0.0)):
        worst.setdefault((row.block, row.site), row)
    return list(worst.values())[:_WORST_SITES]


def _csv(rows: Sequence[Settings]) -> str:
    """One line for each row; nested fields are joined by dots, lists by semicolons, and lists of tables left out."""
    flat = [_flat(row.model_dump(mode="json")) for row in rows]
    columns = dict.fromkeys(column for row in flat for column in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: as_cell(value) for column, value in row.items()} for row in flat)
    return text.getvalue()


def as_cell(value: Any) -> Any:
    """`value` as a cell of CSV: a text stays one in programs that would run what begins like a formula.

    Such a text gets an apostrophe in front, as spreadsheets themselves write it.
    """
    if not isinstance(value, str):
        return value
    found = visible(value)
    return f"'{found}" if found.lstrip().startswith(_FORMULAS) else found


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            if not any(isinstance(item, dict) for item in value):
                found[prefix + key] = ";".join(map(str, value))
        else:
            found[prefix + key] = value
    return found
