"""The one reader of JSON that others wrote: an object, of bounded size and depth, whose keys say one thing each.

The bounds are far above real files: the longest index and manifest of a model of 100 000 tensors take 100 MB and
three million values.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bitwright.errors import BitwrightError
from bitwright.untrusted.boundary import REMEDY, reading
from bitwright.untrusted.files import open_regular

LARGEST_BYTES = 256 << 20
LARGEST_VALUES = 8_000_000
LARGEST_DEPTH = 64


def read_json(path: Path, kind: type[BitwrightError], missing: str = REMEDY) -> dict[str, Any]:
    """The object in the JSON file at `path`.

    Args:
        path: of the file.
        kind: of the error.
        missing: what to say, behind "missing; ", where there is no such file.

    Raises:
        BitwrightError: of `kind`: the file is missing or cannot be read, is too large or nested too deeply, is not
            JSON in UTF-8 or no object, holds NaN, or a key with two values.
    """
    with reading(path, kind):
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size > LARGEST_BYTES:
                    raise kind(f"{path}: {size:,} bytes long, at most {LARGEST_BYTES:,} are read; {REMEDY}")
                data = file.readall()
        except FileNotFoundError as error:
            raise kind(f"{path}: missing; {missing}") from error
    return parse_json(data, str(path), kind)


def parse_json(data: bytes, where: str, kind: type[BitwrightError], remedy: str = REMEDY) -> dict[str, Any]:
    """The object that the text `data` is; `where` it comes from goes into messages.

    Raises:
        BitwrightError: of `kind`; see `read_json`.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(found)
        if len(content) < len(found):
            _refuse_contradictions(found, content)
        return content

    # Bounds the memory of what is parsed: every value but the first follows one of these.
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > LARGEST_VALUES:
        raise kind(f"{where}: {values:,} values, more than any model has; {remedy}")
    try:
        content = json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=_constant)
        if b"\\u" in data:
            # Half a character cannot be written again, nor shown.
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise kind(f"{where}: not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise kind(f"{where}: holds {type(content).__name__}, needed an object; {remedy}")
    if _deeper_than(content, LARGEST_DEPTH):
        raise kind(f"{where}: nested more than {LARGEST_DEPTH} deep; {remedy}")
    return content


def _refuse_contradictions(found: list[tuple[str, Any]], content: dict[str, Any]) -> None:
    for key, value in found:
        if value != content[key]:
            raise ValueError(f"the key {key!r} occurs twice, with different values")


def _constant(name: str) -> float:
    # Infinity is a limit in configs of state-space models; NaN is never meant.
    if name == "NaN":
        raise ValueError("NaN, needed a number")
    return math.inf if name == "Infinity" else -math.inf


def _deeper_than(content: Any, limit: int) -> bool:
    level: list[Any] = [content]
    for _ in range(limit):
        level = [child for parent in level for child in _children(parent) if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _children(parent: Any) -> Iterable[Any]:
    return parent.values() if isinstance(parent, dict) else parent
