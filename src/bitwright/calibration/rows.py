"""Data sets: the rows of JSON, JSONL, CSV, TSV and Parquet files, and a row as text.

Which columns are the text is decided by the first row, unless the user names one (`field`). Known are:

- a conversation: `messages`, `conversations` or `conversation`, a list of messages with `role` and `content` or with
  `from` and `value`. It goes through the tokenizer's chat template.
- `text` or `content`: a string.
- a question and its answer, set one below the other: `prompt` and `completion` (or `response`), or `instruction`,
  perhaps `input`, and `output` (or `response`).

Exactly one of them must be there; which one is meant where there are several is for the user to say.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bitwright.calibration.chat import as_messages, chosen_template, render
from bitwright.calibration.files import Kind, decode, unreadable
from bitwright.errors import EvaluationError

Row = Mapping[str, Any]
_CHATS = ("messages", "conversations", "conversation")
_TEXTS = ("text", "content")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("instruction", "input", "response"),
    ("instruction", "response"),
)
_JSON_CHARACTERS = 2**18
_LONGEST = 2**26
"""Characters of a cell, of an element of a JSON list, and of JSON that is no list."""
_BETWEEN = re.compile(r"[\s,]*")
_PARQUET_ROWS = 256


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set are its text.

    Attributes:
        names: in the order in which they are put together.
        chat: the one column holds conversations.
    """

    names: tuple[str, ...]
    chat: bool = False


@dataclass(frozen=True)
class RowText:
    """Turns the rows of one data set into text.

    Attributes:
        label: of the data set, for messages.
        columns: of the rows.
        tokenizer: whose chat template conversations go through; None: they are refused.
    """

    label: str
    columns: Columns
    tokenizer: Any = None

    @property
    def separator(self) -> str:
        """Between the texts of two rows."""
        return "\n" if self.columns.chat else "\n\n"

    def joined(self, rows: Iterable[Row], characters: int | None = None) -> str:
        """The text of rows, blank ones left out, from the first on until there are `characters`; None: of all."""
        found: list[str] = []
        total = 0
        for row in rows:
            if text := self(row):
                found.append(text)
                total += len(text)
            if characters is not None and total >= characters:
                break
        return self.separator.join(found)

    def __call__(self, row: Row) -> str:
        """The text of a row, without white space at the end; empty where the row has none.

        Raises:
            EvaluationError: what stands in the columns is not text.
        """
        values = [row.get(name) for name in self.columns.names]
        if self.columns.chat:
            return self._conversation(values[0])
        parts = []
        for name, value in zip(self.columns.names, values, strict=True):
            if value is not None and not isinstance(value, str):
                raise EvaluationError(f"{self.label}: column {name!r} holds {_typed(value)}, needed text in every row")
            if value and "\0" in value:
                raise EvaluationError(f"{self.label}: column {name!r} holds a NUL byte; needed text")
            parts.append(value or "")
        return "\n".join(part.rstrip() for part in parts if part.strip())

    def _conversation(self, value: Any) -> str:
        if not value:
            return ""
        messages = as_messages(value)
        if messages is None:
            raise EvaluationError(
                f"{self.label}: column {self.columns.names[0]!r} holds {_typed(value)}, needed a list of messages with "
                "role and content, or with from and value"
            )
        return render(self.tokenizer, messages).rstrip()


def row_text(label: str, first: Row, field: str | None, tokenizer: Any) -> RowText:
    """How the rows of a data set become text, decided by its first one.

    Args:
        label: of the data set, for messages.
        first: its first row.
        field: the column to take; None: the one that is known, see the module.
        tokenizer: of the model.

    Raises:
        EvaluationError: no column is known, or several are, or the tokenizer cannot put conversations.
    """
    columns = _named(label, first, field) if field is not None else _known(label, first)
    if columns.chat:
        if tokenizer is None:
            raise EvaluationError(
                f"{label}: holds conversations, and there is no tokenizer to put them into a template"
            )
        try:
            chosen_template(tokenizer)
        except EvaluationError as error:
            raise EvaluationError(
                f"{label}: holds conversations in the column {columns.names[0]!r}: {error}, or name a column of text: "
                f"{_remedy('NAME')}; columns: {', '.join(map(str, first))}"
            ) from error
    return RowText(label, columns, tokenizer)


def read_rows(path: Path, kind: Kind) -> Generator[Row]:
    """The rows of a file, one by one.

    Raises:
        EvaluationError: it cannot be read, or is not what its name says.
    """
    readers: dict[Kind, Callable[[Path], Iterator[Row]]] = {
        "jsonl": _json_lines,
        "json": _json_rows,
        "csv": lambda path: _table(path, ","),
        "tsv": lambda path: _table(path, "\t"),
        "parquet": _parquet,
    }
    try:
        yield from readers[kind](path)
    except OSError as error:
        raise unreadable(path, error) from error


