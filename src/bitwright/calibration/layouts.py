"""Layouts: how the rows of a text file are joined to one text.

A file is `plain` (used as it is) unless its lines look like WikiText: every line that is not
blank starts and ends with a space, and the first is a title, ` = Title = `. Two layouts exist for those:

- `wikitext`: the non-blank rows, each ending in its newline, joined by two newlines. Whether a copy of the
  data set kept its blank rows or lost them no longer matters. This is what `auto` selects.
- `wikitext-original`: all rows of the original file joined by two newlines, blank rows as empty strings.
  Published perplexities use this one. A file without its blank rows is rebuilt, and the result is checked
  against the SHA-256 of the original (`ORIGINALS`); a file that cannot be checked is refused.

The two give different token streams, so different perplexities: never compare one with the other.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

from bitwright.errors import EvaluationError

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


def layout_of(path: Path, content: str, layout: Layout) -> Layout:
    """The layout of a file that starts with `content`: the one asked for, or what `auto` finds.

    Raises:
        EvaluationError: the file is not in the layout asked for.
    """
    if layout == "plain" or (layout == "auto" and not _is_wikitext(content)):
        return "plain"
    if not _is_wikitext(content):
        raise EvaluationError(
            f"{path}: layout {layout!r} needs WikiText rows (a space at both ends, a ` = Title = ` first); "
            f"found {content.lstrip()[:40]!r}; use --layout plain"
        )
    return "wikitext" if layout == "auto" else layout


def separator(layout: Layout) -> str:
    """What stands between two parts of a text that were arranged apart."""
    return "" if layout == "plain" else "\n\n"


def arrange(content: str, layout: Layout) -> str:
    """Whole lines of a file as text; of `wikitext-original` the blank rows must be there."""
    if layout == "plain":
        return content
    if layout == "wikitext":
        return "\n\n".join(line + "\n" for line in content.split("\n") if line.strip())
    return "\n\n".join(line + "\n" if line.strip() else "" for line in _lines(content))


def arrange_whole(path: Path, content: str, layout: Layout) -> str:
    """All of a file as text; blank rows of `wikitext-original` that are lost are rebuilt.

    Raises:
        EvaluationError: rebuilt, it is no known original.
    """
    if layout == "wikitext-original" and lost_blank_rows(content):
        content = _rebuilt(path, _lines(content))
    return arrange(content, layout)


def lost_blank_rows(content: str) -> bool:
    """Whether there is no blank row, which every original has."""
    return all(line.strip() for line in _lines(content))


def _lines(content: str) -> list[str]:
    lines = content.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


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


def _rebuilt(path: Path, lines: list[str]) -> str:
    """The original file of these rows, its blank rows put back."""
    rebuilt = []
    for line in lines:
        before, after = _blank_rows(line)
        rebuilt += [" "] * before + [line] + [" "] * after
    lines = [*rebuilt[1:], " "]  # no article ends before the first title, one does at the end
    content = "".join(line + "\n" for line in lines)
    digest = hashlib.sha256(content.encode()).hexdigest()
    if digest not in ORIGINALS:
        raise EvaluationError(
            f"{path}: the blank rows of this WikiText file are lost and the rebuilt file (SHA-256 {digest[:12]}) is no "
            "known original; give the original file, or use --layout wikitext"
        )
    return content
