"""Progress: a bar on a terminal; in a log, one line for each block, window or tensor outside the blocks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from bitwright.terminal.text import Styled, cell, error_console, say

_NUMBER = re.compile(r"(?:^|[. ])(\d+)(?=[.:, ]|$)")


def size(nbytes: float) -> str:
    """Bytes as people read them, decimal units."""
    for unit in ("B", "kB", "MB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Told:
    """Called with what was just done or is being done, how much of all that is behind, and all."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show it."""
        raise NotImplementedError

    def stop(self) -> None:
        """Leave the terminal as it was."""


@contextmanager
def progress(description: str) -> Iterator[Told]:
    """Shows on stderr how far the work within is."""
    if not error_console.is_terminal:
        yield Lines(description)
        return
    columns = (_Words(), BarColumn(), _Share(), TimeElapsedColumn(), _Left(), TimeRemainingColumn(), _What())
    with Progress(*columns, console=error_console) as shown:
        yield _Bar(shown, shown.add_task(description, total=None, what=""))


class _Bar(Told):
    """A bar, redrawn in its place."""

    def __init__(self, shown: Progress, task: TaskID):
        self._shown, self._task = shown, task

    def __call__(self, what: str, done: int, total: int) -> None:
        self._shown.update(self._task, completed=done, total=total, what=what)

    def stop(self) -> None:
        self._shown.stop()


class _Words(ProgressColumn):
    def render(self, task: Task) -> Text:
        return cell(task.description)


class _Share(ProgressColumn):
    def render(self, task: Task) -> Text:
        return cell(f"{task.percentage:>3.0f}%")


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        return cell("left")


class _What(ProgressColumn):
    def render(self, task: Task) -> Text:
        return cell(Styled(task.fields["what"], "dim"))


class Lines(Told):
    """A line for each block, or else each step: how much is done, for how long, and how long the rest will take."""

    def __init__(self, description: str, clock: Callable[[], float] = time.monotonic):
        """`clock` gives seconds."""
        self._description, self._clock = description, clock
        self._unit: str | None = None
        self._start: tuple[float, int] | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """A line where another unit has begun, or all is done."""
        now = self._clock()
        if self._start is None:
            self._start = now, done  # what an earlier run has done tells nothing of this one's speed
        unit = "the end" if done >= total else unit_of(what, done)
        if unit == self._unit:
            return
        self._unit = unit
        began, before = self._start
        elapsed = now - began
        left = elapsed * (total - done) / (done - before) if done > before else None
        rest = "" if left is None or done >= total else f", {duration(left)} left"
        share = f"{100 * done / total:.0f} %, " if total else ""
        doing = f", {what}" if what else ""
        say(f"{self._description}: {share}{done:,} of {total:,}, {duration(elapsed)}{rest}{doing}", on=error_console)


def unit_of(what: str, done: int) -> str:
    """The block that a tensor's name or a sentence on a block tells of, else the step itself."""
    found = _NUMBER.search(what)
    return f"block {found.group(1)}" if found else f"{what} {done}"
