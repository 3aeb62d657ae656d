"""A quantized model is not measured on text that it was calibrated on, unless asked to."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import bitwright
from bitwright.calibration.tokens import Calibration, calibration_windows
from bitwright.checkpoint.load import load_model

OPTIONS = bitwright.EvalOptions(windows=None, length=128)


def write(path: Path, seed: int) -> Path:
    path.write_text("".join(random.Random(seed).choices("abcdefgh ", k=900)))
    return path


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "seen.txt", 0), write(tmp_path / "unseen.txt", 1)


@pytest.fixture
def calibrated(tmp_path, tiny_llama_folder, texts):
    out = tmp_path / "out"
    bitwright.quantize(str(tiny_llama_folder), out, "rtn", "w4a16g32")
    tokenizer = load_model(str(tiny_llama_folder)).tokenizer
    settings = Calibration(text=str(texts[0]), windows=3, window_tokens=128)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["calibration"] = calibration_windows(settings, tokenizer, seed=0).to_json()
    (out / "manifest.json").write_text(json.dumps(manifest))
    return str(out)


def test_calibration_text_is_refused_unless_allowed(calibrated, texts, tiny_llama_folder):
    message = r"text 'seen\.txt': holds 3 of the 3 windows that .*out was calibrated on.*--allow-overlap"
    with pytest.raises(bitwright.EvaluationError, match=message):
        bitwright.eval(calibrated, against="no model is read in vain", text=texts[0], options=OPTIONS)
    allowed = bitwright.EvalOptions(windows=None, length=128, allow_overlap=True)
    assert bitwright.eval(calibrated, text=texts[0], options=allowed).windows > 3
    # the float model saw nothing
    assert bitwright.eval(str(tiny_llama_folder), text=texts[0], options=OPTIONS).windows > 3


def test_other_text_and_other_folders_pass(calibrated, texts):
    assert bitwright.eval(calibrated, text=texts[1], options=OPTIONS).windows > 3
    path = Path(calibrated) / "manifest.json"
    manifest = json.loads(path.read_text())
    for calibration in (None, {}, {"fingerprints": []}):
        path.write_text(json.dumps(manifest | {"calibration": calibration}))
        assert bitwright.eval(calibrated, text=texts[0], options=OPTIONS).perplexity > 0


def test_windows_beyond_the_ones_measured_do_not_count(calibrated, texts):
    torch.manual_seed(0)
    one = bitwright.EvalOptions(windows=1, length=16)
    assert bitwright.eval(calibrated, text=texts[0], options=one).windows == 1
