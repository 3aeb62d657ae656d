"""The factor of an inverse Hessian, which is all that error feedback needs to know of the inputs.

GPTQ (Frantar et al. 2022, section 3.3) and SpQR walk over columns with U, the upper triangular matrix for which
`U.T @ U = (H + damping)^-1`. Usual code factorizes H, inverts it, and factorizes the inverse. One Cholesky
factorization suffices: with columns in reverse order, H = R @ R.T for an upper triangular R, and U = R^-1 is one
triangular solve. Both are computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitwright.numeric.spec import WeightSpec

Order = Literal["natural", "activation", "grouped"]

# Damping grows by this factor until the factorization succeeds, up to the mean of the diagonal itself.
_DAMPING_STEP, _DAMPING_LIMIT = 10.0, 1.0
# Then the diagonal is lifted to at least this share of its largest value, growing by the same step.
_FLOOR, _FLOOR_ATTEMPTS = 1e-6, 6


@dataclass(frozen=True)
class Factor:
    """`upper` float32 [in, in] in processing order, `order` int64 [in]: the column that is processed k-th.

    `dead` columns saw only zeros. `attempts` says what it took: empty when the configured damping sufficed, else
    one line per step of the failure ladder; `failed` when no step helped and `upper` is diagonal, so that error
    feedback degrades to rounding to nearest.
    """

    upper: Tensor
    order: Tensor
    damping: float
    dead: int
    attempts: tuple[str, ...] = ()
    failed: bool = False

    def inverse_diagonal(self) -> Tensor:
        """`1 / U_jj**2` by natural column, float32 [in]: the loss of a unit error that later columns cannot mend
        any more."""
        values = torch.empty_like(self.upper.diagonal())
        values[self.order] = self.upper.diagonal() ** -2
        return values


def factorize(hessian: Tensor, damping: float, order: Order, spec: WeightSpec) -> Factor:
    """Factor of `hessian` [in, in] plus `damping` times its mean diagonal, columns taken in `order`.

    - `natural`: as stored.
    - `activation`: by falling diagonal of the Hessian, the inputs that matter most first (GPTQ's `act_order`).
      Groups stay where they are, so nothing is stored and nothing costs more at inference.
    - `grouped`: groups by falling mean of their diagonals, and columns so within each group; a group is then
      processed in one piece, and its grid can be fitted to what error feedback has made of its weights.

    A column whose input is always zero gets the mean diagonal: it keeps its own nearest codes, instead of the
    zeros of the published code, because the text that is served later may use it.
    """
    matrix = hessian.double().clone()
    diagonal = matrix.diagonal()
    mean = diagonal.mean().item()
    dead = diagonal == 0
    diagonal[dead] = mean if mean > 0 else 1.0
    order_index = _column_order(diagonal, order, spec)
    upper, attempts, used = _damped_factor(matrix[order_index][:, order_index], damping)
    failed = upper is None
    if upper is None:
        upper = torch.diag(matrix.diagonal()[order_index].clamp_min(torch.finfo(torch.float32).tiny).rsqrt())
    return Factor(upper.float().contiguous(), order_index, used, int(dead.sum()), tuple(attempts), failed)


def _column_order(diagonal: Tensor, order: Order, spec: WeightSpec) -> Tensor:
    columns = diagonal.numel()
    if order == "natural":
        return torch.arange(columns)
    by_value = torch.argsort(diagonal, descending=True, stable=True)
    if order == "activation":
        return by_value
    width = spec.group_width(columns)
    sums = torch.zeros(spec.groups(columns), dtype=torch.float64)
    group = torch.arange(columns) // width
    sums.index_add_(0, group, diagonal)
    means = sums / torch.bincount(group)
    # Stable: columns keep their falling order within each group.
    return by_value[torch.argsort(means[group[by_value]], descending=True, stable=True)]


def _damped_factor(matrix: Tensor, damping: float) -> tuple[Tensor | None, list[str], float]:
    """Factor, the steps of the failure ladder that were taken, and the damping that was used."""
    mean = matrix.diagonal().mean().item()
    attempts: list[str] = []
    used = damping
    while True:
        upper = _inverse_factor(matrix, used * mean, 0.0)
        if upper is not None:
            return upper, attempts, used
        attempts.append(f"not positive definite with damping {used:g}")
        if used >= _DAMPING_LIMIT:
            break
        used = min(_DAMPING_LIMIT, max(used, 1e-3) * _DAMPING_STEP)
    floor = _FLOOR * matrix.diagonal().max().item()
    for _ in range(_FLOOR_ATTEMPTS):
        upper = _inverse_factor(matrix, used * mean, floor)
        if upper is not None:
            return upper, attempts, used
        attempts.append(f"not positive definite with its diagonal raised to {floor:.3g}")
        floor *= _DAMPING_STEP
    return None, attempts, used


def _inverse_factor(matrix: Tensor, shift: float, floor: float) -> Tensor | None:
    """Upper U with `U.T @ U = (matrix + shift)^-1`; None when that is not positive definite."""
    flipped = matrix.flip(0, 1)
    diagonal = flipped.diagonal()
    diagonal.copy_((diagonal + shift).clamp_min(floor))
    lower, info = torch.linalg.cholesky_ex(flipped)
    if int(info) != 0:
        return None
    reverse = lower.flip(0, 1)  # upper triangular R with R @ R.T = matrix
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype)
    upper = torch.linalg.solve_triangular(reverse, identity, upper=True)
    # float32 cannot hold the factor of a matrix that is positive definite in name only.
    usable = bool(torch.isfinite(upper.float()).all()) and bool((upper.diagonal().float() > 0).all())
    return upper if usable else None
