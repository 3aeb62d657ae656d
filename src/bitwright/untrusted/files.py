"""Opening files that others made: regular ones only, since a pipe or a device might never answer."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path


def open_regular(path: Path | str, follow: bool = True, folder: int | None = None) -> FileIO:
    """`path` to be read, unbuffered, links followed if wanted; relative to the open `folder` if that is given.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    flags = os.O_RDONLY if follow else os.O_RDONLY | os.O_NOFOLLOW
    if not stat.S_ISREG(os.stat(path, dir_fd=folder, follow_symlinks=follow).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    descriptor = os.open(path, flags | os.O_NONBLOCK, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb", buffering=0)
