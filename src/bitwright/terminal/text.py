"""The only way to a terminal: what is printed is text, never markup, and no character of it is a command.

Names of models, files and tensors, and what models say, are others' text. Here they become cells and lines of `rich`
in which nothing is interpreted and every control character is spelled out (see `execute.shown`). No other module
prints, and none but this and `progress` imports `rich`; a test sees to that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitwright.execute.shown import visible

# What a continuation may hold besides what is seen: lines, tabs, and the joiners of scripts and emoji.
_OF_PROSE = "\n\t\u200c\u200d"


def _console(stderr: bool) -> Console:
    # Without a terminal there is no width to ask for; tables in logs should not be folded.
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 140
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


console, error_console = _console(stderr=False), _console(stderr=True)


@dataclass(frozen=True)
class Styled:
    """A piece of a line with a style, such as `bold red`."""

    text: object
    style: str


def cell(*pieces: object) -> Text:
    """One line of `pieces`, some perhaps Styled; whatever they hold is shown and not interpreted."""
    found = Text()
    for piece in pieces:
        style = piece.style if isinstance(piece, Styled) else ""
        found.append(visible(piece.text if isinstance(piece, Styled) else piece), style=style)
    return found


def say(*pieces: object, on: Console = console) -> None:
    """Print one line of `pieces`; lines of a log are not folded at its width."""
    on.print(cell(*pieces), soft_wrap=not on.is_terminal)


def say_prose(text: str) -> None:
    """Print what a model wrote: its lines stay lines."""
    console.print(Text(visible(text, keep=_OF_PROSE)), soft_wrap=True)


class Sheet:
    """A table to fill and show: first columns of words, then columns of numbers."""

    def __init__(self, title: object, words: Iterable[str], numbers: Iterable[str] = (), header: bool = True):
        """Empty; without `header` the names of the columns are not shown."""
        self._table = Table(title=cell(title), show_header=header)
        for heading in words:
            self._table.add_column(cell(heading), overflow="fold")
        for heading in numbers:
            self._table.add_column(cell(heading), justify="right")

    def row(self, *values: object) -> None:
        """One row, a value for each column."""
        self._table.add_row(*map(cell, values))

    def show(self) -> None:
        """Print it."""
        console.print(self._table)
