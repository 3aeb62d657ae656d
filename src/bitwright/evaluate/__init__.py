"""Evaluation: perplexity, distance to the float model, and how sure the numbers are.

`evaluate_model` measures one model on one text. Given the float model as `reference`, it also measures the
distance to it on the same tokens, the primary measure of a quantized model.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from bitwright.calibration.text import AnyText
from bitwright.evaluate.divergence import Divergence, compare
from bitwright.evaluate.logits import Model
from bitwright.evaluate.perplexity import (
    Progress,
    Windows,
    compare_protocols,
    perplexity_of,
    token_windows,
    window_losses,
)
from bitwright.evaluate.statistics import paired_interval
from bitwright.execute.memory import peak_rss_bytes
from bitwright.execute.shown import Shown
from bitwright.words import Protocol

__all__ = [
    "Divergence",
    "EvalOptions",
    "Evaluation",
    "Windows",
    "compare",
    "compare_protocols",
    "evaluate_model",
    "evaluate_windows",
    "paired_interval",
    "perplexity_of",
    "token_windows",
    "window_losses",
]


@dataclass(frozen=True)
class EvalOptions:
    """What to measure on: the first `windows` windows (None: all) of `length` tokens, by `protocol`.

    `allow_overlap` measures a quantized model even on text that it was calibrated on, which flatters it. `field` is the
    column of a data set that is its text; None: the one that is known, see `calibration.rows`.
    """

    windows: int | None = 8
    length: int = 2048
    protocol: Protocol = "gptq"
    allow_overlap: bool = False
    field: str | None = None


_DEFAULTS = EvalOptions()


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation(Shown):
    """The numbers of one evaluation; what was not measured is None.

    KL is in nats per token and `delta_ln_ppl` = ln(perplexity / float_perplexity), with its paired 95 %
    bootstrap interval over windows (None below 6 windows). `top1_lost` and `top1_gained` count tokens
    whose first-ranked token is right only in the float model, and only in this one. `seconds` is the time
    of the measurement and `peak_rss_bytes` the peak of the process so far. `bits_per_weight` and `bytes`
    are the caller's, counted from the bytes written.
    """

    perplexity: float
    float_perplexity: float | None = None
    kl_mean_nats: float | None = None
    kl_median_nats: float | None = None
    kl_p90_nats: float | None = None
    kl_p99_nats: float | None = None
    kl_p999_nats: float | None = None
    kl_max_nats: float | None = None
    top1_agreement: float | None = None
    top1_lost: int | None = None
    top1_gained: int | None = None
    delta_ln_ppl: float | None = None
    delta_ln_ppl_low: float | None = None
    delta_ln_ppl_high: float | None = None
    bits_per_weight: float | None = None
    bytes: int | None = None
    windows: int
    length: int
    dropped_tokens: int | None
    protocol: str
    seconds: float
    peak_rss_bytes: int | None = None

    def facts(self) -> dict[str, str]:
        """See `Shown.facts`; everything is in `to_json`."""
        numbers = {
            "perplexity": self.perplexity,
            "float perplexity": self.float_perplexity,
            "mean KL, nats": self.kl_mean_nats,
            "top-1 agreement": self.top1_agreement,
            "bits per weight": self.bits_per_weight,
        }
        found = {name: f"{value:.5g}" for name, value in numbers.items() if value is not None}
        return found | {"windows": f"{self.windows} of {self.length} tokens", "protocol": self.protocol}

    def to_json(self) -> dict[str, Any]:
        """Every field under its name, in the order of the class; None becomes null."""
        return asdict(self)


def evaluate_model(
    model: Model,
    tokenizer: Any,
    text: AnyText,
    *,
    reference: Model | None = None,
    options: EvalOptions = _DEFAULTS,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure `model` on `text`, and its distance to `reference` where one is given.

    Models take ids [1, tokens] and return logits [1, tokens, vocabulary], or an object that has `.logits`.
    `progress(done, total)` counts windows. Raises EvaluationError where the text is too short, the logits
    are not finite, or the two vocabularies differ.
    """
    windows = token_windows(tokenizer, text, options.length, options.windows, options.protocol)
    return evaluate_windows(model, windows, reference=reference, progress=progress)


def evaluate_windows(
    model: Model, windows: Windows, *, reference: Model | None = None, progress: Progress | None = None
) -> Evaluation:
    """The same on windows that are there already.

    Raises EvaluationError where the logits are not finite, or the two vocabularies differ.
    """
    started = time.perf_counter()
    if reference is None:
        losses = window_losses(model, windows, progress)
        distance: dict[str, Any] = {}
    else:
        divergence = compare(model, reference, windows, progress)
        losses = divergence.losses
        distance = _distance(divergence)
    return Evaluation(
        perplexity=perplexity_of(losses),
        windows=windows.count,
        length=windows.length,
        dropped_tokens=windows.dropped_tokens,
        protocol=windows.protocol,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
        **distance,
    )


def _distance(divergence: Divergence) -> dict[str, Any]:
    median, p90, p99, p999 = divergence.kl_quantiles((0.5, 0.9, 0.99, 0.999))
    lost, gained = divergence.flips
    differences = divergence.losses - divergence.reference_losses
    interval = paired_interval(differences)
    return {
        "float_perplexity": perplexity_of(divergence.reference_losses),
        "kl_mean_nats": divergence.kl_mean,
        "kl_median_nats": median,
        "kl_p90_nats": p90,
        "kl_p99_nats": p99,
        "kl_p999_nats": p999,
        "kl_max_nats": divergence.kl_max,
        "top1_agreement": divergence.top1_agreement,
        "top1_lost": lost,
        "top1_gained": gained,
        "delta_ln_ppl": float(differences.mean()),
        "delta_ln_ppl_low": interval[0] if interval else None,
        "delta_ln_ppl_high": interval[1] if interval else None,
    }
