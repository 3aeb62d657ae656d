"""Calibration windows: disjoint, chosen by the seed, from every kind of text, or refused with a remedy."""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from bitwright.calibration.overlap import fingerprints
from bitwright.calibration.text import builtin, load_text
from bitwright.calibration.tokens import Calibration, TokenWindows, calibration_windows
from bitwright.errors import CalibrationError
from bitwright.evaluate import token_windows


class Words:
    """One token per word, numbered by its text; a BOS token in front, as default special tokens have it."""

    bos_token_id = 0

    def __call__(self, text, *, verbose=True):
        assert not verbose, "the tokenizer may warn"
        digests = (hashlib.sha256(word.encode()).digest() for word in text.split())
        return {"input_ids": [0, *(1 + int.from_bytes(digest[:4], "big") for digest in digests)]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{number}" for number in range(1000)))
    return path


def settings(text, windows=4, window_tokens=64, **more):
    return Calibration(text=str(text), windows=windows, window_tokens=window_tokens, **more)


def test_windows_are_disjoint_pieces_of_the_text_tokenized_once(file):
    stream = torch.tensor(Words()(file.read_text(), verbose=False)["input_ids"])
    found = calibration_windows(settings(file, windows=15), Words(), seed=3)
    assert (found.ids.shape, found.ids.dtype) == ((15, 64), torch.int64)
    pieces = {tuple(piece.tolist()) for piece in stream[: 15 * 64].reshape(15, 64)}
    assert {tuple(window.tolist()) for window in found.ids} == pieces
    # the same cut as the evaluation protocol's: BOS at the start of the text only
    assert pieces == {tuple(w.tolist()) for w in token_windows(Words(), load_text(file), 64).ids}


def test_the_seed_decides_and_fewer_windows_are_the_first_ones(file):
    first = calibration_windows(settings(file), Words(), seed=0)
    again = calibration_windows(settings(file), Words(), seed=0)
    other = calibration_windows(settings(file), Words(), seed=1)
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256 != other.sha256
    assert torch.equal(calibration_windows(settings(file, windows=2), Words(), seed=0).ids, first.ids[:2])


def test_the_record_for_the_manifest(file):
    found = calibration_windows(settings(file), Words(), seed=0)
    record = found.to_json()
    assert json.loads(json.dumps(record)) == record
    assert record["fingerprints"] == fingerprints(found.ids)
    assert (record["windows"], record["window_tokens"]) == (4, 64)
    assert record["text"] == found.label == f"words.txt@{load_text(file).sha256[:12]}"
    assert record["sha256"] == hashlib.sha256(found.ids.numpy().astype("<i8").tobytes()).hexdigest()


def test_builtin_is_the_calibration_half():
    text = builtin("calibration")
    found = calibration_windows(Calibration(), Words(), seed=0)
    assert found.ids.shape == (32, 512)
    assert found.label == f"{text.name}@{text.sha256[:12]}"
    assert set(found.ids.flatten().tolist()) <= set(Words()(text.content, verbose=False)["input_ids"])


def test_layout_is_that_of_evaluation_text(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(" = A = \n" + " word \n" * 40)
    found = calibration_windows(settings(path, windows=1, window_tokens=32), Words(), 0)
    assert found.label.startswith("wiki.txt@")
    with pytest.raises(CalibrationError, match=r"no known original.*--set calibration.layout=wikitext"):
        calibration_windows(settings(path, layout="wikitext-original"), Words(), 0)


@pytest.mark.parametrize(
    ("windows", "window_tokens", "remedy"), [(16, 64, "windows=15"), (1, 2000, "window_tokens=1001")]
)
def test_too_little_text_names_what_was_found_needed_and_the_remedy(file, windows, window_tokens, remedy):
    message = rf"words\.txt': found 1001 .* need {windows * window_tokens}; .*--set calibration.{remedy} or less"
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(settings(file, windows, window_tokens), Words(), 0)


def test_missing_files_are_an_error_of_calibration(tmp_path):
    with pytest.raises(CalibrationError, match=r"calibration text: .*none\.txt: cannot be read"):
        calibration_windows(settings(tmp_path / "none.txt"), Words(), 0)


def test_self_asks_the_sampler():
    asked = []

    def sample(*wanted):
        asked.append(wanted)
        return torch.arange(4 * 64).reshape(4, 64)

    found = calibration_windows(settings("self"), None, 7, sample)
    assert asked == [(4, 64, 7)]
    assert found.label == "self"
    assert torch.equal(found.ids, sample())
    with pytest.raises(CalibrationError, match="no sampler was given"):
        calibration_windows(settings("self"), None, 0)
    with pytest.raises(CalibrationError, match=r"gave torch.float32 \[2, 64\], needed torch.int64 \[4, 64\]"):
        calibration_windows(settings("self"), None, 0, lambda *_: torch.zeros(2, 64))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`; what it was asked, and the rows that it gives."""
    state = SimpleNamespace(asked=[], read=0, rows=[{"text": text} for text in ("", "one two", " \n", "three")] * 99)

    def load_dataset(name, config, *, split, streaming):
        state.asked.append((name, config, split, streaming))
        for row in state.rows:
            state.read += 1
            yield row

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return state


def test_hub_text_is_streamed_until_there_is_enough(hub):
    found = calibration_windows(settings("hf:owner/name:config:test", windows=1, window_tokens=32), Words(), 0)
    assert hub.asked == [("owner/name", "config", "test", True)]
    assert found.ids[0].tolist() == Words()("one two three " * 11, verbose=False)["input_ids"][:32]
    assert hub.read < len(hub.rows)
    assert found.label.startswith("owner/name:config:test@")


def test_hub_defaults(hub):
    calibration_windows(settings("hf:name", windows=1, window_tokens=32), Words(), 0)
    assert hub.asked == [("name", None, "train", True)]


def test_hub_problems_are_named(hub, monkeypatch):
    hub.rows = [{"title": "x"}]
    with pytest.raises(CalibrationError, match=r"name: has the columns title; needed one of messages, .*field=NAME"):
        calibration_windows(settings("hf:name"), Words(), 0)

    def absent(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", absent)
    with pytest.raises(CalibrationError, match="the hub gave ConnectionError: no network; check name"):
        calibration_windows(settings("hf:name"), Words(), 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install 'bitwright\[datasets\]'"):
        calibration_windows(settings("hf:name"), Words(), 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"text": ""},
        {"text": "hf:"},
        {"text": "hf:name::test"},
        {"text": "hf:a:b:c:d"},
        {"windows": 0},
        {"window_tokens": 31},
        {"layout": "book"},
        {"tokens": 5},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        Calibration(**wrong)


def test_windows_are_hashed_as_stored():
    ids = torch.arange(12).reshape(4, 3)
    assert TokenWindows(ids.T, "x").sha256 == TokenWindows(ids.T.contiguous(), "x").sha256
