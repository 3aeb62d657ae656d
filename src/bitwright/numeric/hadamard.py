"""Hadamard transforms and random rotations: orthogonal matrices that spread a massive channel over all channels.

Rows are vectors: a rotation Q acts as `x @ Q`. Source: QuaRot (Ashkboos et al. 2024), section 3. Departure: the
matrices are computed rather than read from tables, so widths that are no power of two get a random orthogonal
factor in place of a Hadamard matrix of order 12, 20 or 28.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)
# A transform is done as matrix products of this order: on a CPU 5 to 12 times as fast as butterflies.
_LARGEST_FACTOR = 64


def hadamard_blocks(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis, in blocks; it is its own inverse and transpose.

    A block is the largest power of two that divides the axis: 1536 channels are 3 blocks of 512, and an odd number
    of channels is left as it is. Differentiable, out of place.

    Args:
        x: [..., features], float. Half precision is transformed in float32 and rounded once.

    Returns:
        [..., features], in the dtype and on the device of `x`.
    """
    left = block_size(x.shape[-1])
    transformed = x.float() if x.dtype in _HALVES else x
    stride = 1
    # H of order a * b is the Kronecker product of H of order a and H of order b
    while left > 1:
        matrix = hadamard(min(left, _LARGEST_FACTOR), transformed.dtype, transformed.device)
        order = matrix.shape[0]
        if stride == 1:
            transformed = transformed.reshape(-1, order) @ matrix
        else:
            transformed = matrix @ transformed.reshape(-1, order, stride)
        stride, left = stride * order, left // order
    return transformed.reshape(x.shape).to(x.dtype) if stride > 1 else x.clone()


def block_size(features: int) -> int:
    """The largest power of two that divides `features`."""
    return features & -features


def hadamard(order: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Tensor:
    """Sylvester's Hadamard matrix divided by the root of its order: orthogonal and symmetric, [order, order].

    Raises:
        ValueError: `order` is not a power of two.
    """
    if order < 1 or block_size(order) != order:
        raise ValueError(f"Hadamard matrix of order {order}; a power of two is needed")
    signs = torch.ones(1, 1, dtype=dtype, device=device)
    while signs.shape[0] < order:
        signs = torch.cat([torch.cat([signs, signs], dim=1), torch.cat([signs, -signs], dim=1)])
    return signs / math.sqrt(order)


def random_rotation(features: int, seed: int, fixes_ones: bool = False) -> Tensor:
    """A random orthogonal matrix with small entries, the same for the same arguments on every machine's CPU.

    For `features` = 2^k * m it is (R x H), where R is random orthogonal [m, m] and H the Hadamard matrix of order
    2^k, with random signs on both sides.

    Args:
        features: its order.
        seed: of the signs and of R.
        fixes_ones: Q @ 1 = 1, hence also 1 @ Q = 1: `x @ Q` has the mean of `x`, so not only RMSNorm but LayerNorm
            (without its weight and bias) commutes with Q, and nothing needs to be centred beforehand.

    Returns:
        float64 [features, features].

    Raises:
        ValueError: `features` is not positive.
    """
    if features < 1:
        raise ValueError(f"rotation of {features} features; at least 1 is needed")
    generator = torch.Generator().manual_seed(seed)
    order = block_size(features)
    spread = torch.kron(_random_orthogonal(features // order, generator), hadamard(order))
    left, right = torch.randint(0, 2, (2, features), generator=generator).double() * 2 - 1
    rotation = left[:, None] * spread * right
    return _fixing_ones(rotation) if fixes_ones else rotation


def _random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """Uniformly distributed orthogonal matrix, float64 [order, order]."""
    normal = torch.randn(order, order, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(normal)
    # QR is unique, and its Q uniform, only when the diagonal of R is positive (Mezzadri 2007)
    signed: Tensor = orthogonal * triangular.diagonal().sign()
    return signed.contiguous()  # kron views its factors


def _fixing_ones(rotation: Tensor) -> Tensor:
    """`rotation` followed by the reflection that takes the image of the ones vector back to it."""
    target = torch.full_like(rotation[0], rotation.shape[0] ** -0.5)
    normal = rotation @ target - target
    length_squared = normal @ normal
    if length_squared == 0:
        return rotation
    return rotation - torch.outer(normal * (2 / length_squared), normal @ rotation)
