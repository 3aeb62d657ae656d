"""Rounding to the nearest code, row chunk by row chunk, with outliers kept as residuals."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bitwright.execute.local import spread
from bitwright.numeric.grid import Grid, encode
from bitwright.numeric.outliers import NoOutliers, NSigma, Outliers, outlier_threshold
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.settings import Settings
from bitwright.ranges import Ranging

# Weights of one chunk: few enough that the passes of a range search stay in the caches, and enough that a thread rarely
# has to wait until another lets it begin its next operation.
CHUNK_WEIGHTS = 1 << 18


class Nearest(Settings):
    """Every weight takes the nearest code of its group's grid."""

    name: Literal["nearest"] = "nearest"


def row_chunks(shape: tuple[int, int], multiple: int = 1) -> list[slice]:
    """Row slices of about `CHUNK_WEIGHTS` weights, cut after multiples of `multiple`.

    What a row becomes does not depend on its chunk, and the chunks do not depend on the machine.
    """
    out_features, in_features = shape
    step = max(1, CHUNK_WEIGHTS // max(1, in_features))
    step = -(-step // multiple) * multiple
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


def quantize_nearest(
    weight: Tensor, importance: Tensor | None, ranging: Ranging, policy: NoOutliers | NSigma
) -> QTensor:
    """`weight` [out, in], any float dtype, on the nearest codes of the grids that the range picks.

    `importance` [1, in] or [out, in] weighs squared errors in ranges that use it. Rows are independent given
    the outlier threshold, so the result does not depend on the chunking. Outliers keep the nearest code of
    their own value beneath, and store target minus that code's value.
    """
    spec = ranging.spec
    chunks = row_chunks((weight.shape[0], weight.shape[1]), spec.row_multiple)
    threshold = outlier_threshold(weight, policy, chunks)
    codes = torch.empty(weight.shape, dtype=torch.uint8)

    def of_rows(rows: slice) -> tuple[Grid, Outliers | None]:
        part = weight[rows].float()
        part_importance = importance if importance is None or importance.shape[0] == 1 else importance[rows]
        mask = None if threshold is None else threshold.select(rows, part)
        grid = ranging.rows(rows).fit(part, None if mask is None else ~mask, part_importance)
        scale, zero = grid.expand(part.shape[1])
        part_codes = encode(part, scale, zero, spec)
        codes[rows] = part_codes.to(torch.uint8)
        return grid, None if mask is None else Outliers.gather(mask, part - scale * (part_codes - zero))

    found = spread(of_rows, chunks)
    outliers = [kept for _, kept in found if kept is not None]
    grid = Grid.concatenate([grid for grid, _ in found])
    return QTensor(codes, grid, Outliers.concatenate(outliers) if outliers else None)


__all__ = ["CHUNK_WEIGHTS", "Nearest", "quantize_nearest", "row_chunks"]
