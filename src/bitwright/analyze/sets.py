"""Calibration sets: named draws of token windows of many kinds.

    maker = SetMaker(source, windows=8, window_tokens=256)
    drawn = maker.draw(parse_set("text"), seed=0)      # drawn.ids int64 [windows, tokens], drawn.sha256

A set is spelled `[NAME=]KIND`:

- `text`: the built-in documentation. `task`: multiple-choice questions. `code`: the standard library's source code.
  `language:LOCALE`: translated messages of an installed package. See `corpora`.
- a path: a text file, a data set, of which `PATH:FIELD` names the column, or a `.safetensors` file of token ids, as
  `quantize --calibration` takes them. `hf:NAME[:CONFIG[:SPLIT]]`: a data set on the hub (extra `datasets`).
- `nonsense`: uniformly random ASCII punctuation and white space, through the tokenizer. Paglieri et al.
  (arXiv 2405.20835) set such text against real text. `random`: uniformly random tokens that are not special.
- `self[:TEMPERATURE]`: the model's own samples, at temperature 1 by default, at 0 the likeliest tokens behind a random
  first one. Needs the whole float model in memory.

Windows of text, files and data sets are those that `quantize` draws with the same seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bitwright.analyze import corpora
from bitwright.analyze.model import SetRow
from bitwright.calibration.draw import windows_of
from bitwright.calibration.sample import sample_from_model
from bitwright.calibration.text import Split, Text, builtin
from bitwright.calibration.tokenize import token_ids
from bitwright.calibration.tokens import HUB, Calibration, TokenWindows, calibration_windows, read_ids
from bitwright.checkpoint.load import load_model, load_tokenizer
from bitwright.checkpoint.place import private_folder
from bitwright.checkpoint.shard import write_shard
from bitwright.checkpoint.source import Source
from bitwright.errors import CalibrationError, EvaluationError
from bitwright.execute.memory import available_memory_bytes

Kind = Literal["text", "task", "code", "language", "file", "hub", "nonsense", "random", "self"]
SAMPLED_TOKENS = 2**16
"""The most that a draw of the model's own samples may have."""
_NOISE_CHARACTERS = 4  # to a token, at first; most tokenizers need 1 to 2
_EVALUATION_SEEDS = 2**31  # evaluation draws; torch looks at 32 bits of a seed


@dataclass(frozen=True)
class SetSpec:
    """A calibration set as the user spelled it; `argument` is the path, language, data set or temperature."""

    name: str
    kind: Kind
    argument: str = ""


