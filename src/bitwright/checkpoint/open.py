"""Which source a MODEL names: a Hugging Face folder, a hub id, a `.gguf` file, or `demo`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path

from bitwright.checkpoint.demo import DemoSource
from bitwright.checkpoint.gguf import GgufSource
from bitwright.checkpoint.settle import settled
from bitwright.checkpoint.side_files import hub_patterns
from bitwright.checkpoint.source import HuggingFaceSource, Source
from bitwright.errors import CheckpointError
from bitwright.untrusted.boundary import reading

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_source(model: str) -> Source:
    """The source that `model` names: `demo`, a `.gguf` file, a folder, or a hub id (`owner/name`).

    Its config and the headers of its tensors are those of one model (see `checkpoint.settle`).

    Raises:
        CheckpointError: nothing of that name can be read; the message lists what was tried. Or what was read
            contradicts itself.
        PlanError: transformers cannot build the model of its config.
    """
    source = find_source(model)
    with reading(source.label, CheckpointError):
        return settled(source)


def find_source(model: str) -> Source:
    """The same as it lies there, only its headers checked.

    Raises:
        CheckpointError: nothing of that name can be read; the message lists what was tried.
    """
    model = model_name(model)
    with reading(model, CheckpointError):
        return _find_source(model)


def _find_source(model: str) -> Source:
    if model == "demo":
        return DemoSource()
    path = Path(model)
    if path.suffix == ".gguf":
        return GgufSource(path)
    if path.is_dir():
        return HuggingFaceSource(path)
    if path.exists():
        raise CheckpointError(f"{model}: a file, but not a .gguf; name the folder that holds config.json")
    if _HUB_ID.fullmatch(model):
        return HuggingFaceSource(_download(model), label=model)
    raise CheckpointError(f"{model}: not found; needed a folder, a .gguf file, a hub id (owner/name) or 'demo'")


def check_unchanged(source: Source, identity: Mapping[str, str]) -> None:
    """Refuse a source, as `find_source` gave it, whose files are no longer what they were.

    Args:
        source: whose config and headers were read once.
        identity: of its files at that time.

    Raises:
        CheckpointError: naming the files that changed, or what can no longer be read of them.
    """
    remedy = "while it was being quantized; nothing was published: run the same command again with --restart"
    try:
        found = source.identity()
        changed = sorted(name for name in identity if found.get(name) != identity[name])
        if not changed and _reread(source).fingerprint() != source.fingerprint():
            changed = ["headers of the weights"]
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{source.label}: cannot be read any more ({error}); it changed {remedy}") from error
    if changed:
        raise CheckpointError(f"{source.label}: {', '.join(changed[:3])} changed {remedy}")


def _reread(source: Source) -> Source:
    """The same source, its headers read anew from the same files."""
    if isinstance(source, HuggingFaceSource):
        return HuggingFaceSource(source.folder, source.label)
    return GgufSource(source.path) if isinstance(source, GgufSource) else DemoSource()


def model_name(model: object) -> str:
    """`model` as a text, where it names one.

    Raises:
        CheckpointError: it is a model itself, or anything else that is no name or path.
    """
    if isinstance(model, str | PathLike):
        return fspath(model)
    raise CheckpointError(
        f"model is an object of class {type(model).__name__}, needed the name of one: a folder, a .gguf file, a hub id "
        "or 'demo'; save it first with model.save_pretrained(FOLDER) and tokenizer.save_pretrained(FOLDER), and give "
        "FOLDER"
    )


def _download(hub_id: str) -> Path:
    # Imported here: the hub client takes a second to load, and most models are folders.
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, allow_patterns=["config.json", "*.safetensors*", *hub_patterns()])
    except Exception as error:
        raise CheckpointError(
            f"{hub_id}: no such folder here, and the hub gave {type(error).__name__}: {error}"
        ) from error
    return Path(folder)
