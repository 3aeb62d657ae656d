"""Calibration sets: seeds, halves, what is in them, and what is refused."""

from __future__ import annotations

import string

import pytest
import torch

from bitwright.analyze import corpora, sets
from bitwright.analyze.sets import SetMaker, parse_set
from bitwright.calibration.tokens import Calibration, calibration_windows
from bitwright.checkpoint.source import HuggingFaceSource
from bitwright.errors import CalibrationError

WINDOWS, TOKENS = 3, 32
CATALOGUE = r"""
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"

msgid "Hello %(name)s, <b>welcome</b>"
msgstr "Guten Tag %(name)s, <b>herzlich</b> willkommen"

msgid "A long one"
msgstr ""
"Eine lange Nachricht, die sich \"über\" "
"zwei Zeilen zieht"

msgid "{n} file"
msgid_plural "{n} files"
msgstr[0] "Eine einzige Datei"
msgstr[1] "Viele verschiedene Dateien"
"""


@pytest.fixture(scope="module", autouse=True)
def _little_code():
    """Parse little of the standard library, and forget it afterwards."""
    before = corpora.CODE_CHARACTERS
    corpora.CODE_CHARACTERS = 40_000
    corpora._modules.cache_clear()
    yield
    corpora.CODE_CHARACTERS = before
    corpora._modules.cache_clear()
    corpora.task.cache_clear()


@pytest.fixture
def maker(tiny_llama_folder, tmp_path):
    return SetMaker(HuggingFaceSource(tiny_llama_folder), WINDOWS, TOKENS, tmp_path / "samples")


@pytest.mark.parametrize("spelled", ["task", "code", "nonsense", "random", "self", "self:0.5", "self:0"])
def test_the_seed_decides_the_tokens(maker, tiny_llama_folder, tmp_path, spelled):
    drawn = maker.draw(parse_set(spelled), 0)
    assert drawn.ids.shape == (WINDOWS, TOKENS)
    assert drawn.ids.dtype == torch.int64
    again = SetMaker(HuggingFaceSource(tiny_llama_folder), WINDOWS, TOKENS).draw(parse_set(spelled), 0)
    assert torch.equal(again.ids, drawn.ids)
    assert again.sha256 == drawn.sha256
    assert maker.draw(parse_set(spelled), 1).sha256 != drawn.sha256
    assert maker.draw(parse_set(spelled), 0, "evaluation").sha256 != drawn.sha256
    assert 0 <= int(drawn.ids.min()) <= int(drawn.ids.max()) < 320
    row = drawn.row()
    assert (row.name, row.windows, row.window_tokens, row.seed) == (spelled, WINDOWS, TOKENS, 0)


def test_a_file_gives_the_windows_that_quantize_draws(maker, text_file):
    drawn = maker.draw(parse_set(f"mine={text_file}"), 3)
    settings = Calibration(text=str(text_file), windows=WINDOWS, window_tokens=TOKENS)
    expected = calibration_windows(settings, maker.tokenizer, 3)
    assert torch.equal(drawn.ids, expected.ids)
    assert (drawn.name, drawn.label, drawn.sha256) == ("mine", expected.label, expected.sha256)


def test_nonsense_is_punctuation_and_white_space(maker):
    ids = maker.draw(parse_set("nonsense"), 0).ids
    text = maker.tokenizer.decode(ids.flatten())
    assert set(text) <= set(string.punctuation + string.whitespace)
    assert len(set(text)) > 20


def test_random_tokens_are_not_special(maker):
    maker.windows = 200
    ids = maker.draw(parse_set("random"), 0).ids
    assert not set(ids.flatten().tolist()) & set(maker.tokenizer.all_special_ids)
    counts = torch.bincount(ids.flatten())
    assert len(counts) == len(maker.tokenizer)
    assert int(counts[2:].min()) > 0


def test_samples_are_kept_and_the_likeliest_do_not_all_start_alike(maker, monkeypatch):
    cold = maker.draw(parse_set("self:0"), 0)
    assert len(set(cold.ids[:, 0].tolist())) > 1
    warm = maker.draw(parse_set("self"), 0)
    assert set(warm.ids[:, 0].tolist()) == {0}  # BOS

    def refuse(*_):
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(sets, "load_model", refuse)
    assert torch.equal(maker.draw(parse_set("self"), 0).ids, warm.ids)
    with pytest.raises(AssertionError):
        maker.draw(parse_set("self"), 1)


