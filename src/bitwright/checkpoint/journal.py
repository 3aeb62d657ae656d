"""The journal: which shards of a job are done, so that a killed run continues where it was.

While a job runs, everything lies in `OUT.partial/`: the finished shards in `OUT.partial/output/` and an
append-only `journal.jsonl` beside them. The first line is the job's identity; every further line is one
finished shard with its SHA-256 and the records that the manifest needs. A shard is written, synced and
renamed before its line is appended and synced, so a line always names a complete file; a shard without a line
is written again. When all is done, `output/` is renamed to `OUT`: the folder appears complete or not at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from bitwright.checkpoint.shard import file_sha256, fsync_folder
from bitwright.errors import ResumeError


class Journal:
    """An open job folder; use as a context manager."""

    def __init__(self, out: Path, job: dict[str, Any], restart: bool = False):
        """Open or continue the job that makes `out`.

        Raises:
            ResumeError: the folder belongs to another job, or another process works on it.
        """
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.output = self.folder / "output"
        self._path = self.folder / "journal.jsonl"
        self._job = job
        self.folder.mkdir(parents=True, exist_ok=True)
        # The lock lies on the folder itself: it vanishes with the process, and with the folder.
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ResumeError(f"{self.folder}: another process is working on it") from error
        try:
            if restart:
                self._clear()
            self.done: dict[str, dict[str, Any]] = self._read()
            self._file = self._path.open("a", encoding="utf-8")
            if self._path.stat().st_size == 0:
                self._append({"job": job})
        except BaseException:
            os.close(self._lock)
            raise

    def _clear(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, dict[str, Any]]:
        """Finished shards by file name whose files are intact; truncates a torn last line."""
        self.output.mkdir(exist_ok=True)
        if not self._path.exists():
            return {}
        lines, intact_bytes = [], 0
        for line in self._path.read_bytes().splitlines(keepends=True):
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                lines.pop()
                break
            intact_bytes += len(line)
        os.truncate(self._path, intact_bytes)
        if not lines:
            return {}
        _refuse_other_job(self.folder, lines[0].get("job", {}), self._job)
        done = {}
        for entry in lines[1:]:
            path = self.output / entry["shard"]
            if path.exists() and file_sha256(path) == entry["sha256"]:
                done[entry["shard"]] = entry
        return done

    def record(self, shard: str, sha256: str, records: list[dict[str, Any]]) -> None:
        """Note that `shard` is complete."""
        entry = {"shard": shard, "sha256": sha256, "records": records}
        self._append(entry)
        self.done[shard] = entry

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, sort_keys=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Make the finished output appear under its own name and forget the job."""
        fsync_folder(self.output)
        self.output.rename(self.out)
        fsync_folder(self.out.parent)
        self._file.close()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Journal:
        """Self; the lock is already held."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock; what is done stays done."""
        self._file.close()
        os.close(self._lock)


def _refuse_other_job(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if changed:
        details = "; ".join(f"{key}: was {found.get(key)}, is now {wanted.get(key)}" for key in changed)
        raise ResumeError(
            f"{folder}: an unfinished run of another job lies here ({details}). Run the same command to continue "
            "it, pass --restart to discard it, or choose another output folder"
        )
