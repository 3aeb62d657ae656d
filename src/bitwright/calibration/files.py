"""Files of text: what one holds, told from its name and its first bytes, and its bytes as characters.

A name that ends in `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` or `.parquet` is a data set (see `rows`), and so is
any file that starts as Parquet does; every other name is prose. What is plainly neither, such as a compressed file,
is refused, and so is prose that is JSON in truth: a layout named by the user, such as `plain`, has it as it is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from bitwright.errors import EvaluationError

Kind = Literal["prose", "jsonl", "json", "csv", "tsv", "parquet"]
WHOLE_BYTES = 2**22
"""Of files up to this size every token is looked at; of larger ones only what is needed is read."""
HEAD_BYTES = 2**16
"""Read to tell what a file is."""
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_PARQUET = b"PAR1"
_FOREIGN = {
    b"\x1f\x8b": ("a gzip file", "unpack it first: gunzip -k FILE"),
    b"BZh": ("a bzip2 file", "unpack it first: bunzip2 -k FILE"),
    b"\xfd7zXZ": ("an xz file", "unpack it first: unxz -k FILE"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it first: unzstd FILE"),
    b"PK\x03\x04": ("a zip file, perhaps of an office program", "unpack it, or save its text as a UTF-8 .txt file"),
    b"%PDF": ("a PDF file", "save its text as a UTF-8 .txt file"),
    b"GGUF": ("a GGUF file", "give a text file"),
    b"\xff\xfe": ("UTF-16 text", "convert it first: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    b"\xfe\xff": ("UTF-16 text", "convert it first: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
}
_BOM = b"\xef\xbb\xbf"
_ROW = re.compile(r'\{\s*"[^"\n]{1,200}"\s*:\s*\S')


def kind_of(path: Path, as_it_is: bool = False) -> Kind:
    """What the file holds; with `as_it_is` prose, whatever its name and its look.

    Raises:
        EvaluationError: it is missing, empty, compressed, binary, in UTF-16, or prose that is JSON in truth.
    """
    head = read_range(path, 0, HEAD_BYTES)
    if not head.strip():
        raise EvaluationError(f"{path}: the file is empty; give a UTF-8 text file, or 'builtin'")
    kind: Kind = "parquet" if head.startswith(_PARQUET) else _SUFFIXES.get(path.suffix.lower(), "prose")
    for magic, (what, remedy) in _FOREIGN.items():
        if head.startswith(magic):
            raise EvaluationError(f"{path}: is {what}, needed UTF-8 text; {remedy}")
    if kind == "parquet":
        if not head.startswith(_PARQUET) or as_it_is:
            raise EvaluationError(
                f"{path}: needed a Parquet file and the layout 'auto'; rename it, or leave --layout out"
            )
        return kind
    if b"\0" in head:
        raise EvaluationError(f"{path}: {_nul(head.index(0))}")
    if as_it_is:
        return "prose"
    if kind == "prose" and _looks_like_json(head):
        raise EvaluationError(
            f"{path}: holds JSON, though its name is that of a text; rename it to {path.stem}.jsonl (a record a line) "
            f"or {path.stem}.json to have the text of its records read, or use --layout plain to take it as it is"
        )
    return kind


def read_range(path: Path, start: int, count: int) -> bytes:
    """At most `count` bytes from byte `start` on; EvaluationError where the file cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(count)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> EvaluationError:
    """What to raise for a file that the system does not give."""
    return EvaluationError(
        f"{path}: cannot be read ({error.strerror or error}); needed a UTF-8 text file; "
        "give the path of one, or 'builtin'"
    )


def decode(data: bytes, path: Path, start: int = 0) -> str:
    """The characters of UTF-8 bytes that begin at byte `start` of the file; every line ends in a newline alone.

    Raises:
        EvaluationError: they are not UTF-8, or hold a NUL byte, which no text does.
    """
    if start == 0:
        data = data.removeprefix(_BOM)
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{path}: not UTF-8 at byte {start + error.start}; convert it first, for example with iconv -t UTF-8"
        ) from error
    if "\0" in content:
        raise EvaluationError(f"{path}: {_nul(start + data.index(0))}")
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _nul(byte: int) -> str:
    return f"a NUL byte at byte {byte}: the file is binary, or text in UTF-16; needed UTF-8 text; convert it first"


def _looks_like_json(head: bytes) -> bool:
    """Whether a file that starts with `head` starts with a JSON object, alone or in a list."""
    text = head.removeprefix(_BOM).decode("utf-8", "replace").lstrip()
    text = text[1:].lstrip() if text.startswith("[") else text
    if not _ROW.match(text):
        return False
    try:
        found, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return len(head) == HEAD_BYTES  # a record longer than that cannot be told from its start
    return isinstance(found, dict)
