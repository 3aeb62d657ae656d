"""Text loading: the built-in halves, the WikiText layouts, and files that must be refused."""

from __future__ import annotations

import hashlib

import pytest

from bitwright.calibration import layouts
from bitwright.calibration import text as module
from bitwright.calibration.text import Text, builtin, load_text, paragraphs
from bitwright.errors import EvaluationError

ROWS = [" = A = ", " one \u2028 two ", " = = B = = ", " = = = C = = = ", " three ", " = D = ", " four "]
ORIGINAL = (
    " \n = A = \n \n one \u2028 two \n \n = = B = = \n \n \n = = = C = = = \n \n three \n \n \n = D = \n \n four \n \n"
)


def test_builtin_halves_share_no_paragraph():
    calibration, evaluation = builtin("calibration"), builtin("evaluation")
    assert not set(paragraphs(calibration.content)) & set(paragraphs(evaluation.content))


def test_builtin_halves_are_large_balanced_and_named_by_version():
    sizes = [len(builtin(split).content) for split in ("calibration", "evaluation")]
    assert min(sizes) > 300_000
    assert max(sizes) < 1.5 * min(sizes)
    assert builtin("evaluation").name.startswith("builtin-evaluation-py3.")


def test_builtin_is_deterministic_and_the_default():
    first = builtin("evaluation")
    module._halves.cache_clear()
    builtin.cache_clear()
    assert builtin("evaluation").sha256 == first.sha256 == load_text().sha256 == load_text("builtin").sha256
    assert load_text(None, "calibration").sha256 == builtin("calibration").sha256


def test_builtin_refuses_an_unknown_split():
    with pytest.raises(EvaluationError, match="split 'test'"):
        builtin("test")


def test_sha256_is_that_of_the_utf8_content():
    assert Text("x", "é").sha256 == hashlib.sha256("é".encode()).hexdigest()


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_plain_files_are_used_as_they_are_with_universal_newlines(tmp_path, ending):
    path = tmp_path / "a.txt"
    path.write_bytes(f"one{ending}{ending} = two = {ending}".encode())
    assert load_text(path) == Text("a.txt", "one\n\n = two = \n", "plain")


@pytest.mark.parametrize("content", ["\r\n".join(ROWS) + "\r\n", "\n".join(ROWS), ORIGINAL])
def test_wikitext_rows_are_joined_alike_with_and_without_blank_rows(tmp_path, content):
    path = tmp_path / "wiki.txt"
    path.write_bytes(content.encode())
    text = load_text(path)
    assert text.layout == "wikitext"
    assert text.content == "\n\n".join(row + "\n" for row in ROWS)
    assert load_text(path, layout="plain").content == content.replace("\r\n", "\n")


def test_original_rows_are_rebuilt_only_when_the_original_is_known(tmp_path, monkeypatch):
    path = tmp_path / "wiki.txt"
    path.write_text("\n".join(ROWS) + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"wiki\.txt.*no known original.*--layout wikitext"):
        load_text(path, layout="wikitext-original")
    monkeypatch.setattr(layouts, "ORIGINALS", {hashlib.sha256(ORIGINAL.encode()).hexdigest(): "test"})
    rebuilt = load_text(path, layout="wikitext-original")
    path.write_text(ORIGINAL, encoding="utf-8")
    assert rebuilt == load_text(path, layout="wikitext-original")
    assert rebuilt.content.startswith("\n\n = A = \n\n\n\n\n one ")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b" \r\n\n", "empty"), (b"ab\xff", "not UTF-8 at byte 2")]
)
def test_unusable_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=rf"bad\.txt: .*{message}"):
        load_text(path)


def test_missing_files_folders_and_wrong_layouts_are_refused_by_name(tmp_path):
    with pytest.raises(EvaluationError, match=r"none\.txt: cannot be read .*builtin"):
        load_text(tmp_path / "none.txt")
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_text(tmp_path)
    (tmp_path / "plain.txt").write_text("hello")
    with pytest.raises(EvaluationError, match=r"plain\.txt: layout 'wikitext' needs WikiText rows"):
        load_text(tmp_path / "plain.txt", layout="wikitext")
