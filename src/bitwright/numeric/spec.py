"""WeightSpec: what the codes of one tensor look like, independent of how they were found."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from bitwright.numeric.settings import Settings

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class WeightSpec(Settings):
    """Integer codes of `bits` bits in groups of `group_size` consecutive inputs of one output row.

    A weight decodes as `scale * (code - zero)` with `code` in `0 .. 2**bits - 1`.

    - `group_size=None`: one group per output row (per channel). The last group of a row may be shorter.
    - `symmetric`: `zero` is `2**(bits-1)` everywhere and is not stored, so that `code - zero` is the standard
      signed range `-2**(bits-1) .. 2**(bits-1)-1`. The scale may be negative: that puts the longer side of
      the range on the positive weights.
    - `zero="int"`: an integer inside the code range, stored in `bits` bits. `zero="float"`: any value, stored
      as `scale_dtype` (HQQ, SpQR).
    """

    bits: int = Field(ge=2, le=8)
    group_size: int | None = Field(default=None, ge=1)
    symmetric: bool = False
    zero: Literal["int", "float"] = "int"
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    @model_validator(mode="after")
    def _symmetric_has_no_float_zero(self) -> WeightSpec:
        if self.symmetric and self.zero == "float":
            raise ValueError("symmetric codes have a fixed zero; zero='float' needs symmetric=false")
        return self

    @property
    def max_code(self) -> int:
        """Largest code, `2**bits - 1`."""
        return (1 << self.bits) - 1

    @property
    def centre(self) -> int:
        """The zero of symmetric codes, `2**(bits-1)`."""
        return 1 << (self.bits - 1)

    @property
    def storage_dtype(self) -> torch.dtype:
        """Torch type in which scales and float zeros are stored."""
        return SCALE_DTYPES[self.scale_dtype]

    def group_width(self, in_features: int) -> int:
        """Columns in a full group of a matrix with `in_features` columns."""
        return in_features if self.group_size is None else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Groups in one row, the ragged last one included."""
        return -(-in_features // self.group_width(in_features))

    def label(self) -> str:
        """The spec in the field's notation, such as `w4g64-asym`."""
        group = "" if self.group_size is None else f"g{self.group_size}"
        kind = "sym" if self.symmetric else "asym"
        return f"w{self.bits}{group}-{kind}" + ("-fzero" if self.zero == "float" else "")
