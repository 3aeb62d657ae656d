"""Promises: what a user asks of a quantized model, and how it is spelled: `1%`, `0.02nats`, `3.5`, `4GB`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from bitwright.errors import RecipeError

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("iB", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True)
class Target:
    """What is promised.

    Attributes:
        kind: `perplexity` (`limit` is the difference of ln perplexity to the float model), `kl` (mean nats per token),
            `bits` (per quantized weight, scales, zeros and outliers included) or `size` (bytes of the weight files).
        limit: at most this.
        text: as the user gave it.
    """

    kind: Literal["perplexity", "kl", "bits", "size"]
    limit: float
    text: str

    @staticmethod
    def of(*, loss: str | None = None, bits: str | float | None = None, size: str | int | None = None) -> Target:
        """The one target that is given: `loss` such as `1%` or `0.02nats`, `bits` such as `3.5`, `size` such as `4GB`.

        Raises:
            RecipeError: none or several are given, or one is not understood.
        """
        given = {kind: value for kind, value in (("loss", loss), ("bits", bits), ("size", size)) if value is not None}
        if len(given) != 1:
            raise RecipeError(
                f"got the targets {', '.join(given) or 'none'}; needed exactly one of loss, bits and size"
            )
        ((kind, value),) = given.items()
        return {"loss": parse_loss, "bits": parse_bits, "size": parse_size}[kind](str(value))

    def __str__(self) -> str:
        """Kind and text, such as `size 4GB`."""
        return f"{'loss' if self.kind in ('perplexity', 'kl') else self.kind} {self.text}"


def parse_loss(text: str) -> Target:
    """`1%`: a perplexity at most 1 % above the float model's; `0.02nats`: a mean KL of at most 0.02 nats per token.

    Raises:
        RecipeError: `text` is neither.
    """
    for suffix in ("%", "nats"):
        number = _positive(text.strip().removesuffix(suffix))
        if text.strip().endswith(suffix) and number is not None:
            return Target("perplexity", math.log1p(number / 100), text) if suffix == "%" else Target("kl", number, text)
    raise RecipeError(
        f"target loss {text!r} is not understood; needed such as 1% (of perplexity) or 0.02nats (mean KL)"
    )


def parse_bits(text: str) -> Target:
    """`3.5`: bits per quantized weight, all that is stored for it included; RecipeError where it is no such number."""
    number = _positive(text)
    if number is None or number > 16:
        raise RecipeError(f"target bits {text!r} is not understood; needed bits per weight up to 16, such as 3.5")
    return Target("bits", number, text)


def parse_size(text: str) -> Target:
    """`4GB`, `900MiB` or a number of bytes, of all weight files; RecipeError where it is neither."""
    match = _SIZE.fullmatch(text.strip())
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units or not float(match[1]) > 0:
        raise RecipeError(f"target size {text!r} is not understood; needed bytes, or such as 4GB or 900MiB")
    return Target("size", float(match[1]) * units[match[2].lower()], text)


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None
