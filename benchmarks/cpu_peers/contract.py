"""What a contender is: copies of one linear's weight, in the layout of some library, and calls that go through them.

Every contender gets the cheapest call that its library has: libraries that run graphs get graphs of several linears
that write to one buffer, so that the cost of starting a graph is shared as it is in a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from typing import Literal, Protocol

import torch
from torch import Tensor

TILE_ROWS = 64
Inputs = Literal["float", "int8"]


class UnavailableError(Exception):
    """A library is missing or does not take the case; the message is a sentence for the reader."""


@dataclass(frozen=True)
class Case:
    """One linear to measure.

    Attributes:
        tile: float32 [rows, in]; the weight [out, in] is these rows again and again, so that peers quantize little.
        rotate_bytes: what the copies of a weight take together at least.
    """

    out_features: int
    in_features: int
    tile: Tensor
    rotate_bytes: int

    @staticmethod
    def of(out_features: int, in_features: int, rotate_bytes: int) -> Case:
        """A random one."""
        return Case(out_features, in_features, torch.randn(min(TILE_ROWS, out_features), in_features), rotate_bytes)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def repeated(self, tile: Tensor) -> Tensor:
        """`tile` [rows, ...] as often as `out` rows need, contiguous [out, ...]."""
        times = -(-self.out_features // len(tile))
        return tile.repeat(times, *[1] * (tile.dim() - 1))[: self.out_features].contiguous()

    def copies(self, weight_bytes: int) -> int:
        """How many weights of `weight_bytes` the rotation needs."""
        return max(2, math.ceil(self.rotate_bytes / weight_bytes))


@dataclass(frozen=True)
class Run:
    """A contender for certain inputs and threads.

    Attributes:
        linears: runs at least so many linears, each with other weights than the one before; returns how many it ran.
        output: float [rows, out], what the last linear wrote.
    """

    linears: Callable[[int], int]
    output: Callable[[], Tensor]


class Contender(Protocol):
    """A library's kernel with all copies of a case's weight.

    Attributes:
        name: heading of its column.
        inputs: what activations are rounded to within the kernel; decides which of our modes it is compared with.
        weight_bytes: of one copy, scales and zeros included, as the library reads it.
        decoded: float [tile rows, in], the weights that the codes mean.
        detail: what else a reader should know: a stand-in format, a layout.
    """

    name: str
    inputs: Inputs
    decoded: Tensor
    detail: str

    @property
    def weight_bytes(self) -> int:
        """See above."""

    def bind(self, x: Tensor, threads: int) -> Run:
        """Calls with `x`, float32 [rows, in]."""


def one_by_one(call: Callable[[object], Tensor], copies: Iterable[object]) -> Run:
    """`call` with one copy after the other, for ever in turn."""
    turn, last = cycle(copies), torch.empty(0)

    def linears(count: int) -> int:
        nonlocal last
        for _ in range(count):
            last = call(next(turn))
        return count

    return Run(linears, lambda: last)


def relative_error(contender: Contender, run: Run, x: Tensor) -> float:
    """Of the output of one linear, against float64 products with the weights that the codes mean.

    Raises:
        RuntimeError: it is beyond what rounding explains, so the kernel does not compute this product.
    """
    run.linears(1)
    wanted = x.double() @ contender.decoded.double().T
    found = run.output()[:, : wanted.shape[1]].double()
    error = float((found - wanted).norm() / wanted.norm())
    if not error < 0.03:
        raise RuntimeError(f"{contender.name} is off by {error:.1%} at {list(x.shape)}: not the product that is timed")
    return error
