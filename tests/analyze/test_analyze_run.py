"""`analyze` from end to end on a tiny model."""

from __future__ import annotations

import socket

import pytest

from bitwright.analyze.report import read_report
from bitwright.analyze.run import BUDGETS, Budget, analyze
from bitwright.errors import PlanError
from bitwright.plan import plan
from bitwright.recipe import load_recipe

LITTLE = Budget("little", 2, 32, (0, 1), ("nonsense",))


@pytest.fixture
def _offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("_offline")
def test_everything_is_written_and_the_recipe_can_be_used(tiny_llama_folder, text_file, tmp_path):
    said = []
    report = analyze(
        str(tiny_llama_folder),
        tmp_path / "out",
        budget=LITTLE,
        sets=[f"mine={text_file}", "nonsense", "self"],
        progress=lambda what, done, total: said.append((done, total)),
    )
    out = tmp_path / "out"
    assert read_report(out / "report.json") == report
    assert {"report.html", "recipe.toml", "sites.csv", "statistics.safetensors"} <= {
        path.name for path in out.iterdir()
    }
    assert [row.name for row in report.sets] == ["mine", "mine", "nonsense", "nonsense", "self", "self"]
    assert report.model.weights == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert {row.block for row in report.outliers.sites} == {0, 1, 2}
    assert len(report.transfer.rows) == 9
    assert report.advice
    assert said == sorted(said)
    made = plan(str(tiny_llama_folder), recipe=load_recipe(file=out / "recipe.toml"))
    assert sum(row.action == "quantize" for row in made.rows()) == 14


def test_a_second_analysis_says_the_same(tiny_llama_folder, text_file, tmp_path):
    sets = [str(text_file), "random"]
    one, other = (
        analyze(str(tiny_llama_folder), tmp_path / name, budget=LITTLE, sets=sets).model_copy(update={"run": None})
        for name in ("one", "other")
    )
    assert one == other


def test_the_users_recipe_is_kept(tiny_llama_folder, tmp_path):
    recipe = load_recipe("gptq", "w3a16g32")
    analyze(str(tiny_llama_folder), tmp_path, budget=LITTLE, recipe=recipe)
    assert load_recipe(file=tmp_path / "recipe.toml") == recipe


def test_budgets_and_sets_that_mean_nothing(tiny_llama_folder, tmp_path):
    with pytest.raises(PlanError, match="did you mean 'quick'"):
        analyze(str(tiny_llama_folder), tmp_path, budget="quik")
    for sets in ([], ["random", "random"]):
        with pytest.raises(PlanError, match="a name of its own"):
            analyze(str(tiny_llama_folder), tmp_path, budget=LITTLE, sets=sets)
    assert not list(tmp_path.iterdir())


def test_samples_of_a_model_that_is_too_large_are_left_out_with_a_note(tiny_llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("bitwright.analyze.run.available_memory_bytes", lambda: 1000)
    budget = Budget("little", 2, 32, (0,), ("nonsense", "self"))
    report = analyze(str(tiny_llama_folder), tmp_path, budget=budget)
    assert [row.name for row in report.sets] == ["nonsense"]
    assert "self was left out" in report.notes[0]


def test_budgets_grow():
    sizes = [len(b.seeds) * len(b.sets) * b.windows * b.window_tokens for b in BUDGETS.values()]
    assert list(BUDGETS) == ["quick", "standard", "full"]
    assert sizes == sorted(sizes)
