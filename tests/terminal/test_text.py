"""Names and texts of others on a terminal, in a log, in a table: shown as they are, and never obeyed."""

import ast
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitwright.cli import main
from bitwright.terminal.text import Sheet, Styled, cell, console, say, say_prose

SOURCE = Path(__file__).parents[2] / "src" / "bitwright"
HOSTILE = "a[/bold]:smile:[link=x]\x1b[31m\u202e"
SHOWN = r"a[/bold]:smile:[link=x]\x1b[31m\u202e"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_else_reaches_a_terminal(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if path.parent.name == "terminal" and path.stem in ("text", "progress"):
        assert "markup=True" not in path.read_text()
        assert not {"TextColumn", "from_markup", "status"} & {
            getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(tree)
        }
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "rich" for name in names), "print by terminal.text"
        called = isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None))
        assert called != "print", "print by terminal.text"


def test_cells_lines_and_titles_are_not_interpreted(capsys: pytest.CaptureFixture[str]) -> None:
    sheet = Sheet(HOSTILE, (HOSTILE,), ("number",))
    sheet.row(HOSTILE, 1)
    sheet.show()
    say(HOSTILE, Styled(HOSTILE, "bold"))
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 5
    assert out.replace("\n", "").isprintable()
    assert str(cell("two\nlines")) == r"two\nlines"


def test_prose_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say_prose("[b]one[/]\n\ttwo\x1b]0;title\x07\u200d")
    assert capsys.readouterr().out == "[b]one[/]\n" + "two".rjust(11) + "\\x1b]0;title\\x07\u200d\n"


def _hostile_model(folder: Path, tiny_llama_folder: Path) -> Path:
    """The tiny model in a folder of a hostile name, with a tensor of one that nobody knows."""
    shutil.copytree(tiny_llama_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"extra{HOSTILE}": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    return folder


COMMANDS: dict[str, Callable[[Path, Path], tuple[str, ...]]] = {
    "plan": lambda model, out: ("plan", str(model), "-m", "rtn", "-s", "w4a16", "--rows"),
    "plan, refused": lambda model, out: ("plan", str(model), "-m", "rtn", "-s", "w4a16g9999"),
    "quantize": lambda model, out: ("quantize", str(model), "-m", "rtn", "-s", "w4a16", "-o", str(model) + "-again"),
    "quantize, refused": lambda model, out: ("quantize", str(model), "-m", HOSTILE, "-s", "w4a16", "-o", str(out)),
    "inspect": lambda model, out: ("inspect", str(out), "--verify"),
    "inspect, refused": lambda model, out: ("inspect", str(model)),
    "eval": lambda model, out: ("eval", str(out), "--windows", "1", "--length", "32"),
    "generate": lambda model, out: ("generate", str(out), f"fox{HOSTILE}", "--tokens", "3"),
    "bench": lambda model, out: ("bench", str(out), "--prompt-tokens", "2", "--new-tokens", "2"),
    "export": lambda model, out: ("export", str(out), "--to", "hf", "-o", str(out) + "-hf"),
    "export, refused": lambda model, out: ("export", str(model), "--to", "gguf", "-o", str(out) + ".gguf"),
    "import, refused": lambda model, out: ("import", str(model), "-o", str(out) + "-in"),
    "no such model": lambda model, out: ("eval", f"{model}-{HOSTILE}"),
    "no such set": lambda model, out: ("analyze", str(model), "-o", str(out) + "-r", "--calibration-set", HOSTILE),
}


@pytest.fixture(scope="module")
def hostile_folders(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and a quantized folder whose names hold markup and escapes."""
    place = tmp_path_factory.mktemp("hostile")
    model = _hostile_model(place / HOSTILE.replace("/", ":"), tiny_llama_folder)
    nested = place / "a[" / "bold]b"  # the path reads a[/bold]b
    nested.parent.mkdir()
    model.rename(nested)
    assert run("quantize", str(nested), "-m", "rtn", "-s", "w4a16", "-o", f"{nested}-\x1b[2Jout") == 0
    return nested, Path(f"{nested}-\x1b[2Jout")


def run(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["bitwright", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_survives_hostile_names(
    name: str, hostile_folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(*COMMANDS[name](*hostile_folders))
    shown = capsys.readouterr()
    assert status == (2 if "refused" in name or "no such" in name else 0), shown.err
    for text in (shown.out, shown.err):
        assert re.sub(r"[\n\t]", "", text).isprintable()


def test_the_console_interprets_nothing() -> None:
    assert not console._markup
    assert not console._emoji
