"""Calibration tokens: windows of equal length, drawn from a text by a seed.

A text that fits into memory is tokenized once, with the tokenizer's default special tokens, and cut into disjoint
windows exactly as the evaluation protocol `gptq` cuts its text (so BOS, where the tokenizer adds one, stands at the
start of the text only). A seeded permutation chooses among all windows of the text, and the chosen ones stay in its
order: the first k windows are a fair sample, too. Of large files only the windows are read; see `draw`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer
from torch import Tensor

from bitwright.calibration.chat import chosen_template
from bitwright.calibration.draw import draw_windows
from bitwright.calibration.files import WHOLE_BYTES
from bitwright.calibration.layouts import Layout
from bitwright.calibration.overlap import SHINGLE_TOKENS, fingerprints
from bitwright.calibration.text import AnyText, load_text, rows_as_text
from bitwright.checkpoint.shard import read_header, read_tensor
from bitwright.errors import BitwrightError, CalibrationError, CheckpointError, EvaluationError
from bitwright.numeric.settings import Settings
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.ids import TOKENIZER_REMEDY, check_ids

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
            `hf:NAME[:CONFIG[:SPLIT]]` (a data set on the hub), the path of a text file or of a data set (`.jsonl`,
            `.json`, `.csv`, `.tsv`, `.parquet`), or that of a `.safetensors` file whose tensor `ids` [windows, tokens]
            holds the windows themselves.
        layout: how a text file becomes one text; see `calibration.layouts`.
        field: the column of a data set that is its text; None: the one that is known, see `calibration.rows`.
        windows: number of windows.
        window_tokens: their length; no shorter than what is hashed to tell calibration from evaluation text.
    """

    text: str = Field(default="builtin", min_length=1)
    layout: Layout = "auto"
    field: str | None = Field(default=None, min_length=1)
    windows: int = Field(default=32, ge=1)
    window_tokens: int = Field(default=512, ge=SHINGLE_TOKENS)

    @field_validator("text")
    @classmethod
    def _names_a_dataset(cls, text: str) -> str:
        if text.startswith(HUB) and not (all(parts := text.split(":")) and len(parts) <= 4):
            raise ValueError(f"data set {text!r} is not understood; needed hf:NAME[:CONFIG[:SPLIT]]")
        return text

    @model_serializer(mode="wrap")
    def _without_an_unset_field(self, standard: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes that name no field have the identity that they had before there was one to name."""
        found: dict[str, Any] = standard(self)
        return {key: value for key, value in found.items() if key != "field" or value is not None}

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the windows are made from text; token ids are there already."""
        return not is_ids(self.text) and self.text != "self"


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
    settings: Calibration,
    tokenizer: Any,
    seed: int,
    sample: Sampler | None = None,
    vocabulary: int | None = None,
) -> TokenWindows:
    """The windows that `settings` ask for; the same `seed` always gives the same ones.

    Args:
        settings: the text, and how much of it.
        tokenizer: of the model; None where `settings.needs_tokenizer` is false.
        seed: of the permutation, or of the sampler.
        sample: makes the windows of the text `self`, for example `partial(sample_from_model, model)`.
        vocabulary: ids that the model knows; given ids beyond it are refused. None: not checked here.

    Raises:
        CalibrationError: the text cannot be read or is too short, or `self` was asked for without a sampler.
    """
    if settings.text == "self":
        return TokenWindows(_sampled(settings, seed, sample), "self")
    if is_ids(settings.text):
        return _given(settings, vocabulary)
    try:
        text = _load(settings, tokenizer)
        with reading(f"{text.name}: its tokens", EvaluationError, TOKENIZER_REMEDY):
            ids = draw_windows(tokenizer, text, settings.windows, settings.window_tokens, seed)
        chosen = chosen_template(tokenizer) if text.templated else None
    except EvaluationError as error:  # text serves both; here it is the calibration that cannot be run
        remedy = str(error)
        for option in ("layout", "field"):
            remedy = remedy.replace(f"--{option} ", f"--set calibration.{option}=")
        raise CalibrationError(f"calibration text: {remedy}") from error
    return TokenWindows(ids, f"{text.name}@{text.sha256[:12]}" + ("" if chosen is None else f" ({chosen})"))


def read_ids(path: str | Path) -> Tensor:
    """Token windows of the user's own: the tensor `ids` of a safetensors file, int64 [windows, tokens].

    Raises:
        CalibrationError: there is no such file, or no such tensor of integers in it, or the file is damaged.
    """
    path = Path(path)
    try:
        tensors = read_header(path)[0]
        if IDS not in tensors:
            raise CheckpointError(f"{path}: holds {', '.join(sorted(tensors)[:3]) or 'nothing'}, and no tensor {IDS}")
        ids = read_tensor(path, IDS, tensors[IDS])
    except CheckpointError as error:
        raise CalibrationError(
            f"token windows: {error}; needed a safetensors file with the tensor {IDS}, integers [windows, tokens]"
        ) from error
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not ids.numel():
        raise CalibrationError(
            f"token windows {str(path)!r}: ids are {ids.dtype} {list(ids.shape)}, needed integers [windows, tokens]"
        )
    return ids.to(torch.int64)


def is_ids(text: str | Path) -> bool:
    """Whether a text is token windows, which need no tokenizer."""
    return str(text).endswith(_WINDOWS_SUFFIX)


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


def _given(settings: Calibration, vocabulary: int | None) -> TokenWindows:
    """The first `settings.windows` windows of a file of token ids, cut to `settings.window_tokens`."""
    ids = read_ids(settings.text)
    needed = (settings.windows, settings.window_tokens)
    if ids.shape[0] < needed[0] or ids.shape[1] < needed[1]:
        raise CalibrationError(
            f"token windows {settings.text!r}: ids are {list(ids.shape)}, needed at least {list(needed)}; take what "
            f"the file holds: --set calibration.windows={ids.shape[0]} --set calibration.window_tokens={ids.shape[1]}"
        )
    ids = ids[: needed[0], : needed[1]]
    check_ids(ids, vocabulary, f"token windows {settings.text!r}", CalibrationError)
    return TokenWindows(ids, Path(settings.text).name)


def _load(settings: Calibration, tokenizer: Any) -> AnyText:
    enough = max(WHOLE_BYTES, settings.windows * settings.window_tokens * _CHARACTERS_PER_TOKEN)
    if settings.text.startswith(HUB):
        return _from_hub(settings, tokenizer)
    return load_text(
        settings.text,
        "calibration",
        layout=settings.layout,
        field=settings.field,
        tokenizer=tokenizer,
        characters=enough,
    )


def _from_hub(settings: Calibration, tokenizer: Any) -> AnyText:
    """The rows of a data set that have text, from its start until there is enough."""
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
        return rows_as_text(settings.text.removeprefix(HUB), rows, settings.field, tokenizer, enough)
    except BitwrightError:
        raise
    except Exception as error:  # the hub, the network, and every file format raise errors of their own
        raise CalibrationError(
            f"calibration text {settings.text!r}: the hub gave {type(error).__name__}: {error}; check name, config and "
            "split, or give a text file"
        ) from error