@dataclass(frozen=True)
class CalibrationSet:
    """One draw of a set.

    Attributes:
        spec: what was drawn from.
        label: where the tokens came from.
        seed: of the draw.
        ids: int64 [windows, tokens].
    """

    spec: SetSpec
    label: str
    seed: int
    ids: Tensor

    @property
    def name(self) -> str:
        """Of the set; draws with other seeds have the same."""
        return self.spec.name

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the ids as little-endian int64, hexadecimal."""
        return hashlib.sha256(self.ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()

    def row(self) -> SetRow:
        """For the report."""
        windows, tokens = self.ids.shape
        return SetRow(
            name=self.name,
            kind=self.spec.kind,
            label=self.label,
            seed=self.seed,
            windows=windows,
            window_tokens=tokens,
            sha256=self.sha256,
        )


def parse_set(text: str) -> SetSpec:
    """The set that `[NAME=]KIND[:ARGUMENT]` or `[NAME=]PATH` spells.

    Raises:
        CalibrationError: it is neither a kind nor the path of a file, or the argument cannot mean anything.
    """
    name, separator, rest = text.partition("=")
    if not separator:
        name, rest = "", text
    kind, _, argument = rest.partition(":")
    if rest.startswith(HUB):
        return SetSpec(name or rest.removeprefix(HUB).partition(":")[0], "hub", rest)
    if kind in ("text", "task", "code", "nonsense", "random") and not argument:
        return SetSpec(name or kind, kind, "")  # type: ignore[arg-type]
    if kind == "language" and argument:
        return SetSpec(name or argument, "language", argument)
    if kind == "self" and _temperature(argument) is not None:
        return SetSpec(name or rest, "self", argument)
    path, _, field = rest.rpartition(":")
    if Path(rest).is_file() or (field and Path(path).is_file()):
        return SetSpec(name or Path(rest if Path(rest).is_file() else path).stem, "file", rest)
    kinds = ", ".join(kind for kind in get_args(Kind) if kind not in ("file", "hub", "language"))
    raise CalibrationError(
        f"calibration set {text!r} is not understood; needed the path of a text file, language:LOCALE, "
        f"self:TEMPERATURE, hf:NAME, or one of {kinds}"
    )


class SetMaker:
    """Draws sets for one model.

    Attributes:
        windows, window_tokens: the shape of every draw.
    """

    def __init__(self, source: Source, windows: int, window_tokens: int, cache: Path | None = None):
        """Nothing is read yet.

        Args:
            source: the float model; its tokenizer is read when first needed.
            windows: of each draw.
            window_tokens: of each window.
            cache: folder where the model's own samples are kept; None: they are sampled again each time.
        """
        self.windows, self.window_tokens = windows, window_tokens
        self._source, self._cache = source, cache
        self._tokens: dict[tuple[str, str], Tensor] = {}  # of whole texts, by name and content

    @cached_property
    def tokenizer(self) -> Any:
        """Of the model; CheckpointError where it has none."""
        return load_tokenizer(self._source)

    def draw(self, spec: SetSpec, seed: int, split: Split = "calibration") -> CalibrationSet:
        """One draw; the same arguments always give the same windows.

        `split` chooses the half of `text`, `task`, `code` and `language`, and other random numbers for `nonsense`,
        `random` and `self`. Files and data sets are used whole for either: give others to evaluate on.

        Raises:
            CalibrationError: there is too little text, or it cannot be read or made.
        """
        number = seed + (_EVALUATION_SEEDS if split == "evaluation" else 0)
        if spec.kind == "self":
            return CalibrationSet(spec, spec.name, seed, self._sampled(_temperature(spec.argument) or 0.0, number))
        if spec.kind == "random":
            return CalibrationSet(spec, "uniform over the vocabulary", seed, self._random(number))
        if spec.kind == "nonsense":
            return CalibrationSet(spec, "random punctuation and white space", seed, self._nonsense(number))
        if spec.kind in ("hub", "file"):
            found = self._given(spec, seed)
            return CalibrationSet(spec, found.label, seed, found.ids)
        text = _text(spec, split)
        return CalibrationSet(spec, f"{text.name}@{text.sha256[:12]}", seed, self._cut(text, seed))

    def _given(self, spec: SetSpec, seed: int) -> TokenWindows:
        """Windows of the user's own text, as `quantize` draws them."""
        text, field = spec.argument, None
        if spec.kind == "file" and not Path(text).is_file():
            text, _, field = text.rpartition(":")
        settings = Calibration(text=text, field=field, windows=self.windows, window_tokens=self.window_tokens)
        tokenizer = self.tokenizer if settings.needs_tokenizer else None
        try:
            return calibration_windows(settings, tokenizer, seed, vocabulary=self._source.config.get("vocab_size"))
        except CalibrationError as error:
            remedy = str(error).replace("--set calibration.field=", f"--calibration-set {text}:")
            raise CalibrationError(f"calibration set {spec.name!r}: {remedy}") from error

    def sampling_bytes(self) -> int:
        """Memory that the set `self` needs for the model."""
        return sum(4 * torch.Size(info.shape).numel() for info in self._source.tensors.values())

    def _cut(self, text: Text, seed: int) -> Tensor:
        """Disjoint windows of `text` in the order of a permutation, as `calibration_windows` does it."""
        key = (text.name, text.sha256)
        if key not in self._tokens:
            self._tokens[key] = token_ids(self.tokenizer, text)
        return windows_of(self._tokens[key], self.windows, self.window_tokens, seed, text.name)

    def _nonsense(self, seed: int) -> Tensor:
        needed = self.windows * self.window_tokens
        characters = _NOISE_CHARACTERS * needed
        while True:
            ids = self.tokenizer(corpora.noise(characters, seed).content, verbose=False)["input_ids"]
            if len(ids) >= needed:
                return torch.tensor(ids[:needed], dtype=torch.int64).reshape(self.windows, self.window_tokens)
            characters *= 2

    def _random(self, seed: int) -> Tensor:
        vocabulary = min(int(self._source.config["vocab_size"]), len(self.tokenizer))
        allowed = torch.ones(vocabulary, dtype=torch.bool)
        allowed[[token for token in self.tokenizer.all_special_ids if token < vocabulary]] = False
        ids = allowed.nonzero().flatten()
        generator = torch.Generator().manual_seed(seed)
        return ids[torch.randint(len(ids), (self.windows, self.window_tokens), generator=generator)]

    def _sampled(self, temperature: float, seed: int) -> Tensor:
        """The model's own samples, from the cache where they are there."""
        shape = (self.windows, self.window_tokens)
        if self.windows * self.window_tokens > SAMPLED_TOKENS:
            raise CalibrationError(
                f"calibration set 'self': {self.windows} windows of {self.window_tokens} tokens; at most "
                f"{SAMPLED_TOKENS} tokens are sampled; take fewer or shorter windows"
            )
        place = self._place(temperature, seed)
        if place is not None:
            private_folder(place.parent)
        if place is not None and place.is_file():
            kept = read_ids(place)
            if kept.dtype != torch.int64 or tuple(kept.shape) != shape:
                raise CalibrationError(
                    f"{place}: {kept.dtype} {list(kept.shape)}, needed int64 {list(shape)}; remove it"
                )
            return kept
        self._check_memory()
        model = load_model(self._source.label).model
        ids = sample_from_model(model if temperature == 1 else _Tempered(model, temperature), *shape, seed)
        if place is not None:
            write_shard(place, {"ids": ids}, {"format": "pt"})
        return ids

    def _check_memory(self) -> None:
        needed, available = self.sampling_bytes(), available_memory_bytes()
        if available is not None and needed > 0.8 * available:
            raise CalibrationError(
                f"calibration set 'self': the float model takes {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB of "
                "memory are available; leave the set out, or use a larger machine"
            )

    def _place(self, temperature: float, seed: int) -> Path | None:
        if self._cache is None:
            return None
        job = [self._source.fingerprint(), self._source.identity(), self.windows, self.window_tokens, temperature, seed]
        return self._cache / f"{hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:32]}.safetensors"


