"""The bootstrap interval: coverage, pairing, seeds and small samples."""

from __future__ import annotations

import pytest
import torch

from bitwright.errors import EvaluationError
from bitwright.evaluate import paired_interval
from bitwright.evaluate.statistics import FEWEST_WINDOWS, student_quantile


@pytest.mark.parametrize("n", [8, 20])
def test_coverage_is_as_promised(n):
    generator = torch.Generator().manual_seed(n)
    samples = 0.3 + torch.randn(600, n, generator=generator, dtype=torch.float64)
    intervals = [paired_interval(row, resamples=600, seed=index) for index, row in enumerate(samples)]
    covered = sum(low <= 0.3 <= high for low, high in intervals) / len(intervals)
    assert 0.93 <= covered <= 0.97


def test_pairing_narrows_the_interval_of_correlated_losses():
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.randn(40, generator=generator, dtype=torch.float64)
    noise = 0.02 * torch.randn(2, 40, generator=generator, dtype=torch.float64)
    model, reference = difficulty + noise[0] + 0.05, difficulty + noise[1]
    low, high = paired_interval(model - reference)
    shuffled = reference[torch.randperm(40, generator=generator)]
    wide_low, wide_high = paired_interval(model - shuffled)
    assert low < 0.05 < high
    assert high - low < (wide_high - wide_low) / 10


def test_the_seed_decides_and_shift_and_scale_carry_over():
    values = torch.linspace(-1, 2, 12, dtype=torch.float64)
    low, high = paired_interval(values)
    assert paired_interval(values) == (low, high)
    assert paired_interval(values, seed=1) != (low, high)
    assert paired_interval(3 * values + 1) == pytest.approx((3 * low + 1, 3 * high + 1))
    assert low < float(values.mean()) < high


def test_equal_differences_leave_no_doubt():
    assert paired_interval(torch.full((9,), 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize("n", range(1, FEWEST_WINDOWS))
def test_too_few_windows_give_no_interval(n):
    assert paired_interval(torch.arange(float(n))) is None


@pytest.mark.parametrize("values", [torch.zeros(2, 8), torch.tensor([0.0, torch.nan] * 4)])
def test_unusable_differences_are_refused(values):
    with pytest.raises(EvaluationError, match="one finite number per window"):
        paired_interval(values)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (5, 2.5706), (7, 2.3646), (30, 2.0423), (165, 1.9744)],
)
def test_student_quantiles_match_the_tables(degrees, quantile):
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-4)
