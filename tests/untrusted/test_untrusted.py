"""The readers of what others wrote: one JSON reader, one check of names, patterns that cannot hang, one boundary."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import torch

from bitwright.errors import CheckpointError, FormatError, RecipeError
from bitwright.untrusted import json_file
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.ids import check_ids, embedding_rows
from bitwright.untrusted.json_file import parse_json, read_json
from bitwright.untrusted.names import inside, shards_of
from bitwright.untrusted.patterns import Pattern, compiled

# --- the boundary ------------------------------------------------------------------------------------------

FOREIGN = [
    KeyError("shape"),
    IndexError("list index out of range"),
    RecursionError("maximum recursion depth exceeded"),
    TypeError("unhashable"),
    OverflowError("too large"),
    MemoryError(),
    RuntimeError("[enforce fail] not enough memory"),
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    Exception("tokenizers raises these"),
]


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_what_content_raises_is_ours(error: Exception) -> None:
    said = r"config\.json: cannot be .*; download it"
    with pytest.raises(FormatError, match=said) as caught, reading("config.json", FormatError, "download it"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RecipeError("mine"), OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()], ids=str
)
def test_what_is_ours_or_of_the_machine_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("config.json", FormatError):
        raise error
    assert caught.value is error


# --- JSON --------------------------------------------------------------------------------------------------

REFUSED = {
    "empty": (b"", "not JSON"),
    "cut": (b'{"a": 1', "not JSON"),
    "list": (b"[1]", "holds list, needed an object"),
    "not UTF-8": (b'{"a": "\xff"}', "not JSON"),
    "NaN": (b'{"a": NaN}', "NaN, needed a number"),
    "contradiction": (b'{"a": {"b": 1, "b": 2}}', "'b' occurs twice"),
    "deep": (b'{"a": ' * 65 + b"1" + b"}" * 65, "nested more than 64"),
    "bottomless": (b'{"a": ' * 100_000, "not JSON"),
    "half a character": (rb'{"\ud800": 1}', "not JSON"),
    "number without end": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_json_that_is_refused(tmp_path: Path, case: str) -> None:
    data, said = REFUSED[case]
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        read_json(path, CheckpointError)


def test_json_that_is_read() -> None:
    text = rb'{"limits": [0.0, Infinity], "same": 1, "same": 1, "name": "\u00e9\ud83d\ude00"}'
    assert parse_json(text, "x", FormatError) == json.loads(text)
    deep = b'{"a": ' * 64 + b"1" + b"}" * 64
    assert parse_json(deep, "x", FormatError)


def test_json_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FormatError, match="missing; it lists"):
        read_json(tmp_path / "no.json", FormatError, "it lists the shards")
    with pytest.raises(FormatError, match="cannot be read"):
        read_json(tmp_path, FormatError)
    path = tmp_path / "some.json"
    path.write_text('{"a": [1, 2, 3]}')
    monkeypatch.setattr(json_file, "LARGEST_BYTES", 15)
    with pytest.raises(FormatError, match="16 bytes long, at most 15"):
        read_json(path, FormatError)
    monkeypatch.setattr(json_file, "LARGEST_BYTES", 100)
    monkeypatch.setattr(json_file, "LARGEST_VALUES", 3)
    with pytest.raises(FormatError, match="4 values, more than any model has"):
        read_json(path, FormatError)


# --- names -------------------------------------------------------------------------------------------------

OUTSIDE = [
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:x",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "\x1b[1m",
    "x" * 256,
    7,
    None,
    ["a"],
]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_names_out_of_the_folder(tmp_path: Path, name: object) -> None:
    for check in (
        lambda: inside(tmp_path, name, "index", FormatError),
        lambda: shards_of(tmp_path, [name], "i", FormatError),
    ):
        with pytest.raises(FormatError, match="the file is damaged"):
            check()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model", "model.safetensors.pkl"])
def test_files_that_could_run_programs(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name, "index", CheckpointError) == tmp_path / name
    with pytest.raises(CheckpointError, match=rf"index: names the file '{re.escape(name)}', needed files that end in"):
        shards_of(tmp_path, ["model.safetensors", name], "index", CheckpointError)


def test_names_in_the_folder(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "b.safetensors", "model-00001-of-00002.safetensors"]
    found = shards_of(tmp_path, names, "index", FormatError)
    assert list(found.items()) == [(name, tmp_path / name) for name in names[:2]]


# --- patterns ----------------------------------------------------------------------------------------------

NAMES = [
    "model.layers.0.mlp.down_proj",
    "lm_head",
    "model.layers.12.self_attn.q_proj",
    "model.layers.1.mlp.experts.3.up",
]
LIKE_PYTHON = [
    r".*\.mlp\.down_proj$",
    r"^(?!.*experts).*",
    r"(?!.*experts)(?=model)",
    r"^(?!.*(mtp|experts)).*proj$",
    r"(?!a[]()]b|\)c)lm.*",
    r"lm_head\Z",
    r"model\.layers\.(?:1|12)\..*",
    r"(?i)LM_.*",
    r"a|lm_head",
    r"\w+$",
    r"model\.layers\.\d{1,2}\..*",
    r"",
]


@pytest.mark.parametrize("expression", LIKE_PYTHON)
def test_patterns_match_as_pythons_do(expression: str) -> None:
    pattern = Pattern(expression, "dynamic")
    assert [pattern.matches(name) for name in NAMES] == [re.match(expression, name) is not None for name in NAMES]


@pytest.mark.parametrize("expression", [r"(a+)+$", r"(a|a)*$", r"(.*)*b", r"(?!(a+)+$)a*$", r"(a?){64}a{15}$"])
def test_patterns_that_would_backtrack_for_ever(expression: str) -> None:
    pattern = Pattern(expression, "dynamic")
    assert pattern.matches("a" * 200 + "!") in (True, False)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("(a", "is no expression"),
        ("a{2000}", "repeats more than 1000 times"),
        ("((a{40}){40}){40}", "repeats more than 1000 times"),
        ("x" * 1001, "has 1001 characters"),
        ("(" * 900, "is no expression"),
        (r"(?P<x>a)(?P=x)", "cannot be matched in linear time"),
        (r"(?<=a)b", "cannot be matched in linear time"),
        (r"(?!a)b|c", "cannot be matched in linear time"),
        (r"[[a]b]", "is no expression"),
    ],
)
def test_patterns_that_are_refused(expression: str, said: str) -> None:
    with pytest.raises(FormatError, match=f"dynamic: .*{said}"):
        Pattern(expression, "dynamic")


def test_a_bound_on_their_number() -> None:
    assert compiled({"+:a": "a"}, "dynamic")["+:a"].matches("abc")
    with pytest.raises(FormatError, match="1001 expressions, at most 1000"):
        compiled({str(number): "a" for number in range(1001)}, "dynamic")


# --- ids ---------------------------------------------------------------------------------------------------


def test_ids_beyond_the_embedding() -> None:
    rows = embedding_rows(torch.nn.ModuleList())
    assert rows is None
    check_ids(torch.tensor([[0, 9]]), 10, "prompt", CheckpointError)
    check_ids(torch.tensor([10**6]), None, "prompt", CheckpointError)
    for ids in ([10], [-1, 3]):
        with pytest.raises(CheckpointError, match=r"prompt: token ids from .*, needed 0 to 9.*use the tokenizer"):
            check_ids(torch.tensor(ids), 10, "prompt", CheckpointError)