class _Tempered:
    """A model with its logits divided by a temperature; at 0 only the likeliest token is left."""

    def __init__(self, model: Any, temperature: float):
        self._model, self._temperature = model, temperature
        self.device = model.device
        self.config = model.config
        if temperature == 0:  # the likeliest text behind BOS is one text: start from random tokens instead
            self.config = type(model.config).from_dict({**model.config.to_dict(), "bos_token_id": None})

    def __call__(self, **arguments: Any) -> Any:
        answer = self._model(**arguments)
        if self._temperature == 0:
            best = answer.logits.argmax(-1, keepdim=True)
            answer.logits = torch.full_like(answer.logits, -torch.inf).scatter_(-1, best, 0.0)
        else:
            answer.logits = answer.logits / self._temperature
        return answer


_TEXTS: dict[Kind, Callable[[Split], Text]] = {"text": builtin, "task": corpora.task, "code": corpora.code}


def _text(spec: SetSpec, split: Split) -> Text:
    try:
        if spec.kind == "language":
            return corpora.language(spec.argument, split)
        return _TEXTS[spec.kind](split)
    except EvaluationError as error:  # text serves both; here it is the calibration that cannot be run
        raise CalibrationError(f"calibration set {spec.name!r}: {error}") from error


def _temperature(argument: str) -> float | None:
    """Of `self:ARGUMENT`; 1 without one; None where it is not a number from 0 up."""
    try:
        value = float(argument or 1)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None
