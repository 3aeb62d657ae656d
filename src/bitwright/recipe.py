"""Recipes: a method times a scheme, per tensor rule.

A recipe is a method (see `method`) and a scheme (see `scheme`), plus ordered rules by name glob; the first rule that
matches a module decides. Every model here is frozen and strict: a key that means nothing is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from bitwright.calibration.tokens import Calibration
from bitwright.errors import RecipeError
from bitwright.method import Method, load_method
from bitwright.numeric.settings import Settings, annotations_at, explain, nearest_name
from bitwright.recipes.presets import method_names
from bitwright.scheme import Scheme
from bitwright.untrusted.boundary import brief, reading
from bitwright.untrusted.files import open_regular

_LARGEST_BYTES = 16 << 20
_MOST_DOTS = 100


def _as_method(value: Any) -> Any:
    return load_method(value) if isinstance(value, str) else value


def _as_scheme(value: Any) -> Any:
    return Scheme.parse(value) if isinstance(value, str) else value


# Steps of a method that have a name and settings of their own.
_STEPS = ("transform", "range", "rounding", "outliers")

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
    seed: int = Field(default=0, ge=0, lt=1 << 63)
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
        where = str(file)
        with reading(where, RecipeError, "correct the file"):
            raw = _read_toml(Path(file))
    else:
        if method is None or scheme is None:
            raise RecipeError(
                "a recipe needs a method and a scheme, such as --method easyquant --scheme w4a16g64; "
                f"methods: {', '.join(method_names())}"
            )
        where = "recipe"
        raw = _spelled_out({"method": method, "scheme": scheme})
    for override in overrides:
        _apply_override(raw, override)
    with reading(where, RecipeError, "correct it"):
        try:
            return Recipe.model_validate(raw)
        except ValidationError as error:
            raise RecipeError(f"{where}: {explain(error, Recipe)}") from error


def as_recipe(recipe: Recipe | str | Path | None, method: str | None, scheme: str | None) -> Recipe:
    """`recipe` itself, its file read, or `method` times `scheme`."""
    if isinstance(recipe, Recipe):
        if method is not None or scheme is not None:
            raise RecipeError("give either a recipe or a method and a scheme, not both")
        return recipe
    return load_recipe(method, scheme, recipe)


def _read_toml(path: Path) -> dict[str, Any]:
    with reading(path, RecipeError, "give a recipe in TOML"), open_regular(path) as file:
        data = file.read(_LARGEST_BYTES + 1)
    if len(data) > _LARGEST_BYTES:
        raise RecipeError(f"{path}: longer than {_LARGEST_BYTES:,} bytes, so it is no recipe; give another file")
    # The time for a key of many parts is the square of their number.
    if max(line.count(b".") for line in data.split(b"\n")) > _MOST_DOTS:
        raise RecipeError(f"{path}: a line with more than {_MOST_DOTS} dots, so it is no recipe; give another file")
    try:
        raw = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: not TOML ({brief(error)})") from error
    rules = raw.get("rules")
    if isinstance(rules, list):
        raw["rules"] = [_spelled_out(r, raw.get("scheme")) if isinstance(r, dict) else r for r in rules]
    return _spelled_out(raw)


def _spelled_out(table: dict[str, Any], default_scheme: Any = None) -> dict[str, Any]:
    """`table` with its preset and scheme in full, so that overrides reach into them and the preset fits the scheme."""
    found = dict(table)
    if isinstance(found.get("scheme"), str):
        found["scheme"] = Scheme.parse(found["scheme"]).model_dump()
    if isinstance(found.get("method"), str):
        scheme = found.get("scheme", default_scheme)
        parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme and Scheme.model_validate(scheme)
        found["method"] = load_method(found["method"], parsed).model_dump(mode="json")
    return found


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `key=value` in the raw recipe; keys of the method may leave out the leading `method.`.

    `none` stands for a setting or step that is left out; a step's name alone sets its `name`; `keep=GLOB` is a rule
    that leaves the linears of that name in float.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {override!r} is not understood; needed key=value, such as outliers.n=2.5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    if key in ("scheme", "method"):
        raw[key] = value
        raw.update(_spelled_out(raw))
        return
    if key == "keep":
        raw["rules"] = [{"match": str(value), "keep": True}, *raw.get("rules", ())]
        return
    path = key.split(".")
    if path[0] in Method.model_fields and path[0] not in Recipe.model_fields:
        path = ["method", *path]
    if path[0] not in Recipe.model_fields or path[0] == "rules":
        known = [name for name in [*Recipe.model_fields, *Method.model_fields, "keep"] if name != "rules"]
        raise RecipeError(f"--set {key}: no such key{nearest_name(path[0], known)}")
    if isinstance(value, str) and path[-1] in _STEPS and len(path) == 2:
        path.append("name")
    elif value == "none" and not any("none" in get_args(field) for field in annotations_at(Recipe, path)):
        value = None  # TOML has no word for it
    table = raw
    for part in path[:-1]:
        table[part] = table.get(part) or {}  # none: a step that the method leaves out
        table = table[part]
        if not isinstance(table, dict):
            raise RecipeError(f"--set {key}: {part} is a value, not a table")
    if path[-1] == "name" and len(path) > 2 and table.get("name") != value:
        table.clear()  # another kind of range or policy: the old kind's settings mean nothing to it
    table[path[-1]] = value
