"""Schemes: how many bits for what, in the field's notation: `w4a16g64`, `w3a16`, `w4a4kv4g128-sym`."""

from __future__ import annotations

import re

from pydantic import Field, ValidationError

from bitwright.errors import RecipeError
from bitwright.numeric.settings import Settings, explain

_SCHEME = re.compile(r"w(\d+)a(\d+)(?:kv(\d+))?(?:g(\d+))?(?:-(sym|asym))?")


class Scheme(Settings):
    """Bits of weights, activations and KV cache; weights per input `group_size` (None: per channel)."""

    weight_bits: int = Field(ge=2, le=8)
    activation_bits: int = Field(default=16, ge=4, le=16)
    kv_bits: int = Field(default=16, ge=2, le=16)
    group_size: int | None = Field(default=None, ge=1)
    symmetric: bool | None = None
    """None: as the method prefers."""

    @staticmethod
    def parse(text: str) -> Scheme:
        """The scheme that `text` spells, such as `w4a16g64-sym`, in capitals or not.

        Raises:
            RecipeError: `text` is not a scheme.
        """
        match = _SCHEME.fullmatch(text.strip().lower())
        if match is None:
            raise RecipeError(
                f"scheme {text!r} is not understood{_nearest_scheme(text)}; needed "
                "w<bits>a<bits>[kv<bits>][g<group>][-sym|-asym], such as w4a16g64 (no g: one group per output channel)"
            )
        weight, activation, kv, group, kind = match.groups()
        try:
            return Scheme(
                weight_bits=int(weight),
                activation_bits=int(activation),
                kv_bits=int(kv) if kv else 16,
                group_size=int(group) if group else None,
                symmetric=None if kind is None else kind == "sym",
            )
        except ValidationError as error:
            raise RecipeError(f"scheme {text!r}: {explain(error, Scheme)}") from error

    def __str__(self) -> str:
        """The scheme as users type it."""
        kv = "" if self.kv_bits == 16 else f"kv{self.kv_bits}"
        group = "" if self.group_size is None else f"g{self.group_size}"
        kind = {None: "", True: "-sym", False: "-asym"}[self.symmetric]
        return f"w{self.weight_bits}a{self.activation_bits}{kv}{group}{kind}"


def _nearest_scheme(text: str) -> str:
    """The scheme that was perhaps meant, to go behind a refusal: the parts that can be read, in their order."""
    found = {key: re.search(rf"{key}[-_ ]?(\d+)", text.lower()) for key in ("w", "a", "kv", "g")}
    if found["w"] is None:
        return ""
    numbers = {key: "" if match is None else match.group(1) for key, match in found.items()}
    parts = [key + number for key, number in (numbers | {"a": numbers["a"] or "16"}).items() if number]
    kind = re.search("asym|sym", text.lower())
    return f"; did you mean {''.join(parts) + ('' if kind is None else f'-{kind.group()}')!r}?"
