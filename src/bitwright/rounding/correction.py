"""Targets for inputs that are no longer those of the float model.

Blocks that are already rounded give a linear other inputs x than the float model's r. What it should reproduce is
`W r`, not `W x`. The weights that do so best on x, in the sense of least squares, are

    W' = W + share * W (C - H) (H + damping)^-1        C = sum of w r x^T,  H = sum of w x x^T

(GPTAQ, Li et al. 2025, section 3; Qronos, Zhang et al. 2025, section 3). Rounding then works towards W'. With few
tokens the correction also follows their noise, hence the share and the damping.
"""

from __future__ import annotations

import torch
from torch import Tensor


def corrected(weight: Tensor, hessian: Tensor, cross: Tensor, share: float, damping: float) -> Tensor:
    """The weights that rounding should aim at, float32 [out, in].

    Args:
        weight: [out, in].
        hessian: mean of w x x^T over inputs x that the linear gets, [in, in].
        cross: mean of w r x^T with the float model's inputs r, [in, in].
        share: of the correction, 0 to 1.
        damping: share of the mean diagonal that is added to the Hessian.

    A Hessian that cannot be factorized gives back the weights.
    """
    matrix = hessian.double().clone()
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        return weight.float()
    mismatch = (cross - hessian).double()
    change = torch.cholesky_solve(mismatch.T, lower).T  # (C - H) (H + damping)^-1, as both H are symmetric
    return weight.float() + share * (weight.float() @ change.float())
