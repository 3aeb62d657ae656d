"""The boundary that every reader stands behind: what damaged content raises becomes an error of ours.

Readers check what they can name; whatever a library raises beyond that (a missing key, a shape that does not fit, a
damaged header, nesting without end) is turned into the reader's error with the name of the file. The original error
stays its cause, so that a traceback shows where a bug of our own would lie.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from bitwright.errors import BitwrightError

# What the machine lacks is no fault of a file: these go on to whoever runs the job.
_OF_THE_MACHINE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE))
_LONGEST = 300
REMEDY = "the file is damaged: download or make it again"


@contextmanager
def reading(what: str | Path, kind: type[BitwrightError], remedy: str = REMEDY) -> Iterator[None]:
    """Within, an error that the content of a file causes becomes one of `kind`; errors of ours pass as they are.

    Args:
        what: the file that is read, or the part of it.
        kind: of the error.
        remedy: what the user can do.

    Raises:
        BitwrightError: of `kind`; the error that it replaces is its cause.
        OSError: the disk is full, or the machine lacks something else.
    """
    try:
        yield
    except BitwrightError:
        raise
    except OSError as error:
        if error.errno in _OF_THE_MACHINE:
            raise
        raise kind(f"{what}: cannot be read ({brief(error)}); {remedy}") from error
    except Exception as error:
        raise kind(f"{what}: cannot be understood ({brief(error)}); {remedy}") from error


def brief(error: Exception) -> str:
    """The name of an error and the beginning of what it says, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:_LONGEST]}" if said else type(error).__name__
