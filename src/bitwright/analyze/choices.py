"""Choices: the ways to quantize one tensor that an allocation may mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitwright.errors import RecipeError
from bitwright.method import Method, load_method, weight_spec
from bitwright.numeric.spec import WeightSpec
from bitwright.recipe import Recipe, load_recipe
from bitwright.rounding.sensitivity import Obs
from bitwright.scheme import Scheme
from bitwright.transforms.rotate import Rotate

DEFAULT_CHOICES = (
    "spqr:w2a16:outliers.share=0.02",
    "spqr:w3a16:outliers.share=0.005",
    "spqr:w3a16:outliers.share=0.02",
    "spqr:w3a16:outliers.share=0.05",
    "spqr:w4a16:outliers.share=0.005",
    "spqr:w4a16:outliers.share=0.03",
    "gptq:w3a16g128",
    "gptq:w4a16g128",
    "gptq:w5a16g64",
    "gptq:w6a16g64",
    "gptq:w8a16g64",
)
"""What is mixed where nothing else is asked for: 2.6 to 8.4 bits per weight, all under one treatment of blocks."""
_BITS_AND_GROUPS = ((2, (64,)), (3, (32, 128)), (4, (32, 128)), (5, (64,)), (6, (64,)), (8, (64,)))
_BITS_AND_SHARES = ((2, (0.02,)), (3, (0.005, 0.02, 0.05)), (4, (0.005, 0.03)), (5, (0.005,)), (6, (0.005,)))


@dataclass(frozen=True)
class Choice:
    """A method, whose outliers say their share, times a scheme."""

    method: Method
    scheme: Scheme

    @property
    def label(self) -> str:
        """As `parse_choice` reads it, where the share of outliers is all that differs from the preset."""
        share = self.outlier_share
        return f"{self.method.name}:{self.scheme}" + (f":outliers.share={share:g}" if share else "")

    @property
    def bits(self) -> int:
        """Of the codes."""
        return self.scheme.weight_bits

    @property
    def spec(self) -> WeightSpec:
        """What the codes look like, with scales in float16."""
        return weight_spec(self.method, self.scheme, "float16")

    @property
    def group_size(self) -> int | None:
        """Of the grids; None: one group per channel."""
        return self.spec.group_size

    @property
    def outlier_share(self) -> float:
        """Share of weights that is kept apart; 0 where no share is aimed at."""
        policy = self.method.outliers
        return policy.share if isinstance(policy, Obs) and policy.keeps_a_share else 0.0


def parse_choice(text: str) -> Choice:
    """The choice that `METHOD:SCHEME[:KEY=VALUE...]` spells, such as `spqr:w3a16:outliers.share=0.02`.

    Raises:
        RecipeError: `text` is not understood.
    """
    recipe = parse_recipe(text)
    if recipe.method is None or recipe.scheme is None:
        raise RecipeError(f"choice {text!r} has no method or no scheme; needed METHOD:SCHEME, such as gptq:w4a16g64")
    return Choice(recipe.method, recipe.scheme)


def parse_recipe(text: str) -> Recipe:
    """The whole recipe that is spelled in the same way, such as `rtn:w8a8:activations.granularity=tensor`.

    Raises:
        RecipeError: `text` is not understood.
    """
    method, separator, rest = text.partition(":")
    scheme, *overrides = rest.split(":")
    if not separator:
        raise RecipeError(f"{text!r} is not understood; needed METHOD:SCHEME, such as gptq:w4a16g64")
    return load_recipe(method, scheme, overrides=overrides)


def default_choices() -> tuple[Choice, ...]:
    """`DEFAULT_CHOICES`, read."""
    return tuple(parse_choice(text) for text in DEFAULT_CHOICES)


def choices_of(methods: Sequence[str]) -> tuple[Choice, ...]:
    """What an allocation mixes of `methods` alone: 2 to 8 bits with several groups, or shares of outliers.

    Raises:
        RecipeError: a method is unknown, or two treat whole blocks differently, which no recipe can mix.
    """
    found = []
    for name in methods:
        method = load_method(name)
        shares = isinstance(method.outliers, Obs) and method.outliers.keeps_a_share
        if shares:
            asked = [f"{name}:w{b}a16:outliers.share={s}" for b, some in _BITS_AND_SHARES for s in some]
        elif method.group_size is not None:
            asked = [f"{name}:w{bits}a16" for bits, _ in _BITS_AND_GROUPS]
        else:
            asked = [f"{name}:w{bits}a16g{group}" for bits, groups in _BITS_AND_GROUPS for group in groups]
        found += [parse_choice(text) for text in asked]
    check_mixable(found)
    return tuple(found)


def check_mixable(choices: Sequence[Choice]) -> Rotate | None:
    """Refuse choices that no recipe can mix; the rotation that all of them ask for.

    Raises:
        RecipeError: there are none, two are equal, or two treat whole blocks, or the model, differently.
    """
    if not choices:
        raise RecipeError("no choices to allocate; give some, such as gptq:w3a16g64 and gptq:w4a16g64")
    if len(set(choices)) < len(choices):
        raise RecipeError(f"a choice is given twice: {', '.join(choice.label for choice in choices)}")
    calibrated = [choice for choice in choices if choice.method.calibrated]
    for choice in calibrated[1:]:
        if choice.method.of_blocks != calibrated[0].method.of_blocks:
            raise RecipeError(
                f"{calibrated[0].label} and {choice.label} treat whole blocks differently (inputs, rotate, transform, "
                "learn, range clip); one recipe cannot mix them: choose methods that agree in these"
            )
    rotations = list(dict.fromkeys(choice.method.rotate for choice in choices))
    if len(rotations) > 1:
        raise RecipeError(f"choices ask for the rotations {rotations}; the model has one: let all choices agree")
    return rotations[0]
