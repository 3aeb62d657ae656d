"""Places of our own: folders for unfinished work, and files that appear whole or not at all.

What is being made lies in a folder beside the result, `OUT.partial` and the like, until it is finished. Such a place
is made by us, for us alone (mode 0700), bears a mark, and is locked while we work in it. One of that name that we find
is ours only if it is a real folder of this user with the mark in it, and nobody else may write into it; anything else
is refused and left as it is. Links are never followed, neither while working nor while cleaning up.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO

from bitwright.errors import ResumeError
from bitwright.untrusted.files import open_regular

MARK = ".bitwright"
_MARK_TEXT = (
    b"bitwright keeps unfinished work here, and removes this folder with all that is in it when the work ends.\n"
)
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Place:
    """A folder for unfinished work beside `out`, made or taken up again, and locked until it is closed."""

    def __init__(self, out: Path, suffix: str):
        """Make the folder that is called as `out` and ends on `suffix`, or take up our own of that name.

        Raises:
            ResumeError: something of that name is not ours, or another process works in it.
            OSError: the folder cannot be made.
        """
        self.out = out
        self.folder = out.with_name(out.name + suffix)
        self.output = self.folder / "output"
        """What becomes `out`; not made yet in a new place."""
        self.fresh = False
        """Whether the folder was made just now."""
        self._parents = [parent for parent in (out.parent, *out.parent.parents) if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        # The lock lies on the folder itself: it vanishes with the process, and with the folder.
        self.descriptor = self._claim()

    def _claim(self) -> int:
        while True:
            try:
                os.mkdir(self.folder, 0o700)
                self.fresh = True
            except FileExistsError:
                self.fresh = False
            try:
                descriptor = _open_own_folder(self.folder)
            except FileNotFoundError:
                continue
            try:
                _lock(descriptor, self.folder)
                # Whoever held the lock before may have removed the folder that was opened.
                if _is_still(descriptor, self.folder):
                    self._check_mark(descriptor)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _check_mark(self, descriptor: int) -> None:
        names, mode = os.listdir(descriptor), os.fstat(descriptor).st_mode
        if MARK not in names:
            # An empty folder that only its owner may enter is one whose maker was killed before it was marked.
            if not self.fresh and (names or mode & 0o077):
                raise not_ours(self.folder, "it is not one that bitwright made")
            with open(os.open(MARK, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=descriptor), "wb") as file:
                file.write(_MARK_TEXT)
            return
        with open_own(MARK, self.folder, descriptor) as file:
            text = file.read(len(_MARK_TEXT) + 1)
        # A killed maker may have left part of a mark, and nothing besides.
        if text != _MARK_TEXT and not (names == [MARK] and _MARK_TEXT.startswith(text)):
            raise not_ours(self.folder, "it is not one that bitwright made")
        if mode & _OTHERS_WRITE:
            raise not_ours(self.folder, "other users may write into it")

    def clear(self) -> None:
        """Remove everything in the folder but its mark."""
        for name in os.listdir(self.descriptor):
            if name != MARK:
                remove_entry(name, self.descriptor)

    def publish(self, made: Path | None = None) -> None:
        """Let `made`, `output` when not given, appear as `out`, and remove the folder.

        Raises:
            ResumeError: by now there is something called `out`.
        """
        made = made or self.output
        if os.path.lexists(self.out):
            raise ResumeError(
                f"{self.out}: appeared while it was being made; the result is kept in {self.folder}: move the other "
                "away, and run the same command again"
            )
        if made.is_dir():
            fsync_folder(made)
        made.rename(self.out)
        fsync_folder(self.out.parent)
        # What cannot be tidied now is tidied by the next run; the result is there.
        with suppress(OSError):
            self.remove()

    def remove(self, parents: bool = False) -> None:
        """Remove the folder, with `parents` also the empty folders above it that were made for it; unlock it."""
        try:
            self.clear()
            os.unlink(MARK, dir_fd=self.descriptor)
            self.folder.rmdir()
            if parents:
                with suppress(OSError):
                    for parent in self._parents:
                        parent.rmdir()
        finally:
            self.close()

    def close(self) -> None:
        """Leave the folder as it is, and unlock it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def left_over(out: Path, suffix: str) -> Place | None:
    """The place beside `out` that a killed run of ours left; None where there is none, or it is not ours to take."""
    if not os.path.lexists(out.with_name(out.name + suffix)):
        return None
    try:
        return Place(out, suffix)
    except (ResumeError, OSError):
        return None


EXPORTING = ".exporting"


