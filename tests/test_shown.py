"""Results in a prompt and in a notebook: short, whole sentences apart, and harmless whatever names they hold."""

from collections.abc import Callable
from pathlib import Path

import pytest

import bitwright
from bitwright.bench import Bench
from bitwright.evaluate import Evaluation
from bitwright.execute.shown import Shown, visible
from bitwright.export.folder import ExportResult, ExportRow
from bitwright.generate import Generation
from bitwright.pipeline import Summary

HOSTILE = "a[/bold]<b>\x1b[31m\u202e\n|"


def summary(name: str) -> Summary:
    record = {"tensor": name, "action": "quantize", "shape": [64, 64], "bytes": 2048, "outliers": 0, "sqnr_db": 20.0}
    return Summary(Path(name), [record] * 500, 1.0, 10**8, 0)


RESULTS: dict[str, Callable[[str], Shown]] = {
    "summary": summary,
    "evaluation": lambda name: Evaluation(
        perplexity=9.0, windows=2, length=8, dropped_tokens=0, protocol=name, seconds=1.0
    ),
    "export": lambda name: ExportResult(Path(name), "gguf", (ExportRow(name, "float", 1, 2, "too wide"),) * 200),
    "generation": lambda name: Generation(name, name, 3, 1.0),
    "bench": lambda name: Bench(name, "lean", None, "avx2", None, "exact", 1, 1, 1, 1, 1.0, 1.0, None, 1.0, None, 1),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_are_short_and_harmless(kind: str) -> None:
    result = RESULTS[kind](HOSTILE)
    for shown in (repr(result), str(result)):
        assert shown.isprintable()
        assert len(shown) < 400
    html = result._repr_html_()
    assert html.isprintable()
    assert "<b>" not in html
    assert len(html) < 1000


def test_a_plan_and_an_inspection_are_short(tiny_llama_folder: Path, tmp_path: Path) -> None:
    plan = bitwright.plan(str(tiny_llama_folder), "rtn", "w4a16")
    assert "14 of 21 to quantize" in repr(plan)
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", "rtn", "w4a16")
    assert "14 quantized" in bitwright.inspect(tmp_path / "out")._repr_html_()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0", "model.layers.0"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\u202eb\u2028c", r"a\u202eb\u2028c"),
        ("\udc80", r"\udc80"),
        ("l\u00e9gal \u4e2d \U0001f600", "l\u00e9gal \u4e2d \U0001f600"),
        ("two\nlines", r"two\nlines"),
    ],
)
def test_what_is_not_seen_is_spelled_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_characters_that_are_asked_for_stay() -> None:
    assert visible("two\n\tlines\x1b", keep="\n\t") == "two\n\tlines\\x1b"
