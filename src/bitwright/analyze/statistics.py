"""Statistics of activations at one site of a model: one pass, bounded memory, mergeable.

Values are seen as |x| in a histogram, as power sums, and per channel. Position 0 of each window is kept apart: there
massive activations live (Sun et al., arXiv 2402.17762), and one token of a window would otherwise decide the maximum.

The histogram has fixed bins that follow the bits of a float32: every octave from 2**-40 to 2**40 is cut into 32 equal
parts, so a bin is 1.6 to 3.1 % wide and quantiles are right to that. Histograms, maxima and counts are the same for
any split into batches and any order of merging, to the last bit. Power sums are taken in float64 and differ by
rounding: 1e-12 of the sum of their terms' sizes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from bitwright.analyze.model import Spread
from bitwright.errors import CalibrationError

OCTAVES = 40
"""Octaves on each side of 1; what is smaller or larger falls into the outermost bins."""
PARTS_LOG2 = 5
BINS = 2 * OCTAVES * 2**PARTS_LOG2 + 2
TOP = 4
"""So many channels of a token are its largest; channels that are zero are not counted."""
LARGE = 6.0
"""Size from which LLM.int8 (Dettmers et al., arXiv 2208.07339) counts a value as an outlier."""
ROWS = 256
"""Tokens looked at together: their float64 copies stay in the cache."""
_SHIFT = 23 - PARTS_LOG2
_OFFSET = ((127 - OCTAVES) << PARTS_LOG2) - 1


class Magnitudes:
    """|x| of some tokens: counts by size, power sums, and what each channel shows.

    Attributes:
        features: number of channels.
        tokens: vectors seen.
        histogram: values by size, int64 [BINS]; see `bin_edges`.
        absmax: largest |x| of each channel, float32 [features].
        squares: sum of x squared of each channel, float64 [features].
        top: tokens in which the channel is among the `TOP` largest and not zero, int64 [features].
        large: tokens in which the channel's |x| is at least `LARGE`, int64 [features].
    """

    def __init__(self, features: int):
        """Nothing seen yet."""
        self.features = features
        self.tokens = 0
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.absmax = torch.zeros(features)
        self.squares = torch.zeros(features, dtype=torch.float64)
        self.top = torch.zeros(features, dtype=torch.int64)
        self.large = torch.zeros(features, dtype=torch.int64)
        self._powers = torch.zeros(4, dtype=torch.float64)  # sums of x, x**2, x**3, x**4

    def update(self, values: Tensor) -> None:
        """Add vectors [tokens, features], float32 and finite."""
        for rows in torch.split(values, ROWS):
            sizes = rows.abs()
            largest = sizes.amax(0)
            self.histogram += torch.bincount(_bins(sizes).flatten(), minlength=BINS)
            self.absmax = torch.maximum(self.absmax, largest)
            top = sizes.topk(min(TOP, self.features), dim=1, sorted=False)
            self.top += torch.bincount(top.indices[top.values > 0], minlength=self.features)
            candidates = (largest >= LARGE).nonzero().flatten()
            self.large[candidates] += (sizes[:, candidates] >= LARGE).sum(0)
            wide = rows.double()
            square = wide.square()
            self.squares += square.sum(0)
            flat, flat_square = wide.flatten(), square.flatten()
            self._powers += torch.stack(
                [flat.sum(), flat_square.sum(), flat.dot(flat_square), flat_square.dot(flat_square)]
            )
        self.tokens += len(values)

    def merge(self, other: Magnitudes) -> None:
        """Add what `other` has seen; ValueError where the widths differ."""
        if other.features != self.features:
            raise ValueError(f"cannot merge statistics of {self.features} and {other.features} channels")
        self.tokens += other.tokens
        self.histogram += other.histogram
        self.absmax = torch.maximum(self.absmax, other.absmax)
        self.squares += other.squares
        self.top += other.top
        self.large += other.large
        self._powers += other._powers

    @property
    def rms(self) -> Tensor:
        """Root mean square of each channel: float32 [features]; its square is the diagonal of the mean Hessian."""
        return (self.squares / max(self.tokens, 1)).sqrt().float()

    @property
    def persistence(self) -> Tensor:
        """Share of tokens in which each channel is among the `TOP` largest: float32 [features]."""
        return (self.top / max(self.tokens, 1)).float()

    def quantile(self, level: float) -> float:
        """The size that a share `level` of all values does not exceed, right to a bin's width; at most the maximum."""
        largest = float(self.absmax.max())
        cumulative = self.histogram.cumsum(0)
        wanted = max(1, math.ceil(level * int(cumulative[-1])))
        index = int(torch.searchsorted(cumulative, wanted))
        if index == BINS:  # nothing seen
            return 0.0
        inside = int(self.histogram[index])
        share = (wanted - int(cumulative[index]) + inside) / inside
        low, high = (min(float(edge), largest) for edge in bin_edges()[index : index + 2])
        return low + (high - low) * share

    def share_beyond(self, size: float) -> float:
        """Share of values in bins above the one that holds `size`: 0 for the own maximum, and never too large."""
        index = int(_bins(torch.tensor([size], dtype=torch.float32)))
        return float(self.histogram[index + 1 :].sum()) / max(int(self.histogram.sum()), 1)

    def spread(self) -> Spread:
        """The numbers that describe the sizes; a ratio or kurtosis that does not exist is None."""
        largest, median = float(self.absmax.max()), self.quantile(0.5)
        # half of the values and more may be zero, behind a ReLU
        smallest = float(bin_edges()[1])
        return Spread(
            tokens=self.tokens,
            absmax=largest,
            p999=self.quantile(0.999),
            median=0.0 if median < smallest else median,
            max_median=largest / median if median >= smallest else None,
            kurtosis=self._kurtosis(),
            channel_kurtosis=excess_kurtosis(self.rms),
        )

    def _kurtosis(self) -> float | None:
        mean, second, third, fourth = (self._powers / max(self.tokens * self.features, 1)).tolist()
        variance = second - mean**2
        if variance <= 1e-12 * second:  # all values alike, as far as rounding can tell
            return None
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        return float(central / variance**2 - 3)


