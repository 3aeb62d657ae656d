"""The manifest: files in folders below are hashed as well, and no name leads out of the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bitwright.checkpoint.manifest import MANIFEST, read_manifest, verify_manifest, write_manifest
from bitwright.errors import FormatError

CONTENT: dict[str, Any] = {"job": {}, "source_label": "x", "recipe": {}, "shards": [], "tensors": []}
NESTED = "additional_chat_templates/tool_use.jinja"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / NESTED).parent.mkdir(parents=True)
    (folder / NESTED).write_text("template")
    (folder / "LICENSE").write_text("licence")
    write_manifest(folder, CONTENT, {})
    return folder


def test_files_below_are_part_of_it(folder: Path) -> None:
    assert set(read_manifest(folder)["files"]) == {"LICENSE", NESTED}
    told: list[tuple[int, int]] = []
    assert verify_manifest(folder, lambda what, done, total: told.append((done, total))) == []
    assert told == [(0, 2), (1, 2)]
    (folder / NESTED).write_text("changed")
    (folder / "additional_chat_templates" / "planted.jinja").write_text("planted")
    (folder / ".cache" / "deep").mkdir(parents=True)
    complaints = verify_manifest(folder)
    assert complaints[:2] == [
        ".cache: not in the manifest",
        "additional_chat_templates/planted.jinja: not in the manifest",
    ]
    assert complaints[2].startswith(f"{NESTED}: SHA-256")
    assert len(complaints) == 3


def test_what_is_no_file_is_a_complaint(folder: Path, tmp_path: Path) -> None:
    (folder / "LICENSE").unlink()
    os.mkfifo(folder / "LICENSE")
    (folder / "additional_chat_templates").rename(tmp_path / "moved")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "moved")
    assert verify_manifest(folder) == [
        f"{NESTED}: missing",
        "additional_chat_templates: not in the manifest",
        "LICENSE: cannot be read (not a regular file)",
    ]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", "a/./b", "", "a\nb", "a/b/c/d/e/f"])
def test_names_that_lead_anywhere_else_are_refused(folder: Path, name: str) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][name] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"manifest\.json"):
        verify_manifest(folder)
