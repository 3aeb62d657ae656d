"""Recipes: a method times a scheme, per tensor rule.

- A *scheme* says how many bits for what, in the field's notation: `w4a16g64`, `w3a16`, `w4a16g128-sym`.
- A *method* is a choice at each step of a weight's journey: range, rounding, outliers. The presets are the
  TOML files in `bitwright/recipes/`, named as users type them.
- A *recipe* is both, plus ordered rules by name glob; the first rule that matches a module decides. Every
  model here is frozen and strict: a key that means nothing is refused by name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from bitwright.calibration.tokens import Calibration
from bitwright.errors import RecipeError
from bitwright.numeric.outliers import NoOutliers, NSigma
from bitwright.numeric.settings import Settings
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.ranges import RangeSettings
from bitwright.rounding.gptq import Gptq
from bitwright.rounding.nearest import Nearest
from bitwright.rounding.sensitivity import Obs

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
        """The scheme that `text` spells, such as `w4a16g64-sym`.

        Raises:
            RecipeError: `text` is not a scheme.
        """
        match = _SCHEME.fullmatch(text)
        if match is None:
            raise RecipeError(
                f"scheme {text!r} is not understood; needed w<bits>a<bits>[kv<bits>][g<group>][-sym|-asym], "
                "such as w4a16g64 (no g: one group per output channel)"
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
            raise RecipeError(f"scheme {text!r}: {_explain(error, Scheme)}") from error

    def __str__(self) -> str:
        """The scheme as users type it."""
        kv = "" if self.kv_bits == 16 else f"kv{self.kv_bits}"
        group = "" if self.group_size is None else f"g{self.group_size}"
        kind = {None: "", True: "-sym", False: "-asym"}[self.symmetric]
        return f"w{self.weight_bits}a{self.activation_bits}{kv}{group}{kind}"


RoundingSettings = Annotated[Nearest | Gptq, Field(discriminator="name")]
OutlierPolicy = Annotated[NoOutliers | NSigma | Obs, Field(discriminator="name")]


class Inputs(Settings):
    """What a calibrated method knows of the inputs of the linears it rounds.

    - `stream`: `quantized` inputs are what the blocks before, already rounded, give; `float` ones are those of
      the model as it was.
    - `sequential`: the linears of a block are rounded in order of execution, each seeing what rounding those
      before it has done; else all of them see the block as it was.
    - `weighting`: `gradient` weighs each token by what the model's loss cares about the linear's output there
      (see `calibration.gradients`), `uniform` counts tokens alike, as GPTQ and SpQR do.
    - `correction`: the share, 0 to 1, by which targets are corrected for the difference between the inputs that
      linears get and those of the float model (see `rounding.correction`); takes a second stream.
    """

    stream: Literal["quantized", "float"] = "quantized"
    sequential: bool = True
    weighting: Literal["uniform", "gradient"] = "uniform"
    correction: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _float_inputs_do_not_change(self) -> Inputs:
        if self.stream == "float" and self.correction:
            raise ValueError("float inputs do not differ from the float model's; correction needs stream='quantized'")
        if self.stream == "float" and self.sequential:
            raise ValueError(
                "float inputs do not depend on what was rounded before; stream='float' needs sequential=false"
            )
        return self


class Method(Settings):
    """A choice at each step: range, rounding, outliers; and the grid it prefers."""

    name: str = "custom"
    summary: str = ""
    paper: str = ""
    range: RangeSettings
    rounding: RoundingSettings = Nearest()
    outliers: OutlierPolicy = NoOutliers()
    symmetric: bool = False
    zero: Literal["int", "float"] = "int"
    bilevel: Bilevel | None = None
    group_size: int | None = Field(default=None, ge=1)
    """Of groups, where the scheme names none; schemes without g otherwise mean one group per channel."""
    inputs: Inputs = Inputs()

    @property
    def calibrated(self) -> bool:
        """Whether the method needs to see the inputs of the linears."""
        return isinstance(self.rounding, Gptq)

    @model_validator(mode="after")
    def _steps_fit_together(self) -> Method:
        if isinstance(self.outliers, Obs) and not self.calibrated:
            raise ValueError("outliers 'obs' are chosen by the Hessian; they need rounding 'gptq'")
        updated = isinstance(self.rounding, Gptq) and self.rounding.groups == "updated"
        if isinstance(self.rounding, Gptq) and self.rounding.refit and self.bilevel is not None:
            raise ValueError("rounding.refit needs scales of one level; two-level ones are refined before rounding")
        if updated and self.bilevel is not None and self.bilevel.axis == "column":
            raise ValueError("rounding.groups='updated' fits group by group; bilevel.axis='column' needs whole rows")
        return self


def method_names() -> list[str]:
    """Names of the presets that ship with bitwright, sorted."""
    folder = resources.files("bitwright") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_method(name: str) -> Method:
    """The preset called `name`.

    Raises:
        RecipeError: there is no such preset.
    """
    if name not in method_names():
        raise RecipeError(f"method {name!r} is unknown{_nearest(name, method_names())}")
    text = (resources.files("bitwright") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    return Method.model_validate(tomllib.loads(text))


def _as_method(value: Any) -> Any:
    return load_method(value) if isinstance(value, str) else value


def _as_scheme(value: Any) -> Any:
    return Scheme.parse(value) if isinstance(value, str) else value


MethodField = Annotated[Method | None, BeforeValidator(_as_method)]
SchemeField = Annotated[Scheme | None, BeforeValidator(_as_scheme)]


class Rule(Settings):
    """What happens to the linears and embeddings whose module name matches the glob `match`.

    `keep = true` leaves them in float; otherwise `method` and `scheme` replace the recipe's own where given.
    """

    match: str = Field(min_length=1)
    keep: bool = False
    method: MethodField = None
    scheme: SchemeField = None

    @model_validator(mode="after")
    def _keep_is_all(self) -> Rule:
        if self.keep and (self.method is not None or self.scheme is not None):
            raise ValueError(f"rule {self.match!r} keeps its tensors; method and scheme would mean nothing")
        return self


class Recipe(Settings):
    """A method times a scheme, with exceptions by name.

    Rules are tried in order before the defaults. The defaults keep the embeddings and the head, and give
    every linear of every block the recipe's `method` and `scheme`; a recipe without those two must claim
    every linear by rules of its own.
    """

    method: MethodField = None
    scheme: SchemeField = None
    rules: tuple[Rule, ...] = ()
    seed: int = Field(default=0, ge=0)
    calibration: Calibration = Calibration()
    bits_per_weight: float | None = Field(default=None, gt=2, le=16)
    """What the quantized weights may take together, outliers and scales included: as many outliers are kept,
    by a policy `obs`, as that leaves room for."""
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    kept_dtype: Literal["auto", "source", "float16", "bfloat16"] = "auto"
    """Type of kept tensors. `auto`: 16-bit tensors as they are; of a float32 source, matrices become float16
    and vectors (norms, biases) stay float32."""

    @model_validator(mode="after")
    def _method_and_scheme_go_together(self) -> Recipe:
        if (self.method is None) != (self.scheme is None):
            missing = "scheme" if self.scheme is None else "method"
            raise ValueError(f"{missing} is missing: give both method and scheme, or neither and only rules")
        if self.method is None and not self.rules:
            raise ValueError("nothing to do: give method and scheme, or rules")
        return self

    def sha256(self) -> str:
        """Identity of the recipe: equal exactly when every setting is."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def weight_spec(method: Method, scheme: Scheme, scale_dtype: Literal["float16", "bfloat16", "float32"]) -> WeightSpec:
    """How the codes look when `method` works in `scheme`; symmetry from the scheme, else the method."""
    symmetric = method.symmetric if scheme.symmetric is None else scheme.symmetric
    bilevel = method.bilevel
    if symmetric and bilevel is not None:
        bilevel = bilevel.model_copy(update={"zero_bits": None})  # there are no zeros to store
    return WeightSpec(
        bits=scheme.weight_bits,
        group_size=method.group_size if scheme.group_size is None else scheme.group_size,
        symmetric=symmetric,
        zero="int" if symmetric else method.zero,
        scale_dtype=scale_dtype,
        bilevel=bilevel,
    )


