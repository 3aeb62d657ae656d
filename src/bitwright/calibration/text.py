"""Text for calibration and evaluation: a file, or the documentation that ships with Python.

Files are prose or data sets, whose rows become text (see `files` and `rows`). A file of more than 4 MiB is not read
whole: prose and JSONL are read where they are needed (see `large`), other data sets from their start.

Built-in text. No corpus is shipped. `builtin` reads the language reference (`pydoc_data.topics`) and the
docstrings of a fixed list of standard-library modules, and splits them by content hash into a calibration
and an evaluation half. Every paragraph is used once, so the halves share none. The text differs between
Python versions, hence the version in its name.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import sysconfig
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from bitwright.calibration.files import HEAD_BYTES, WHOLE_BYTES, Kind, decode, kind_of, read_range
from bitwright.calibration.large import LargeProse, LargeRows, LargeText
from bitwright.calibration.layouts import Layout, arrange_whole, layout_of, lost_blank_rows
from bitwright.calibration.rows import Row, read_rows, row_text
from bitwright.errors import EvaluationError

Split = Literal["calibration", "evaluation"]

_SHORTEST_DOCSTRING = 200  # characters; shorter ones are signatures in words rather than prose
_MODULES = (
    "abc argparse asyncio/events asyncio/locks asyncio/protocols asyncio/queues asyncio/streams "
    "asyncio/tasks asyncio/transports bisect calendar cmd code codecs codeop collections/__init__ "
    "concurrent/futures/_base configparser contextlib copy csv ctypes/util dataclasses datetime _pydatetime "
    "decimal _pydecimal difflib doctest email/charset email/header email/headerregistry email/message "
    "email/parser email/policy email/_policybase enum fileinput fractions ftplib functools gettext glob "
    "graphlib gzip heapq hmac http/client http/cookiejar http/cookies http/server imaplib importlib/abc "
    "importlib/util inspect ipaddress json/__init__ json/decoder json/encoder locale logging/__init__ "
    "logging/config logging/handlers lzma mailbox mimetypes ntpath numbers optparse os pathlib pdb "
    "pickle pkgutil platform poplib posixpath pprint profile pstats py_compile pydoc queue random _pyio "
    "sched secrets selectors shelve shlex shutil site smtplib socket socketserver sqlite3/__init__ ssl "
    "statistics string subprocess tarfile tempfile textwrap threading _threading_local timeit "
    "tkinter/__init__ tkinter/ttk traceback turtle typing unittest/case unittest/loader unittest/mock "
    "urllib/parse urllib/request uuid warnings weakref wsgiref/handlers wsgiref/headers wsgiref/validate "
    "xml/dom/minidom xml/etree/ElementTree xml/sax/handler xml/sax/xmlreader zipfile"
)


@dataclass(frozen=True)
class Text:
    """A named text.

    Attributes:
        name: of the file, or of the built-in text.
        content: the text.
        layout: how its rows were joined; see the module docstring.
        templated: a chat template has written its special tokens, so the tokenizer adds none.
        whole: nothing of the file was left out.
    """

    name: str
    content: str
    layout: Layout = "plain"
    templated: bool = False
    whole: bool = True

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content in UTF-8, hexadecimal."""
        return hashlib.sha256(self.content.encode("utf-8", "surrogatepass")).hexdigest()


def load_text(
    source: str | Path | None = None,
    split: Split = "evaluation",
    *,
    layout: Layout = "auto",
    field: str | None = None,
    tokenizer: Any = None,
    characters: int = WHOLE_BYTES,
) -> Text | LargeText:
    """The text of a file, or one half of the built-in text where `source` is None or "builtin".

    Args:
        source: what to read.
        split: the half of the built-in text; files have no halves.
        layout: see `layouts`; any but `auto` takes the file as prose, whatever it is called.
        field: the column of a data set that is its text; None: see `rows`.
        tokenizer: whose chat template conversations go through.
        characters: where the rows of a large data set can only be read in order, so many are, from its start.

    Raises:
        EvaluationError: the file is missing, empty, binary, not UTF-8, not in the layout asked for, or it is a data set
            and which of its columns is the text cannot be told.
    """
    if source is None or source == "builtin":
        return builtin(split)
    path = Path(source)
    kind = kind_of(path, as_it_is=layout != "auto")
    if kind != "prose":
        return _data_set(path, kind, field, tokenizer, characters)
    if field is not None:
        raise EvaluationError(f"{path}: is prose and has no field {field!r}; leave --field out, or give a data set")
    return _prose(path, layout)


