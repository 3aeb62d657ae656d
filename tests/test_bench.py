"""`bench` and the choice of path in `generate`: keys, errors and paths; never times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import bitwright
import bitwright.cli as cli
from bitwright import bench as module
from bitwright.bench import bench
from bitwright.errors import EvaluationError
from bitwright.runtime import cpu

KEYS = {
    "model", "path", "path_reason", "kernels", "kernels_reason", "mode", "threads", "prompt_tokens", "new_tokens",
    "rounds", "decode_tokens_per_second", "prefill_tokens_per_second", "weight_bytes_per_token",
    "read_bandwidth_bytes_per_second", "read_bandwidth_share", "peak_rss_bytes",
}  # fmt: skip

compiled = pytest.mark.skipif(not cpu.available(), reason="the compiled kernels are not built, or turned off")


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROBE_FLOATS", 1 << 16)


@pytest.fixture(scope="module")
def quantized_folder(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "out"
    bitwright.quantize(str(tiny_llama_folder), out, recipe=bitwright.load_recipe("rtn", "w4a16g32"))
    return out


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bitwright", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@compiled
def test_the_command_measures_a_quantized_folder(
    quantized_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "bench.json"
    arguments = ("--prompt-tokens", "5", "--new-tokens", "3", "--threads", "1", "--mode", "fast")
    assert run(monkeypatch, "bench", str(quantized_folder), *arguments, "--json", str(report)) == 0
    measured = json.loads(report.read_text())
    assert measured.keys() == KEYS
    assert (measured["path"], measured["path_reason"], measured["kernels_reason"]) == ("lean", None, None)
    assert (measured["mode"], measured["threads"], measured["new_tokens"]) == ("fast", 1, 3)
    share = measured["weight_bytes_per_token"] * measured["decode_tokens_per_second"]
    assert measured["read_bandwidth_share"] == pytest.approx(share / measured["read_bandwidth_bytes_per_second"])
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    assert "reference" not in shown


@compiled
def test_missing_kernels_are_said(
    quantized_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITWRIGHT_NATIVE", "0")
    arguments = ("--prompt-tokens", "5", "--new-tokens", "2", "--threads", "1")
    assert run(monkeypatch, "bench", str(quantized_folder), *arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "slow PyTorch reference" in shown
    assert "BITWRIGHT_NATIVE=0" in shown
    assert run(monkeypatch, "generate", str(quantized_folder), "The quick", "--tokens", "2") == 0
    assert "kernels are missing or turned off" in " ".join(capsys.readouterr().err.split())


def test_float_models_are_measured_too(tiny_llama_folder: Path) -> None:
    measured = bench(str(tiny_llama_folder), prompt_tokens=3, new_tokens=2, threads=1)
    assert (measured.path, measured.kernels, measured.kernels_reason) == ("lean", "float", None)
    # 2 blocks of 4 * 64 * 64 less two halves (2 of 4 heads), 3 * 64 * 128, and the head.
    assert measured.weight_bytes_per_token == 4 * (2 * (3 * 64 * 64 + 3 * 64 * 128) + 320 * 64)


def test_both_paths_read_the_same_float_weights(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lean = bench(str(tiny_llama_folder), prompt_tokens=3, new_tokens=2, threads=1)
    monkeypatch.setattr(module, "supports", lambda *_: "for the test")
    plain = bench(str(tiny_llama_folder), prompt_tokens=3, new_tokens=2, threads=1)
    assert (plain.path, plain.path_reason) == ("transformers", "for the test")
    assert plain.weight_bytes_per_token == lean.weight_bytes_per_token


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"new_tokens": -1}, "new_tokens is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"mode": "quick"}, "mode is 'quick'"),
        ({"mode": "fast"}, "no quantized linear"),
        ({"prompt_tokens": 250, "new_tokens": 10}, "250 \\+ 10 tokens"),
    ],
)
def test_refusals(tiny_llama_folder: Path, arguments: dict, said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        bench(str(tiny_llama_folder), **arguments)


@compiled
def test_generate_is_the_same_on_both_paths(quantized_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lean = bitwright.generate(str(quantized_folder), "The quick brown", tokens=12)
    assert lean.fallback is None
    monkeypatch.setattr(sys.modules["bitwright.generate"], "supports", lambda *_: "for the test")
    plain = bitwright.generate(str(quantized_folder), "The quick brown", tokens=12)
    assert plain.fallback == "for the test"
    assert (lean.text, lean.tokens) == (plain.text, plain.tokens)


def test_penalties_are_left_to_transformers(tiny_llama_folder: Path, tmp_path: Path) -> None:
    for file in tiny_llama_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.3}))
    found = bitwright.generate(str(tmp_path), "The quick", tokens=2)
    assert "repetition_penalty to 1.3" in str(found.fallback)
