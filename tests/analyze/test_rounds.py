"""The folders of a target and of a matrix: ours alone, tidied when the work is done, and no one else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import bitwright
from bitwright.analyze.choices import parse_choice, parse_recipe
from bitwright.analyze.matrix import MatrixOptions, measure_matrix
from bitwright.analyze.promise import Target
from bitwright.analyze.rounds import SENSITIVITY, Rounds, refuse_existing
from bitwright.analyze.sets import SetMaker, parse_set
from bitwright.analyze.target import TargetOptions, quantize_to_target
from bitwright.calibration.tokens import Calibration
from bitwright.checkpoint.open import open_source
from bitwright.errors import ResumeError


def finished(out: Path) -> Rounds:
    """Rounds of which the first is finished."""
    rounds = Rounds(out)
    (rounds.folder / SENSITIVITY).write_text("{}")
    for number in (1, 2):
        (rounds.folder / f"round-{number}").mkdir()
        (rounds.folder / f"round-{number}" / "config.json").write_text(str(number))
    return rounds


def test_a_round_becomes_the_result_and_nothing_else_stays(tmp_path: Path) -> None:
    with finished(tmp_path / "out") as rounds:
        rounds.publish(2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "2"


def test_what_is_worth_going_on_with_stays_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="why"), Rounds(tmp_path / "new" / "out"):
        raise ValueError("why")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="why"), finished(tmp_path / "out"):
        raise ValueError("why")
    with Rounds(tmp_path / "out") as rounds:
        assert (rounds.folder / "round-1" / "config.json").exists()


def test_rounds_of_a_killed_run_are_tidied_once_their_result_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with finished(out) as rounds:
        (rounds.folder / "published").write_text("round-1")
    refuse_existing(out)  # there is none: they are gone on with
    out.mkdir()
    with pytest.raises(ResumeError, match="out: exists"):
        refuse_existing(out)
    assert (tmp_path / "out.rounds").exists()  # of which `out` was not made
    (tmp_path / "out.rounds" / "round-1").rename(tmp_path / "moved")
    with pytest.raises(ResumeError, match="out: exists"):
        refuse_existing(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "out"]


@pytest.mark.parametrize("link", [False, True])
def test_rounds_of_others_are_refused_and_stay(
    tiny_llama_folder: Path, text_file: Path, tmp_path: Path, link: bool
) -> None:
    theirs = tmp_path / ("theirs" if link else "out.rounds")
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    if link:
        (tmp_path / "out.rounds").symlink_to(theirs)
    calibration = Calibration(text=str(text_file), windows=4, window_tokens=48)
    base = bitwright.Recipe(method="rtn", scheme="w4a16", calibration=calibration)
    options = TargetOptions((parse_choice("rtn:w4a16g32"),), base, probes=0, held_out_windows=2)
    with pytest.raises(ResumeError, match=r"out\.rounds.*left alone; move it away"):
        quantize_to_target(str(tiny_llama_folder), tmp_path / "out", Target.of(bits=6), options)
    assert (theirs / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "out.rounds").is_symlink() == link


@pytest.mark.parametrize("name", ["matrix", "matrix/cell.partial"])
def test_a_matrix_does_not_work_in_the_folder_of_another(tiny_llama_folder: Path, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    if name != "matrix":
        (tmp_path / "matrix").mkdir(mode=0o700)
    (tmp_path / name).symlink_to(theirs)
    maker = SetMaker(open_source(str(tiny_llama_folder)), 2, 24)
    draws = [maker.draw(parse_set("random"), 0)]
    evaluations = [maker.draw(parse_set("random"), 7, "evaluation")]
    options = MatrixOptions({"rtn": parse_recipe("rtn:w4a16g32")}, evaluations, tmp_path / "matrix")
    with pytest.raises(ResumeError, match="left alone"):
        measure_matrix(str(tiny_llama_folder), draws, options)
    assert os.listdir(theirs) == ["thesis.tex"]
