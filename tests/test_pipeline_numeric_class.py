"""Calibrated runs keep to one numeric class, or say that they did not; data-free ones have none."""

import json
from pathlib import Path

import pytest
import torch

import bitwright
from bitwright import machine
from bitwright.errors import ResumeError
from bitwright.execute.numeric_class import numeric_class

ELSEWHERE = "2 threads on another machine"


@pytest.fixture
def recipe(text_file: Path) -> bitwright.Recipe:
    settings = ["calibration.windows=4", "calibration.window_tokens=32", f'calibration.text="{text_file}"']
    return bitwright.load_recipe("gptq-paper", "w4a16g32", None, settings)


def interrupted(model: Path, out: Path, recipe: bitwright.Recipe, workers: int) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "model.layers.1.mlp.down_proj.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bitwright.quantize(str(model), out, recipe=recipe, options=bitwright.RunOptions(workers, progress=stop))


def classes(out: Path) -> list[str] | None:
    job = json.loads((out / "manifest.json").read_text())["job"]
    return job.get("numeric_class")


def test_the_class_names_threads_processor_and_libraries() -> None:
    assert numeric_class(1).startswith("1 thread on ")
    assert numeric_class(3).startswith("3 threads on ")
    assert f"PyTorch {torch.__version__}" in numeric_class(1)
    assert torch.backends.cpu.get_cpu_capability() in numeric_class(1)


def test_an_unfinished_run_goes_on_in_its_class_alone(
    tiny_llama_folder: Path, tmp_path: Path, recipe: bitwright.Recipe
) -> None:
    out = tmp_path / "out"
    interrupted(tiny_llama_folder, out, recipe, workers=2)
    with pytest.raises(ResumeError, match=r"2 threads on .*this is 1 thread on .*--workers 2 for the same bytes"):
        bitwright.quantize(str(tiny_llama_folder), out, recipe=recipe, options=bitwright.RunOptions(1))
    # The remedy of the message.
    summary = bitwright.quantize(str(tiny_llama_folder), out, recipe=recipe, options=bitwright.RunOptions(2))
    assert summary.resumed_shards == 2
    assert classes(out) == [numeric_class(2)]


def test_another_class_continues_when_it_is_told_to_and_is_noted(
    tiny_llama_folder: Path, tmp_path: Path, recipe: bitwright.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(machine, "numeric_class", lambda _: ELSEWHERE)
        interrupted(tiny_llama_folder, out, recipe, workers=1)
    with pytest.raises(ResumeError, match=rf"{ELSEWHERE}.*Continue it there.*--accept-other-machine.*--restart"):
        bitwright.quantize(str(tiny_llama_folder), out, recipe=recipe, options=bitwright.RunOptions(1))
    accepting = bitwright.RunOptions(1, accept_other_machine=True)
    assert bitwright.quantize(str(tiny_llama_folder), out, recipe=recipe, options=accepting).resumed_shards == 2
    assert classes(out) == [ELSEWHERE, numeric_class(1)]


def test_data_free_runs_have_no_class(tiny_llama_folder: Path, tmp_path: Path) -> None:
    plan = bitwright.plan(str(tiny_llama_folder), "rtn", "w4a16g32")
    assert machine.estimate(plan, 2).numeric_class is None
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", "rtn", "w4a16g32")
    assert classes(tmp_path / "out") is None


def test_the_plan_names_the_class(tiny_llama_folder: Path, recipe: bitwright.Recipe) -> None:
    plan = bitwright.plan(str(tiny_llama_folder), recipe=recipe)
    assert machine.estimate(plan, 2).numeric_class == numeric_class(2)