def load_recipe(
    method: str | None = None,
    scheme: str | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The recipe that a user asked for: a TOML `file`, or a `method` and a `scheme`, with `key=value` overrides.

    Raises:
        RecipeError: a name, key or value is not understood; the message names the file and key.
    """
    if file is not None and (method is not None or scheme is not None):
        raise RecipeError("give either a recipe file or a method and a scheme, not both; use --set to change fields")
    if file is not None:
        where, raw = str(file), _read_toml(Path(file))
    else:
        if method is None or scheme is None:
            raise RecipeError(
                "a recipe needs a method and a scheme, such as --method easyquant --scheme w4a16g64; "
                f"methods: {', '.join(method_names())}"
            )
        where = "recipe"
        raw = {
            "method": load_method(method).model_dump(mode="json"),
            "scheme": Scheme.parse(scheme).model_dump(),
        }
    for override in overrides:
        _apply_override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error, Recipe)}") from error


def as_recipe(recipe: Recipe | str | Path | None, method: str | None, scheme: str | None) -> Recipe:
    """`recipe` itself, its file read, or `method` times `scheme`."""
    if isinstance(recipe, Recipe):
        if method is not None or scheme is not None:
            raise RecipeError("give either a recipe or a method and a scheme, not both")
        return recipe
    return load_recipe(method, scheme, recipe)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML ({error})") from error
    # Presets are spelled out, so that overrides can reach into them.
    if isinstance(raw.get("method"), str):
        raw["method"] = load_method(raw["method"]).model_dump(mode="json")
    if isinstance(raw.get("scheme"), str):
        raw["scheme"] = Scheme.parse(raw["scheme"]).model_dump()
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `key=value` in the raw recipe; keys of the method may leave out the leading `method.`."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {override!r} is not understood; needed key=value, such as outliers.n=2.5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if key == "scheme":
        raw["scheme"] = Scheme.parse(str(value)).model_dump()
        return
    path = key.split(".")
    if path[0] in Method.model_fields and path[0] not in Recipe.model_fields:
        path = ["method", *path]
    if path[0] not in Recipe.model_fields or path[0] == "rules":
        known = [name for name in [*Recipe.model_fields, *Method.model_fields] if name != "rules"]
        raise RecipeError(f"--set {key}: no such key{_nearest(path[0], known)}")
    table = raw
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {key}: {part} is a value, not a table")
    if path[-1] == "name" and len(path) > 2 and table.get("name") != value:
        table.clear()  # another kind of range or policy: the old kind's settings mean nothing to it
    table[path[-1]] = value


def _explain(error: ValidationError, model: type[Settings]) -> str:
    """Pydantic's findings in one line each, with the keys that would have been understood."""
    lines = []
    for found in error.errors():
        # Union tags (the names of ranges and policies) are pydantic's own path steps, not keys of the file.
        location = ".".join(str(part) for part in found["loc"])
        if found["type"] == "extra_forbidden":
            known = list(model.model_fields)
            name = str(found["loc"][-1])
            hint = _nearest(name, known) if len(found["loc"]) == 1 else ""
            lines.append(f"unknown key {location}{hint}")
        else:
            got = "" if isinstance(found["input"], dict) else f" (got {found['input']!r})"
            lines.append(f"{location + ': ' if location else ''}{found['msg']}{got}")
    return "; ".join(lines)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
