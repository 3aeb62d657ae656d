"""The journal: what is continued was written by us, whole, and is what it says; anything else is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.checkpoint.journal import Journal, tidy_finished
from bitwright.checkpoint.shard import write_shard
from bitwright.errors import FormatError, ResumeError, WeightError

JOB: dict[str, Any] = {"recipe": "r", "source_files": {"model.safetensors": "1:2"}}
RECORDS = [{"tensor": "a", "bytes": 4}]
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A job with one finished shard, interrupted."""
    with Journal(tmp_path / "out", JOB) as journal:
        finish_one(journal)
    return tmp_path / "out"


def finish_one(journal: Journal) -> None:
    sha256 = write_shard(journal.output / SHARD, {"a": torch.ones(1)}, {})
    journal.record(SHARD, sha256, RECORDS)


def path_of(out: Path) -> Path:
    return out.with_name("out.partial") / "journal.jsonl"


def lines(out: Path) -> list[Any]:
    return [json.loads(line) for line in path_of(out).read_text().splitlines()]


def continued(out: Path, job: dict[str, Any] | None = None) -> set[str]:
    with Journal(out, job or JOB) as journal:
        return set(journal.done)


def test_a_finished_shard_is_counted(out: Path) -> None:
    assert continued(out) == {SHARD}


@pytest.mark.parametrize("tail", [b'{"shard": "model-0000', b"\x00" * 64, b"[" * 40, b"{}"])
def test_a_torn_tail_is_cut_off(out: Path, tail: bytes) -> None:
    whole = path_of(out).read_bytes()
    path_of(out).write_bytes(whole + tail)
    assert continued(out) == {SHARD}
    assert path_of(out).read_bytes() == whole


def bad(**changes: Any) -> bytes:
    return json.dumps({"shard": SHARD, "sha256": "0" * 64, "records": RECORDS} | changes).encode()


BAD_LINES = [
    b"null",
    b"[]",
    b"3",
    b"{}",
    b'"text"',
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b'{"job": 3}',
    b'{"job": {"numeric_class": 3}}',
    bad(shard=3),
    bad(shard="../escaped.safetensors"),
    bad(shard="/etc/passwd"),
    bad(shard=".."),
    bad(sha256=None),
    bad(sha256="0" * 63),
    bad(records={}),
    bad(records=[1]),
    bad(extra=1),
]


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_we_do_not_write_is_refused_with_its_place(out: Path, line: bytes) -> None:
    first, rest = path_of(out).read_bytes().split(b"\n", 1)
    for number, content in ((1, line + b"\n" + rest), (2, first + b"\n" + line + b"\n" + rest)):
        if number == 1 and line.startswith(b'{"shard"'):
            continue
        path_of(out).write_bytes(content)
        with pytest.raises(
            ResumeError, match=rf"journal\.jsonl: line {number} is not what bitwright writes; .*--restart"
        ):
            Journal(out, JOB)
        assert path_of(out).read_bytes() == content
    with Journal(out, JOB, restart=True) as journal:
        assert not journal.done


def test_rubbish_in_the_middle_is_no_torn_tail(out: Path) -> None:
    first, rest = path_of(out).read_bytes().split(b"\n", 1)
    path_of(out).write_bytes(first + b"\nrubbish\n" + rest)
    with pytest.raises(ResumeError, match="line 2"):
        Journal(out, JOB)


@pytest.mark.parametrize("name", ["journal.jsonl", "output"])
def test_links_and_pipes_in_the_folder_are_not_followed(out: Path, tmp_path: Path, name: str) -> None:
    place = out.with_name("out.partial") / name
    place.rename(tmp_path / "moved")
    for plant in (lambda: place.symlink_to(tmp_path / "moved"), lambda: os.mkfifo(place)):
        plant()
        before = sorted((tmp_path / "moved").parent.rglob("*"))
        with pytest.raises(ResumeError, match="left alone"):
            Journal(out, JOB)
        assert sorted((tmp_path / "moved").parent.rglob("*")) == before
        place.unlink()


