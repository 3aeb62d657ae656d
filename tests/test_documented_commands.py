"""Every command of the README and the docs runs as it is written, in order, on a small model."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitwright.analyze.choices import parse_choice
from bitwright.analyze.run import BUDGETS, Budget
from bitwright.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {"vllm serve": "a server, see tests/runtime/test_vllm_real.py", "--device cuda": "needs a GPU"}
# What makes a command quick, where it does not say so itself.
SMALLER = {
    "quantize": ("--set", "calibration.windows=4", "--set", "calibration.window_tokens=64"),
    "analyze": ("--seeds", "1"),
    "eval": ("--windows", "1", "--length", "64"),
    "bench": ("--prompt-tokens", "4", "--new-tokens", "4"),
    "generate": ("--tokens", "4"),
}


def commands(page: Path) -> Iterator[str]:
    """The commands of a page's blocks of code, whole, without comments and brackets of a synopsis."""
    fence: str | None = None
    for line in page.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fence = line[3:] if fence is None else None
        elif re.match(r"(bitwright|vllm) ", line.removeprefix("    ")) and (
            fence in ("", "sh", "bash") or (fence is None and line.startswith("    "))
        ):
            yield re.sub(r"\s+#.*$|\[[^]]*\]", "", line.strip())


def is_run(command: str) -> bool:
    return not any(part in command for part in NOT_RUN)


DOCUMENTED = [page for page in PAGES if any(map(is_run, commands(page)))]


@pytest.fixture(scope="module")
def model(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama wide enough for groups of 64, budgets of bits and blocks of GGUF."""
    folder = tmp_path_factory.mktemp("documented") / "model"
    config = LlamaConfig.from_pretrained(
        tiny_llama_folder,
        hidden_size=256,
        intermediate_size=256,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    for path in tiny_llama_folder.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def test_the_readme_has_them() -> None:
    found = list(commands(ROOT / "README.md"))
    assert len(found) >= 18
    assert {shlex.split(command)[1] for command in found} >= {"quantize", "export", "import", "eval", "plan", "analyze"}


@pytest.mark.parametrize("page", DOCUMENTED, ids=lambda page: page.stem)
def test_documented_commands_run_in_order(
    page: Path, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # one processor: products of small matrices gain nothing from more, and wait for each other
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
    monkeypatch.setitem(BUDGETS, "quick", Budget("quick", 2, 32, (0,), ("random",), evaluation_windows=1))
    # the model is too small for the default
    some = tuple(parse_choice(f"rtn:w{bits}a16g64") for bits in (2, 3, 4, 6))
    monkeypatch.setattr("bitwright.analyze.choices.default_choices", lambda: some)
    files = ("TEXT", "wikitext2-valid.txt", "wikitext2-test.txt", "notes.txt")
    words = {"MODEL": str(model), "FLOAT": str(model), "demo": str(model), "FILE": "result.json"}
    words |= {"TEXT": "text.txt", "METHOD": "rtn", "SCHEME": "w4a16"}
    for number, name in enumerate(files):
        # texts of their own, or an evaluation would be refused for being calibrated on
        said = " ".join(f"{word}{number}" for word in text_file.read_text().split())
        Path(words.get(name, name)).write_text(said)
    for command in filter(is_run, commands(page)):
        arguments = [words.get(word, word) for word in shlex.split(command)[1:]]
        more = () if "--windows" in arguments else SMALLER.get(arguments[0], ())
        monkeypatch.setattr("sys.argv", ["bitwright", *arguments, *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code, command
