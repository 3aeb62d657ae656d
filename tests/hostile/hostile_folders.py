"""A folder to be damaged: keys of its config and tensors of its shards are one call away."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.checkpoint.manifest import read_manifest, write_manifest
from bitwright.formats.folder import INDEX, PLAIN_INDEX

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]


@dataclass(frozen=True)
class Damaged:
    """A copy of a folder, to be changed."""

    folder: Path

    def config(self, changes: Mapping[str, Any]) -> None:
        """Set keys of config.json; `...` removes one."""
        path = self.folder / "config.json"
        content = json.loads(path.read_text()) | dict(changes)
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    def tensors(self, change: Change) -> None:
        """Let `change` alter each shard's tensors, and the index follow."""
        place = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            stored = load_file(path)
            change(stored)
            save_file({name: t.contiguous() for name, t in stored.items()}, path, {"format": "pt"})
            place |= dict.fromkeys(stored, path.name)
        for index in (self.folder / INDEX, self.folder / PLAIN_INDEX):
            if index.exists():
                index.write_text(json.dumps({"metadata": {}, "weight_map": place}))

    def reseal(self) -> None:
        """Write a manifest of what the files are now."""
        if (self.folder / "manifest.json").exists():
            content = read_manifest(self.folder)
            content.pop("files")
            write_manifest(self.folder, content, {})
