"""Places of our own: fresh, for us alone, marked; what is not ours is refused and stays as it is."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from bitwright.checkpoint.place import (
    MARK,
    Place,
    appearing,
    left_over,
    new_file,
    private_folder,
    write_output,
)
from bitwright.errors import ResumeError
from bitwright.untrusted.files import open_regular

Plant = Callable[[Path, Path], None]


def someone_elses_folder(place: Path, theirs: Path) -> None:
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")


def a_link_to_a_folder(place: Path, theirs: Path) -> None:
    place.symlink_to(theirs)


def a_link_to_nothing(place: Path, theirs: Path) -> None:
    place.symlink_to(theirs / "nothing")


def a_file(place: Path, theirs: Path) -> None:
    place.write_text("not a folder")


def an_empty_folder_that_others_may_enter(place: Path, theirs: Path) -> None:
    place.mkdir(mode=0o755)


def a_mark_that_is_a_link(place: Path, theirs: Path) -> None:
    place.mkdir(mode=0o700)
    (place / MARK).symlink_to(theirs / "precious.txt")


def a_mark_with_other_words(place: Path, theirs: Path) -> None:
    place.mkdir(mode=0o700)
    (place / MARK).write_text("mine")


def a_mark_that_is_a_pipe(place: Path, theirs: Path) -> None:
    place.mkdir(mode=0o700)
    os.mkfifo(place / MARK)


def an_empty_mark_beside_other_files(place: Path, theirs: Path) -> None:
    place.mkdir(mode=0o700)
    (place / MARK).touch()
    (place / "thesis.tex").write_text("years of work")


def ours_but_open_to_others(place: Path, theirs: Path) -> None:
    Place(place.with_suffix(""), place.suffix).close()
    place.chmod(0o777)


PLANTS: list[Plant] = [
    someone_elses_folder,
    a_link_to_a_folder,
    a_link_to_nothing,
    a_file,
    an_empty_folder_that_others_may_enter,
    a_mark_that_is_a_link,
    a_mark_with_other_words,
    a_mark_that_is_a_pipe,
    an_empty_mark_beside_other_files,
    ours_but_open_to_others,
]


def listing(folder: Path) -> dict[str, object]:
    """Everything below a folder, as it lies there."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        kept = os.readlink(path) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(mode) else None
        found[str(path.relative_to(folder))] = (mode, kept)
    return found


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "precious.txt").write_text("precious")
    return folder


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_not_ours_is_refused_and_stays(tmp_path: Path, theirs: Path, plant: Plant) -> None:
    plant(tmp_path / "out.partial", theirs)
    before = listing(tmp_path)
    with pytest.raises(ResumeError, match=r"out\.partial.*left alone; move it away, or choose another output folder"):
        Place(tmp_path / "out", ".partial")
    assert left_over(tmp_path / "out", ".partial") is None
    assert listing(tmp_path) == before


@pytest.mark.parametrize("plant", PLANTS)
def test_an_export_refuses_what_is_not_ours_before_it_writes(tmp_path: Path, theirs: Path, plant: Plant) -> None:
    plant(tmp_path / "out.exporting", theirs)
    before = listing(tmp_path)
    with pytest.raises(ResumeError, match="left alone"), appearing(tmp_path / "out"):
        raise AssertionError("never reached")
    assert listing(tmp_path) == before


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Place(tmp_path / "out", ".partial").close()
    before = listing(tmp_path)
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with pytest.raises(ResumeError, match="belongs to another user"):
        Place(tmp_path / "out", ".partial")
    assert listing(tmp_path) == before


def test_a_place_is_for_its_maker_alone_and_vanishes_when_it_is_published(tmp_path: Path) -> None:
    place = Place(tmp_path / "deep" / "out", ".partial")
    assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((place.folder / MARK).stat().st_mode) == 0o600
    with pytest.raises(ResumeError, match="another process"):
        Place(tmp_path / "deep" / "out", ".partial")
    place.output.mkdir()
    (place.output / "result").write_text("done")
    place.publish()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "result").read_text() == "done"


