"""Statistics of the inputs of linears: one pass, any batch split, any number of parts, the same result.

Everything is a sum over tokens, so two statistics merge by adding. Products are made in float32 over at most
2048 tokens and added up in float64: the split into batches moves the result by about 1e-7 of its size, the number
of threads not at all where the matrix library leaves each entry to one thread (see `STEP`).

Products are never made in TF32 or bfloat16, whatever precision the process has chosen: an error of 1e-3 in a
Hessian is larger than the damping that makes it invertible.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bitwright.errors import CalibrationError

ROWS = 2048
"""Tokens in one product: float32 sums of so many squares are right to 1e-7."""
STEP = 256
"""Tokens in one call of the matrix product. Libraries split the sum over many tokens among threads, so that the last
bits depend on their number; so few tokens they leave to one thread for each entry."""
PANEL = 256
"""Columns in one product: of a symmetric sum only panels on and above the diagonal are made, about half of it,
and no temporary is larger than a panel."""
LARGEST = 1e17
"""Absolute values beyond this overflow float32 when 2048 of them are squared and added."""


class Hessian:
    """sum of w x x^T over the inputs x of one linear: what its output error depends on.

    With `cross`, also sum of w r x^T, where r is the input of the same linear for the same token in another
    run of the model, such as the float one. GPTQ (Frantar et al., arXiv 2210.17323) minimises
    tr(D H D^T) for a change of weights D and the Hessian H.

    Attributes:
        features: width of the inputs.
        name: of the linear, for messages.
        tokens: inputs seen.
        total_weight: sum of their weights w; without weights the same number.
    """

    def __init__(self, features: int, cross: bool = False, name: str = "linear"):
        """Nothing seen yet. Takes 8 * features**2 bytes, twice that with `cross`."""
        self.features = features
        self.name = name
        self.tokens = 0
        self.total_weight = 0.0
        self._sum = torch.zeros(features, features, dtype=torch.float64)  # on and above the diagonal panels
        self._cross = torch.zeros(features, features, dtype=torch.float64) if cross else None

    def update(self, inputs: Tensor, *, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        """Add a batch of tokens.

        Args:
            inputs: [tokens, features] of any float type; products are computed where they lie.
            weights: [tokens], not negative; None: one each.
            reference: r for the same tokens, [tokens, features]; needed exactly with `cross`.

        Raises:
            CalibrationError: a value is NaN, infinite, or too large to be squared, or a weight is negative.
            ValueError: a shape is wrong, or `reference` does not go with `cross`.
        """
        if (reference is None) != (self._cross is None):
            raise ValueError(f"{self.name}: give reference inputs exactly when the Hessian was made with cross=True")
        _check_inputs(inputs, self.features, self.name)
        if reference is not None:
            _check_inputs(reference, self.features, f"{self.name} (reference)")
            if len(reference) != len(inputs):
                raise ValueError(f"{self.name}: got {len(reference)} reference tokens for {len(inputs)} tokens")
        if weights is not None:
            _check_weights(weights, len(inputs), self.name)
        with full_precision():
            for rows in _slices(len(inputs), ROWS):
                right = inputs[rows].float()
                weighted = right if weights is None else right * weights[rows, None].to(right)
                _add_product(self._sum, weighted, right, symmetric=True)
                if reference is not None and self._cross is not None:
                    _add_product(self._cross, reference[rows].float(), weighted, symmetric=False)
        self.tokens += len(inputs)
        self.total_weight += float(len(inputs) if weights is None else weights.double().sum())

    def merge(self, other: Hessian) -> None:
        """Add what `other`, of the same linear, has seen.

        Raises:
            ValueError: the two have different widths, or only one has cross moments.
        """
        if other.features != self.features or (other._cross is None) != (self._cross is None):
            raise ValueError(
                f"{self.name}: cannot merge Hessians of {self.features} and {other.features} features, "
                f"cross {self._cross is not None} and {other._cross is not None}; needed the same"
            )
        self._sum += other._sum
        if self._cross is not None and other._cross is not None:
            self._cross += other._cross
        self.tokens += other.tokens
        self.total_weight += other.total_weight

    @property
    def mean(self) -> Tensor:
        """sum of w x x^T / sum of w: float32 [features, features], exactly symmetric.

        Raises:
            CalibrationError: no token with a positive weight was seen.
        """
        self._check_seen()
        result = torch.empty(self.features, self.features)
        for columns in _slices(self.features, PANEL):
            start, width = columns.start, columns.stop - columns.start
            panel = (self._sum[columns, start:] / self.total_weight).float()
            square = panel[:, :width].triu()
            panel[:, :width] = square + square.triu(1).T  # its halves were computed apart
            result[columns, start:] = panel
            result[start:, columns] = panel.T
        return result

    @property
    def cross_mean(self) -> Tensor:
        """sum of w r x^T / sum of w: float32 [features of r, features of x].

        Raises:
            CalibrationError: no token with a positive weight was seen.
            ValueError: the Hessian was made without `cross`.
        """
        if self._cross is None:
            raise ValueError(f"{self.name}: no cross moments; make the Hessian with cross=True")
        self._check_seen()
        return (self._cross / self.total_weight).float()

    def _check_seen(self) -> None:
        if not self.total_weight > 0:
            raise CalibrationError(
                f"{self.name}: the Hessian saw {self.tokens} tokens of weight {self.total_weight:g}; needed some; "
                "calibrate on more tokens, or leave this linear in float with --set keep=NAME"
            )


class ChannelMoments:
    """Extremes and means of every input channel of one linear; mergeable.

    Attributes:
        features: width of the inputs.
        name: of the linear, for messages.
        tokens: inputs seen.
        low, high: smallest and largest value, float32 [features]; +inf and -inf before the first token.
    """

    def __init__(self, features: int, name: str = "linear"):
        """Nothing seen yet."""
        self.features = features
        self.name = name
        self.tokens = 0
        self.low = torch.full((features,), torch.inf)
        self.high = torch.full((features,), -torch.inf)
        self._sums = torch.zeros(3, features, dtype=torch.float64)  # of x, |x| and x squared

    def update(self, inputs: Tensor) -> None:
        """Add a batch of tokens, [tokens, features] of any float type.

        Raises:
            CalibrationError: a value is NaN, infinite, or too large to be squared.
            ValueError: the shape is wrong.
        """
        _check_inputs(inputs, self.features, self.name)
        for rows in _slices(len(inputs), ROWS):
            values = inputs[rows].float()
            low, high = values.aminmax(dim=0)
            self.low = torch.minimum(self.low, low.cpu())
            self.high = torch.maximum(self.high, high.cpu())
            self._sums += torch.stack([values.sum(0), values.abs().sum(0), values.square().sum(0)]).cpu()
        self.tokens += len(inputs)

    def merge(self, other: ChannelMoments) -> None:
        """Add what `other`, of the same linear, has seen; ValueError where the widths differ."""
        if other.features != self.features:
            raise ValueError(f"{self.name}: cannot merge moments of {self.features} and {other.features} features")
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)
        self._sums += other._sums
        self.tokens += other.tokens

    @property
    def absmax(self) -> Tensor:
        """Largest absolute value of each channel: float32 [features]; CalibrationError before the first token."""
        self._check_seen()
        return torch.maximum(-self.low, self.high)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel: float32 [features]; CalibrationError before the first token."""
        return self._mean(0)

    @property
    def mean_abs(self) -> Tensor:
        """Mean absolute value of each channel: float32 [features]; CalibrationError before the first token."""
        return self._mean(1)

    @property
    def second_moment(self) -> Tensor:
        """Mean square of each channel, the diagonal of the Hessian's mean: float32 [features]; errors as `mean`."""
        return self._mean(2)

    def _mean(self, row: int) -> Tensor:
        self._check_seen()
        return (self._sums[row] / self.tokens).float()

    def _check_seen(self) -> None:
        if not self.tokens:
            raise CalibrationError(
                f"{self.name}: no tokens were seen; needed some; calibrate on more tokens, or leave this linear "
                "in float with --set keep=NAME"
            )


