"""`eval`: measure a model on a text, alone or against the float model on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bitwright.calibration.text import Layout, load_text
from bitwright.checkpoint.load import load_model
from bitwright.evaluate import EvalOptions, Evaluation, evaluate_model
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
        text: a file, or None for the built-in evaluation text.
        layout: how a file becomes one text. `auto` rejoins the non-blank rows of a WikiText file by two
            newlines and takes any other file as it is; `wikitext-original` also restores WikiText's blank
            rows, as published perplexities have it. The protocol id tells which.
        options: windows, their length, and the protocol.
        progress: called with windows done and in all.

    Raises:
        CheckpointError, FormatError: a model cannot be loaded.
        EvaluationError: the text is too short, or the models do not share a vocabulary.
    """
    content = load_text(text, layout=layout)
    loaded = load_model(model)
    reference = None if against is None else load_model(against)
    evaluation = evaluate_model(
        loaded.model,
        loaded.tokenizer,
        content,
        reference=None if reference is None else reference.model,
        options=options or EvalOptions(),
        progress=progress,
    )
    if not loaded.quantized:
        return evaluation
    found = inspect(model)
    return replace(evaluation, bits_per_weight=found.bits_per_weight, bytes=found.bytes)
