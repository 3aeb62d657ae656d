"""`eval`: measure a model on a text, alone or against the float model on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bitwright.calibration.layouts import Layout
from bitwright.calibration.overlap import overlap
from bitwright.calibration.text import load_text
from bitwright.calibration.tokens import is_ids, read_ids
from bitwright.checkpoint.load import LoadedModel, load_model, tokenizer_of
from bitwright.checkpoint.manifest import read_manifest
from bitwright.checkpoint.native_folder import check_sums
from bitwright.errors import CalibrationError, EvaluationError
from bitwright.evaluate import EvalOptions, Evaluation, Windows, evaluate_windows, token_windows
from bitwright.evaluate.perplexity import given_windows
from bitwright.inspect import inspect


def eval(
    model: str,
    *,
    against: str | None = None,
    text: str | Path | None = None,
    layout: Layout = "auto",
    options: EvalOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of `model` and, with `against`, its distance to that float model on the same tokens.

    Args:
        model: anything that `quantize` reads, or a folder that it made.
        against: the float model to compare with; both are in memory at once.
        text: a file of text, a data set, or a `.safetensors` file of token windows, whose tensor `ids`
            [windows, tokens] is cut to the length asked for; None: the built-in evaluation text.
        layout: how a file becomes one text. `auto` rejoins the non-blank rows of a WikiText file by two
            newlines and takes any other file as it is; `wikitext-original` also restores WikiText's blank
            rows, as published perplexities have it. The protocol id tells which.
        options: windows, their length, the protocol, and whether they may be windows of the calibration.
        progress: called with windows done and in all.

    Raises:
        CheckpointError, FormatError, WeightError: a model cannot be loaded, or is not what its manifest says.
        EvaluationError: the text is too short, a quantized model was calibrated on it, or the models do not
            share a vocabulary.
    """
    options = options or EvalOptions()
    windows = _windows(model, text, layout, options)
    loaded = load_model(model)
    if loaded.quantized and loaded.folder is not None:
        # what is measured must be what was made
        check_sums(loaded.folder, read_manifest(loaded.folder))
    if not options.allow_overlap:
        _refuse_overlap(loaded, windows, "builtin" if text is None else Path(text).name)
    reference = None if against is None else load_model(against)
    evaluation = evaluate_windows(
        loaded.model, windows, reference=None if reference is None else reference.model, progress=progress
    )
    if not loaded.quantized:
        return evaluation
    found = inspect(model)
    return replace(evaluation, bits_per_weight=found.bits_per_weight, bytes=found.bytes)


def _windows(model: str, text: str | Path | None, layout: Layout, options: EvalOptions) -> Windows:
    """The windows to measure on; token ids of the user's own need no tokenizer."""
    if text is not None and is_ids(text):
        try:
            return given_windows(read_ids(text), Path(text).name, options.length, options.windows)
        except CalibrationError as error:
            raise EvaluationError(str(error)) from error
    tokenizer = tokenizer_of(model)
    content = load_text(text, layout=layout, field=options.field, tokenizer=tokenizer)
    return token_windows(tokenizer, content, options.length, options.windows, options.protocol)


def _refuse_overlap(loaded: LoadedModel, windows: Windows, text: str) -> None:
    """Raise EvaluationError where a quantized model was calibrated on windows of this text."""
    if not loaded.quantized or loaded.folder is None:
        return
    known = (read_manifest(loaded.folder).get("calibration") or {}).get("fingerprints") or []
    if count := overlap(windows.ids, known):
        raise EvaluationError(
            f"text {text!r}: holds {count} of the {len(known)} windows that {loaded.label} was calibrated on, so it "
            "would flatter the model; evaluate on another text, or use --allow-overlap to measure all the same"
        )
