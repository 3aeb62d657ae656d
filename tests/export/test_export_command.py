"""Exporting and importing as users type it: statuses, tables, and refusals before any work."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bitwright
from bitwright import cli
from bitwright.errors import FormatError, PlanError
from bitwright.export.targets import export_model, obstacles, refuse_early

SYMMETRIC = ("--method", "rtn", "--scheme", "w4a16g32-sym")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bitwright", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_quantize_export_import(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tiny_llama_folder), tmp_path / "out"
    assert run(monkeypatch, "quantize", model, *SYMMETRIC, "-o", str(out), "--format", "gptq") == 0
    assert (tmp_path / "out-gptq" / "config.json").is_file()
    exported, report = tmp_path / "ct", tmp_path / "report.json"
    to = ("--to", "compressed-tensors", "-o", str(exported), "--json", str(report))
    assert run(monkeypatch, "export", str(out), *to) == 0
    rows = json.loads(report.read_text())["tensors"]
    assert {row["action"] for row in rows} == {"exact", "kept"}
    assert "codes as they are" in capsys.readouterr().out
    back = tmp_path / "back"
    assert run(monkeypatch, "import", str(exported), "-o", str(back)) == 0
    assert run(monkeypatch, "inspect", str(back), "--verify") == 0
    before, after = weights(out), weights(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # an export does not write over what is there
    assert run(monkeypatch, "export", str(out), *to) == 2
    assert "exists" in capsys.readouterr().err


def test_what_a_format_cannot_hold_is_refused_before_any_work(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    outliers = ("--method", "easyquant", "--scheme", "w4a16g32", "--format", "gguf")
    assert run(monkeypatch, "quantize", str(tiny_llama_folder), *outliers, "-o", str(out)) == 2
    assert "outliers" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("target", "scheme", "fits"),
    [
        ("gguf", "w4a16g32-sym", True),
        ("gguf", "w8a16g32", False),
        ("compressed-tensors", "w4a16g32", True),
        ("compressed-tensors", "w3a16g32", False),
        ("gptq", "w3a16g32", True),
        ("gptq", "w5a16g32", False),
        ("awq", "w4a16g32", True),
        ("awq", "w8a16g32", False),
        ("hf", "w5a16g32", True),
    ],
)
def test_a_plan_is_refused_where_its_result_would_be(
    tiny_llama_folder: Path, tmp_path: Path, target: cli.Target, scheme: str, fits: bool
) -> None:
    planned = bitwright.plan(str(tiny_llama_folder), "rtn", scheme)
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", "rtn", scheme)
    place = tmp_path / ("file.gguf" if target == "gguf" else "folder")
    if fits:
        refuse_early(planned, target)
        if target != "gguf":  # the tiny model's tokenizer has no name in llama.cpp
            assert not export_model(tmp_path / "out", place, target).lossy or target == "hf"
        return
    with pytest.raises(FormatError, match="weight"):
        refuse_early(planned, target)
    with pytest.raises(FormatError):
        export_model(tmp_path / "out", place, target)
    assert not place.exists()


def test_a_model_that_llama_cpp_does_not_have_is_refused_before_any_work(tiny_llama_folder: Path) -> None:
    planned = bitwright.plan(str(tiny_llama_folder), "rtn", "w4a16g32-sym")
    refuse_early(planned, "gguf")
    with pytest.raises(FormatError, match="hidden_act is 'gelu'"):
        refuse_early(replace(planned, config={**planned.config, "hidden_act": "gelu"}), "gguf")


def test_names_that_nothing_has(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="compressed-tensors"):
        export_model(tmp_path, tmp_path / "out", "onnx")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="vllm"):
        obstacles(bitwright.plan(str(tiny_llama_folder), "rtn", "w4a16g32"), "ollama")  # type: ignore[arg-type]


def test_a_plan_tells_what_an_engine_will_refuse(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spqr = ("plan", str(tiny_llama_folder), "--method", "spqr", "--scheme", "w3a16", "--for", "vllm")
    assert run(monkeypatch, *spqr) == 2
    assert "vllm refuses" in capsys.readouterr().out


def test_a_cache_is_refused_before_any_work(tiny_llama_folder: Path) -> None:
    def planned(scheme: str, *settings: str) -> bitwright.Plan:
        recipe = bitwright.load_recipe("rtn", scheme, overrides=list(settings))
        return bitwright.plan(str(tiny_llama_folder), recipe=recipe)

    for target in ("compressed-tensors", "gptq"):
        with pytest.raises(FormatError, match="the KV cache is kv8-asym-after"):
            refuse_early(planned("w4a16kv8g32"), target)
    refuse_early(planned("w4a16kv8g32"), "hf")
    fixed = planned("w4a16kv8g32", "activations.kv.grid=fp8")
    refuse_early(fixed, "compressed-tensors")
    with pytest.raises(FormatError, match="the KV cache is kv8-fp8, for which gptq has no place"):
        refuse_early(fixed, "gptq")