def parse_line(line: bytes, path: Path, where: str, start: int = 0) -> Row | None:
    """The row of the line of JSONL that begins at byte `start`; None: it is blank. Errors name it as `where`.

    Raises:
        EvaluationError: it is not a JSON object in UTF-8.
    """
    text = decode(line, path, start)
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: {where} is not JSON ({error}); needed one object a line") from error
    if not isinstance(row, dict):
        raise EvaluationError(f"{path}: {where} holds {_typed(row)}, needed one object a line")
    return row


def _named(label: str, row: Row, field: str) -> Columns:
    if field not in row:
        raise EvaluationError(
            f"{label}: has no column {field!r}, but {', '.join(map(str, row))}; name one of them: {_remedy('NAME')}"
        )
    return Columns((field,), chat=as_messages(row[field]) is not None)


def _known(label: str, row: Row) -> Columns:
    found = [Columns((name,), chat=True) for name in _CHATS if as_messages(row.get(name)) is not None]
    found += [Columns((name,)) for name in _TEXTS if isinstance(row.get(name), str)]
    pairs = [names for names in _PAIRS if all(isinstance(row.get(name), str) for name in names)]
    # the longer of two that begin alike says more
    found += [Columns(names) for names in pairs if not any(set(names) < set(other) for other in pairs)]
    if len(found) == 1:
        return found[0]
    columns = ", ".join(map(str, row)) or "none"
    if found:
        several = " and ".join("+".join(one.names) for one in found)
        raise EvaluationError(
            f"{label}: which columns are the text? It could be {several}; name one: {_remedy(found[0].names[0])}; "
            f"columns: {columns}"
        )
    raise EvaluationError(
        f"{label}: has the columns {columns}; needed one of {', '.join((*_CHATS, *_TEXTS))}, prompt with completion or "
        f"instruction with output; name the column of the text: {_remedy('NAME')}"
    )


def _remedy(name: str) -> str:
    return f"--field {name}"


def _typed(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        place = 0
        for number, line in enumerate(file, start=1):
            row = parse_line(line, path, f"line {number}", place)
            place += len(line)
            if row is not None:
                yield row


def _json_rows(path: Path) -> Iterator[Row]:
    """Rows of a list of objects, read as far as they are asked for; of an object that holds one list; or of lines."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            buffer = file.read(_JSON_CHARACTERS)
            start = buffer.lstrip()
            if start.startswith("["):
                yield from _elements(path, start[1:], file.read)
                return
            lines = [line for line in start.split("\n", 2)[:2] if line.strip()]
            if len(lines) > 1 and _is_object(lines[0]):
                yield from _json_lines(path)
                return
            content = json.loads(buffer + file.read(_LONGEST))
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{path}: not JSON in UTF-8 ({error}); needed a list of objects") from error
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else []
    rows: list[Any] = lists[0] if len(lists) == 1 else [content]
    yield from (_as_row(path, row) for row in rows)


def _elements(path: Path, buffer: str, more: Callable[[int], str]) -> Iterator[Row]:
    """The elements of a JSON list whose opening bracket has been read; `more` reads on."""
    decoder = json.JSONDecoder()
    place = 0
    while True:
        if between := _BETWEEN.match(buffer, place):
            place = between.end()
        if buffer.startswith("]", place):
            return
        try:
            row, place = decoder.raw_decode(buffer, place)
        except json.JSONDecodeError:
            # The element is longer than what was read, unless the file ends here or nothing is so long.
            further = more(max(_JSON_CHARACTERS, len(buffer) - place)) if len(buffer) - place < _LONGEST else ""
            if not further:
                raise
            buffer, place = buffer[place:] + further, 0
            continue
        yield _as_row(path, row)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _as_row(path: Path, row: Any) -> Row:
    if not isinstance(row, dict):
        raise EvaluationError(f"{path}: holds {_typed(row)} where a row should be; needed a list of objects")
    return row


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    before = csv.field_size_limit(_LONGEST)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, restkey="further cells")
            for row in reader:
                if None in row.values() or "further cells" in row:
                    raise EvaluationError(
                        f"{path}: line {reader.line_num} has more or fewer cells than the first line, "
                        f"{', '.join(reader.fieldnames or ())}; needed a first line of names and as many cells in "
                        "every other; put text that has a comma or a line break into quotes"
                    )
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: not a table in UTF-8 ({error}); mend it, or write it as JSONL") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        parquet = import_module("pyarrow.parquet")
        known = import_module("pyarrow").ArrowException
    except ImportError as error:
        raise EvaluationError(
            f"{path}: Parquet files need the package pyarrow, which is missing; install it with: "
            "pip install 'bitwright[datasets]', or write the text to a .jsonl file"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                yield from batch.to_pylist()
    except (known, ValueError, OSError) as error:
        raise EvaluationError(f"{path}: not a Parquet file that can be read ({error}); write it again") from error
