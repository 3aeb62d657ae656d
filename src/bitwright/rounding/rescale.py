"""Scales refitted to finished codes.

Codes are rounded for the scales that were there before. Once they are fixed, the layer's error is quadratic in the
scales, so that its minimum over all groups of a row at once is one small linear system:

    minimise  d H d^T,   d = target - sum over groups of s_g * (codes_g - zero_g)

Only one-level grids can take any scale; two-level ones are refined before rounding (see `ranges.refine`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.numeric.grid import Grid, expand_groups, stored_scale

# Share of the mean diagonal that keeps the small systems solvable where a group's codes are all at its zero.
_RIDGE = 1e-6


def refit_scales(codes: Tensor, grid: Grid, target: Tensor, hessian: Tensor, kept: Tensor) -> Grid:
    """`grid` with the scales that leave the least error, row by row; rows that would not gain stay.

    Args:
        codes: uint8 [out, in].
        grid: one level.
        target: what scales times steps should be, float32 [out, in]; for a kept weight, what keeping it has left.
        hessian: [in, in], symmetric, damped as it was for rounding.
        kept: bool [out, in], weights that are stored apart: whatever lies beneath them does not count.
    """
    steps = (codes.float() - expand_groups(grid.zero, grid.spec, codes.shape[1])).masked_fill(kept, 0.0)
    hessian = hessian.float()
    groups = grid.scale.shape[1]
    normal = _by_group(steps, hessian, grid.spec.group_width(codes.shape[1]), groups)
    right = _sum_groups(steps * (target @ hessian), grid.spec.group_width(codes.shape[1]), groups)
    ridge = _RIDGE * normal.diagonal(dim1=1, dim2=2).mean(dim=1) + torch.finfo(torch.float64).tiny
    system = normal + ridge[:, None, None] * torch.eye(groups, dtype=torch.float64)
    # Towards the old scales: a group without any step keeps its own.
    solution = torch.linalg.solve(system, right + ridge[:, None] * grid.scale.double()).float()
    usable = solution.isfinite() & (solution * grid.scale > 0)
    scale = stored_scale(torch.where(usable, solution, grid.scale), grid.spec)
    before, after = (_error(steps, target, values, grid, hessian) for values in (grid.scale, scale))
    return replace(grid, scale=torch.where((after < before).unsqueeze(1), scale, grid.scale))


def _by_group(steps: Tensor, hessian: Tensor, width: int, groups: int) -> Tensor:
    """float64 [out, groups, groups]: s_g H_gh s_h^T for every pair of groups and every row."""
    columns = []
    for group in range(groups):
        part = slice(group * width, min((group + 1) * width, steps.shape[1]))
        columns.append(_sum_groups(steps * (steps[:, part] @ hessian[part]), width, groups))
    matrix = torch.stack(columns, dim=2)
    return (matrix + matrix.transpose(1, 2)) / 2


def _sum_groups(values: Tensor, width: int, groups: int) -> Tensor:
    """float64 [out, groups]: sums over the columns of each group."""
    padded = functional.pad(values, (0, groups * width - values.shape[1]))
    return padded.reshape(values.shape[0], groups, width).double().sum(dim=2)


def _error(steps: Tensor, target: Tensor, scale: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    left = target - steps * expand_groups(scale, grid.spec, steps.shape[1])
    return (left @ hessian * left).double().sum(dim=1)
