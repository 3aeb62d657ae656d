"""The journal: which shards of a job are done, so that a killed run continues where it was.

While a job runs, everything lies in `OUT.partial/` (see `place`): the finished shards in `OUT.partial/output/` and an
append-only `journal.jsonl` beside them. The first line is the job's identity, noted anew when another numeric class
continues it; every other line is one finished shard with its SHA-256 and the records that the manifest needs. A shard
is written, synced and renamed before its line is appended and synced, so a line always names a complete file; a shard
without a line is written again. When all is done, `output/` is renamed to `OUT`: the folder appears complete or not at
all. A job that ends without a finished shard leaves nothing, and one that was killed so is replaced by any other.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from bitwright.checkpoint.place import Place, left_over, not_ours, open_own, remove_entry
from bitwright.checkpoint.shard import file_sha256
from bitwright.errors import BitwrightError, ResumeError

SUFFIX = ".partial"
CLASS = "numeric_class"
"""Key of a calibrated job: the numeric classes in which it was computed, in order."""
_JOURNAL = "journal.jsonl"
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Records = list[dict[str, Any]]
Check = Callable[[Path, Records], None]
"""Told of a shard whose bytes are those of its line; raises BitwrightError where it is not what the records say."""


def _trust(path: Path, records: Records) -> None:
    pass


class Journal:
    """An open job folder; use as a context manager."""

    def __init__(
        self, out: Path, job: dict[str, Any], restart: bool = False, check: Check = _trust, accept_class: bool = False
    ):
        """Open or continue the job that makes `out`.

        Args:
            out: folder to be made.
            job: its identity; an unfinished run of another one is not continued. `CLASS`, where it has one, is here
                a list of the present class alone.
            restart: discard what an unfinished run has finished.
            check: asked about every finished shard before it is counted as done.
            accept_class: continue what another numeric class has begun; `self.job` then lists all of them.

        Raises:
            ResumeError: the folder is not ours or belongs to another job, another process works on it, or its journal
                or a shard is not what we wrote.
        """
        self.out = out
        self.place = Place(out, SUFFIX)
        self.folder, self.output = self.place.folder, self.place.output
        self._path = self.folder / _JOURNAL
        self.job, self._check, self._accept_class = job, check, accept_class
        self._noted: dict[str, Any] | None = None
        try:
            if restart:
                self.place.clear()
            self.done: dict[str, dict[str, Any]] = self._read()
            self._file = os.fdopen(self._open(os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w", encoding="utf-8")
            try:
                if self._noted != self.job:
                    self._append({"job": self.job})
            except BaseException:
                self._file.close()
                raise
        except BaseException:
            if self.place.fresh:
                self.place.remove(parents=True)
            self.place.close()
            raise

    def _open(self, flags: int) -> int:
        return os.open(_JOURNAL, flags | os.O_NOFOLLOW, 0o600, dir_fd=self.place.descriptor)

    def _read(self) -> dict[str, dict[str, Any]]:
        """Finished shards by file name whose files are intact; drops a torn last line, and a job without a shard."""
        lines = self._lines()
        if lines and "job" not in lines[0]:
            raise self._damaged(1)
        entries = []
        for number, line in enumerate(lines, start=1):
            if line.keys() != {"job"}:
                entries.append(self._entry(number, line))
            elif _is_job(line["job"]):
                self._noted = line["job"]
            else:
                raise self._damaged(number)
        if self._noted is not None:
            self._continue(self._noted, bool(entries))
        if not os.path.lexists(self.output):
            self.output.mkdir()
        elif not stat.S_ISDIR(self.output.lstat().st_mode):
            raise not_ours(self.output, "it is not a folder of its own but a link or a file")
        return {entry["shard"]: entry for entry in entries if self._intact(entry)}

    def _continue(self, begun: dict[str, Any], some_finished: bool) -> None:
        """Take up the job that was begun, in its numeric class or, where that is accepted, in another."""
        if not some_finished and begun != self.job:
            self.place.clear()
            self._noted = None
            return
        if _without_class(begun) != _without_class(self.job):
            _refuse_other_job(self.folder, _without_class(begun), _without_class(self.job))
        before, here = begun.get(CLASS, []), self.job.get(CLASS, [])
        if before[-1:] != here and not self._accept_class:
            _refuse_other_class(self.folder, before, here)
        classes = before if before[-1:] == here else before + here
        self.job = self.job | ({CLASS: classes} if classes else {})

    def _lines(self) -> list[dict[str, Any]]:
        """The journal's lines; a torn last one is cut off."""
        try:
            with open_own(_JOURNAL, self.folder, self.place.descriptor) as file:
                if os.fstat(file.fileno()).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise not_ours(self._path, "other users may write into it")
                whole = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        lines, intact_bytes = [], 0
        for number, line in enumerate(whole, start=1):
            try:
                content = json.loads(line)
                if not line.endswith(b"\n"):
                    break
            except ValueError:
                if number == len(whole):
                    break
                raise self._damaged(number) from None
            except RecursionError:
                raise self._damaged(number) from None
            if not isinstance(content, dict):
                raise self._damaged(number)
            lines.append(content)
            intact_bytes += len(line)
        descriptor = self._open(os.O_WRONLY)
        try:
            os.ftruncate(descriptor, intact_bytes)
        finally:
            os.close(descriptor)
        return lines

    def _entry(self, number: int, line: dict[str, Any]) -> dict[str, Any]:
        """A line that names a finished shard, as `record` writes it."""
        shard, sha256, records = line.get("shard"), line.get("sha256"), line.get("records")
        if not (
            line.keys() == {"shard", "sha256", "records"}
            and isinstance(shard, str)
            and _SHARD.fullmatch(shard)
            and isinstance(sha256, str)
            and _SHA256.fullmatch(sha256)
            and isinstance(records, list)
            and all(isinstance(record, dict) for record in records)
        ):
            raise self._damaged(number)
        return line

    def _damaged(self, number: int) -> ResumeError:
        return ResumeError(
            f"{self._path}: line {number} is not what bitwright writes; pass --restart to make everything anew, or "
            "choose another output folder"
        )

    def _intact(self, entry: dict[str, Any]) -> bool:
        """Whether the shard of a line still is what was written; ResumeError where it never was what the line says."""
        path = self.output / entry["shard"]
        try:
            if not stat.S_ISREG(path.lstat().st_mode) or file_sha256(path) != entry["sha256"]:
                return False
        except FileNotFoundError:
            return False
        try:
            self._check(path, entry["records"])
        except BitwrightError as error:
            raise ResumeError(
                f"{path}: does not hold what {_JOURNAL} says of it ({error}); pass --restart to make everything anew, "
                "or choose another output folder"
            ) from error
        return True

    def record(self, shard: str, sha256: str, records: Records) -> None:
        """Note that `shard` is complete."""
        entry = {"shard": shard, "sha256": sha256, "records": records}
        self._append(entry)
        self.done[shard] = entry

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, sort_keys=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove_strangers(self) -> None:
        """Drop from the output what is no finished shard: what a killed run left half-written."""
        descriptor = os.open(self.output, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for name in os.listdir(descriptor):
                if name not in self.done:
                    remove_entry(name, descriptor)
        finally:
            os.close(descriptor)

    def publish(self) -> None:
        """Make the finished output appear under its own name and forget the job.

        Raises:
            ResumeError: something of that name has appeared.
        """
        self.place.publish()

    def __enter__(self) -> Journal:
        """Self; the lock is already held."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock; what is done stays done, and where nothing is, nothing stays."""
        self._file.close()
        if error is not None and not self.done and (isinstance(error, BitwrightError) or not self._prepared()):
            self.place.remove(parents=True)
        self.place.close()

    def _prepared(self) -> bool:
        """Whether a run that was interrupted has more to go on with than shards: what precedes the first of them."""
        return self.place.descriptor >= 0 and len(os.listdir(self.place.descriptor)) > 3  # mark, journal, output


def tidy_finished(out: Path, job: dict[str, Any]) -> None:
    """Remove what a run of `job` left that was killed after `out` had appeared; nothing of any other."""
    place = left_over(out, SUFFIX)
    if place is None:
        return
    try:
        if not os.path.lexists(place.output) and _of_job(place, job):
            place.remove()
    except (OSError, ResumeError):
        return  # it will be tidied another time
    finally:
        place.close()


def _of_job(place: Place, job: dict[str, Any]) -> bool:
    """Whether the journal of a place is of `job`, wherever its source lay, or is gone already."""
    try:
        with open_own(_JOURNAL, place.folder, place.descriptor) as file:
            known = json.loads(file.readline()).get("job")
    except FileNotFoundError:
        return True
    except (ValueError, AttributeError, RecursionError):
        return False
    return isinstance(known, dict) and all(
        known.get(key) == job[key] for key in job if key not in ("source_files", CLASS)
    )


def _is_job(job: Any) -> bool:
    classes = job.get(CLASS, []) if isinstance(job, dict) else None
    return isinstance(classes, list) and all(isinstance(one, str) for one in classes)


def _without_class(job: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in job.items() if key != CLASS}


def _refuse_other_class(folder: Path, before: list[str], here: list[str]) -> NoReturn:
    begun, now = (classes[-1] if classes else "an unknown class" for classes in (before, here))
    threads, _, place = begun.partition(" on ")
    remedy = "Continue it there for the same bytes"
    if place == now.partition(" on ")[2]:
        remedy = f"Pass --workers {threads.split()[0]} for the same bytes"
    raise ResumeError(
        f"{folder}: the calibrated run that lies here unfinished was computed by {begun}; this is {now}, which "
        f"adds up in another order, so that the last digits would change on the way. {remedy}, "
        "--accept-other-machine to continue it here with a note in the manifest, or --restart to discard it"
    )


def _refuse_other_job(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    details = "; ".join(f"{key}: {_difference(found.get(key), wanted.get(key))}" for key in changed)
    raise ResumeError(
        f"{folder}: an unfinished run of another job lies here ({details}). Run the same command to continue "
        "it, pass --restart to discard it, or choose another output folder"
    )


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return f"{', '.join(sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)))} changed"
    return f"was {found}, is now {wanted}"
