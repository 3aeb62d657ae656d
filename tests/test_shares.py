"""Outliers spent over the whole model, against sorting all gains."""

import pytest
import torch

from bitwright.shares import Gains, spend


def binned(gains: torch.Tensor, bins: int = 5120) -> Gains:
    counts = torch.bincount(((gains.log2() + 160) * 16).long(), minlength=bins)
    return Gains(counts, gains.numel())


@pytest.mark.parametrize("kept", [1, 37.5, 400])
def test_the_largest_gains_of_all_tensors_are_kept(kept: float) -> None:
    torch.manual_seed(0)
    gains = {"a": torch.rand(1000) ** 4, "b": 5 * torch.rand(500) ** 4, "c": torch.full((300,), 1e-6)}
    shares = spend({name: binned(values) for name, values in gains.items()}, kept)
    assert sum(shares[name] * values.numel() for name, values in gains.items()) == pytest.approx(kept)
    limit = torch.cat(list(gains.values())).sort(descending=True).values[int(kept)]
    for name, values in gains.items():
        sure = int((values > limit * 2 ** (1 / 8)).sum()), int((values > limit / 2 ** (1 / 8)).sum())
        assert sure[0] <= shares[name] * values.numel() <= sure[1] + 1e-6


def test_more_than_gain_anything_keeps_all_that_gain() -> None:
    gains = {"a": binned(torch.rand(10) + 0.1), "b": Gains(torch.zeros(5120, dtype=torch.int64), 10)}
    assert spend(gains, 15) == {"a": 1.0, "b": 0.0}
