"""The presets that ship with bitwright, as the TOML files say them; importable without PyTorch."""

from __future__ import annotations

import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from bitwright.errors import RecipeError
from bitwright.numeric.settings import known_name, nearest_name


def method_names() -> list[str]:
    """Names of the presets that ship with bitwright, sorted."""
    files = _folder().iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in files if entry.name.endswith(".toml"))


def read_preset(name: str) -> dict[str, Any]:
    """The file of the preset called `name`, in capitals or not, as it stands; `method.load_method` reads it.

    Raises:
        RecipeError: there is no such preset.
    """
    found = known_name(name, method_names())
    if found is None:
        raise RecipeError(f"method {name!r} is unknown{nearest_name(name, method_names())}")
    return tomllib.loads((_folder() / f"{found}.toml").read_text(encoding="utf-8"))


def _folder() -> Traversable:
    return resources.files("bitwright") / "recipes"