def test_a_journal_that_others_may_write_into_is_refused(out: Path) -> None:
    path_of(out).chmod(0o666)
    with pytest.raises(ResumeError, match="other users may write into it"):
        Journal(out, JOB)


def test_a_shard_is_hashed_and_then_asked_about(out: Path, tmp_path: Path) -> None:
    def refuse(path: Path, records: list[dict[str, Any]]) -> None:
        assert records == RECORDS
        raise FormatError(f"{path.name}: not of this plan")

    with pytest.raises(ResumeError, match=r"model-00001.*does not hold what journal\.jsonl says of it.*--restart"):
        Journal(out, JOB, check=refuse)
    shard = out.with_name("out.partial") / "output" / SHARD
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")  # the very same bytes
    assert continued(out) == set()
    shard.unlink()
    os.mkfifo(shard)
    assert continued(out) == set()


def test_another_job_is_refused_where_something_is_finished(out: Path) -> None:
    changed = JOB | {"source_files": {"model.safetensors": "1:3"}}
    with pytest.raises(ResumeError, match=r"source_files: model\.safetensors changed.*--restart"):
        Journal(out, changed)
    assert continued(out) == {SHARD}


def test_a_killed_job_without_a_finished_shard_is_replaced_by_any_other(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", JOB)
    (journal.folder / "token_weights.safetensors").write_text("of the first job")
    journal._file.close()  # as a kill does: nothing is tidied
    journal.place.close()
    again = Journal(tmp_path / "out", JOB)
    assert (again.folder / "token_weights.safetensors").exists()
    again._file.close()
    again.place.close()
    with Journal(tmp_path / "out", JOB | {"recipe": "other"}) as other:
        assert not (other.folder / "token_weights.safetensors").exists()
        finish_one(other)
    assert continued(tmp_path / "out", JOB | {"recipe": "other"}) == {SHARD}


@pytest.mark.parametrize("error", [WeightError("refused"), RuntimeError("a bug"), OSError(28, "disk full")])
def test_a_job_that_fails_without_a_finished_shard_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), Journal(tmp_path / "new" / "out", JOB):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_job_that_fails_keeps_what_is_finished(tmp_path: Path) -> None:
    def fail(journal: Journal) -> None:
        finish_one(journal)
        raise WeightError("refused")

    with pytest.raises(WeightError), Journal(tmp_path / "out", JOB) as journal:
        fail(journal)
    assert continued(tmp_path / "out") == {SHARD}


def test_what_precedes_the_first_shard_is_kept_when_the_user_interrupts(tmp_path: Path) -> None:
    def interrupt(journal: Journal) -> None:
        (journal.folder / "token_weights.safetensors").write_text("an hour of work")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "out", JOB) as journal:
        interrupt(journal)
    with Journal(tmp_path / "out", JOB) as journal:
        assert (journal.folder / "token_weights.safetensors").exists()


def test_strangers_in_the_output_go_without_their_targets(out: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious.txt").write_text("precious")
    with Journal(out, JOB) as journal:
        (journal.output / "half.tmp").write_text("half")
        (journal.output / "additional_chat_templates").mkdir()
        (journal.output / "additional_chat_templates" / "half.jinja").write_text("half")
        (journal.output / "link").symlink_to(tmp_path / "theirs")
        journal.remove_strangers()
        assert os.listdir(journal.output) == [SHARD]
    assert (tmp_path / "theirs" / "precious.txt").read_text() == "precious"


def test_after_a_kill_at_the_very_end_only_the_same_job_tidies(out: Path) -> None:
    partial = out.with_name("out.partial")
    tidy_finished(out, JOB)
    assert partial.exists()  # not finished
    (partial / "output").rename(out)
    tidy_finished(out, JOB | {"recipe": "other"})
    assert partial.exists()
    tidy_finished(out, JOB | {"source_files": {}})
    assert not partial.exists()
    partial.symlink_to(out)
    tidy_finished(out, JOB)
    assert partial.is_symlink()
    assert out.is_dir()
