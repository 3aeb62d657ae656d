"""The base of every frozen, strict model in bitwright: unknown keys and wrong types are refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen pydantic model that refuses unknown keys; all recipe parts derive from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
