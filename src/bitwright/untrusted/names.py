"""The one check of file names that an index or a manifest gives: a plain name, inside the folder, of a known kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bitwright.errors import BitwrightError

SHARD = ".safetensors"
_LONGEST_NAME = 255
_DEEPEST = 4


def inside(folder: Path, name: Any, said_by: str | Path, kind: type[BitwrightError]) -> Path:
    """The path of the file `name` in `folder`; `said_by`, the index or manifest, goes into messages.

    A hub cache links its files elsewhere, so the file may be a link; the name may not lead anywhere.

    Raises:
        BitwrightError: of `kind`: the name is no plain file name.
    """
    if not isinstance(name, str):
        raise kind(f"{said_by}: names a file {str(name)[:60]!r}, needed text; the file is damaged")
    plain = name.isprintable() and not any(mark in name for mark in "/\\:")
    if not plain or name in ("", ".", "..") or len(name.encode(errors="replace")) > _LONGEST_NAME:
        raise kind(
            f"{said_by}: the file {name[:120]!r} lies outside the folder, or has a name that no file of a model has; "
            "the file is damaged or hostile: take the model from another place"
        )
    return folder / name


def below(folder: Path, name: Any, said_by: str | Path, kind: type[BitwrightError]) -> Path:
    """The same for a file in a folder below `folder`, such as `additional_chat_templates/tool_use.jinja`.

    Raises:
        BitwrightError: of `kind`: a part of the name is no plain file name, or there are too many.
    """
    parts = name.split("/") if isinstance(name, str) else [name]
    if len(parts) > _DEEPEST:
        raise kind(f"{said_by}: the file {name[:120]!r} lies {len(parts)} folders deep, at most {_DEEPEST} are read")
    for part in parts[:-1]:
        folder = inside(folder, part, said_by, kind)
    return inside(folder, parts[-1], said_by, kind)


def shards_of(folder: Path, names: Iterable[Any], said_by: str | Path, kind: type[BitwrightError]) -> dict[str, Path]:
    """Name -> path of files of weights in `folder`, each once and in order of appearance.

    They must be safetensors: other kinds hold programs that reading would run.

    Raises:
        BitwrightError: of `kind`: see `inside`, or a file of another kind.
    """
    found: dict[str, Path] = {}
    for name in names:
        if isinstance(name, str) and name in found:
            continue
        path = inside(folder, name, said_by, kind)
        if path.suffix != SHARD:
            raise kind(
                f"{said_by}: names the file {name!r}, needed files that end in {SHARD}; others can hold programs that "
                "reading would run: where you trust it, save the model anew with transformers' save_pretrained"
            )
        found[name] = path
    return found
