"""Every remedy in a message is in the words of the command line, and doing what it says works."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from bitwright.cli import main
from bitwright.method import Method
from bitwright.numeric.settings import annotations_at
from bitwright.recipe import Recipe

SOURCE = Path(__file__).parents[1] / "src" / "bitwright"
SMALL = ("--set", "calibration.windows=2", "--set", "calibration.window_tokens=32")


def run(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["bitwright", *arguments])
        # one processor: products of small matrices gain nothing from more, and wait for each other
        patch.setattr("os.sched_getaffinity", lambda process: {0})
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


# What is asked for beside the model, and what the message says to add; later options take the place of earlier ones.
PLANNED = {
    "method": ("-m RTNN -s w4a16", "-m rtn", "did you mean 'rtn'"),
    "scheme": ("-m rtn -s 4w16a", "-s w4a16", "such as w4a16"),
    "group": ("-m rtn -s w4a16g1024", "--scheme w4a16g64", None),
    "obs": ("-m spqr -s w4a16 --set rounding=nearest", "--set rounding.name=gptq", None),
    "stream": (
        "-m gptq -s w4a16 --set inputs.stream=float --set inputs.correction=0",
        "--set inputs.sequential=false",
        None,
    ),
    "correction": ("-m gptq -s w4a16 --set inputs.stream=float", "--set inputs.stream=quantized", None),
    "learning": (
        "-m omniquant -s w4a16 --set inputs.stream=float --set inputs.sequential=false",
        "--set inputs.stream=quantized",
        None,
    ),
    "static learned": (
        "-m omniquant -s w4a8 --set activations.granularity=tensor",
        "--set activations.granularity=token",
        None,
    ),
    "nothing to learn": (
        "-m omniquant -s w4a16 --set learn.scales=false --set learn.clip=false --set learn.weights=false",
        "--set learn.weights=true",
        None,
    ),
    "learned and moved": (
        "-m gptq -s w4a16 --set learn.weights=true", "--set rounding.name=nearest", None
    ),
    "rotated down": (
        "-m omniquant+rotate -s w4a4 --set 'transform.sites=[\"down\"]'", "--set rotate.online_down=false", None
    ),
    "grid and levels": (
        "-m spqr -s w4a16 --set outliers=none --set grid=gguf", "--set bilevel=none --set group_size=none", None
    ),
    "refit": ("-m spqr -s w4a16 --set rounding.refit=true", "--set rounding.refit=false", None),
    "updated": ("-m gptq -s w4a16 --set rounding.groups=updated", "--set rounding.order=natural", None),
    "clip": (
        "-m rtn -s w8a8 --set activations.granularity=tensor --set activations.clip=0.9",
        "--set activations.clip=1",
        None,
    ),
    "past": (
        "-m rtn -s w4a16kv4 --set activations.kv.past_only=true --set activations.kv.rope=before",
        "--set activations.kv.rope=after",
        None,
    ),
    "fp8 before": (
        "-m rtn -s w4a16kv8 --set activations.kv.grid=fp8 --set activations.kv.rope=before",
        "--set activations.kv.rope=after",
        None,
    ),
    "fp8 and bits": ("-m rtn -s w4a16kv4 --set activations.kv.grid=fp8", "--set activations.kv.grid=int", None),
    "model-wide": (
        "-m spqr -s w4a16 --set outliers.scope=model --set outliers.threshold=0.2",
        "--set outliers.threshold=none --set outliers.loss=none",
        None,
    ),
    "levels and zeros": ("-m spqr -s w4a16 --set zero=int --set bilevel.zero_bits=3", "--set bilevel=none", None),
    "rotates nothing": (
        "-m rotate -s w4a4 --set rotate.residual=false --set rotate.values=false --set rotate.online_down=false",
        "--set rotate=none",
        None,
    ),
    "budget": ("-m rtn -s w4a16 --bits-per-weight 5", "--method spqr", None),
    "gguf groups": ("-m rtn -s w4a16g32 --set grid=gguf", "--scheme w4a16 --set scale_dtype=float16", None),
    "unclaimed": ("--recipe RULES", "--set 'keep=*.k_proj'", None),
    "calibrated head": ("--recipe HEAD", "--set keep=lm_head", None),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANNED)
def test_a_refused_plan_is_mended_by_its_remedy(
    case: str, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, remedy, said = PLANNED[case]
    rules, head = tmp_path / "rules.toml", tmp_path / "head.toml"
    keep = '{match = "*mlp*", keep = true}, {match = "*o_proj", keep = true}'
    rules.write_text(f'rules = [{{match = "*[vq]_proj", method = "rtn", scheme = "w4a16"}}, {keep}]')
    head.write_text('method = "gptq"\nscheme = "w4a16"\nrules = [{match = "lm_head"}]')
    asked = asked.replace("RULES", str(rules)).replace("HEAD", str(head))
    command = ("plan", str(tiny_llama_folder), *shlex.split(asked))
    assert run(*command) == 2
    assert (said or remedy) in capsys.readouterr().err
    assert run(*command, *shlex.split(remedy)) == 0


EXPORTED = {
    "outliers": (
        "-m easyquant -s w4a16g32-sym",
        "--set outliers.name=none",
        ("gguf", "compressed-tensors", "gptq", "awq"),
    ),
    "levels": ("-m spqr -s w4a16-sym --set outliers=none", "--set bilevel=none", ("gptq", "awq", "compressed-tensors")),
    "zeros": ("-m hqq -s w4a16g32", "--set zero=int", ("gptq", "awq", "compressed-tensors")),
    "blocks": ("-m rtn -s w4a16g16", "--scheme w4a16g32-sym", ("gguf",)),
    "rotation": (
        "-m rotate -s w4a16g32-sym --set rotate.online_down=true",
        "--set rotate.online_down=false",
        ("compressed-tensors", "gguf"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("early", [True, False], ids=["--format", "export"])
@pytest.mark.parametrize("case", EXPORTED)
def test_a_refused_export_is_mended_by_its_remedy(
    case: str, early: bool, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, remedy, targets = EXPORTED[case]
    quantize = ("quantize", str(tiny_llama_folder), *shlex.split(asked), *SMALL)
    if not early:
        assert run(*quantize, "-o", str(tmp_path / "out")) == 0
        assert run(*quantize, *shlex.split(remedy), "-o", str(tmp_path / "mended")) == 0
    for target in targets:
        capsys.readouterr()
        if early:
            assert run(*quantize, "-o", str(tmp_path / target), "--format", target) == 2
            assert remedy in capsys.readouterr().err
            continue
        export = ("export", str(tmp_path / "out"), "--to", target, "-o", str(tmp_path / f"{target}.gguf"))
        assert run(*export) == 2
        said = capsys.readouterr().err
        assert remedy in said
        assert "--allow-lossy" in said
        assert run(*export, "--allow-lossy") == 0
        assert run("export", str(tmp_path / "mended"), *export[2:-1], str(tmp_path / f"mended-{target}.gguf")) == 0


def test_options_of_commands_are_named_and_work(
    tiny_llama_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, short = str(tiny_llama_folder), tmp_path / "short.txt"
    short.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    refused = ("eval", model, "--text", str(short))
    assert run(*refused) == 2
    length = re.search(r"--length \d+", capsys.readouterr().err)
    assert length is not None
    assert run(*refused, *length.group().split()) == 0
    gptq = ("quantize", model, "-m", "gptq", "-s", "w4a16", "-o", str(tmp_path / "out"), "--calibration", str(short))
    assert run(*gptq, "--set", "calibration.window_tokens=32") == 2
    windows = re.search(r"--set calibration.windows=\d+", capsys.readouterr().err)
    assert windows is not None
    assert run(*gptq, "--set", "calibration.window_tokens=32", *windows.group().split()) == 0
    seen = ("eval", str(tmp_path / "out"), "--text", str(short), "--length", "32")
    assert run(*seen) == 2
    assert "--allow-overlap" in capsys.readouterr().err
    assert run(*seen, "--allow-overlap") == 0
    assert run("bench", model, "--prompt-tokens", "400", "--new-tokens", "4") == 2
    assert "--prompt-tokens" in capsys.readouterr().err
    assert run("bench", model, "--mode", "fast") == 2
    assert "use --mode exact" in capsys.readouterr().err


def _messages() -> list[tuple[str, str]]:
    """Place and text of every string in the sources that has an option or an assignment in it."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if "\n" not in text:
                found.append((f"{path.relative_to(SOURCE)}:{node.lineno}", text))
    return found


def test_every_key_that_is_advised_exists() -> None:
    wrong = []
    for place, text in _messages():
        for key in re.findall(r"--set '?([a-z_.]+)=", text):
            path = key.split(".")
            full = ["method", *path] if path[0] in Method.model_fields and path[0] not in Recipe.model_fields else path
            if key != "keep" and not annotations_at(Recipe, full):
                wrong.append(f"{place}: {key}")
    assert not wrong


def test_no_message_advises_settings_in_other_words() -> None:
    advice = re.compile(r"(?<!--)\b(?:set|needs|quantize with|use) [a-z_.]+ ?= ?['\"a-z0-9]")
    wrong = [f"{place}: {text}" for place, text in _messages() if advice.search(text)]
    # the arithmetic and the runtime speak to those who call them
    assert not [line for line in wrong if not line.startswith(("runtime/", "numeric/"))]
