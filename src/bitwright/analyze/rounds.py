"""The folder of a target on its way, `OUT.rounds`: the sensitivity that was measured, and every quantized round."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from bitwright.checkpoint.place import Place, left_over
from bitwright.checkpoint.shard import write_text
from bitwright.errors import ResumeError

SUFFIX = ".rounds"
SENSITIVITY = "sensitivity.json"
_PUBLISHED = "published"
"""Name of the file that says which round becomes the result."""


class Rounds:
    """The place of a target; use as a context manager. What is worth going on with stays after an error."""

    def __init__(self, out: Path):
        """Make the folder beside `out`, or take up the one that an interrupted run left.

        Raises:
            ResumeError: something of the folder's name is not ours.
        """
        self._place = Place(out, SUFFIX)
        self.folder = self._place.folder

    def publish(self, number: int) -> None:
        """Let round `number` appear as the result, and remove the others."""
        made = self.folder / f"round-{number}"
        write_text(self.folder / _PUBLISHED, made.name)
        self._place.publish(made)

    def __enter__(self) -> Rounds:
        """Self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Unlock the folder; nothing of it stays where not even the sensitivity was measured."""
        if error is not None and not (self.folder / SENSITIVITY).exists():
            self._place.remove(parents=True)
        self._place.close()


def refuse_existing(out: Path) -> None:
    """Refuse an `out` that is there already, and tidy the rounds that led to it, where a run was killed at its end.

    Raises:
        ResumeError: it is.
    """
    if not os.path.lexists(out):
        return
    place = left_over(out, SUFFIX)
    if place is not None:
        with suppress(OSError, ValueError):
            made = (place.folder / _PUBLISHED).read_text(encoding="utf-8")
            if re.fullmatch(r"round-\d+", made) and not os.path.lexists(place.folder / made):
                place.remove()
        place.close()
    raise ResumeError(f"{out}: exists; choose another folder or remove it")
