"""torch's own: products in float32 and bfloat16, and its weight-only kernels with bfloat16 inputs.

Left out: `_weight_int4pack_mm_for_cpu` and `_weight_int8pack_mm` with float32 inputs, and `_dyn_quant_matmul_4bit`,
which in the x86 wheel are scalar loops, ten to a hundred times slower than with bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cpu_peers.contract import Case, Inputs, Run, UnavailableError, one_by_one


@dataclass
class Plain:
    """Float weights of one type."""

    name: str
    copies: list[Tensor]
    decoded: Tensor
    inputs: Inputs = "float"
    detail: str = ""

    @staticmethod
    def of(case: Case, dtype: torch.dtype) -> Plain:
        """The case's own weights, rounded to `dtype`."""
        weight = case.repeated(case.tile.to(dtype))
        copies = [weight.clone() for _ in range(case.copies(weight.nbytes))]
        return Plain(str(dtype).removeprefix("torch."), copies, case.tile.to(dtype).float())

    @property
    def weight_bytes(self) -> int:
        """See `Contender`."""
        return self.copies[0].nbytes

    def bind(self, x: Tensor, threads: int) -> Run:
        """See `Contender`."""
        inputs = x.to(self.copies[0].dtype)
        result = torch.empty(len(x), len(self.copies[0]), dtype=inputs.dtype)
        return one_by_one(lambda weight: torch.mm(inputs, weight.t(), out=result), self.copies)  # type: ignore[attr-defined]


@dataclass
class Int4:
    """`_weight_int4pack_mm_for_cpu`: 4-bit codes in groups, one bfloat16 scale and offset each."""

    case: Case
    name: str = "torch int4"
    inputs: Inputs = "float"
    detail: str = ""
    group_size: int = field(init=False)

    def __post_init__(self) -> None:
        """Draw codes and scales."""
        fits = [size for size in (128, 64, 32) if self.case.in_features % size == 0]
        if not fits or self.case.out_features % 16:
            shape = f"{self.case.out_features}x{self.case.in_features}"
            raise UnavailableError(f"torch int4 needs out features by 16 and in features by 32, got {shape}")
        self.group_size = fits[0]
        self.detail = f"g{self.group_size}"
        tile = torch.randint(0, 16, self.case.tile.shape, dtype=torch.int32)
        groups = (self.case.in_features // self.group_size, len(tile))
        scale = (torch.rand(groups) * 0.02 + 0.001).bfloat16()
        # The kernel's zero is what code 8 means.
        zero = (torch.rand(groups) * 0.02 - 0.01).bfloat16()
        wide = [grid.float().T.repeat_interleave(self.group_size, dim=1) for grid in (scale, zero)]
        self.decoded = (tile - 8) * wide[0] + wide[1]
        words = self.case.repeated(tile)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(words, 1)
        self._grid = self.case.repeated(torch.stack([scale.T, zero.T], dim=-1)).transpose(0, 1).contiguous()
        self.weight_bytes = packed.nbytes + self._grid.nbytes
        self._copies = [(packed.clone(), self._grid.clone()) for _ in range(self.case.copies(self.weight_bytes))]

    def bind(self, x: Tensor, threads: int) -> Run:
        """See `Contender`."""
        half = x.bfloat16()
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        return one_by_one(lambda copy: kernel(half, copy[0], self.group_size, copy[1]), self._copies)  # type: ignore[index]


@dataclass
class Int8:
    """`_weight_int8pack_mm`: signed bytes, one bfloat16 scale a row."""

    case: Case
    name: str = "torch int8"
    inputs: Inputs = "float"
    detail: str = "one scale a row"

    def __post_init__(self) -> None:
        """Draw codes and scales."""
        tile = torch.randint(-128, 128, self.case.tile.shape, dtype=torch.int8)
        scale = (torch.rand(len(tile)) * 0.02 + 0.001).bfloat16()
        self.decoded = tile * scale.float()[:, None]
        codes, scales = self.case.repeated(tile), self.case.repeated(scale)
        self.weight_bytes = codes.nbytes + scales.nbytes
        self._copies = [(codes.clone(), scales.clone()) for _ in range(self.case.copies(self.weight_bytes))]

    def bind(self, x: Tensor, threads: int) -> Run:
        """See `Contender`."""
        half = x.bfloat16()
        kernel = torch.ops.aten._weight_int8pack_mm
        return one_by_one(lambda copy: kernel(half, *copy), self._copies)  # type: ignore[misc]
