"""The command line as a user meets it: status, tables, JSON, and errors without tracebacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bitwright.cli as cli
from bitwright.analyze.choices import parse_choice
from bitwright.analyze.run import BUDGETS, Budget

EVALUATION_KEYS = {
    "perplexity", "float_perplexity", "kl_mean_nats", "kl_p99_nats", "top1_agreement", "delta_ln_ppl",
    "delta_ln_ppl_low", "delta_ln_ppl_high", "bits_per_weight", "bytes", "windows", "protocol", "seconds",
    "peak_rss_bytes",
}  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bitwright", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_whole_journey(
    tiny_llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = str(tiny_llama_folder), str(tmp_path / "out")
    recipe = ("--method", "easyquant", "--scheme", "w4a16g32")
    report = tmp_path / "report.json"
    assert run(monkeypatch, "plan", model, *recipe, "--json", str(report)) == 0
    assert json.loads(report.read_text())["estimate"]["workers"] >= 1
    assert "easyquant w4g32-asym" in capsys.readouterr().out
    assert run(monkeypatch, "quantize", model, *recipe, "-o", out, "--json", str(report)) == 0
    assert json.loads(report.read_text())["bits_per_weight"] < 6
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    measure = ("--against", model, "--text", str(text), "--windows", "3", "--length", "32")
    assert run(monkeypatch, "eval", out, *measure, "--json", str(report)) == 0
    measured = json.loads(report.read_text())
    assert measured.keys() >= EVALUATION_KEYS
    assert measured["kl_mean_nats"] > 0
    assert measured["windows"] == 3
    assert run(monkeypatch, "inspect", out, "--verify") == 0
    assert run(monkeypatch, "generate", out, "The quick", "--tokens", "3") == 0
    assert run(monkeypatch, "methods") == 0
    assert "easyquant-paper" in capsys.readouterr().out


def test_verify_finds_a_flipped_bit(
    tiny_llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "quantize", str(tiny_llama_folder), "-m", "rtn", "-s", "w4a16", "-o", str(out)) == 0
    shard = out / "model-00002-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert run(monkeypatch, "inspect", str(out), "--verify") == 3
    assert "model-00002-of-00004.safetensors: SHA-256" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "/nowhere", "-m", "rtn", "-s", "w4a16"), "not found"),
        (("plan", "MODEL", "-m", "rtx", "-s", "w4a16"), "did you mean 'rtn'"),
        (("plan", "MODEL", "-m", "rtn", "-s", "w4b16"), "scheme 'w4b16'"),
        (("plan", "MODEL", "-m", "rtn", "-s", "w4a16", "--set", "sed=1"), "did you mean 'seed'"),
        (("plan", "MODEL", "-m", "rtn", "-s", "w4a12"), "12-bit activations"),
        (("inspect", "MODEL"), "manifest.json: missing"),
        (("eval", "MODEL", "--text", "/nowhere.txt"), "/nowhere.txt"),
    ],
)
def test_refusals_are_one_message_and_status_two(
    tiny_llama_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    filled = [str(tiny_llama_folder) if argument == "MODEL" else argument for argument in arguments]
    assert run(monkeypatch, *filled) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert said in shown
    assert "Traceback" not in shown


def test_the_installed_command_answers() -> None:
    result = subprocess.run([sys.executable, "-m", "bitwright", "--help"], capture_output=True, text=True, check=True)
    for command in ("plan", "quantize", "eval", "inspect", "generate", "bench", "methods"):
        assert command in result.stdout


def test_analyze_writes_a_report_and_a_recipe(
    tiny_llama_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out, report = str(tiny_llama_folder), tmp_path / "report", tmp_path / "again.json"
    monkeypatch.setitem(BUDGETS, "quick", Budget("quick", 2, 16, (0,), ("random",)))
    arguments = ("analyze", model, "-o", str(out), "--json", str(report))
    assert run(monkeypatch, *arguments) == 0
    assert "report.html" in capsys.readouterr().out
    assert json.loads(report.read_text()) == json.loads((out / "report.json").read_text())
    planned = ("plan", model, "--recipe", str(out / "recipe.toml"), "--set", "scheme=w4a16g32")
    assert run(monkeypatch, *planned) == 0
    wider = ("--seeds", "2", "--matrix", "rtn:w3a16g32", "--evaluation-set", f"mine={text_file}")
    monkeypatch.setitem(BUDGETS, "quick", Budget("quick", 2, 32, (0,), ("random",), evaluation_windows=2))
    assert run(monkeypatch, *arguments, *wider) == 0
    matrix = json.loads(report.read_text())["matrix"]
    assert [(row["recipe"], row["evaluation"], row["seed"]) for row in matrix["rows"]] == [("rtn w3a16g32", "mine", 0)]
    assert run(monkeypatch, *arguments, *wider, "--matrix", "rtn") == 2
    assert "METHOD:SCHEME" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--fail-above", "max_median=0.001") == 4
    assert "limit not kept" in capsys.readouterr().out
    assert run(monkeypatch, *arguments, "--fail-above", "max_medain=1") == 2
    assert "max_median" in capsys.readouterr().err


def test_a_target_chooses_bits_and_is_kept_or_not(
    tiny_llama_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ("--set", "calibration.windows=4", "--set", "calibration.window_tokens=32")
    common = (str(tiny_llama_folder), "--calibration", str(text_file), *small)
    some = tuple(parse_choice(f"rtn:w{bits}a16g32") for bits in (2, 3, 4, 6))  # the model is too small for the default
    monkeypatch.setattr("bitwright.analyze.choices.default_choices", lambda: some)
    report = tmp_path / "report.json"
    out = tmp_path / "out"
    place = tmp_path / "report"
    asked = ("quantize", *common, "-o", str(out), "--target-bits", "5", "--json", str(report), "--report", str(place))
    assert run(monkeypatch, *asked) == 0
    section = json.loads(report.read_text())
    assert section["bits_per_weight"] <= 5
    assert json.loads((place / "report.json").read_text())["allocation"] == section
    assert "Size and loss" in (place / "report.html").read_text()
    assert run(monkeypatch, "plan", common[0], "--recipe", str(place / "recipe.toml")) == 0
    assert "holds" in capsys.readouterr().out
    assert run(monkeypatch, "inspect", str(out), "--verify") == 0
    refused = ("quantize", *common, "-o", str(tmp_path / "other"), "--target-bits", "5", "-s", "w4a16")
    assert run(monkeypatch, *refused) == 2
    assert "a target chooses schemes itself" in capsys.readouterr().err
