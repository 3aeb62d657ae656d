"""The second level of a grid: scales and zeros of groups as small codes over statistics of superblocks.

With `k` statistics per superblock and every number taken to float32, groups decode as

    row axis      scale = minimum + step * code                   zero = zero_minimum + zero_step * zero_code
    column axis   scale = step * code                             zero = (minimum_step * zero_code) / scale
                  scale = step * (code - 2**(scale_bits - 1))     in symmetric specs

SpQR (Dettmers et al. 2023, section 3.3) writes the row axis as `S * (code - Z)`. We store the minimum instead of
Z: Z = -minimum / S is large where the scales of a superblock are nearly equal (and has no value where they are
equal), so that rounding it to 16 bits would move every scale by several steps, whereas a rounded minimum moves
them by 2**-11 of themselves. Equal scales are exact, with a step of 0. The column axis is GGUF's
`weight = d * scale * code - dmin * min` in the one form that all grids have, `scale * (code - zero)`.

A product of a 16-bit statistic and a code is exact in float32, hence a fused multiply-add gives the same scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.numeric.spec import Bilevel, WeightSpec


@dataclass(frozen=True)
class SecondLevel:
    """`scale_codes` and `zero_codes` (None: zeros have one level), uint8 [out, groups], and `statistics`.

    `statistics` float32 [superblocks along rows, superblocks along groups, Bilevel.statistics], each exactly
    representable in `scale_dtype`, in the order of the formulas above: of the scales, then of the zeros.
    """

    scale_codes: Tensor
    zero_codes: Tensor | None
    statistics: Tensor

    def decode(self, spec: WeightSpec) -> tuple[Tensor, Tensor | None]:
        """Scale and zero, float32 [out, groups]; the zero is None where it has one level."""
        bilevel = _bilevel(spec)
        codes, zero_codes = self.scale_codes.float(), self.zero_codes
        of_group = spread(self.statistics, bilevel, (codes.shape[0], codes.shape[1])).unbind(dim=2)
        if bilevel.axis == "row":
            scale = of_group[0] + of_group[1] * codes
            return scale, None if zero_codes is None else of_group[2] + of_group[3] * zero_codes
        scale = of_group[0] * (codes - code_offset(spec))
        return scale, None if zero_codes is None else of_group[1] * zero_codes / scale

    def rows(self, rows: slice, spec: WeightSpec) -> SecondLevel:
        """The given rows; `rows` starts and stops at multiples of `spec.row_multiple`, or stops at the end."""
        multiple = spec.row_multiple
        superblocks = slice(rows.start // multiple, -(-rows.stop // multiple))
        zero_codes = None if self.zero_codes is None else self.zero_codes[rows]
        return SecondLevel(self.scale_codes[rows], zero_codes, self.statistics[superblocks])

    @staticmethod
    def concatenate(parts: Sequence[SecondLevel | None], axis: int) -> SecondLevel | None:
        """Consecutive rows (`axis` 0) or groups (1) as one; None if there is no second level."""
        levels = [part for part in parts if part is not None]
        if not levels:
            return None
        zero_codes = [part.zero_codes for part in levels if part.zero_codes is not None]
        return SecondLevel(
            torch.cat([part.scale_codes for part in levels], dim=axis),
            torch.cat(zero_codes, dim=axis) if zero_codes else None,
            torch.cat([part.statistics for part in levels], dim=axis),
        )

    def validate(self, name: str, shape: tuple[int, int], spec: WeightSpec) -> SecondLevel:
        """Self, if it fits `shape` (out, groups) and decodes to finite zeros and finite scales other than 0.

        Raises:
            FormatError: otherwise; `name` is in the message.
        """
        bilevel = _bilevel(spec)
        statistics = (*bilevel.superblocks(*shape), bilevel.statistics)
        if tuple(self.statistics.shape) != statistics:
            raise FormatError(f"{name}: statistics have shape {list(self.statistics.shape)}, needed {statistics}")
        if (self.zero_codes is None) != (bilevel.zero_bits is None):
            raise FormatError(f"{name}: zero_codes do not agree with zero_bits={bilevel.zero_bits}")
        for part, codes, bits in (
            ("scale_codes", self.scale_codes, bilevel.scale_bits),
            ("zero_codes", self.zero_codes, bilevel.zero_bits or 8),
        ):
            if codes is None:
                continue
            if codes.dtype != torch.uint8 or tuple(codes.shape) != shape:
                raise FormatError(f"{name}: {part} are {codes.dtype} {list(codes.shape)}, needed uint8 {list(shape)}")
            if codes.numel() and int(codes.max()) >> bits:
                raise FormatError(f"{name}: {part} reach {int(codes.max())}, needed {bits} bits")
        if not bool(torch.isfinite(self.statistics).all()):
            raise FormatError(f"{name}.superblock_statistics: holds NaN or Inf, needed finite values")
        scale, zero = self.decode(spec)
        if not bool((torch.isfinite(scale) & (scale != 0)).all()):
            raise FormatError(f"{name}.scale_codes: decode to a scale of 0 or beyond float32")
        if zero is not None and not bool(torch.isfinite(zero).all()):
            raise FormatError(f"{name}.zero_codes: decode to a zero beyond float32")
        return self


def code_offset(spec: WeightSpec) -> int:
    """The scale code that stands for 0 on the column axis: codes are signed where scales may be negative."""
    return 1 << (_bilevel(spec).scale_bits - 1) if spec.symmetric else 0


def spread(statistics: Tensor, bilevel: Bilevel, shape: tuple[int, int]) -> Tensor:
    """Statistics of every group, [out, groups, k] with `shape` = (out, groups)."""
    axis = 0 if bilevel.axis == "row" else 1
    # No wider than the matrix: a size far beyond it must not cost memory.
    size = min(bilevel.size, shape[axis])
    repeats = [-1, -1, -1]
    repeats.insert(axis + 1, size)
    # Not repeat_interleave, which takes a millisecond on the CPU however short its input.
    whole = statistics.unsqueeze(axis + 1).expand(repeats).flatten(axis, axis + 1)
    return whole.narrow(axis, 0, shape[axis])


def _bilevel(spec: WeightSpec) -> Bilevel:
    if spec.bilevel is None:
        raise ValueError(f"{spec.label()} has one level")
    return spec.bilevel