def test_what_a_killed_maker_left_is_taken_up(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir(mode=0o700)  # killed before it was marked
    Place(tmp_path / "out", ".partial").close()
    (tmp_path / "out.partial" / MARK).write_bytes(b"bitw")  # killed while it was marked
    Place(tmp_path / "out", ".partial").close()


def test_a_result_that_appears_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        out = tmp_path / make.__name__.strip("<>")
        place = Place(out, ".partial")
        place.output.mkdir()
        make(out)
        with pytest.raises(ResumeError, match="appeared"):
            place.publish()
        assert place.output.is_dir()
        place.close()


def test_clearing_and_removing_follow_no_link(tmp_path: Path, theirs: Path) -> None:
    place = Place(tmp_path / "out", ".partial")
    place.output.mkdir()
    (place.output / "link").symlink_to(theirs)
    (place.folder / "link").symlink_to(theirs)
    (place.output / "file").symlink_to(theirs / "precious.txt")
    os.link(theirs / "precious.txt", place.folder / "hard")
    place.clear()
    assert os.listdir(place.folder) == [MARK]
    (place.folder / "output").symlink_to(theirs)
    place.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert (theirs / "precious.txt").read_text() == "precious"


def test_an_export_tidies_after_a_killed_one_and_after_an_error(tmp_path: Path) -> None:
    place = Place(tmp_path / "out", ".exporting")
    place.output.mkdir()
    (place.output / "half").write_text("written")
    place.close()
    with appearing(tmp_path / "out") as working:
        working.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())

    def fail(working: Path) -> None:
        working.write_text("half")
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"), appearing(tmp_path / "made" / "other") as working:
        fail(working)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # killed after the result had appeared
    Place(tmp_path / "out", ".exporting").close()
    with pytest.raises(ResumeError, match="exists"), appearing(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_private_folder_is_ours_or_refused(tmp_path: Path, theirs: Path) -> None:
    private_folder(tmp_path / "a" / "state")
    assert stat.S_IMODE((tmp_path / "a" / "state").stat().st_mode) == 0o700
    private_folder(tmp_path / "a" / "state")
    (tmp_path / "link").symlink_to(theirs)
    with pytest.raises(ResumeError, match="a link or a file"):
        private_folder(tmp_path / "link")
    theirs.chmod(0o777)
    with pytest.raises(ResumeError, match="other users may write"):
        private_folder(theirs)


# --- files -------------------------------------------------------------------------------------------------


def test_a_new_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"), new_file(path) as file:
        fail(file)
    assert [one.name for one in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "before"
    with new_file(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"


def test_a_new_file_follows_no_link_and_writes_over_no_file_of_a_similar_name(tmp_path: Path, theirs: Path) -> None:
    for planted in ("report.json", "report.json.tmp"):
        (tmp_path / planted).symlink_to(theirs / "precious.txt")
    with new_file(tmp_path / "report.json") as file:
        file.write(b"after")
    assert (theirs / "precious.txt").read_text() == "precious"
    assert not (tmp_path / "report.json").is_symlink()
    assert (tmp_path / "report.json.tmp").is_symlink()


def test_temporary_files_of_killed_writers_are_tidied_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    with new_file(tmp_path / "one"):
        (alive,) = tmp_path.iterdir()
        dead = alive.with_name(f"{alive.name[: alive.name.rindex('-')]}-0123.tmp")
        dead.write_text("half")
        with new_file(tmp_path / "other"):
            assert dead.exists()  # of another file
        with new_file(tmp_path / "one") as second:
            second.write(b"two")
        assert sorted(tmp_path.iterdir()) == sorted([alive, tmp_path / "one", tmp_path / "other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)


def test_output_that_the_user_names_may_be_a_pipe_and_a_link_is_replaced(tmp_path: Path, theirs: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_output(tmp_path / "pipe", "through")
    reader.join()
    assert read == ["through"]
    (tmp_path / "link").symlink_to(theirs / "precious.txt")
    write_output(tmp_path / "link", "result")
    assert (tmp_path / "link").read_text() == "result"
    assert (theirs / "precious.txt").read_text() == "precious"
    write_output(Path("/dev/null"), "nothing")
    assert Path("/dev/null").is_char_device()
