"""Large files of text: read where they are needed, never whole.

`passage` gives the text from some byte on and `pieces` the text from the start on, both in whole lines: a byte in the
middle of one leads to the next. Where there are no lines (none begins in what was read) words will do, and where
there are no words characters. In memory is only what is asked for.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bitwright.calibration.files import decode, read_range, unreadable
from bitwright.calibration.layouts import Layout, arrange, separator
from bitwright.calibration.rows import Row, RowText, parse_line
from bitwright.errors import EvaluationError

PIECE_BYTES = 2**17
"""Read at once."""
_IDENTITY_BYTES = 2**20
_LONGEST_LINE = 2**25
"""Bytes of a row of JSONL."""
_LONGEST_CHARACTER = 4  # bytes, in UTF-8


@dataclass(frozen=True)
class Passage:
    """A part of a file: the bytes from `begin` to before `end`, and the text that they hold."""

    begin: int
    end: int
    content: str


@dataclass(frozen=True)
class LargeText(ABC):
    """A file of text that is too large to be read whole.

    Attributes:
        path: of the file.
        size: its bytes.
        layout: how its rows are joined.
    """

    path: Path
    size: int
    layout: Layout = "plain"

    @property
    def name(self) -> str:
        """Of the file."""
        return self.path.name

    @property
    @abstractmethod
    def templated(self) -> bool:
        """Whether a chat template has written special tokens."""

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the size, and the first and the last MiB: names the file without reading it whole."""
        digest = hashlib.sha256(f"{self.size} bytes\n".encode())
        digest.update(read_range(self.path, 0, _IDENTITY_BYTES))
        digest.update(read_range(self.path, max(0, self.size - _IDENTITY_BYTES), _IDENTITY_BYTES))
        return digest.hexdigest()

    @abstractmethod
    def passage(self, start: int, count: int) -> Passage:
        """Text of about `count` bytes from byte `start` on, empty where nothing begins there.

        Raises EvaluationError where the bytes are not text.
        """

    @abstractmethod
    def pieces(self) -> Iterator[str]:
        """All of the text from its start, in order; joined they are the text. Raises EvaluationError as `passage`."""


@dataclass(frozen=True)
class LargeProse(LargeText):
    """A large file of prose."""

    @property
    def templated(self) -> bool:
        """See `LargeText`."""
        return False

    def passage(self, start: int, count: int) -> Passage:
        """See `LargeText.passage`."""
        data = read_range(self.path, start, count)
        first = 0 if start == 0 else _after_break(data)
        end = len(data) if start + len(data) >= self.size else _before_break(data)
        content = decode(data[first:end], self.path, start + first)
        return Passage(start + first, start + end, arrange(content, self.layout))

    def pieces(self) -> Iterator[str]:
        """See `LargeText.pieces`."""
        place = 0
        while place < self.size:
            data = read_range(self.path, place, PIECE_BYTES)
            if not data:
                raise EvaluationError(f"{self.path}: has become shorter while it was read; start again")
            if place + len(data) < self.size:
                data = data[: _before_break(data)]
            joint = separator(self.layout) if place else ""
            yield joint + arrange(decode(data, self.path, place), self.layout)
            place += len(data)


@dataclass(frozen=True)
class LargeRows(LargeText):
    """A large file of JSONL.

    Attributes:
        text_of: what turns a row into text.
    """

    text_of: RowText | None = None

    @property
    def templated(self) -> bool:
        """See `LargeText`."""
        return self._text_of.columns.chat

    @property
    def _text_of(self) -> RowText:
        assert self.text_of is not None
        return self.text_of

    def passage(self, start: int, count: int) -> Passage:
        """See `LargeText.passage`: rows that begin behind `start`, until their texts have `count` bytes or so."""
        texts: list[str] = []
        begin = end = start
        total = 0
        for place, line_end, row in self._rows(start):
            if text := self._text_of(row):
                begin, end = (begin if texts else place), line_end
                texts.append(text)
                total += len(text.encode())
            if total >= count:
                break
        return Passage(begin, end, self._text_of.separator.join(texts))

    def pieces(self) -> Iterator[str]:
        """See `LargeText.pieces`."""
        joint = ""
        for _, _, row in self._rows(0):
            if text := self._text_of(row):
                yield joint + text
                joint = self._text_of.separator

    def _rows(self, start: int) -> Iterator[tuple[int, int, Row]]:
        """The rows that begin at or behind byte `start`, each with the bytes where its line begins and ends."""
        try:
            with self.path.open("rb") as file:
                if start:
                    file.seek(start - 1)
                    file.readline(_LONGEST_LINE)  # the rest of a line that begins before
                while line := file.readline(_LONGEST_LINE):
                    place = file.tell() - len(line)
                    if len(line) == _LONGEST_LINE:
                        raise EvaluationError(
                            f"{self.path}: the line at byte {place} is longer than {_LONGEST_LINE} bytes; needed one "
                            "record a line; a list of records belongs into a .json file"
                        )
                    row = parse_line(line, self.path, f"the line at byte {place}", place)
                    if row is not None:
                        yield place, file.tell(), row
        except OSError as error:
            raise unreadable(self.path, error) from error


def _after_break(data: bytes) -> int:
    """Where the first line of `data` begins that is whole, or else a word, or else a character."""
    for mark in (b"\n", b" "):
        if place := data.find(mark, 0, len(data) // 2) + 1:
            return place
    return next((place for place in range(min(len(data), _LONGEST_CHARACTER)) if data[place] & 0xC0 != 0x80), 0)


def _before_break(data: bytes) -> int:
    """Where the last whole line of `data` ends, or else the last word, or else the last character."""
    for mark in (b"\n", b" "):
        place = data.rfind(mark, len(data) // 2)
        if place >= 0:
            # a space belongs to the word behind it, as tokenizers have it
            return place + 1 if mark == b"\n" else place
    for place in range(len(data) - 1, max(0, len(data) - 1 - _LONGEST_CHARACTER), -1):
        if data[place] & 0xC0 != 0x80:
            return place
    return len(data)
