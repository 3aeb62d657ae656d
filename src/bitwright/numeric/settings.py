"""The base of every frozen, strict model in bitwright: unknown keys and wrong types are refused, and how we say so."""

from __future__ import annotations

import difflib

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Frozen pydantic model that refuses unknown keys; all recipe parts derive from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def explain(error: ValidationError, model: type[Settings]) -> str:
    """Pydantic's findings in one line each, with the keys that would have been understood."""
    lines = []
    for found in error.errors():
        # Union tags (the names of ranges and policies) are pydantic's own path steps, not keys of the file.
        location = ".".join(str(part) for part in found["loc"])
        if found["type"] == "extra_forbidden":
            known = list(model.model_fields)
            name = str(found["loc"][-1])
            hint = nearest_name(name, known) if len(found["loc"]) == 1 else ""
            lines.append(f"unknown key {location}{hint}")
        else:
            got = "" if isinstance(found["input"], dict) else f" (got {found['input']!r})"
            lines.append(f"{location + ': ' if location else ''}{found['msg']}{got}")
    return "; ".join(lines)


def nearest_name(name: str, known: list[str]) -> str:
    """The known name that was perhaps meant, or all of them, to go behind a refusal."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
