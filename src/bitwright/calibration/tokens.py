"""Calibration tokens: windows of equal length, drawn from a text by a seed.

The text is tokenized once, with the tokenizer's default special tokens, and cut into disjoint windows exactly as
the evaluation protocol `gptq` cuts its text (so BOS, where the tokenizer adds one, stands at the start of the
text only). A seeded permutation chooses among all windows of the text, and the chosen ones stay in its order:
the first k windows are a fair sample, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from bitwright.calibration.overlap import SHINGLE_TOKENS, fingerprints
from bitwright.calibration.text import Layout, Text, load_text
from bitwright.checkpoint.shard import read_header, read_tensor
from bitwright.errors import CalibrationError, CheckpointError, EvaluationError
from bitwright.numeric.settings import Settings
from bitwright.untrusted.ids import check_ids

HUB = "hf:"
IDS = "ids"
_WINDOWS_SUFFIX = ".safetensors"
_CHARACTERS_PER_TOKEN = 16
"""Characters of a data set that are read for every token needed. Real text has 3 to 5 to a token; the rest gives
the permutation something to choose from."""

#: (windows, window_tokens, seed) -> ids int64 [windows, window_tokens]
Sampler = Callable[[int, int, int], Tensor]


class Calibration(Settings):
    """What a method that needs data is shown: `windows` windows of `window_tokens` tokens each.

    Attributes:
        text: `builtin` (the calibration half of the built-in text), `self` (sampled from the model itself),
            `hf:NAME[:CONFIG[:SPLIT]]` (column `text` of a data set on the hub), the path of a text file, or that of a
            `.safetensors` file whose tensor `ids` [windows, tokens] holds the windows themselves.
        layout: how a text file becomes one text; see `calibration.text`.
        windows: number of windows.
        window_tokens: their length; no shorter than what is hashed to tell calibration from evaluation text.
    """

    text: str = Field(default="builtin", min_length=1)
    layout: Layout = "auto"
    windows: int = Field(default=32, ge=1)
    window_tokens: int = Field(default=512, ge=SHINGLE_TOKENS)

    @field_validator("text")
    @classmethod
    def _names_a_dataset(cls, text: str) -> str:
        if text.startswith(HUB) and not (all(parts := text.split(":")) and len(parts) <= 4):
            raise ValueError(f"data set {text!r} is not understood; needed hf:NAME[:CONFIG[:SPLIT]]")
        return text


@dataclass(frozen=True)
class TokenWindows:
    """Calibration windows.

    Attributes:
        ids: int64 [windows, window_tokens].
        label: where they came from.
    """

    ids: Tensor
    label: str

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the ids as little-endian int64, hexadecimal."""
        return hashlib.sha256(self.ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What the manifest keeps under `calibration`; `fingerprints` lets `eval` refuse the same text."""
        return {
            "text": self.label,
            "windows": self.ids.shape[0],
            "window_tokens": self.ids.shape[1],
            "sha256": self.sha256,
            "fingerprints": fingerprints(self.ids),
        }


def calibration_windows(
    settings: Calibration, tokenizer: Any, seed: int, sample: Sampler | None = None
) -> TokenWindows:
    """The windows that `settings` ask for; the same `seed` always gives the same ones.

    Args:
        settings: the text, and how much of it.
        tokenizer: of the model; not used for the text `self`.
        seed: of the permutation, or of the sampler.
        sample: makes the windows of the text `self`, for example `partial(sample_from_model, model)`.

    Raises:
        CalibrationError: the text cannot be read or is too short, or `self` was asked for without a sampler.
    """
    if settings.text == "self":
        return TokenWindows(_sampled(settings, seed, sample), "self")
    if settings.text.endswith(_WINDOWS_SUFFIX):
        return _given(settings, len(tokenizer))
    text = _load(settings)
    # verbose=False: the text is meant to be longer than the model's context
    tokens = torch.tensor(tokenizer(text.content, verbose=False)["input_ids"], dtype=torch.int64)
    length = settings.window_tokens
    found = len(tokens) // length
    if found < settings.windows:
        remedy = f"windows={found}" if found else f"window_tokens={max(1, len(tokens) // settings.windows)}"
        raise CalibrationError(
            f"calibration text {text.name!r}: found {len(tokens)} tokens; {settings.windows} windows of {length} need "
            f"{settings.windows * length}; give a longer text, or use --set calibration.{remedy} or less"
        )
    order = torch.randperm(found, generator=torch.Generator().manual_seed(seed))
    windows = tokens[: found * length].reshape(found, length)[order[: settings.windows]]
    return TokenWindows(windows, f"{text.name}@{text.sha256[:12]}")


def _sampled(settings: Calibration, seed: int, sample: Sampler | None) -> Tensor:
    if sample is None:
        raise CalibrationError(
            "calibration text 'self': no sampler was given; it needs the float model in memory: pass sample, "
            "or use --calibration builtin"
        )
    needed = (settings.windows, settings.window_tokens)
    ids = sample(*needed, seed)
    if tuple(ids.shape) != needed or ids.dtype != torch.int64:
        raise CalibrationError(
            f"calibration text 'self': the sampler gave {ids.dtype} {list(ids.shape)}, needed torch.int64 "
            f"{list(needed)}; mend the sampler"
        )
    return ids


def _given(settings: Calibration, vocabulary: int) -> TokenWindows:
    """The first `settings.windows` windows of a file of token ids, cut to `settings.window_tokens`."""
    ids = read_ids(Path(settings.text))
    needed = (settings.windows, settings.window_tokens)
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[0] < needed[0] or ids.shape[1] < needed[1]:
        raise CalibrationError(
            f"calibration windows {settings.text!r}: ids are {ids.dtype} {list(ids.shape)}, needed integers of at "
            f"least {list(needed)}; set calibration.windows and calibration.window_tokens to what the file holds"
        )
    ids = ids[: needed[0], : needed[1]]
    check_ids(ids, vocabulary, f"calibration windows {settings.text!r}", CalibrationError)
    return TokenWindows(ids.to(torch.int64), Path(settings.text).name)


def read_ids(path: Path) -> Tensor:
    """The tensor `ids` of a safetensors file, whatever its type and shape.

    Raises:
        CalibrationError: there is no such file or tensor, or the file is damaged.
    """
    try:
        tensors = read_header(path)[0]
        if IDS not in tensors:
            raise CheckpointError(f"{path}: holds {', '.join(sorted(tensors)[:3]) or 'nothing'}, and no tensor {IDS}")
        return read_tensor(path, IDS, tensors[IDS])
    except CheckpointError as error:
        raise CalibrationError(
            f"calibration windows: {error}; needed a safetensors file with the tensor {IDS}, integers [windows, tokens]"
        ) from error


def _load(settings: Calibration) -> Text:
    try:
        if settings.text.startswith(HUB):
            return _from_hub(settings)
        return load_text(settings.text, "calibration", layout=settings.layout)
    except EvaluationError as error:  # text serves both; here it is the calibration that cannot be run
        remedy = str(error).replace("--layout ", "--set calibration.layout=")
        raise CalibrationError(f"calibration text: {remedy}") from error


def _from_hub(settings: Calibration) -> Text:
    """The rows of a data set that have text, joined by an empty line, from its start until there is enough."""
    try:
        load_dataset = import_module("datasets").load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"calibration text {settings.text!r}: needs the package datasets, which is missing; "
            "install it with: pip install 'bitwright[datasets]', or give a text file"
        ) from error
    _, name, *rest = settings.text.split(":")
    config, split = (*rest, None, None)[:2]
    enough = settings.windows * settings.window_tokens * _CHARACTERS_PER_TOKEN
    try:
        rows = load_dataset(name, config, split=split or "train", streaming=True)
        content = "\n\n".join(_until(rows, enough, settings.text))
    except CalibrationError:
        raise
    except Exception as error:  # the hub, the network, and every file format raise errors of their own
        raise CalibrationError(
            f"calibration text {settings.text!r}: the hub gave {type(error).__name__}: {error}; check name, config and "
            "split, or give a text file"
        ) from error
    return Text(settings.text.removeprefix(HUB), content)


def _until(rows: Iterable[Mapping[str, Any]], characters: int, label: str) -> list[str]:
    """Texts of the first rows that have `characters` characters together, blank ones left out."""
    found: list[str] = []
    total = 0
    for row in rows:
        if not isinstance(text := row.get("text"), str):
            raise CalibrationError(
                f"calibration text {label!r}: rows have the columns {sorted(row)}, needed a column 'text' of strings; "
                "use another data set, or write its text to a file"
            )
        if text.strip():
            found.append(text)
            total += len(text)
        if total >= characters:
            break
    return found