def rows_as_text(name: str, rows: Iterable[Row], field: str | None, tokenizer: Any, characters: int) -> Text:
    """The rows of a data set as one text, from the first on until there are `characters`.

    Raises:
        EvaluationError: there is no row with text, or which columns are the text cannot be told.
    """
    ordered = iter(rows)
    first = next(ordered, None)
    if first is None:
        raise EvaluationError(f"{name}: holds no row; needed rows with text")
    text_of = row_text(name, first, field, tokenizer)
    content = text_of.joined(chain([first], ordered), characters)
    if not content:
        raise EvaluationError(f"{name}: {'+'.join(text_of.columns.names)} is empty in every row; needed text")
    return Text(name, content, templated=text_of.columns.chat, whole=next(ordered, None) is None)


def _data_set(path: Path, kind: Kind, field: str | None, tokenizer: Any, characters: int) -> Text | LargeText:
    size = path.stat().st_size
    with closing(read_rows(path, kind)) as rows:
        if kind != "jsonl" or size <= WHOLE_BYTES:
            return replace(rows_as_text(str(path), rows, field, tokenizer, characters), name=path.name)
        return LargeRows(path, size, text_of=row_text(str(path), next(rows, {}), field, tokenizer))


def _prose(path: Path, layout: Layout) -> Text | LargeText:
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        content = decode(read_range(path, 0, WHOLE_BYTES), path)
        found = layout_of(path, content, layout)
        return Text(path.name, arrange_whole(path, content, found), found)
    sample = LargeProse(path, size).passage(0, HEAD_BYTES).content
    found = layout_of(path, sample, layout)
    if found == "wikitext-original" and lost_blank_rows(sample):
        raise EvaluationError(
            f"{path}: the blank rows of this WikiText file are lost, and it is too large to rebuild them "
            f"({size} bytes); give the original file, or use --layout wikitext"
        )
    return LargeProse(path, size, found)


AnyText = Text | LargeText


@lru_cache(maxsize=2)
def builtin(split: Split = "evaluation") -> Text:
    """One half of the documentation that ships with Python; the halves share no paragraph.

    Raises EvaluationError where the split is unknown or this Python carries no documentation.
    """
    if split not in ("calibration", "evaluation"):
        raise EvaluationError(f"built-in text: found split {split!r}; needed 'calibration' or 'evaluation'")
    return Text(f"builtin-{split}-py{platform.python_version()}", _halves()[split])


def paragraphs(content: str) -> list[str]:
    """The paragraphs of a text, with the white space of each collapsed; what the halves do not share."""
    return [key for part in re.split(r"\n\s*\n", content) if (key := " ".join(part.split()))]


@lru_cache(maxsize=1)
def _halves() -> dict[str, str]:
    documents = _topics() + _docstrings()
    ordered = sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in documents)
    chosen: dict[str, list[str]] = {"evaluation": [], "calibration": []}
    seen: set[str] = set()
    for split, parity in (("evaluation", 0), ("calibration", 1)):
        for digest, text in ordered:
            # the last digit decides the half, so the first ones still shuffle the order within it
            if int(digest[-1], 16) % 2 == parity and (kept := _unseen(text, seen)):
                chosen[split].append(kept)
    return {split: "\n\n".join(texts) + "\n" for split, texts in chosen.items()}


def _unseen(text: str, seen: set[str]) -> str:
    """The paragraphs of `text` that are not in `seen`, which grows by them."""
    kept = []
    for part in re.split(r"\n\s*\n", text.strip("\n")):
        key = " ".join(part.split())
        if key and key not in seen:
            seen.add(key)
            kept.append(part.rstrip())
    return "\n\n".join(kept)


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise EvaluationError(
            "built-in text: this Python carries no pydoc_data.topics; install the full standard library, "
            "or give a text file"
        ) from error
    return [str(text) for text in topics.values()]


def _docstrings() -> list[str]:
    """Docstrings of the listed modules; a module that this Python version lacks is left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for module in _MODULES.split():
        try:
            tree = ast.parse((root / f"{module}.py").read_bytes())
        except OSError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= _SHORTEST_DOCSTRING:
                    found.append(text)
    return found
