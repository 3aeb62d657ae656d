"""Large files: windows from a few places of the file, and the same tokens piece by piece as in one go."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from small_tokenizers import WORDS, byte_level, sentencepiece_like, word_level

from bitwright.calibration import large, text, tokenize
from bitwright.calibration.large import LargeProse, LargeRows
from bitwright.calibration.text import Text, builtin, load_text
from bitwright.calibration.tokenize import token_ids
from bitwright.calibration.tokens import Calibration, calibration_windows
from bitwright.errors import CalibrationError, EvaluationError
from bitwright.evaluate import token_windows

LIMIT = 20_000


TOKENIZERS = {"byte-level": byte_level, "sentencepiece": sentencepiece_like, "words": word_level}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture
def small(monkeypatch):
    """What counts as large, and pieces, made small."""
    monkeypatch.setattr(text, "WHOLE_BYTES", LIMIT)
    monkeypatch.setattr(large, "PIECE_BYTES", 4096)
    monkeypatch.setattr(tokenize, "PIECE_CHARACTERS", 3000)
    monkeypatch.setattr(tokenize, "SHARED_CHARACTERS", 600)


CONTENTS = {
    "lines": WORDS[:20_000],
    "one line": WORDS[:20_000].replace("\n", " "),
    "no spaces": WORDS[:9_000].replace("\n", "").replace(" ", ""),
    "white space": WORDS[:4000] + " " * 5000 + "\n\n\n" * 900 + WORDS[:4000],
    "repeated": "la" * 9000,
    "accents": "é" * 9000 + WORDS[:2000],
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("special", [True, False])
def test_pieces_give_the_tokens_of_the_whole(small, tokenizer, content, special):
    expected = tokenizer(content, verbose=False, add_special_tokens=special)["input_ids"]
    assert token_ids(tokenizer, Text("x", content), special=special).tolist() == expected


def test_real_text_in_pieces_gives_the_tokens_of_the_whole(monkeypatch):
    monkeypatch.setattr(tokenize, "PIECE_CHARACTERS", 2**14)
    content = builtin("calibration").content
    tokenizer = byte_level()
    assert token_ids(tokenizer, Text("x", content)).tolist() == tokenizer(content, verbose=False)["input_ids"]


@pytest.fixture(params=["prose", "one line", "wikitext", "jsonl"])
def file(request, tmp_path, small):
    """A large file, and the whole text that it holds."""
    path = tmp_path / "large.txt"
    rows = WORDS.split("\n")[:-1]
    if request.param == "jsonl":
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps({"id": "x" * 50, "text": row}) + "\n" for row in rows))
        return path, "\n\n".join(rows)
    content = {
        "prose": WORDS,
        "one line": " ".join(rows),
        "wikitext": " = Title = \n" + "".join(f" {row} \n" for row in rows),
    }[request.param]
    path.write_text(content, encoding="utf-8")
    return path, content if request.param != "wikitext" else "\n\n".join(
        line + "\n" for line in content.split("\n")[:-1]
    )


def test_windows_of_a_large_file_are_disjoint_parts_of_its_text(file, tokenizer):
    path, content = file
    assert isinstance(load_text(path), LargeProse | LargeRows)
    whole = tokenizer(content, verbose=False, add_special_tokens=False)["input_ids"]
    # a row may begin otherwise than what follows another one, by a token for the space in front of a text
    places = {tuple(whole[start + 1 : start + 32]): start for start in range(len(whole) - 31)}
    settings = Calibration(text=str(path), windows=6, window_tokens=32)
    found = calibration_windows(settings, tokenizer, 5)
    starts = sorted(places[tuple(window.tolist()[1:])] for window in found.ids)
    assert all(second - first >= 32 for first, second in pairwise(starts))
    assert torch.equal(calibration_windows(settings, tokenizer, 5).ids, found.ids)
    fewer = calibration_windows(settings.model_copy(update={"windows": 2}), tokenizer, 5)
    assert torch.equal(fewer.ids, found.ids[:2])
    assert not torch.equal(calibration_windows(settings, tokenizer, 6).ids, found.ids)
    assert found.label == f"{path.name}@{load_text(path).sha256[:12]}"


def test_the_start_of_a_large_file_gives_the_windows_of_the_whole(file, tokenizer):
    path, content = file
    expected = token_windows(tokenizer, Text(path.name, content), 48, 5)
    found = token_windows(tokenizer, load_text(path), 48, 5)
    assert torch.equal(found.ids, expected.ids)
    assert (found.dropped_tokens, found.total_tokens) == (None, None)
    everything = token_windows(tokenizer, load_text(path), 48)
    assert torch.equal(everything.ids, token_windows(tokenizer, Text(path.name, content), 48).ids)
    assert everything.total_tokens is not None


def test_only_what_the_windows_need_is_read(tmp_path, monkeypatch):
    path = tmp_path / "huge.txt"
    path.write_text(WORDS * 60)
    read = []
    real = large.read_range
    monkeypatch.setattr(large, "read_range", lambda *wanted: read.append(wanted[2]) or real(*wanted))
    calibration_windows(Calibration(text=str(path), windows=4, window_tokens=32), byte_level(), 0)
    token_windows(byte_level(), load_text(path), 64, 4)
    assert path.stat().st_size > 5_000_000
    # the two identities are a mebibyte from either end, each
    assert sum(read) < 4 * 2**20 + 600_000


def test_where_slots_are_too_few_all_windows_of_the_file_are_candidates(small, tmp_path):
    path = tmp_path / "large.txt"
    path.write_text(WORDS)
    tokenizer = byte_level()
    tokens = tokenizer(WORDS, verbose=False)["input_ids"]
    windows = len(tokens) // 32
    found = calibration_windows(Calibration(text=str(path), windows=windows, window_tokens=32), tokenizer, 0)
    assert sorted(found.ids.flatten().tolist()) == sorted(tokens[: windows * 32])
    with pytest.raises(CalibrationError, match=rf"found {len(tokens)} tokens.*calibration\.windows={windows} or less"):
        calibration_windows(Calibration(text=str(path), windows=windows + 1, window_tokens=32), tokenizer, 0)


def test_a_large_file_without_tokens_is_refused_and_not_read_for_ever(small, tmp_path):
    path = tmp_path / "blank.txt"
    path.write_text("A start.\n" + "\n" * 300_000)
    with pytest.raises(CalibrationError, match=r"0 of 1 windows of 32 tokens were found in 300009 bytes"):
        calibration_windows(Calibration(text=str(path), windows=1, window_tokens=32), word_level(), 0)


def test_rows_longer_than_a_slot_are_used_once(small, tmp_path):
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} {WORDS[:6000]}"}) + "\n" for number in range(8)))
    tokenizer = byte_level()
    found = calibration_windows(Calibration(text=str(path), windows=4, window_tokens=32), tokenizer, 0).ids
    assert len({tuple(window.tolist()) for window in found}) == 4


@pytest.mark.parametrize(
    ("name", "tail", "message"),
    [
        ("a.txt", b"\xff" * 30_000, "not UTF-8 at byte"),
        ("a.txt", b"\0" * 30_000, "NUL byte at byte"),
        ("a.jsonl", b"{}]\n" * 9000, "the line at byte .* is not JSON"),
        ("a.jsonl", b'{"text": 5}\n' * 3000, "holds int '5'"),
    ],
)
def test_damage_that_is_met_is_refused_by_place(small, tmp_path, name, tail, message):
    path = tmp_path / name
    path.write_bytes(b'{"text": "x"}\n' * 400 + tail)
    layout = "plain" if name == "a.txt" else "auto"
    with pytest.raises(EvaluationError, match=message):
        token_windows(byte_level(), load_text(path, layout=layout), 2048)


def test_lost_blank_rows_of_a_large_original_are_refused(small, tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(" = Title = \n" + "".join(f" {row} \n" for row in WORDS.split("\n")[:-1]))
    with pytest.raises(EvaluationError, match=r"too large to rebuild them.*--layout wikitext"):
        load_text(path, layout="wikitext-original")
    assert load_text(path).layout == "wikitext"
    path.write_text(" \n = Title = \n \n" + "".join(f" {row} \n \n" for row in WORDS.split("\n")[:-1]))
    whole = " \n = Title = \n \n" + "".join(f" {row} \n \n" for row in WORDS.split("\n")[:-1])
    joined = "\n\n".join(line + "\n" if line.strip() else "" for line in whole.split("\n")[:-1])
    found = token_ids(byte_level(), load_text(path, layout="wikitext-original"))
    assert found.tolist() == byte_level()(joined, verbose=False)["input_ids"]
