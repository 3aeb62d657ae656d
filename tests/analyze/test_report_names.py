"""Names of others in a report: no formulas in CSV, no markup in HTML and SVG, no control characters anywhere."""

import csv
from pathlib import Path

import pytest
from test_analyze_report import make_report, whole_report

from bitwright.analyze.model import Report
from bitwright.analyze.report import as_cell, render, write_report

HOSTILE = "=cmd|'/c'!A1</text><script>\x1b[31m\u202e\nx"


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        (" =1", "' =1"),
        ("\t=1", r"\t=1"),
        ("a=1", "a=1"),
        ("a\nb", r"a\nb"),
        (-1.5, -1.5),
        (None, None),
    ],
)
def test_a_text_is_no_formula(value: object, cell: object) -> None:
    assert as_cell(value) == cell


def _named(report: Report) -> Report:
    sets = tuple(row.model_copy(update={"name": HOSTILE, "label": HOSTILE}) for row in report.sets)
    model = report.model.model_copy(update={"label": HOSTILE})
    assert report.sensitivity is not None
    rows = tuple(row.model_copy(update={"module": HOSTILE}) for row in report.sensitivity.rows)
    sensitivity = report.sensitivity.model_copy(update={"rows": rows})
    changes = {"sets": sets, "model": model, "sensitivity": sensitivity, "notes": (HOSTILE,)}
    return report.model_copy(update=changes)


def test_a_report_of_hostile_names(tmp_path: Path) -> None:
    report = _named(whole_report())
    page = render(report)
    assert "<script" not in page
    assert not {"\x1b", "\u202e"} & set(page)
    write_report(report, tmp_path)
    for path in tmp_path.glob("*.csv"):
        with path.open() as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert all(cell.isprintable() and not cell.startswith(("=", "@", "+")) for cell in cells)
    assert "<script" not in repr(make_report()) + report._repr_html_()
