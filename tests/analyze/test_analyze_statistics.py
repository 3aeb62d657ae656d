"""Streaming statistics of activations against plain formulas in float64, and against themselves in other batches."""

from __future__ import annotations

import pytest
import torch

from bitwright.analyze.statistics import (
    BINS,
    TOP,
    Magnitudes,
    SiteStatistics,
    bin_edges,
    excess_kurtosis,
    position_bins,
)
from bitwright.errors import CalibrationError


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values over many octaves, with zeros."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=random) * (3 * torch.randn(shape, generator=random)).exp()
    return values * (torch.rand(shape, generator=random) > 0.05)


def seen(values: torch.Tensor) -> Magnitudes:
    found = Magnitudes(values.shape[1])
    found.update(values)
    return found


def exact(found: Magnitudes) -> list[torch.Tensor]:
    return [found.histogram, found.absmax, found.top, found.large, torch.tensor(found.tokens)]


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 0.999])
def test_quantiles_are_right_to_a_bin(level):
    values = heavy(4000, 7)
    expected = torch.quantile(values.abs().double().flatten(), level, interpolation="higher")
    assert seen(values).quantile(level) == pytest.approx(float(expected), rel=0.032)


def test_bins_hold_what_their_edges_say():
    edges = bin_edges()
    assert len(edges) == BINS + 1
    inner = edges[1:-1]
    ratio = inner[1:] / inner[:-1]
    assert float(ratio.min()) > 1.015
    assert float(ratio.max()) < 1.032
    values = heavy(500, 3).abs()
    counts = seen(values).histogram
    expected = torch.histogram(values.double().flatten(), bins=edges.nan_to_num(posinf=1e300)).hist
    torch.testing.assert_close(counts.double(), expected.double(), rtol=0, atol=0)


@pytest.mark.parametrize(("draw", "expected"), [("normal", 0.0), ("laplace", 3.0), ("uniform", -1.2)])
def test_kurtosis_of_known_distributions(draw, expected):
    random = torch.Generator().manual_seed(1)
    uniform = torch.rand(20_000, 16, generator=random, dtype=torch.float64)
    values = {
        "normal": torch.randn(20_000, 16, generator=random, dtype=torch.float64),
        "laplace": torch.where(uniform < 0.5, (2 * uniform).log(), -(2 - 2 * uniform).log()),
        "uniform": uniform,
    }[draw].float()
    found = seen(values).spread().kurtosis
    assert found == pytest.approx(expected, abs=0.1)
    assert found == pytest.approx(excess_kurtosis(values.flatten()), abs=1e-9)


def test_scaling_moves_sizes_and_not_shapes():
    values = heavy(300, 8)
    one, scaled = seen(values).spread(), seen(values * -4).spread()
    for name in ("absmax", "p999", "median"):
        assert getattr(scaled, name) == pytest.approx(4 * getattr(one, name), rel=1e-6)
    for name in ("max_median", "kurtosis", "channel_kurtosis"):
        assert getattr(scaled, name) == pytest.approx(getattr(one, name), rel=1e-5)


@pytest.mark.parametrize("sizes", [[600], [1, 599], [256, 256, 88], [7] * 85 + [5]])
def test_any_split_and_order_of_merging_give_the_same(sizes):
    values = heavy(600, 9)
    whole = seen(values)
    parts = [seen(part) for part in torch.split(values, sizes)]
    merged = Magnitudes(9)
    for part in reversed(parts):
        merged.merge(part)
    batches = Magnitudes(9)
    for part in torch.split(values, sizes):
        batches.update(part)
    for other in (merged, batches):
        assert all(torch.equal(a, b) for a, b in zip(exact(other), exact(whole), strict=True))
        torch.testing.assert_close(other.squares, whole.squares, rtol=1e-12, atol=0)
        assert other.spread().kurtosis == pytest.approx(whole.spread().kurtosis, rel=1e-9)


def test_channels_by_brute_force():
    values = heavy(200, 12)
    found = seen(values)
    expected = torch.zeros(12, dtype=torch.int64)
    for row in values.abs():
        for channel in sorted(range(12), key=lambda c: -float(row[c]))[:TOP]:
            expected[channel] += int(row[channel] > 0)
    assert torch.equal(found.top, expected)
    assert torch.equal(found.large, (values.abs() >= 6).sum(0))
    torch.testing.assert_close(found.rms.double(), values.double().square().mean(0).sqrt(), rtol=1e-6, atol=0)
    assert found.spread().channel_kurtosis == pytest.approx(excess_kurtosis(found.rms))


def test_share_beyond_a_size():
    values = heavy(400, 5)
    found = seen(values)
    assert found.share_beyond(float(values.abs().max())) == 0
    for size in (0.01, 1.0, 30.0):
        exact_share = float((values.abs() > size).double().mean())
        nearly = float((values.abs() > 1.032 * size).double().mean())
        assert nearly <= found.share_beyond(size) <= exact_share


def test_what_does_not_exist_is_none():
    constant = seen(torch.full((20, 4), 2.5)).spread()
    assert (constant.kurtosis, constant.channel_kurtosis) == (None, None)
    assert constant.max_median == pytest.approx(1.0, rel=0.032)
    relu = seen(torch.eye(8)).spread()
    assert (relu.median, relu.max_median) == (0.0, None)
    assert Magnitudes(3).spread().absmax == 0


def test_position_zero_stands_apart():
    values = torch.randn(6, 20, 4)
    values[:, 0, 2] = 500
    whole = SiteStatistics(4)
    whole.update(values)
    assert whole.first is not None
    assert whole.first.tokens == 6
    assert whole.rest.tokens == 6 * 19
    assert float(whole.first.absmax[2]) == 500
    assert float(whole.rest.absmax.max()) < 10
    assert whole.profile.tolist() == [float(values[:, a:b].abs().max()) for a, b in position_bins(20)]
    merged = SiteStatistics(4)
    for window in values.flip(0):
        part = SiteStatistics(4)
        part.update(window[None])
        merged.merge(part)
    assert torch.equal(merged.profile, whole.profile)
    assert torch.equal(merged.first.histogram, whole.first.histogram)
    assert torch.equal(merged.rest.histogram, whole.rest.histogram)


def test_tokens_without_a_position_are_all_the_rest():
    found = SiteStatistics(4)
    found.update(torch.randn(30, 4))
    assert found.first is None
    assert found.rest.tokens == 30
    assert len(found.profile) == 0


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 64, 300])
def test_position_bins_cover_every_position_once(tokens):
    bins = position_bins(tokens)
    assert [p for start, stop in bins for p in range(start, stop)] == list(range(tokens))
    assert len(bins) <= 4 + 2 * 8


def test_memory_does_not_grow_with_tokens():
    def kept(windows: int) -> int:
        found = SiteStatistics(16)
        for _ in range(windows):
            found.update(torch.randn(1, 32, 16))
        parts = [vars(found.first), vars(found.rest), vars(found)]
        return sum(value.numel() for part in parts for value in part.values() if isinstance(value, torch.Tensor))

    assert kept(1) == kept(20)


def test_values_that_are_not_finite_are_named():
    values = torch.zeros(2, 3, 4)
    values[1, 2, 3] = torch.nan
    with pytest.raises(CalibrationError, match=r"fc1 of block 3: 1 of 24 activations are NaN"):
        SiteStatistics(4, "fc1 of block 3").update(values)
    with pytest.raises(ValueError, match="needed"):
        SiteStatistics(4).update(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="merge"):
        SiteStatistics(4).merge(SiteStatistics(5))