def refuse_existing(out: Path) -> None:
    """Refuse an `out` that is there already, and tidy what a killed run left beside it.

    Raises:
        ResumeError: it is.
    """
    if not os.path.lexists(out):
        return
    with suppress(OSError):
        if (found := left_over(out, EXPORTING)) is not None:
            found.remove()
    raise ResumeError(f"{out}: exists; choose another name or remove it")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A path to make a file or folder at, which becomes `out` when the block ends; after an error nothing of it stays.

    Raises:
        ResumeError: `out` exists, another process is writing it, or `OUT.exporting` is not ours.
    """
    refuse_existing(out)
    place = Place(out, EXPORTING)
    try:
        # What a killed run left.
        place.clear()
        yield place.output
        place.publish()
    except BaseException:
        if place.descriptor >= 0:
            place.remove(parents=True)
        raise


def private_folder(folder: Path) -> None:
    """Make `folder` for our own later use, or see that it is one that nobody else could have written into.

    Raises:
        ResumeError: it is a link or a file, belongs to another user, or others may write into it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    descriptor = _open_own_folder(folder)
    try:
        if os.fstat(descriptor).st_mode & _OTHERS_WRITE:
            raise not_ours(folder, "other users may write into it")
    finally:
        os.close(descriptor)


def not_ours(path: Path, why: str) -> ResumeError:
    """The refusal of something that stands where our own should be."""
    return ResumeError(f"{path}: {why}, so it is left alone; move it away, or choose another output folder")


# --- files -------------------------------------------------------------------------------------------------


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to fill, which takes the place of `path` when the block ends, durably; after an error nothing is changed.

    A link at `path` is replaced, not followed. What killed writers of the same file left is removed.
    """
    of = hashlib.sha256(path.name.encode(errors="surrogateescape")).hexdigest()[:16]
    _remove_dead(path.parent, f".bitwright-{of}-")
    temporary = path.with_name(f".bitwright-{of}-{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            with suppress(OSError):  # not every file system has locks; without one nothing takes the file for dead
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def _remove_dead(folder: Path, start: str) -> None:
    """Remove our own temporary files whose names begin as `start` and that nobody is writing."""
    for name in os.listdir(folder):
        if name.startswith(start) and name.endswith(".tmp"):
            with suppress(OSError, ResumeError), open_own(folder / name, folder) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (folder / name).unlink()


def write_output(path: Path, content: str) -> None:
    """Write `content` to a path that the user named: a file appears whole, a pipe or a device takes it as it comes.

    A link is replaced, not followed, unless it is the system's own, such as `/dev/stdout`.
    """
    of_system = path.absolute().is_relative_to("/dev") or path.absolute().is_relative_to("/proc")
    if of_system or (path.exists() and not path.is_file()):
        path.write_text(content, encoding="utf-8")
    else:
        with new_file(path) as file:
            file.write(content.encode())


def open_own(path: Path | str, label: Path, folder: int | None = None) -> FileIO:
    """A file of this user to be read, no link; relative to the open `folder` if that is given.

    Raises:
        ResumeError: it is something else; `label` goes into the message.
        OSError: it cannot be read.
    """
    try:
        file = open_regular(path, follow=False, folder=folder)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ELOOP):
            raise not_ours(label / path, "it is not a regular file") from error
        raise
    if os.fstat(file.fileno()).st_uid != os.geteuid():
        file.close()
        raise not_ours(label / path, "it belongs to another user")
    return file


def remove_entry(name: str, folder: int) -> None:
    """Remove the file, link or folder `name` in the open `folder`; nothing that a link leads to."""
    if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        shutil.rmtree(name, dir_fd=folder)
    else:
        os.unlink(name, dir_fd=folder)


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- checks ------------------------------------------------------------------------------------------------


def _open_own_folder(folder: Path) -> int:
    """A descriptor of a real folder of this user; ResumeError for anything else."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise not_ours(folder, "it is not a folder of its own but a link or a file") from error
        if error.errno == errno.EACCES:
            raise not_ours(folder, "it cannot be opened by this user") from error
        raise
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise not_ours(folder, "it belongs to another user")
    return descriptor


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ResumeError(
            f"{folder}: another process is working on it; wait, or choose another output folder"
        ) from error
    except OSError as error:
        raise ResumeError(f"{folder}: cannot be locked ({error.strerror}); choose a folder on another disk") from error


def _is_still(descriptor: int, folder: Path) -> bool:
    """Whether `folder` is what was opened as `descriptor`."""
    try:
        found = os.stat(folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))
