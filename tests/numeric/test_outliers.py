"""Outliers: storage as residuals, slicing, and the n-sigma policy against obvious float64 code."""

import pytest
import torch

from bitwright.errors import WeightError
from bitwright.numeric.outliers import NoOutliers, NSigma, Outliers, outlier_threshold
from bitwright.rounding.nearest import row_chunks


def heavy(out: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    return weight + 8 * (torch.rand(out, width, generator=generator) < 0.01) * torch.sign(weight)


def select(weight: torch.Tensor, policy: NSigma, chunks: list[slice]) -> torch.Tensor:
    threshold = outlier_threshold(weight, policy, chunks)
    assert threshold is not None
    return torch.cat([threshold.select(rows, weight[rows].float()) for rows in chunks])


def test_gather_and_add_restore_the_target_at_float16_precision() -> None:
    target, base = heavy(6, 9), torch.zeros(6, 9)
    mask = target.abs() > 1.5
    outliers = Outliers.gather(mask, target - base)
    restored = outliers.add_to(base)
    assert torch.equal(restored[mask], target[mask].half().float())
    assert not restored[~mask].any()


def test_row_slices_concatenate_to_the_whole() -> None:
    target = heavy(7, 5)
    whole = Outliers.gather(target.abs() > 1, target)
    parts = [whole.row_slice(slice(0, 2)), whole.row_slice(slice(2, 3)), whole.row_slice(slice(3, 7))]
    joined = Outliers.concatenate(parts)
    assert torch.equal(joined.row_pointer, whole.row_pointer)
    assert torch.equal(joined.column, whole.column)
    assert torch.equal(joined.residual, whole.residual)


def test_small_residuals_are_multiples_of_their_rows_step() -> None:
    target = heavy(40, 90) * torch.logspace(-9, 3, 40).unsqueeze(1)
    mask = target.abs() > target.abs().median(dim=1, keepdim=True).values
    mask[3] = False
    outliers = Outliers.gather(mask, target, value_bits=8)
    assert outliers.value_bits == 8
    assert outliers.validate("w", (40, 90)) is outliers
    assert outliers.step is not None
    assert torch.equal(outliers.step, outliers.step.half().float())
    assert outliers.step[3] == 0
    error = (outliers.add_to(torch.zeros(40, 90)) - target)[mask]
    row = mask.nonzero()[:, 0]
    assert bool((error.abs() <= 0.5001 * outliers.step[row]).all())
    # Rounded up: the step is the smallest of float16 that clips nothing.
    largest = torch.where(mask, target.abs(), 0.0).amax(dim=1)
    assert bool((outliers.step * 127 >= largest * (1 - 1e-6)).all())
    normal = outliers.step > 1e-4
    assert bool((outliers.step[normal] * 127 <= largest[normal] * 1.001).all())
    parts = [outliers.row_slice(slice(0, 7)), outliers.row_slice(slice(7, 40))]
    joined = Outliers.concatenate(parts)
    assert joined.step is not None
    assert torch.equal(joined.step, outliers.step)
    assert torch.equal(joined.residual, outliers.residual)


def test_chunks_of_rows_have_the_steps_of_the_whole() -> None:
    target = heavy(9, 30)
    mask = target.abs() > 1
    whole = Outliers.gather(mask, target, 8)
    parts = Outliers.concatenate([Outliers.gather(mask[rows], target[rows], 8) for rows in (slice(0, 4), slice(4, 9))])
    assert torch.equal(whole.residual, parts.residual)
    with pytest.raises(ValueError, match="16 and of 8 bits"):
        Outliers.concatenate([whole, Outliers.gather(mask, target)])


def test_residuals_that_are_all_zero_have_no_step() -> None:
    outliers = Outliers.gather(torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3), 8)
    assert not outliers.residual.any()
    assert outliers.validate("w", (2, 3)) is outliers


@pytest.mark.parametrize("scope", ["tensor", "channel"])
def test_nsigma_selects_what_the_definition_says(scope: str) -> None:
    weight = heavy(40, 30).to(torch.bfloat16)
    mask = select(weight, NSigma(n=3, scope=scope, max_share=1.0), [slice(0, 13), slice(13, 40)])  # type: ignore[arg-type]
    exact = weight.double()
    axis = {"tensor": (0, 1), "channel": (1,)}[scope]
    mean = exact.mean(dim=axis, keepdim=True)
    sigma = exact.std(dim=axis, keepdim=True, correction=0)
    assert torch.equal(mask, (exact - mean).abs() > 3 * sigma)
    assert mask.any()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.005])
@pytest.mark.parametrize("scope", ["tensor", "channel"])
def test_the_cap_keeps_the_farthest(share: float, scope: str) -> None:
    weight = heavy(50, 40, seed=3)
    policy = NSigma(n=2, scope=scope, max_share=share)  # type: ignore[arg-type]
    if share == 0:
        assert outlier_threshold(weight, policy, [slice(0, 50)]) is None
        return
    mask = select(weight, policy, [slice(0, 50)])
    assert 0 < int(mask.sum()) <= int(share * weight.numel())
    if scope == "tensor":
        distance = (weight - weight.mean()).abs()
        assert distance[mask].min() > distance[~mask].max()


def test_chunks_do_not_change_the_selection() -> None:
    weight, policy = heavy(64, 33), NSigma(n=2.5, max_share=0.004)
    one, many = [slice(0, 64)], [slice(i, i + 1) for i in range(64)]
    assert torch.equal(select(weight, policy, one), select(weight, policy, many))


def test_no_outliers_policy_and_constant_weights_select_nothing() -> None:
    assert outlier_threshold(heavy(3, 3), NoOutliers(), row_chunks((3, 3))) is None
    assert not select(torch.full((4, 4), 2.0), NSigma(n=3), [slice(0, 4)]).any()


def test_residuals_beyond_float16_are_refused() -> None:
    with pytest.raises(WeightError, match="float16"):
        Outliers.gather(torch.tensor([[True]]), torch.tensor([[1e6]]))
    assert Outliers.gather(torch.tensor([[True]]), torch.tensor([[1e6]]), 8).residual.item() == pytest.approx(1e6, 1e-3)
    with pytest.raises(WeightError, match="a step of outlier residuals"):
        Outliers.gather(torch.tensor([[True]]), torch.tensor([[1e8]]), 8)
