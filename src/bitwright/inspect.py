"""Look into a quantized folder: what is in it, how well it was made, and whether it is intact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.checkpoint.manifest import read_manifest, verify_manifest
from bitwright.checkpoint.native_folder import read_native
from bitwright.checkpoint.open import model_name
from bitwright.execute.shown import Shown
from bitwright.formats.native import TensorEntry, packed_bytes


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """A quantized folder as its own files describe it."""

    folder: Path
    manifest: dict[str, Any]
    entries: dict[str, TensorEntry]
    bytes: int
    """Bytes of all weights, from the shards' headers."""
    bits_per_weight: float
    """Bits per quantized weight, from the shards' headers."""
    complaints: list[str]
    """What `verify` found wrong; empty when intact or not asked."""

    def facts(self) -> dict[str, str]:
        """See `Shown.facts`."""
        if self.complaints:
            return {"folder": str(self.folder), "damaged": f"{self.complaints[0]} ({len(self.complaints)} such)"}
        return {
            "folder": str(self.folder),
            "made from": str(self.manifest["source_label"]),
            "tensors": f"{len(self.entries)} quantized",
            "bits per weight": f"{self.bits_per_weight:.3f}",
            "bytes": f"{self.bytes:,}",
        }

    def to_json(self) -> dict[str, Any]:
        """The inspection for `inspect --json`."""
        return {
            "folder": str(self.folder),
            "source": self.manifest["source_label"],
            "recipe": self.manifest["recipe"],
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "tensors": self.manifest["tensors"],
            "complaints": self.complaints,
        }


def inspect(folder: str | Path, *, verify: bool = False) -> Inspection:
    """What `folder` holds; with `verify`, every file is hashed against the manifest.

    Raises:
        FormatError: the folder is not a complete bitwright result, or its parts contradict each other.
    """
    folder = Path(model_name(folder))
    manifest = read_manifest(folder)
    complaints = verify_manifest(folder) if verify else []
    if complaints:
        return Inspection(folder, manifest, {}, 0, float("nan"), complaints)
    native = read_native(folder)
    entries = native.entries
    weights = sum(entry.shape[0] * entry.shape[1] for entry in entries.values())
    packed = sum(packed_bytes(entry) for entry in entries.values())
    total = sum(info.bytes for _, info in native.place.values())
    return Inspection(folder, manifest, entries, total, 8 * packed / weights if weights else float("nan"), [])
