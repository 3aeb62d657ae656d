"""The report's files: complete, self-contained, readable back; advice with evidence; limits; charts."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess

import pytest

from bitwright.analyze.advice import advise, has_heavy_channels, suggested_recipe
from bitwright.analyze.model import (
    AllocationPoint,
    AllocationRow,
    AllocationSection,
    ChannelMap,
    Interval,
    MassiveActivation,
    MatrixRow,
    MatrixSection,
    ModelSection,
    OutlierChannel,
    OutlierSection,
    ProfileRow,
    Report,
    RunSection,
    SensitivityRow,
    SensitivitySection,
    SetRow,
    SiteRow,
    Spread,
    TauRow,
    TopChannel,
    TransferRow,
    TransferSection,
    VarianceRow,
)
from bitwright.analyze.report import read_report, render, tables, write_report
from bitwright.analyze.svg import Axes, Line, Mark, Table, heat_map, line_chart, number, scatter_chart
from bitwright.analyze.thresholds import METRICS, Limit, breaches, metrics, parse_limit
from bitwright.errors import EvaluationError

SETS = ("text", "nonsense")
LINEARS = ("self_attn.q_proj", "mlp.down_proj")


def spread(absmax: float, median: float = 0.5, kurtosis: float | None = 4.0) -> Spread:
    ratio = absmax / median if median else None
    return Spread(
        tokens=62,
        absmax=absmax,
        p999=absmax / 2,
        median=median,
        max_median=ratio,
        kurtosis=kurtosis,
        channel_kurtosis=2.0,
    )


def site(name: str, block: int, kind: str, where: str, absmax: float) -> SiteRow:
    top = TopChannel(channel=3, persistence=0.9, absmax=absmax, rms=1.0, rms_ratio=2.0)
    return SiteRow(
        set=name,
        block=block,
        kind=kind,
        site=where,
        channels=32,
        first=spread(2 * absmax),
        rest=spread(absmax, median=0.0 if where == "values" else 0.5),
        absmax_by_seed=(absmax, absmax / 2),
        top=(top,),
    )


def outlier_section(heavy: bool = False) -> OutlierSection:
    kinds = [("linear_input", name) for name in LINEARS] + [("keys", "keys"), ("values", "values")]
    rows = [site(s, b, kind, name, 1.0 + b) for s in SETS for b in range(3) for kind, name in kinds]
    rows += [site(s, b, "residual", "residual", 10.0) for s in SETS for b in range(4)]
    return OutlierSection(
        sites=tuple(rows),
        profiles=tuple(
            ProfileRow(set=s, start=i, stop=i + 1, absmax=(1.0, 2.0, 9.0, 4.0)) for s in SETS for i in range(3)
        ),
        channel_maps=tuple(ChannelMap(set=s, site="residual", channels=(3, 8), rows=((0.0, -1.0),) * 4) for s in SETS),
        int8_channels=(OutlierChannel(set="text", channel=3, block_share=1.0, token_share=0.9, absmax=50.0),) * heavy,
        massive=(MassiveActivation(set="text", block=1, channel=3, absmax=900.0, median=0.4, first_position=True),)
        * heavy,
    )


def transfer_section(clipped: float = 0.0) -> TransferSection:
    rows = [
        TransferRow(
            calibration=a,
            evaluation=b,
            clip_rate=clipped * (a != b),
            worst_clip_rate=2 * clipped * (a != b),
            worst_site="block 2 mlp.down_proj",
            outlier_jaccard=1.0,
            hessian_rank_correlation=None,
        )
        for a in SETS
        for b in SETS
    ]
    return TransferSection(rows=tuple(rows))


def matrix_section() -> MatrixSection:
    interval = Interval(low=0.1, high=0.2)
    rows = [
        MatrixRow(
            recipe=recipe,
            calibration=a,
            evaluation=b,
            seed=seed,
            kl=kl,
            kl_interval=interval,
            delta_nll=0.1,
            data_free=free,
        )
        for recipe, kl, free in (("rtn w4a16g64", 0.3, True), ("gptq w4a16g64", 0.1, False))
        for a in SETS
        for b in SETS
        for seed in (0, 1)
    ]
    variance = [
        VarianceRow(
            recipe="rtn w4a16g64",
            evaluation="text",
            measure="kl",
            between_sets=0,
            between_seeds=0,
            ratio=None,
            constant=True,
        ),
        VarianceRow(
            recipe="gptq w4a16g64", evaluation="text", measure="kl", between_sets=0.02, between_seeds=0.1, ratio=0.2
        ),
    ]
    return MatrixSection(protocol="gptq", windows=8, window_tokens=64, rows=tuple(rows), variance_ratio=tuple(variance))


def sensitivity_section(tau: float | None, measured: bool = True) -> SensitivitySection:
    rows = [
        SensitivityRow(
            tensor=f"model.layers.{b}.{name}.weight",
            block=b,
            bits=bits,
            weight_error_db=-6.0 * bits,
            hessian_error=10.0 ** -(bits + b),
            fisher=None,
            measured_kl=0.01 * bits if measured and b else None,
        )
        for b in range(3)
        for name in LINEARS
        for bits in (2, 4)
    ]
    taus = (TauRow(measure="hessian_error", tau=tau, rows=8), TauRow(measure="fisher", tau=None, rows=0))
    return SensitivitySection(rows=tuple(rows), kendall_tau=taus)


def allocation_section(met: bool | None) -> AllocationSection:
    rows = [
        AllocationRow(
            tensor=f"model.layers.{b}.{name}.weight",
            block=b,
            bits=3,
            group_size=64,
            method="gptq",
            bits_per_weight=3.3,
            bytes=99,
        )
        for b in range(3)
        for name in LINEARS
    ]
    points = [
        AllocationPoint(
            label=f"at {bits}",
            uniform=u,
            bytes=bits * 10**6,
            bits_per_weight=bits,
            predicted_kl=1 / bits,
            measured_kl=1 / bits,
        )
        for bits in (3, 4)
        for u in (True, False)
    ]
    return AllocationSection(
        target="bits 3.5",
        met=met,
        rows=tuple(rows),
        measured_kl=0.2,
        bits_per_weight=3.3,
        bytes=594,
        points=tuple(points),
    )


def make_report(**sections) -> Report:
    sections = {"outliers": outlier_section(), "transfer": transfer_section()} | sections
    report = Report(
        model=ModelSection(
            label="tiny & <small>", model_type="llama", fingerprint="f" * 64, blocks=3, hidden=32, weights=9
        ),
        run=RunSection(
            bitwright="0",
            torch="2",
            transformers="5",
            text_python="3",
            budget="quick",
            seeds=(0, 1),
            seconds=1.5,
            peak_rss_bytes=10,
        ),
        sets=tuple(
            SetRow(name=s, kind="text", label="somewhere", seed=i, windows=2, window_tokens=32, sha256="a" * 64)
            for s in SETS
            for i in (0, 1)
        ),
        notes=("something was left out",),
        **sections,
    )
    return report.model_copy(update={"advice": advise(report), "recipe_toml": 'method = "rtn"\n'})


def whole_report() -> Report:
    return make_report(
        outliers=outlier_section(heavy=True),
        transfer=transfer_section(0.01),
        matrix=matrix_section(),
        sensitivity=sensitivity_section(0.8),
        allocation=allocation_section(True),
    )


def test_files_say_the_same_as_the_report(tmp_path):
    report = whole_report()
    write_report(report, tmp_path / "out")
    assert read_report(tmp_path / "out" / "report.json") == report
    assert {path.stem for path in (tmp_path / "out").glob("*.csv")} == set(tables(report))
    with (tmp_path / "out" / "sites.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.outliers.sites)
    assert rows[0]["set"] == "text"
    assert float(rows[0]["rest.absmax"]) == report.outliers.sites[0].rest.absmax
    assert rows[0]["absmax_by_seed"] == "1.0;0.5"
    assert (tmp_path / "out" / "recipe.toml").read_text() == 'method = "rtn"\n'


def test_the_page_needs_nothing_else():
    page = render(whole_report())
    assert not re.search(r"https?:|//[a-z]|\bsrc\s*=|<script|<link|@import|url\(", page)
    assert set(re.findall(r'href="(.)', page)) == {"#"}
    targets = re.findall(r'href="#([^"]+)"', page)
    assert all(f'id="{target}"' in page for target in targets)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert "tiny &amp; &lt;small&gt;" in page
    assert "<small>" not in page.split("<main>")[0]
    for line in (line for advice in whole_report().advice for line in advice.evidence):
        assert line.replace("'", "&#39;").replace("<", "&lt;") in page


def test_sections_that_were_not_measured_are_left_out():
    whole, little = render(whole_report()), render(make_report(outliers=None, transfer=None))
    for heading in ("Allocation", "Sensitivity", "Activations", "From set to set", "Worst sites"):
        assert f">{heading}</h2>" in whole
        assert f">{heading}</h2>" not in little
    assert "somewhere" in little
    tables_of_little = tables(make_report(outliers=None, transfer=None))
    assert set(tables_of_little) == {"sets"}


def test_the_same_report_gives_the_same_page():
    assert render(whole_report()) == render(whole_report())


def test_other_versions_and_other_files_are_refused(tmp_path):
    write_report(make_report(), tmp_path)
    path = tmp_path / "report.json"
    content = json.loads(path.read_text())
    for change, message in (({"version": 2}, "reads 1"), ({"sects": []}, "unknown key sects"), ({"model": 3}, "model")):
        path.write_text(json.dumps(content | change))
        with pytest.raises(EvaluationError, match=message):
            read_report(path)
    path.write_text("[]")
    with pytest.raises(EvaluationError, match="holds list, needed an object"):
        read_report(path)
    with pytest.raises(EvaluationError, match=r"none\.json"):
        read_report(tmp_path / "none.json")


def by_rule(report: Report) -> dict:
    return {advice.rule: advice for advice in advise(report)}


def test_advice_without_a_measurement_is_withheld():
    found = by_rule(make_report())
    assert found["calibration corpus"].withheld
    assert found["data-free or calibrated"].withheld
    assert "sensitive tensors" not in found
    assert by_rule(make_report(sensitivity=sensitivity_section(0.2)))["sensitive tensors"].withheld
    assert by_rule(make_report(sensitivity=sensitivity_section(None)))["sensitive tensors"].withheld
    assert by_rule(make_report(allocation=allocation_section(None)))["allocation"].withheld


def test_advice_follows_the_numbers():
    light, heavy = by_rule(make_report()), by_rule(whole_report())
    assert all(advice.evidence for advice in (*light.values(), *heavy.values()))
    assert light["outlier channels"].verdict.startswith("No outlier channels")
    assert "channel 3: 100% of blocks" in " ".join(heavy["outlier channels"].evidence)
    assert "carry over" in light["static ranges"].verdict
    assert "clip another" in heavy["static ranges"].verdict
    assert "immaterial" in heavy["calibration corpus"].verdict
    assert "gptq w4a16g64 is 3.0 times closer" in heavy["data-free or calibrated"].verdict
    assert "model.layers.0.mlp.down_proj.weight" in " ".join(heavy["sensitive tensors"].evidence)
    assert "is kept" in heavy["allocation"].verdict
    assert not has_heavy_channels(make_report())
    assert suggested_recipe(make_report()).method.name == "easyquant"
    assert suggested_recipe(whole_report()).method.name == "gptq"


def test_limits():
    report = whole_report()
    assert set(metrics(report)) == set(METRICS)
    assert breaches(report, [parse_limit("max_median=6"), parse_limit("kl=0.3")]) == ()
    low = [parse_limit("max_median=5.9"), parse_limit("absmax=0"), parse_limit("int8_channels=0")]
    found = breaches(report, low)
    assert [breach.limit for breach in found] == low
    assert str(found[0]) == "max_median is 6 (self_attn.q_proj of block 2, set text), above the limit 5.9"
    assert found[2].found.value == 1
    assert parse_limit("kl=1e-3") == Limit("kl", 1e-3)


def test_limits_that_cannot_be_judged_are_no_pass():
    with pytest.raises(EvaluationError, match="did not measure"):
        breaches(make_report(), [parse_limit("kl=1")])
    for wrong, message in (
        ("kurtosi=1", "kurtosis"),
        ("kl", "not a number"),
        ("kl=nan", "not a number"),
        ("", "known"),
    ):
        with pytest.raises(EvaluationError, match=message):
            parse_limit(wrong)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (1, "1"),
        (0.12345, "0.123"),
        (123.4, "123"),
        (45678, "45\u202f678"),
        (2.5e-5, "2.5e-5"),
        (-1e7, "-1e7"),
    ],
)
def test_numbers(value, written):
    assert number(value) == written


def test_charts_place_values_where_they_belong():
    chart = line_chart(Axes("t", "block", y_scale="log"), [Line("a", [1.0, None, 100.0, 10.0], 0)])
    heights = [float(y) for y in re.findall(r'<circle class="dot s0" cx="[^"]+" cy="([^"]+)"', chart)]
    assert len(heights) == 3
    assert heights[0] > heights[2] > heights[1]
    assert heights[2] == pytest.approx((heights[0] + heights[1]) / 2, abs=0.1)
    assert chart.count("M") == 2  # the gap
    assert "a, block 2: 100" in chart


@pytest.mark.parametrize("scale", ["linear", "log", "symlog"])
@pytest.mark.parametrize("values", [[], [0.0], [5.0, 5.0], [0.0, 1e-9, 1e9], [-3.0, 4.0], [None, 1.0]])
def test_charts_of_any_values(scale, values):
    lines = line_chart(Axes("<t>", "x", y_scale=scale), [Line("a", values, 9)])
    marks = [Mark(f"m{i}", value, value, i, ring=bool(i % 2)) for i, value in enumerate(values) if value is not None]
    points = scatter_chart(Axes("<t>", "x", "y", scale, scale), marks, [list(range(len(marks)))] if marks else [])
    for chart in (lines, points):
        assert "&lt;t&gt;" in chart
        coordinates = [float(v) for v in re.findall(r'c[xy]="([^"]+)"', chart)]
        assert all(math.isfinite(v) and -1 <= v <= 341 for v in coordinates)


def test_heat_maps_shade_and_write():
    table = Table(
        "t", ["a"], ["x", "y", "z"], [[0.0, 2.0, None]], lambda v: v, lambda v: f"told {v}", lambda v: f"is {v}"
    )
    chart = heat_map(table)
    assert re.findall(r"fill-opacity:([\d.]+)", chart) == ["0.00", "1.00"]
    assert "a, y: told 2.0" in chart
    assert ">is 2.0<" in chart
    assert 'class="empty"' in chart


def test_a_browser_shows_the_page(tmp_path):
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("needs chromium or google-chrome; install one to see the page in a real browser")
    write_report(whole_report(), tmp_path)
    # the width of a phone, then what the page makes of it
    script = (
        "document.title = 'width ' + document.documentElement.scrollWidth + ' of ' + innerWidth + ' svg ' + "
        "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height > 20).length"
    )
    page = (tmp_path / "report.html").read_text()
    probe = page.replace("</body>", f"<script>{script}</script></body>")
    (tmp_path / "probe.html").write_text(probe)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=500,900",
    ]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", (tmp_path / "probe.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"{browser} does not run here: {done.stderr.strip()[-200:]}")
    width, inner, shown = re.search(r"<title>width (\d+) of (\d+) svg (\d+)</title>", done.stdout).groups()
    assert int(width) <= int(inner)
    assert int(shown) == render(whole_report()).count("<svg")