def test_samples_are_bounded(maker, monkeypatch):
    monkeypatch.setattr(sets, "available_memory_bytes", lambda: 1000)
    with pytest.raises(CalibrationError, match="memory"):
        maker.draw(parse_set("self"), 5)
    maker.windows = 10**5
    with pytest.raises(CalibrationError, match="at most"):
        maker.draw(parse_set("self"), 0)


def test_halves_share_nothing():
    one, other = corpora.code("calibration").content, corpora.code("evaluation").content
    assert min(len(one), len(other)) > 30_000
    assert '"""Return' not in one
    long = {line for line in one.splitlines() if len(line) > 60}
    shared = long & set(other.splitlines())
    assert len(shared) < 0.01 * len(long)
    questions = [
        {block for block in corpora.task(split).content.split("\n\n") if "fits this" in block}
        for split in ("calibration", "evaluation")
    ]
    assert all(questions)
    assert not {q.splitlines()[0] for q in questions[0]} & {q.splitlines()[0] for q in questions[1]}


def test_questions_have_one_right_answer():
    for block in corpora.task("calibration").content.split("\n\n"):
        question, *choices, answer = block.splitlines()
        assert question.startswith("Question: ")
        assert [choice[:3] for choice in choices] == ["A. ", "B. ", "C. ", "D. "]
        assert len(set(choices)) == 4
        if "left?" in question:
            start, more, less = (int(word) for word in question.split() if word.isdigit())
            right = next(choice for choice in choices if choice.startswith(answer.removeprefix("Answer: ")))
            assert int(right[3:]) == start + more - less


def test_languages_come_from_installed_packages(maker, tmp_path, monkeypatch):
    place = tmp_path / "site"
    catalogue = place / "django" / "conf" / "locale" / "de" / "LC_MESSAGES" / "django.po"
    catalogue.parent.mkdir(parents=True)
    catalogue.write_text(CATALOGUE, encoding="utf-8")
    meta = place / "Django-9.9.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: Django\nVersion: 9.9\n")
    (meta / "RECORD").write_text(f"{catalogue.relative_to(place)},,\n")
    monkeypatch.syspath_prepend(str(place))
    corpora.language.cache_clear()
    halves = [corpora.language("de", split) for split in ("calibration", "evaluation")]
    corpora.language.cache_clear()
    messages = sorted(line for half in halves for line in half.content.splitlines())
    assert messages == [
        "Eine einzige Datei",
        'Eine lange Nachricht, die sich "über" zwei Zeilen zieht',
        "Guten Tag , herzlich willkommen",
        "Viele verschiedene Dateien",
    ]
    assert halves[0].name == "language-de-calibration-Django-9.9"
    with pytest.raises(CalibrationError, match=r"Django 9\.9 have de"):
        maker.draw(parse_set("language:xx"), 0)


def test_names_kinds_and_arguments(text_file, tmp_path):
    assert parse_set("text") == sets.SetSpec("text", "text", "")
    assert parse_set("prose=text").name == "prose"
    assert parse_set("language:zh_Hans") == sets.SetSpec("zh_Hans", "language", "zh_Hans")
    assert parse_set("hf:c4:en:train") == sets.SetSpec("c4", "hub", "hf:c4:en:train")
    assert parse_set(str(text_file)) == sets.SetSpec("calibration", "file", str(text_file))
    for wrong in ("txet", "language", "self:warm", "self:-1", "self:inf", "text:3", "=", str(tmp_path / "none.txt")):
        with pytest.raises(CalibrationError, match="not understood"):
            parse_set(wrong)


def test_too_little_text_is_refused(maker, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Hardly any.")
    with pytest.raises(CalibrationError, match=r"3 windows of 32 need 96; give a longer text"):
        maker.draw(parse_set(str(short)), 0)
    empty = tmp_path / "empty.txt"
    empty.write_text(" ")
    with pytest.raises(CalibrationError, match="empty"):
        maker.draw(parse_set(str(empty)), 0)
