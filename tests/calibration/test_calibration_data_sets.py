"""Data sets as calibration text: every format and kind of column gives the text it holds, or is refused by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_tokenizers import byte_level

from bitwright.calibration import chat
from bitwright.calibration.text import Text, load_text
from bitwright.calibration.tokens import Calibration, calibration_windows
from bitwright.errors import CalibrationError, EvaluationError
from bitwright.recipe import Recipe

TEXTS = ["One line.", 'Two "quoted" words,\nand a second line: café.', "", "Three."]
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def lines(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def table(path: Path, rows: list[dict[str, str]], delimiter: str) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)


WRITERS = {
    "jsonl": lines,
    "ndjson": lines,
    "JSONL": lines,
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig"),
    "list.json": lambda path, rows: path.write_text(json.dumps({"version": 1, "data": rows})),
    "lines.json": lines,
    "csv": lambda path, rows: table(path, rows, ","),
    "tsv": lambda path, rows: table(path, rows, "\t"),
    "parquet": parquet,
    "bin": parquet,  # told by its first bytes
}


@pytest.fixture
def tokenizer():
    found = byte_level()
    found.chat_template = TEMPLATE
    return found


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("column", ["text", "content"])
def test_every_format_gives_the_text_of_its_rows(tmp_path, suffix, column):
    path = tmp_path / f"set.{suffix}"
    WRITERS[suffix](path, [{"id": str(number), column: text} for number, text in enumerate(TEXTS)])
    assert load_text(path) == Text(path.name, "\n\n".join(text for text in TEXTS if text))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (SHAREGPT, "<user>hi</s>\n<assistant>yo</s>"),
        ({"prompt": "Sum of 2 and 3?", "completion": " 5"}, "Sum of 2 and 3?\n 5"),
        ({"prompt": "a", "response": "b"}, "a\nb"),
        ({"instruction": "do", "input": "it", "output": "done"}, "do\nit\ndone"),
        ({"instruction": "do", "input": "", "output": "done"}, "do\ndone"),
        ({"instruction": "do", "output": "done"}, "do\ndone"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "<user>hi</s>"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, "<user>hi</s>"),
    ],
)
def test_every_known_kind_of_row_becomes_text(tmp_path, tokenizer, row, expected):
    lines(tmp_path / "set.jsonl", [row, row])
    found = load_text(tmp_path / "set.jsonl", tokenizer=tokenizer)
    joint = "\n" if found.templated else "\n\n"
    assert found.content == expected + joint + expected
    assert found.templated == ("messages" in row or "conversations" in row)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_conversations_become_windows_with_the_special_tokens_of_the_template_alone(tmp_path, tokenizer, suffix):
    rows = [{"messages": [{"role": "user", "content": f"café number {number}"}]} for number in range(40)]
    path = tmp_path / f"set.{suffix}"
    WRITERS[suffix](path, rows)
    whole = "\n".join(f"<user>café number {number}</s>" for number in range(40))
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    windows = calibration_windows(Calibration(text=str(path), windows=2, window_tokens=64), tokenizer, 0).ids
    cut = [expected[start : start + 64] for start in range(0, len(expected) - 63, 64)]
    assert all(window.tolist() in cut for window in windows)


def test_the_user_names_the_column_of_several(tmp_path, tokenizer):
    path = tmp_path / "set.jsonl"
    lines(path, [{"prompt_id": "7", "text": "short", "messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(EvaluationError, match=r"be messages and text; name one: --field messages; columns: prompt"):
        load_text(path, tokenizer=tokenizer)
    with pytest.raises(CalibrationError, match=r"name one: --set calibration\.field=messages;"):
        calibration_windows(Calibration(text=str(path)), tokenizer, 0)
    assert load_text(path, field="text").content == "short"
    assert load_text(path, field="prompt_id").content == "7"
    assert load_text(path, field="messages", tokenizer=tokenizer).content == "<user>hi</s>"
    with pytest.raises(EvaluationError, match=r"no column 'answer', but prompt_id, text, messages;"):
        load_text(path, field="answer")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"title": "x"}\n', r"has the columns title; needed one of messages.*--field NAME"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', "column 'text' holds int '3', needed text in every row"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"line 2 holds list '\[1\]', needed one object a line"),
        ("a.jsonl", '{"text": ""}\n', "text is empty in every row"),
        ("a.jsonl", '{"text": "a\\u0000b"}\n', "holds a NUL byte"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.json", "[1, 2]", "holds int '1' where a row should be"),
        ("a.json", '[{"text": "x"}', "not JSON in UTF-8"),
        ("a.json", "{", "not JSON in UTF-8"),
        ("a.json", '["x"', "holds str"),
        ("a.csv", "text,id\nab,1,2\n", "line 2 has more or fewer cells than the first line, text, id"),
        ("a.csv", "text\n\x80\n", "not a table in UTF-8"),
        ("a.parquet", "no", "needed a Parquet file"),
    ],
)
def test_data_sets_that_cannot_be_read_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(EvaluationError, match=message) as found:
        load_text(path)
    assert str(path) in str(found.value)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    with pytest.raises(EvaluationError, match=r"a\.parquet: not a Parquet file that can be read"):
        load_text(tmp_path / "a.parquet")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(EvaluationError, match=r"pip install 'bitwright\[datasets\]'"):
        load_text(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "content", ['{"text": "x"}\n{"text": "y"}\n', '[{"text": "x"}]', '{\n "text": "x"\n}', '\ufeff[\n {"a": [1]}]']
)
def test_prose_that_is_json_is_refused_unless_it_is_asked_for_as_it_is(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"a\.txt: holds JSON.*rename it to a\.jsonl.*--layout plain"):
        load_text(path)
    with pytest.raises(CalibrationError, match=r"use --set calibration\.layout=plain to take it"):
        calibration_windows(Calibration(text=str(path)), None, 0)
    assert load_text(path, layout="plain").content == content.removeprefix("\ufeff")
    path = path.rename(tmp_path / "a.jsonl")
    assert load_text(path, layout="plain").content == content.removeprefix("\ufeff")


@pytest.mark.parametrize("content", ["{ a set } of words\n", "[1] A footnote.\n", '["a", "b"]\n', "{}\n"])
def test_prose_with_brackets_is_prose(tmp_path, content):
    (tmp_path / "a.md").write_text(content)
    assert load_text(tmp_path / "a.md").content == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08 packed", "a gzip file.*gunzip -k FILE"),
        (b"PK\x03\x04 packed", "a zip file"),
        (b"%PDF-1.7", "a PDF file"),
        ("text".encode("utf-16"), "UTF-16 text.*iconv -f UTF-16"),
        ("text".encode("utf-16-le"), "NUL byte at byte 1"),
        (b"words " * 20_000 + b"\0", "NUL byte at byte 120000"),
        (b"words " * 20_000 + b"\xff", "not UTF-8 at byte 120000"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
def test_files_that_are_no_text_are_refused_with_what_they_are(tmp_path, content, message, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    if suffix != "txt" and content.startswith(b"words"):
        message = "."  # not rows of text either, whatever is told first
    with pytest.raises(EvaluationError, match=message):
        load_text(path)


def test_conversations_need_a_template(tmp_path):
    lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}], "text": 7}])
    with pytest.raises(EvaluationError, match=r"a\.jsonl: holds conv.*no chat template.*chat_template\.jinja"):
        load_text(tmp_path / "a.jsonl", tokenizer=byte_level())


def test_of_several_templates_the_default_is_taken_and_said(tmp_path, tokenizer):
    lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi there " * 9}]}] * 9)
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    settings = Calibration(text=str(tmp_path / "a.jsonl"), windows=1, window_tokens=32)
    found = calibration_windows(settings, tokenizer, 0)
    assert found.label.endswith("(chat template default of default, tool_use)")
    tokenizer.chat_template = {"one": TEMPLATE, "two": TEMPLATE}
    with pytest.raises(CalibrationError, match="has the chat templates one, two, none of them called default"):
        calibration_windows(settings, tokenizer, 0)


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no user') }}", "{{ messages[9].content }}"])
def test_templates_that_fail_are_an_error_of_ours(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(EvaluationError, match="chat template fails with"):
        chat.render(tokenizer, [{"role": "user", "content": "hi"}])


def test_a_field_of_prose_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(EvaluationError, match="is prose and has no field 'text'"):
        load_text(tmp_path / "a.txt", field="text")


def test_recipes_that_name_no_field_keep_their_identity():
    assert "field" not in Recipe(method="gptq", scheme="w4a16").model_dump(mode="json")["calibration"]
    named = Recipe(method="gptq", scheme="w4a16", calibration=Calibration(field="body"))
    assert named.model_dump(mode="json")["calibration"]["field"] == "body"
    assert Recipe.model_validate(named.model_dump(mode="json")) == named


def test_rows_are_read_only_as_far_as_they_are_needed(tmp_path):
    lines(tmp_path / "a.jsonl", [{"text": f"row {number}"} for number in range(5)] + [[]])
    found = load_text(tmp_path / "a.jsonl", characters=8)
    assert (found.content, found.whole) == ("row 0\n\nrow 1", False)


def test_a_stub_without_templates_has_none():
    with pytest.raises(EvaluationError, match="no chat template"):
        chat.chosen_template(SimpleNamespace())
