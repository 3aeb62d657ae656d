"""The manifest: what was made, from what, how well, and the SHA-256 of every file.

It holds nothing that changes between two runs of the same job (no times, no host, no memory), so that equal
jobs give byte-identical folders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitwright.checkpoint.shard import file_sha256, write_text
from bitwright.errors import FormatError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


def write_manifest(folder: Path, content: dict[str, Any], known_sums: dict[str, str]) -> None:
    """Write `manifest.json` into `folder`: `content` plus a `files` table of SHA-256 sums of all other files.

    `known_sums` spares re-reading the shards, whose sums were taken while they were written.
    """
    files = {
        path.name: known_sums.get(path.name) or file_sha256(path)
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    body = {"manifest_version": MANIFEST_VERSION, **content, "files": files}
    write_text(folder / MANIFEST, json.dumps(body, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a quantized folder.

    Raises:
        FormatError: the folder has none, or one that cannot be read.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{folder}: no {MANIFEST}; not a folder that quantize or import completed") from error
    except ValueError as error:
        raise FormatError(f"{path}: not JSON ({error}); the folder is damaged") from error
    if not isinstance(content, dict) or content.get("manifest_version") != MANIFEST_VERSION:
        found = content.get("manifest_version") if isinstance(content, dict) else type(content).__name__
        raise FormatError(f"{path}: manifest version {found}, this bitwright reads {MANIFEST_VERSION}")
    return content


def verify_manifest(folder: Path) -> list[str]:
    """What does not agree with the manifest, one line per file; empty when the folder is intact."""
    files: dict[str, str] = read_manifest(folder)["files"]
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    complaints = [f"{name}: missing" for name in sorted(set(files) - present)]
    complaints += [f"{name}: not in the manifest" for name in sorted(present - set(files))]
    for name in sorted(set(files) & present):
        found = file_sha256(folder / name)
        if found != files[name]:
            complaints.append(f"{name}: SHA-256 {found[:16]}, needed {files[name][:16]}")
    return complaints