@contextmanager
def full_precision() -> Iterator[None]:
    """Within, float32 products are made of float32 factors, on every device."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _add_product(total: Tensor, left: Tensor, right: Tensor, symmetric: bool) -> None:
    """total += left^T right, for [tokens, features] each; if `symmetric` only on and above the diagonal panels."""
    for columns in _slices(left.shape[1], PANEL):
        first = columns.start if symmetric else 0
        product = right.new_zeros(columns.stop - columns.start, right.shape[1] - first)
        for rows in _slices(len(left), STEP):
            product.addmm_(left[rows, columns].T, right[rows, first:])
        total[columns, first:] += product.to(total.device)


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _check_inputs(inputs: Tensor, features: int, name: str) -> None:
    if inputs.ndim != 2 or inputs.shape[1] != features or not inputs.is_floating_point():
        raise ValueError(f"{name}: got inputs {inputs.dtype} {list(inputs.shape)}, needed floats [tokens, {features}]")
    if not len(inputs):
        return
    low, high = inputs.aminmax()  # NaN comes through, and then no comparison holds
    if max(-float(low), float(high)) <= LARGEST:
        return
    bad = ~(inputs.abs() <= LARGEST)
    token, channel = bad.nonzero()[0].tolist()
    raise CalibrationError(
        f"{name}: {int(bad.sum())} of {inputs.numel()} inputs cannot be squared in float32, the first at token "
        f"{token}, channel {channel}: {float(inputs[token, channel])}; needed finite values up to {LARGEST:g}; "
        "check the checkpoint's weights for NaN, or leave this linear in float with --set keep=NAME"
    )


def _check_weights(weights: Tensor, tokens: int, name: str) -> None:
    if tuple(weights.shape) != (tokens,):
        raise ValueError(f"{name}: got weights {list(weights.shape)}, needed [{tokens}], one for each token")
    if tokens and not bool((weights.isfinite() & (weights >= 0)).all()):
        raise CalibrationError(
            f"{name}: token weights reach from {float(weights.min())} to {float(weights.max())}; "
            "needed finite ones that are not negative; mend what computes them"
        )
