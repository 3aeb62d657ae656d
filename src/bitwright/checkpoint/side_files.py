"""Side files: what loaders, processors and licences need beside config and weights, carried from folder to folder.

A link that leads out of the folder is left out and told of: its target may be anything on the machine, and a result
is made to be given away. The exception is the cache of the Hugging Face hub, where every file is a link to a blob of
the same repository. Pipes and devices are never opened.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from bitwright.checkpoint.place import new_file
from bitwright.errors import CheckpointError
from bitwright.execute.shown import visible
from bitwright.untrusted.files import open_regular
from bitwright.untrusted.names import below

PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "*processor_config.json",
    # Code that config.json names for loaders that are told to trust it, and what it imports; nothing here runs it.
    "*.py",
    "*license*",
    "*licence*",
    "copying*",
    "copyright*",
    "notice*",
    "*use_policy*",
)
"""Compared without regard to case."""
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".index.json")


def hub_patterns() -> list[str]:
    """`PATTERNS` for the hub's client, which regards case."""
    return [*dict.fromkeys(spelled for one in PATTERNS for spelled in (one, one.upper(), one.title()))]


def copy_side_files(source: Path, folder: Path) -> list[str]:
    """Copy the side files of the folder `source` into `folder`; a line for each that was left out, and why.

    Raises:
        OSError: a file cannot be read or written.
    """
    left_out = []
    for relative in sorted(_matching(source)):
        path = source / relative
        why = _refusal(source, path)
        if why is not None:
            left_out.append(f"{source / visible(relative)}: left out of the result, for it is {why}")
            continue
        (folder / relative).parent.mkdir(exist_ok=True)
        with (
            open_regular(Path(os.path.realpath(path)), follow=False) as reading,
            new_file(folder / relative) as writing,
        ):
            shutil.copyfileobj(reading, writing)
    return left_out


def check_regular(folder: Path) -> None:
    """Refuse a folder one of whose side files is a pipe or a device, before a library opens it and waits for ever.

    Raises:
        CheckpointError: naming it.
    """
    for relative in sorted(_matching(folder)):
        if (folder / relative).exists() and not (folder / relative).is_file():
            raise CheckpointError(
                f"{folder / visible(relative)}: not a regular file; put a copy of the file in its place"
            )


def _matching(source: Path) -> Iterator[str]:
    """Paths of all side files but folders, relative to `source`."""
    folders = {"", *(pattern.rpartition("/")[0] for pattern in PATTERNS)}
    for inner in folders:
        place = source / inner
        if not place.is_dir():
            continue
        for name in os.listdir(place):
            relative = f"{inner}/{name}" if inner else name
            lowered = relative.lower()
            wanted = any(fnmatchcase(lowered, one) and one.count("/") == lowered.count("/") for one in PATTERNS)
            if wanted and not lowered.endswith(_WEIGHTS) and not (source / relative).is_dir():
                yield relative


def _refusal(source: Path, path: Path) -> str | None:
    """Why a file is not carried; None where it is."""
    try:
        below(source, path.relative_to(source).as_posix(), source, CheckpointError)
    except CheckpointError:
        return "called in a way that no file of a model is"
    base, real = Path(os.path.realpath(source)), Path(os.path.realpath(path))
    if not real.is_relative_to(base) and not _is_blob(base, real):
        return f"a link out of the folder, to {real}; put a copy in its place if it belongs to the model"
    try:
        mode = real.stat().st_mode
    except OSError:
        return f"a link to {real}, which is not there"
    return None if stat.S_ISREG(mode) else "not a regular file"


def _is_blob(base: Path, real: Path) -> bool:
    """Whether `base` is a snapshot in a cache of the Hugging Face hub, and `real` a file of the same repository."""
    return base.parent.name == "snapshots" and real.parent == base.parent.parent / "blobs"