class SiteStatistics:
    """Magnitudes at one site, position 0 apart, and the largest value by position.

    Attributes:
        name: for messages.
        first: of position 0 of each window; None before a token with a known position was seen.
        rest: of all other tokens, and of those without a position.
        profile: largest |x| by position, float32 [bins of `position_bins`].
    """

    def __init__(self, features: int, name: str = "site"):
        """Nothing seen yet."""
        self.features, self.name = features, name
        self.first: Magnitudes | None = None
        self.rest = Magnitudes(features)
        self.profile = torch.zeros(0)

    def update(self, values: Tensor) -> None:
        """Add a batch.

        Args:
            values: [windows, tokens, features], whole windows, or [tokens, features] where positions are unknown.

        Raises:
            CalibrationError: a value is NaN or infinite.
            ValueError: the shape is wrong.
        """
        if values.ndim not in (2, 3) or values.shape[-1] != self.features:
            raise ValueError(
                f"{self.name}: got {list(values.shape)}, needed [windows, tokens, {self.features}] or [tokens, ..]"
            )
        values = values.detach().to("cpu", torch.float32)
        if values.numel() and not math.isfinite(float(values.abs().max())):
            raise CalibrationError(
                f"{self.name}: {int((~values.isfinite()).sum())} of {values.numel()} activations are NaN or infinite; "
                "needed finite ones; check the checkpoint's weights for NaN"
            )
        if values.ndim == 2:
            self.rest.update(values)
            return
        self.first = self.first or Magnitudes(self.features)
        self.first.update(values[:, 0])
        self.rest.update(values[:, 1:].flatten(0, 1))
        self._add_profile(_by_position(values))

    def merge(self, other: SiteStatistics) -> None:
        """Add what `other`, of the same site, has seen; ValueError where the widths differ."""
        self.rest.merge(other.rest)
        if other.first is not None:
            self.first = self.first or Magnitudes(self.features)
            self.first.merge(other.first)
        self._add_profile(other.profile)

    @property
    def absmax(self) -> float:
        """Largest |x| at any position."""
        return max(float(part.absmax.max()) for part in (self.first, self.rest) if part is not None)

    def share_beyond(self, size: float) -> float:
        """Share of all values in bins above the one that holds `size`."""
        parts = [part for part in (self.first, self.rest) if part is not None]
        values = sum(part.tokens for part in parts)
        return sum(part.share_beyond(size) * part.tokens for part in parts) / max(values, 1)

    def _add_profile(self, profile: Tensor) -> None:
        shorter, longer = sorted((self.profile, profile), key=len)
        longer = longer.clone()
        longer[: len(shorter)] = torch.maximum(longer[: len(shorter)], shorter)
        self.profile = longer


@lru_cache(maxsize=1)
def bin_edges() -> Tensor:
    """Lower edge of each bin of a histogram and the end of the last: float64 [BINS + 1]; do not change it."""
    bits = torch.arange(1, BINS, dtype=torch.int32) + _OFFSET
    inner = (bits << _SHIFT).view(torch.float32).double()
    return torch.cat([torch.zeros(1, dtype=torch.float64), inner, torch.tensor([math.inf], dtype=torch.float64)])


def position_bins(tokens: int) -> list[tuple[int, int]]:
    """Positions that share an entry of a profile, as (start, stop): the first four alone, then half octaves."""
    starts = [0, 1, 2, 3]
    step = 4
    while step < tokens:
        starts += [step, step + step // 2]
        step *= 2
    starts = [start for start in starts if start < tokens]
    return list(zip(starts, [*starts[1:], tokens], strict=True))


def excess_kurtosis(values: Tensor) -> float | None:
    """Excess kurtosis of a vector in float64; None where its entries are all alike."""
    wide = values.double()
    centred = wide - wide.mean()
    variance = float(centred.square().mean())
    if variance <= 1e-12 * float(wide.square().mean()):
        return None
    return float(centred.pow(4).mean()) / variance**2 - 3


def _bins(sizes: Tensor) -> Tensor:
    """The bin of each size, int32."""
    return ((sizes.view(torch.int32) >> _SHIFT) - _OFFSET).clamp_(0, BINS - 1)


def _by_position(values: Tensor) -> Tensor:
    """Largest |x| of [windows, tokens, features] in each of `position_bins`."""
    largest = values.abs().amax((0, 2))
    return torch.stack([largest[start:stop].max() for start, stop in position_bins(len(largest))])
