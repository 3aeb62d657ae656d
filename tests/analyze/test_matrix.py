"""The calibration-sensitivity matrix: its control, its variances, and runs that were interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bitwright.analyze import matrix
from bitwright.analyze.choices import parse_recipe
from bitwright.analyze.matrix import MatrixOptions, measure_matrix, variance_rows
from bitwright.analyze.model import MatrixRow, VarianceRow
from bitwright.analyze.run import STATIC, Budget, analyze
from bitwright.analyze.sets import CalibrationSet, SetMaker, parse_set
from bitwright.calibration.tokens import Calibration, calibration_windows
from bitwright.checkpoint.open import open_source
from bitwright.errors import CalibrationError

RECIPES = {text.replace(":", " "): parse_recipe(text) for text in ("rtn:w3a16g64", f"rtn:w8a8:{STATIC}")}


@pytest.fixture(scope="module")
def draws(tiny_llama_folder: Path) -> list[CalibrationSet]:
    maker = SetMaker(open_source(str(tiny_llama_folder)), 4, 48)
    return [maker.draw(parse_set(kind), seed) for kind in ("nonsense", "random") for seed in (0, 1)]


@pytest.fixture(scope="module")
def evaluations(tiny_llama_folder: Path) -> list[CalibrationSet]:
    maker = SetMaker(open_source(str(tiny_llama_folder)), 6, 48)
    return [maker.draw(parse_set("random"), 7, "evaluation")]


def test_without_data_rows_are_equal_to_the_last_bit_and_static_ranges_vary(
    tiny_llama_folder: Path, draws: list[CalibrationSet], evaluations: list[CalibrationSet], tmp_path: Path
) -> None:
    said: list[tuple[int, int]] = []
    options = MatrixOptions(RECIPES, evaluations, tmp_path, lambda what, done, total: said.append((done, total)))
    found = measure_matrix(str(tiny_llama_folder), draws, options)
    free = [row for row in found.rows if row.data_free]
    assert [(row.calibration, row.seed) for row in free] == [("nonsense", 0), ("random", 0)]
    assert len({(row.kl, row.delta_nll) for row in free}) == 1
    shown = [row for row in found.rows if not row.data_free]
    assert [(row.calibration, row.seed) for row in shown] == [(draw.name, draw.seed) for draw in draws]
    assert len({row.kl for row in shown}) > 1
    assert all(row.kl_interval is not None and row.kl_interval.low <= row.kl <= row.kl_interval.high for row in shown)
    assert [(row.recipe, row.constant) for row in found.variance_ratio if row.measure == "kl"] == [
        ("rtn w3a16g64", True),
        (f"rtn w8a8 {STATIC}", False),
    ]
    assert found.notes == ()
    assert said == sorted(said)
    assert said[-1] == (6, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.json"]


def test_an_interrupted_run_goes_on_where_it_was(
    tiny_llama_folder: Path,
    draws: list[CalibrationSet],
    evaluations: list[CalibrationSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = MatrixOptions(RECIPES, evaluations, tmp_path)
    calls = []
    real = matrix._measured

    def stopping(*arguments: Any) -> list[MatrixRow]:
        calls.append(arguments[1].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(matrix, "_measured", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure_matrix(str(tiny_llama_folder), draws, options)
    one = measure_matrix(str(tiny_llama_folder), draws, options)
    assert len(calls) == 7
    monkeypatch.setattr(matrix, "_measured", real)
    other = measure_matrix(str(tiny_llama_folder), draws, MatrixOptions(RECIPES, evaluations, tmp_path / "other"))
    assert one == other


def test_evaluation_windows_that_were_calibrated_on_are_refused(
    tiny_llama_folder: Path, draws: list[CalibrationSet], tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"4 windows of calibration set 'nonsense'.*--evaluation-set"):
        measure_matrix(str(tiny_llama_folder), draws, MatrixOptions(RECIPES, draws[:1], tmp_path))


def test_the_report_has_matrix_and_sensitivity_where_the_budget_asks(
    tiny_llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    budget = Budget("mine", 4, 48, (0, 1), ("random",), probes=8, matrix=("rtn:w3a16g64",), evaluations=("random",))
    report = analyze(str(tiny_llama_folder), tmp_path, budget=budget)
    assert report.matrix is not None
    assert report.sensitivity is not None
    assert {row.bits for row in report.sensitivity.rows} == {2, 3, 4, 8}
    assert sum(row.measured_kl is not None for row in report.sensitivity.rows) == 8
    assert set(report.run.phases) == {"sets", "activations", "sensitivity", "matrix"}
    assert (tmp_path / "matrix.csv").exists()


# --- variances -----------------------------------------------------------------------------------------------


def rows_of(values: dict[str, list[float]]) -> list[MatrixRow]:
    return [
        MatrixRow(recipe="gptq w4a16", calibration=name, evaluation="text", seed=seed, kl=value, delta_nll=0.5)
        for name, some in values.items()
        for seed, value in enumerate(some)
    ]


def kl_row(values: dict[str, list[float]]) -> VarianceRow:
    (found,) = [row for row in variance_rows(rows_of(values)) if row.measure == "kl"]
    return found


def test_variances_are_those_of_the_textbook() -> None:
    found = kl_row({"a": [1.0, 3.0], "b": [5.0, 7.0]})
    # within: 2; means 2 and 6, variance 8, of which 2 / 2 is the seeds' share
    assert (found.between_seeds, found.between_sets, found.ratio) == (2.0, 7.0, 3.5)


def test_the_interval_of_the_ratio_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        means = generator.normal(0, 2**0.5, 6)
        values = {str(i): generator.normal(mean, 1, 3).tolist() for i, mean in enumerate(means)}
        interval = kl_row(values).interval
        assert interval is not None
        covered += interval.low <= 2 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_one_seed_tells_no_ratio_and_equal_values_are_constant() -> None:
    one = kl_row({"a": [1.0], "b": [2.0]})
    assert (one.ratio, one.constant) == (None, False)
    same = kl_row({"a": [1.0, 1.0], "b": [1.0, 1.0]})
    assert (same.ratio, same.constant) == (None, True)


# --- windows from a file --------------------------------------------------------------------------------------


def test_windows_of_a_file_are_taken_as_they_are(tmp_path: Path) -> None:
    ids = torch.arange(3 * 64).reshape(3, 64)
    path = tmp_path / "windows.safetensors"
    save_file({"ids": ids}, path)
    found = calibration_windows(Calibration(text=str(path), windows=2, window_tokens=48), None, seed=5, vocabulary=320)
    assert torch.equal(found.ids, ids[:2, :48])
    with pytest.raises(CalibrationError, match=r"\[3, 64\], needed at least \[4, 48\].*calibration\.windows=3"):
        calibration_windows(Calibration(text=str(path), windows=4, window_tokens=48), None, seed=5, vocabulary=320)
    save_file({"ids": ids + 320}, path)
    with pytest.raises(CalibrationError, match="use the tokenizer that belongs to this model"):
        calibration_windows(Calibration(text=str(path), windows=3, window_tokens=64), None, seed=5, vocabulary=320)
    save_file({"tokens": ids}, path)
    with pytest.raises(CalibrationError, match="needed a safetensors file with the tensor ids"):
        calibration_windows(Calibration(text=str(path), windows=3, window_tokens=64), None, seed=5, vocabulary=320)
