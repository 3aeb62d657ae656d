"""Text for calibration and evaluation: a file, or the documentation that ships with Python.

Built-in text. No corpus is shipped. `builtin` reads the language reference (`pydoc_data.topics`) and the
docstrings of a fixed list of standard-library modules, and splits them by content hash into a calibration
and an evaluation half. Every paragraph is used once, so the halves share none. The text differs between
Python versions, hence the version in its name.

Layouts. A file is `plain` (used as it is) unless its lines look like WikiText: every line that is not
blank starts and ends with a space, and the first is a title, ` = Title = `. Two layouts exist for those:

- `wikitext`: the non-blank rows, each ending in its newline, joined by two newlines. Whether a copy of the
  data set kept its blank rows or lost them no longer matters. This is what `auto` selects.
- `wikitext-original`: all rows of the original file joined by two newlines, blank rows as empty strings.
  Published perplexities use this one. A file without its blank rows is rebuilt, and the result is checked
  against the SHA-256 of the original (`ORIGINALS`); a file that cannot be checked is refused.

The two give different token streams, so different perplexities: never compare one with the other.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import sysconfig
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from bitwright.errors import EvaluationError

Split = Literal["calibration", "evaluation"]
Layout = Literal["auto", "plain", "wikitext", "wikitext-original"]

#: SHA-256 of original WikiText files with a newline after every row -> what they are.
ORIGINALS = {
    "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08": "WikiText-2 raw, test split",
}
#: Rows of the originals that break the rule of `_blank_rows`: row -> blank rows (before, after).
_IRREGULAR = {
    " = 1 rad / s and a nominal impedance k = ": (0, 0),  # two formulas, not titles
    " = 1 henry and capacitance C = ": (0, 0),
    " = The Hustler ( film ) = ": (1, 1),  # the one article boundary with a single blank row
}
_HEADING = re.compile(r" ((?:= )+)\S(?:.*?\S)??((?: =)+) ")
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
    """A named text and how its rows were joined (see the module docstring for the layouts)."""

    name: str
    content: str
    layout: Layout = "plain"

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content in UTF-8, hexadecimal."""
        return hashlib.sha256(self.content.encode("utf-8", "surrogatepass")).hexdigest()


def load_text(source: str | Path | None = None, split: Split = "evaluation", *, layout: Layout = "auto") -> Text:
    """The text of a file, or one half of the built-in text where `source` is None or "builtin".

    `split` picks the half of the built-in text; a file is always used whole. Line ends become newlines.
    Raises EvaluationError where the file is missing, empty, not UTF-8 or not in the layout asked for.
    """
    if source is None or source == "builtin":
        return builtin(split)
    path = Path(source)
    content = _read(path)
    if layout == "plain" or (layout == "auto" and not _is_wikitext(content)):
        return Text(path.name, content, "plain")
    if not _is_wikitext(content):
        raise EvaluationError(
            f"{path}: layout {layout!r} needs WikiText rows (a space at both ends, a ` = Title = ` first); "
            f"found {content.lstrip()[:40]!r}; use --layout plain"
        )
    if layout == "wikitext-original":
        return Text(path.name, "\n\n".join(_original_rows(path, content)), layout)
    rows = (line + "\n" for line in content.split("\n") if line.strip())
    return Text(path.name, "\n\n".join(rows), "wikitext")


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


def _read(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{path}: not UTF-8 at byte {error.start}; convert it first, for example with iconv -t UTF-8"
        ) from error
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be read ({error.strerror or error}); needed a UTF-8 text file; "
            "give the path of one, or 'builtin'"
        ) from error
    if not content.strip():
        raise EvaluationError(f"{path}: the file is empty; give a UTF-8 text file, or 'builtin'")
    return content


def _is_wikitext(content: str) -> bool:
    rows = [line for line in content.split("\n") if line.strip()]
    return _level(rows[0]) == 1 and all(row[0] == " " == row[-1] for row in rows)


def _level(row: str) -> int:
    """Depth of a heading row (` = Title = ` is 1, ` = = Section = = ` is 2), or 0 for body text."""
    match = _HEADING.fullmatch(row)
    return len(match[1]) // 2 if match and len(match[1]) == len(match[2]) else 0


def _blank_rows(row: str) -> tuple[int, int]:
    """Blank rows (before, after) in an original: around each heading, one more where an article ends."""
    level = _level(row)
    return _IRREGULAR.get(row, (2 if level == 1 else 1, 1) if level else (0, 0))


def _original_rows(path: Path, content: str) -> list[str]:
    """All rows of the original file, blank rows as "", others with their newline."""
    lines = content.split("\n")
    if lines[-1] == "":
        lines.pop()
    if all(line.strip() for line in lines):  # the blank rows are lost: rebuild them
        rebuilt = []
        for line in lines:
            before, after = _blank_rows(line)
            rebuilt += [" "] * before + [line] + [" "] * after
        lines = [*rebuilt[1:], " "]  # no article ends before the first title, one does at the end
        digest = hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
        if digest not in ORIGINALS:
            raise EvaluationError(
                f"{path}: the blank rows of this WikiText file are lost and the rebuilt file "
                f"(SHA-256 {digest[:12]}) is no known original; give the original file, "
                "or use --layout wikitext"
            )
    return [line + "\n" if line.strip() else "" for line in lines]


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
