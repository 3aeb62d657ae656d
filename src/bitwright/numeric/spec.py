"""WeightSpec: what the codes of one tensor look like, independent of how they were found."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from bitwright.numeric.settings import Settings

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Bilevel(Settings):
    """How the scales and zeros of groups are themselves quantized, over superblocks of `size` groups.

    - `axis="row"`: `size` consecutive output rows of one column of groups share statistics (SpQR's beta2).
      Scales and zeros decode as `minimum + step * code`, each with its own two statistics.
    - `axis="column"`: `size` consecutive groups of one row share statistics (GGUF's K-blocks). Scales decode as
      `step * code`, the code signed in symmetric specs; zeros as `minimum_step * zero_code / scale`.
    - `scale_bits`, `zero_bits`: bits of each second-level code. `zero_bits=None`: only scales have a second
      level, and zeros are stored as the spec says.

    The last superblock may be shorter. Statistics are stored as the spec's `scale_dtype`.
    """

    axis: Literal["row", "column"]
    size: int = Field(ge=1, le=1 << 27)
    scale_bits: int = Field(ge=2, le=8)
    zero_bits: int | None = Field(default=None, ge=2, le=8)

    @property
    def statistics(self) -> int:
        """Numbers that a superblock stores: of the scales, and of the zeros where they have a second level."""
        return (2 if self.axis == "row" else 1) * (1 if self.zero_bits is None else 2)

    def superblocks(self, out_features: int, groups: int) -> tuple[int, int]:
        """Superblocks along the rows and along the groups of a matrix, ragged last ones included."""
        rows, columns = (self.size, 1) if self.axis == "row" else (1, self.size)
        return -(-out_features // rows), -(-groups // columns)

    def label(self) -> str:
        """Size, first letter of the axis and bits of scales and zeros, such as `b16r3/3`."""
        zeros = "" if self.zero_bits is None else f"/{self.zero_bits}"
        return f"b{self.size}{self.axis[0]}{self.scale_bits}{zeros}"


class WeightSpec(Settings):
    """Integer codes of `bits` bits in groups of `group_size` consecutive inputs of one output row.

    A weight decodes as `scale * (code - zero)` with `code` in `0 .. 2**bits - 1`.

    - `group_size=None`: one group per output row (per channel). The last group of a row may be shorter.
    - `symmetric`: `zero` is `2**(bits-1)` everywhere and is not stored, so that `code - zero` is the standard
      signed range `-2**(bits-1) .. 2**(bits-1)-1`. The scale may be negative: that puts the longer side of
      the range on the positive weights.
    - `zero="int"`: an integer inside the code range, stored in `bits` bits. `zero="float"`: any value, stored
      as `scale_dtype` (HQQ, SpQR).
    - `bilevel`: scales, and perhaps float zeros, are quantized too.
    """

    bits: int = Field(ge=2, le=8)
    group_size: int | None = Field(default=None, ge=1)
    symmetric: bool = False
    zero: Literal["int", "float"] = "int"
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    bilevel: Bilevel | None = None

    @model_validator(mode="after")
    def _symmetric_has_no_float_zero(self) -> WeightSpec:
        if self.symmetric and self.zero == "float":
            raise ValueError("symmetric codes have a fixed zero; zero='float' needs symmetric=false")
        return self

    @model_validator(mode="after")
    def _two_level_zeros_are_floats(self) -> WeightSpec:
        if self.bilevel is not None and self.bilevel.zero_bits is not None and self.zero != "float":
            raise ValueError("zeros with a second level are no integers; bilevel.zero_bits needs zero='float'")
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

    @property
    def row_multiple(self) -> int:
        """Rows that must be fitted together: a matrix may be cut only after a multiple of them."""
        return self.bilevel.size if self.bilevel is not None and self.bilevel.axis == "row" else 1

    @property
    def group_multiple(self) -> int:
        """Groups of a row that must be fitted together: a row may be cut only after a multiple of them."""
        return self.bilevel.size if self.bilevel is not None and self.bilevel.axis == "column" else 1

    @property
    def one_level(self) -> WeightSpec:
        """The spec of this grid once decoded: one level, float32 scales and zeros. Itself without `bilevel`."""
        if self.bilevel is None:
            return self
        return self.model_copy(update={"bilevel": None, "scale_dtype": "float32"})

    def label(self) -> str:
        """The spec in the field's notation, such as `w4g64-asym` or `w4g16-asym-fzero-b16r3/3`."""
        group = "" if self.group_size is None else f"g{self.group_size}"
        kind = "sym" if self.symmetric else "asym"
        bilevel = "" if self.bilevel is None else f"-{self.bilevel.label()}"
        return f"w{self.bits}{group}-{kind}" + ("-fzero" if self.zero == "float" else "") + bilevel
