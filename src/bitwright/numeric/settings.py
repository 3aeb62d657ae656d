"""The base of every frozen, strict model in bitwright: unknown keys and wrong types are refused, and how we say so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Frozen pydantic model that refuses unknown keys; all recipe parts derive from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def explain(error: ValidationError, model: type[Settings]) -> str:
    """Pydantic's findings in one line each, with the keys that would have been understood."""
    lines = []
    for found in error.errors():
        keys, fields = _place(model, found["loc"])
        location = ".".join(keys)
        if found["type"] == "extra_forbidden":
            lines.append(f"unknown key {location}{nearest_name(keys[-1], fields)}")
        elif found["type"] == "union_tag_invalid":
            tag, known = str(found["ctx"]["tag"]), found["ctx"]["expected_tags"].replace("'", "").split(", ")
            lines.append(f"{location}.name is {tag!r}, which is unknown{nearest_name(tag, known)}")
        else:
            got = "" if isinstance(found["input"], dict) else f" (got {found['input']!r})"
            lines.append(f"{location + ': ' if location else ''}{found['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(lines)


def annotations_at(model: type[Settings], path: Sequence[str]) -> list[Any]:
    """The types that the field at `path` may have, one for each model that may hold it; empty: no such field."""
    models = [model]
    for key in path[:-1]:
        models = [inner for one in models if key in one.model_fields for inner in _models_of(one, key)]
    return [one.model_fields[path[-1]].annotation for one in models if path[-1] in one.model_fields]


def _place(model: type[Settings], steps: Sequence[int | str]) -> tuple[list[str], list[str]]:
    """The keys among pydantic's `steps`, and the fields of the models that hold the last one.

    The others are tags of unions, which are the names of ranges and policies, and no keys of a file.
    """
    keys: list[str] = []
    models = [model]
    for step in steps:
        tagged = [one for one in models if "name" in one.model_fields and one.model_fields["name"].default == step]
        if tagged and not any(step in one.model_fields for one in models):
            models = tagged
            continue
        keys.append(str(step))
        models = [inner for one in models if step in one.model_fields for inner in _models_of(one, str(step))] or models
    return keys, list(dict.fromkeys(field for one in models for field in one.model_fields))


def _models_of(model: type[Settings], field: str) -> list[type[Settings]]:
    """The models among the types that `field` may have."""
    waiting, found = [model.model_fields[field].annotation], []
    while waiting:
        one = waiting.pop()
        if isinstance(one, type) and issubclass(one, Settings):
            found.append(one)
        waiting += get_args(one)
    return found


def known_name(given: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is spelled like `given`, but for capitals; None where there is none."""
    return next((name for name in known if name.casefold() == given.casefold()), None)


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The known name that was perhaps meant, or all of them, to go behind a refusal."""
    names = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name.casefold(), list(names), n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else f"; known: {', '.join(names.values())}"
