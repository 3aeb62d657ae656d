"""The manifest: what was made, from what, how well, and the SHA-256 of every file.

It holds nothing that changes between two runs of the same job (no times, no host, no memory), so that equal
jobs give byte-identical folders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bitwright.checkpoint.shard import file_sha256, write_text
from bitwright.errors import FormatError
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.json_file import read_json
from bitwright.untrusted.names import below, shards_of

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]


class _Lenient(BaseModel):
    """Keys that readers use, checked; others are carried along."""

    model_config = ConfigDict(extra="ignore")


class _Record(_Lenient):
    """What the manifest says of one tensor."""

    tensor: str
    action: Literal["quantize", "keep", "tied"]
    shape: Annotated[list[_Count], Field(max_length=32)]
    bytes: _Count
    outliers: _Count = 0
    sqnr_db: float | None = None
    source_sha256: str | None = None

    @model_validator(mode="after")
    def _is_matrix(self) -> _Record:
        if self.action == "quantize":
            if len(self.shape) != 2 or 0 in self.shape:
                raise ValueError(f"shape {self.shape} of a quantized tensor, needed [out, in]")
            if missing := {"outliers", "sqnr_db"} - self.model_fields_set:
                raise ValueError(f"{min(missing)} is missing")
        return self


class _Calibration(_Lenient):
    """What the manifest says of calibration windows."""

    fingerprints: list[list[Annotated[int, Field(strict=True, ge=0, lt=1 << 64)]]] = Field(default_factory=list)


class _Manifest(_Lenient):
    """The keys of a manifest that readers use."""

    job: dict[str, Any]
    source_label: str
    calibration: _Calibration | None = None
    recipe: dict[str, Any]
    shards: list[str]
    tensors: list[_Record]
    files: dict[str, str]


def write_manifest(folder: Path, content: dict[str, Any], known_sums: dict[str, str]) -> None:
    """Write `manifest.json` into `folder`: `content` plus a `files` table of SHA-256 sums of all other files.

    `known_sums` spares re-reading the shards, whose sums were taken while they were written.
    """
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    files = {name: known_sums.get(name) or file_sha256(folder / name) for name in names if name != MANIFEST}
    body = {"manifest_version": MANIFEST_VERSION, **content, "files": files}
    write_text(folder / MANIFEST, json.dumps(body, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a quantized folder.

    Raises:
        FormatError: the folder has none, or one that cannot be read.
    """
    path = folder / MANIFEST
    content = read_json(path, FormatError, "not a folder that quantize or import completed")
    if content.get("manifest_version") != MANIFEST_VERSION:
        found = content.get("manifest_version")
        raise FormatError(f"{path}: manifest version {found!r}, this bitwright reads {MANIFEST_VERSION}")
    with reading(path, FormatError):
        _Manifest.model_validate(content)
    for name in content["files"]:
        below(folder, name, path, FormatError)
    shards_of(folder, content["shards"], path, FormatError)
    return content


def verify_manifest(folder: Path, say: Callable[[str, int, int], None] | None = None) -> list[str]:
    """What does not agree with the manifest, one line per file; empty when the folder is intact.

    `say` is told of every tenth part which file is being read, how many were, and how many there are.
    """
    files: dict[str, str] = read_manifest(folder)["files"]
    present = set(_present(folder, {parent for name in files for parent in _parents(name)})) - {MANIFEST}
    complaints = [f"{name}: missing" for name in sorted(files.keys() - present)]
    complaints += [f"{name}: not in the manifest" for name in sorted(present - files.keys())]
    told = -1
    for done, name in enumerate(sorted(files.keys() & present)):
        if say is not None and 10 * done // len(files) > told:
            told = 10 * done // len(files)
            say(f"checking {name}", done, len(files))
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            complaints.append(f"{name}: cannot be read ({error.strerror or error})")
            continue
        if found != files[name]:
            complaints.append(f"{name}: SHA-256 {found[:16]}, needed {str(files[name])[:16]}")
    return complaints


def _parents(name: str) -> list[str]:
    """The folders of a file, relative as it is: of `a/b/c` `a` and `a/b`."""
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _present(folder: Path, expected: set[str], inner: str = "") -> Iterator[str]:
    """Everything in `folder` by relative path; of folders that are links, or not `expected`, the name alone."""
    with os.scandir(folder / inner) as entries:
        for entry in entries:
            name = inner + entry.name
            if name in expected and entry.is_dir(follow_symlinks=False):
                yield from _present(folder, expected, f"{name}/")
            else:
                yield name
