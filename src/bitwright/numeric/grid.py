"""The grid: how a code becomes a weight and a weight becomes a code.

Every range, rounding, format and kernel goes through `encode` and `decode`, so there is one arithmetic:

    code   = clamp(round_half_even(weight / scale + zero), 0, 2**bits - 1)
    weight = scale * (code - zero)

in float32. Scales and zeros are rounded to their stored precision *before* codes are chosen
(`stored_scale`, `stored_zero`): the code is nearest on the grid that will be read back, not on an ideal one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import WeightError
from bitwright.numeric.bilevel import SecondLevel
from bitwright.numeric.spec import WeightSpec


def encode(weights: Tensor, scale: Tensor, zero: Tensor, spec: WeightSpec) -> Tensor:
    """Nearest codes of `weights` as float32 integers; `scale` and `zero` broadcast against `weights`."""
    return torch.clamp(torch.round(weights / scale + zero), 0, spec.max_code)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Weights of `codes` in float32; `scale` and `zero` broadcast against `codes`."""
    return scale * (codes.to(scale.dtype) - zero)


def stored_scale(scale: Tensor, spec: WeightSpec) -> Tensor:
    """`scale` rounded to its stored precision, never zero (sign kept), as float32.

    Raises:
        WeightError: a scale is beyond the largest finite value of `spec.scale_dtype`.
    """
    info = torch.finfo(spec.storage_dtype)
    if scale.numel() and scale.abs().max().item() > info.max:
        raise WeightError(
            f"a scale of {scale.abs().max().item():.3g} does not fit {spec.scale_dtype} (at most {info.max:.3g}); "
            "use --set scale_dtype=bfloat16"
        )
    smallest = smallest_scale(spec)
    rounded = scale.to(spec.storage_dtype).float()
    tiny = rounded.abs() < smallest
    return torch.where(tiny, torch.copysign(torch.full_like(rounded, smallest), scale), rounded)


def smallest_scale(spec: WeightSpec) -> float:
    """The smallest magnitude that a stored scale has."""
    # float16 needs its subnormals: steps below 6e-5 occur. The other two reach 1e-38 without them.
    return 2.0**-24 if spec.scale_dtype == "float16" else torch.finfo(spec.storage_dtype).smallest_normal


def stored_zero(zero: Tensor, spec: WeightSpec) -> Tensor:
    """`zero` as it will be read back: the centre, an integer code, or a float of `scale_dtype`; float32."""
    if spec.symmetric:
        return torch.full_like(zero, float(spec.centre))
    if spec.zero == "int":
        return torch.clamp(torch.round(zero), 0, spec.max_code)
    return zero.to(spec.storage_dtype).float()


def rounded_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Smallest numbers of the float type `dtype` that are not below `values` (float32, not negative), as float32."""
    nearest = values.to(dtype)
    if dtype == torch.float32:
        return nearest
    # The bits of positive floats, read as integers, are in the order of the floats.
    above = (nearest.view(torch.int16) + 1).view(dtype)
    return torch.where(nearest.float() < values, above, nearest).float()


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of one matrix, float32 [out, groups].

    Without `levels` each is exactly representable as it is stored. With them (`spec.bilevel`), scales, and zeros
    where `bilevel.zero_bits` is set, are what `levels` decodes to, to the last bit.
    """

    scale: Tensor
    zero: Tensor
    spec: WeightSpec
    levels: SecondLevel | None = None

    @staticmethod
    def of_levels(levels: SecondLevel, zero: Tensor | None, spec: WeightSpec) -> Grid:
        """The grid that `levels` decodes to; `zero` [out, groups] where zeros have one level, else None."""
        scale, decoded = levels.decode(spec)
        zero = decoded if zero is None else zero
        if zero is None:
            raise ValueError(f"{spec.label()} stores zeros in one level; they are needed beside the second one")
        return Grid(scale, zero, spec, levels)

    @staticmethod
    def concatenate(parts: list[Grid]) -> Grid:
        """The grids of consecutive rows as one.

        Raises:
            ValueError: a part other than the last is no whole number of superblocks (`spec.row_multiple`).
        """
        _check_cuts([part.scale.shape[0] for part in parts], parts[0].spec.row_multiple, "rows")
        return _joined(parts, 0)

    @staticmethod
    def concatenate_groups(parts: list[Grid]) -> Grid:
        """The grids of consecutive groups of the same rows as one.

        Raises:
            ValueError: a part other than the last is no whole number of superblocks (`spec.group_multiple`).
        """
        _check_cuts([part.scale.shape[1] for part in parts], parts[0].spec.group_multiple, "groups")
        return _joined(parts, 1)

    def rows(self, rows: slice) -> Grid:
        """The grid of consecutive rows.

        A cut through superblocks leaves a one-level grid of the same values (`spec.one_level`): it decodes alike
        and can be stored, but no longer as small.
        """
        scale, zero = self.scale[rows], self.zero[rows]
        if self.levels is None:
            return Grid(scale, zero, self.spec)
        multiple, out_features = self.spec.row_multiple, self.scale.shape[0]
        start, stop, _ = rows.indices(out_features)
        if start % multiple or (stop % multiple and stop != out_features):
            return Grid(scale, zero, self.spec.one_level)
        return Grid(scale, zero, self.spec, self.levels.rows(slice(start, stop), self.spec))

    def expand(self, in_features: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of every weight, each [out, in_features]."""
        return expand_groups(self.scale, self.spec, in_features), expand_groups(self.zero, self.spec, in_features)

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes of `weight` [out, in], uint8."""
        scale, zero = self.expand(weight.shape[1])
        return encode(weight.float(), scale, zero, self.spec).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Weights of `codes` [out, in], float32."""
        scale, zero = self.expand(codes.shape[1])
        return decode(codes, scale, zero)


def _check_cuts(sizes: list[int], multiple: int, what: str) -> None:
    if any(size % multiple for size in sizes[:-1]):
        raise ValueError(f"parts of {sizes} {what} cut through superblocks of {multiple}; cut after multiples of it")


def _joined(parts: list[Grid], axis: int) -> Grid:
    scale, zero = (torch.cat([getattr(part, name) for part in parts], dim=axis) for name in ("scale", "zero"))
    return Grid(scale, zero, parts[0].spec, SecondLevel.concatenate([part.levels for part in parts], axis))


def expand_groups(per_group: Tensor, spec: WeightSpec, in_features: int) -> Tensor:
    """[out, groups] to [out, in_features]: every column takes its group's value."""
    width = spec.group_width(in_features)
    # Not repeat_interleave, which takes a millisecond on the CPU however short its input.
    return per_group.unsqueeze(2).expand(-1, -1, width).flatten(1)[:, :in_features]


def group_rows(matrix: Tensor, spec: WeightSpec) -> list[Tensor]:
    """Views of `matrix` [out, in] as rows of groups: the full groups [out * full, width], then the ragged tail.

    The tail [out, tail] is present only when `in` is not a multiple of the group width. Statistics of a
    short group thus never see padding.
    """
    out_features, in_features = matrix.shape
    width = spec.group_width(in_features)
    full = in_features // width
    parts = [matrix[:, : full * width].reshape(out_features * full, width)]
    if full * width < in_features:
        parts.append(matrix[:, full * width :])
    return parts


def ungroup_rows(parts: list[Tensor], out_features: int) -> Tensor:
    """Inverse of `group_rows` for per-group values: vectors per part to [out, groups]."""
    return torch.cat([part.reshape(out_features, -1) for part in parts], dim=1)
