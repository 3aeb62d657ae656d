"""QTensor: a quantized matrix in its canonical form, the oracle of every format and kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.numeric.grid import Grid
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.spec import WeightSpec


@dataclass(frozen=True)
class QTensor:
    """`codes` uint8 [out, in], their `grid`, and residual `outliers`.

    `dequantize()` defines what the tensor means; formats and kernels are tested against it.
    """

    codes: Tensor
    grid: Grid
    outliers: Outliers | None = None

    @property
    def spec(self) -> WeightSpec:
        """What the codes look like."""
        return self.grid.spec

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """The weights, float32 [out, in]: `scale * (code - zero)` plus the outliers' residuals."""
        weight = self.grid.decode(self.codes)
        return weight if self.outliers is None else self.outliers.add_to(weight)

    def rows(self, rows: slice) -> QTensor:
        """Consecutive rows as a QTensor of their own; see `Grid.rows` for cuts through superblocks."""
        start, stop, _ = rows.indices(self.codes.shape[0])
        rows = slice(start, stop)
        outliers = None if self.outliers is None else self.outliers.row_slice(rows)
        return QTensor(self.codes[rows], self.grid.rows(rows), outliers)

    def validate(self, name: str) -> QTensor:
        """Self, if every part agrees with every other.

        Raises:
            FormatError: a shape, code, scale, zero or outlier index is impossible; `name` is in the message.
        """
        out_features, in_features = self.shape
        spec = self.spec
        expected = (out_features, spec.groups(in_features))
        for part, tensor in (("scale", self.grid.scale), ("zero", self.grid.zero)):
            if tuple(tensor.shape) != expected:
                raise FormatError(f"{name}: {part} has shape {tuple(tensor.shape)}, needed {expected}")
            if not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"{name}: {part} holds NaN or Inf")
        if self.codes.numel() and int(self.codes.max()) > spec.max_code:
            raise FormatError(f"{name}: code {int(self.codes.max())} is above {spec.max_code} ({spec.bits} bits)")
        self._validate_levels(name)
        if self.outliers is not None:
            self.outliers.validate(name, self.shape)
        return self

    def _validate_levels(self, name: str) -> None:
        grid, levels = self.grid, self.grid.levels
        if levels is None or self.spec.bilevel is None:
            if levels is not None or self.spec.bilevel is not None:
                raise FormatError(f"{name}: the grid's levels do not agree with its spec {self.spec.label()}")
            return
        levels.validate(name, (grid.scale.shape[0], grid.scale.shape[1]), self.spec)
        scale, zero = levels.decode(self.spec)
        if not torch.equal(scale, grid.scale) or (zero is not None and not torch.equal(zero, grid.zero)):
            raise FormatError(f"{name}: scales or zeros are not what their second level decodes to")
