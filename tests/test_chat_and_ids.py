"""A chat template is used, or its lack is said; token ids of the user's own need no tokenizer anywhere."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import bitwright
from bitwright.cli import app
from bitwright.errors import CheckpointError, EvaluationError

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def folder(tiny_llama_folder, tmp_path):
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


@pytest.fixture
def bare(folder):
    """A model without a tokenizer."""
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            path.unlink()
    return folder


@pytest.fixture
def ids(tmp_path):
    path = tmp_path / "ids.safetensors"
    save_file({"ids": torch.randint(0, 320, (4, 64), dtype=torch.int32)}, path)
    return path


def recipe(*settings):
    few = ("calibration.windows=2", "calibration.window_tokens=64")
    return bitwright.load_recipe("gptq", "w4a16g32", None, [*few, *settings])


def test_chat_without_a_template_is_refused(folder):
    with pytest.raises(EvaluationError, match=rf"^{re.escape(str(folder))}: .*no chat template.*leave --chat out"):
        bitwright.generate(str(folder), "hi", tokens=2, chat=True)


def test_chat_goes_through_the_template_and_says_which(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    found = bitwright.generate(str(folder), "hi", tokens=4, chat=True)
    assert found.template is None
    assert found.text == bitwright.generate(str(folder), "user: hi\n", tokens=4).text
    (folder / "chat_template.jinja").unlink()
    place = folder / "tokenizer_config.json"
    templates = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "{{ tools }}"}]
    place.write_text(json.dumps(json.loads(place.read_text()) | {"chat_template": templates}))
    again = bitwright.generate(str(folder), "hi", tokens=4, chat=True)
    assert (again.text, again.template) == (found.text, "chat template default of default, tool_use")


def test_a_missing_tokenizer_is_told_by_the_name_of_the_model(bare, tmp_path, text_file):
    message = rf"^{re.escape(str(bare))}: no tokenizer .* copy the tokenizer files"
    with pytest.raises(CheckpointError, match=message):
        bitwright.quantize(str(bare), tmp_path / "out", recipe=recipe(f"calibration.text={text_file}"))
    with pytest.raises(CheckpointError, match=message):
        bitwright.eval(str(bare), text=text_file)
    with pytest.raises(CheckpointError, match=message):
        bitwright.generate(str(bare), "hi")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_token_ids_need_no_tokenizer(bare, tmp_path, ids):
    bitwright.quantize(str(bare), tmp_path / "out", recipe=recipe(f"calibration.text={ids}"))
    options = bitwright.EvalOptions(windows=2, length=48, allow_overlap=True)
    found = bitwright.eval(str(tmp_path / "out"), against=str(bare), text=ids, options=options)
    assert (found.windows, found.length) == (2, 48)
    assert found.protocol.startswith("ids:48|windows:2|text:ids.safetensors|tokens:")
    with pytest.raises(EvaluationError, match=r"holds 2 of the 2 windows that .* was calibrated on"):
        bitwright.eval(str(tmp_path / "out"), text=ids)
    ran = CliRunner().invoke(app, ["analyze", str(bare), "-o", str(tmp_path / "report"), "--calibration-set", str(ids)])
    assert "no tokenizer" not in ran.output
    assert "needed at least [8, 256]" in str(ran.exception)


def test_token_ids_beyond_the_model_are_refused(bare, tmp_path, ids):
    save_file({"ids": load_file(ids)["ids"] + 300}, ids)
    with pytest.raises(bitwright.CalibrationError, match=r"ids from .* needed 0 to 319"):
        bitwright.quantize(str(bare), tmp_path / "out", recipe=recipe(f"calibration.text={ids}"))
    with pytest.raises(EvaluationError, match=r"token ids from .* needed 0 to 319"):
        bitwright.eval(str(bare), text=ids)


@pytest.mark.parametrize("wrong", [torch.zeros(4, 64), torch.zeros(4, 64, dtype=torch.bool), torch.zeros(64).int()])
def test_token_windows_of_another_kind_are_refused(bare, tmp_path, ids, wrong):
    save_file({"ids": wrong}, ids)
    with pytest.raises(EvaluationError, match=r"token windows .* needed integers \[windows, tokens\]"):
        bitwright.eval(str(bare), text=ids)


def test_a_data_set_is_evaluated_by_the_column_that_is_named(folder, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps({"text": "a b c " * 9, "body": "c d e " * 9}) + "\n" for _ in range(9)))
    ran = CliRunner().invoke(app, ["eval", str(folder), "--text", str(path), "--length", "64", "--windows", "2"])
    assert isinstance(ran.exception, SystemExit) or ran.exit_code == 0, ran.output
    (tmp_path / "two.jsonl").write_text(path.read_text().replace('"body"', '"content"'))
    options = bitwright.EvalOptions(windows=2, length=64)
    with pytest.raises(EvaluationError, match="could be text and content"):
        bitwright.eval(str(folder), text=tmp_path / "two.jsonl", options=options)
    named = bitwright.EvalOptions(windows=2, length=64, field="content")
    assert bitwright.eval(str(folder), text=tmp_path / "two.jsonl", options=named).windows == 2
