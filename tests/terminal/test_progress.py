"""Progress where there is no terminal: one line for each unit, with what is done, for how long, and what is left."""

import re
from pathlib import Path

import pytest

from bitwright.cli import main
from bitwright.terminal.progress import Lines, unit_of


def test_a_line_for_each_unit(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 10))
    told = Lines("quantizing", lambda: next(clock))
    told("model.layers.0.q_proj.weight", 100, 400)  # done by an earlier run
    for done in (120, 140, 160):
        told("model.layers.0.k_proj.weight", done, 400)
    told("Hessians of block 1: q_proj, k_proj", 200, 400)
    told("model.layers.1.q_proj.weight", 300, 400)
    told("lm_head.weight", 400, 400)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "quantizing: 25 %, 100 of 400, 0.0 s, model.layers.0.q_proj.weight",
        "quantizing: 50 %, 200 of 400, 40.0 s, 80.0 s left, Hessians of block 1: q_proj, k_proj",
        "quantizing: 100 %, 400 of 400, 60.0 s, lm_head.weight",
    ]


@pytest.mark.parametrize(
    ("what", "unit"),
    [
        ("model.layers.12.mlp.up_proj", "block 12"),
        ("Hessians of block 3: up_proj", "block 3"),
        ("block 7", "block 7"),
        ("lm_head.weight", "lm_head.weight 5"),
        ("w4a16", "w4a16 5"),
    ],
)
def test_units(what: str, unit: str) -> None:
    assert unit_of(what, 5) == unit


def run(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["bitwright", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def test_commands_tell_a_log_how_far_they_are(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tiny_llama_folder), str(tmp_path / "out")
    commands = {
        "quantizing": ("quantize", model, "-m", "rtn", "-s", "w4a16g32-sym", "-o", out),
        "evaluating": ("eval", out, "--windows", "3", "--length", "32"),
        "exporting": ("export", out, "--to", "gptq", "-o", f"{out}-gptq"),
        "importing": ("import", f"{out}-gptq", "-o", f"{out}-again"),
    }
    for doing, command in commands.items():
        assert run(*command) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{doing}: ")]
        assert len(lines) >= 3
        assert all(re.search(r"\d+ %, [\d,]+ of [\d,]+, [\d.]+ s", line) for line in lines)
        assert "100 %" in lines[-1]
    assert run("export", out, "--to", "GGUF", "-o", f"{out}.gguf") == 0
    assert run("export", out, "--to", "gguff", "-o", f"{out}-2.gguf") == 2
    assert "did you mean 'gguf'" in capsys.readouterr().err


def test_losses_of_one_kind_are_one_line(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert run("quantize", str(tiny_llama_folder), "-m", "easyquant", "-s", "W4A16G32", "-o", out) == 0
    capsys.readouterr()
    assert run("export", out, "--to", "awq", "-o", f"{out}-awq", "--allow-lossy") == 0
    lossy = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lossy")]
    assert len(lossy) == 1
    assert re.search(r"\(1\d such; --json FILE has all\)", lossy[0])
