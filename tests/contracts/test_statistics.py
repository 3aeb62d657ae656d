"""What every statistic must do: one result for any batch split and any merge, equal to a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.calibration import statistics as module
from bitwright.calibration.statistics import ChannelMoments, Hessian
from bitwright.errors import CalibrationError

SPLITS = st.lists(st.integers(0, 40), min_size=1, max_size=5)


def inputs_of(splits, features, seed, outlier=1.0):
    """Inputs, reference inputs and weights of all tokens; one channel `outlier` times larger than the others."""
    random = torch.Generator().manual_seed(seed)
    count = sum(splits)
    inputs, reference = torch.randn(2, count, features, generator=random)
    inputs[:, 0] *= outlier
    return inputs, reference, torch.rand(count, generator=random)


def oracle(left, right, weights=None):
    weights = torch.ones(len(left)) if weights is None else weights
    weights = weights.double()
    return left.double().T @ (weights[:, None] * right.double()) / weights.sum()


def assert_same(found, expected, left, right):
    """Equal to 1e-6 of the size that an entry can have, which massive channels do not hide."""
    size = left.double().square().mean(0).sqrt()[:, None] * right.double().square().mean(0).sqrt()
    assert ((found - expected).abs() <= 1e-6 * size + 1e-30).all()


def feed(splits, inputs, reference, weights):
    """One Hessian for each batch."""
    parts = []
    start = 0
    for size in splits:
        rows = slice(start, start + size)
        part = Hessian(inputs.shape[1], cross=True)
        part.update(inputs[rows], weights=weights[rows], reference=reference[rows])
        parts.append(part)
        start += size
    return parts


def merged(parts):
    total = Hessian(parts[0].features, cross=True)
    for part in parts:
        total.merge(part)
    return total


@settings(max_examples=40, deadline=None)
@given(SPLITS.filter(any), st.integers(1, 30), st.integers(0, 99), st.sampled_from([1.0, 1e4]))
def test_hessian_is_that_of_the_oracle_for_any_split_order_and_grouping(splits, features, seed, outlier):
    inputs, reference, weights = inputs_of(splits, features, seed, outlier)
    in_turn = Hessian(features, cross=True)
    start = 0
    for size in splits:
        rows = slice(start, start + size)
        in_turn.update(inputs[rows], weights=weights[rows], reference=reference[rows])
        start += size
    left, right = merged(feed(splits, inputs, reference, weights)), Hessian(features, cross=True)
    for part in reversed(feed(splits, inputs, reference, weights)):
        part.merge(right)
        right = part
    mean, cross = oracle(inputs, inputs, weights), oracle(reference, inputs, weights)
    for found in (in_turn, left, right):
        assert found.tokens == sum(splits)
        assert found.total_weight == pytest.approx(float(weights.double().sum()))
        # weights may be small, so entries are measured against unweighted sizes times the weights' range
        scale = float(weights.max() / weights.double().mean())
        assert_same(found.mean, mean, scale * inputs, inputs)
        assert_same(found.cross_mean, cross, scale * reference, inputs)


@settings(max_examples=20, deadline=None)
@given(SPLITS.filter(any), st.integers(1, 30), st.integers(0, 99))
def test_moments_are_those_of_the_oracle_for_any_split(splits, features, seed):
    inputs, *_ = inputs_of(splits, features, seed)
    parts = []
    for batch in inputs.split(splits):
        part = ChannelMoments(features)
        if len(batch):
            part.update(batch)
        parts.append(part)
    total = ChannelMoments(features)
    for part in reversed(parts):
        total.merge(part)
    exact = inputs.double()
    assert total.tokens == len(inputs)
    assert torch.equal(total.low, inputs.amin(0))
    assert torch.equal(total.high, inputs.amax(0))
    assert torch.equal(total.absmax, inputs.abs().amax(0))
    for found, expected in (
        (total.mean, exact.mean(0)),
        (total.mean_abs, exact.abs().mean(0)),
        (total.second_moment, exact.square().mean(0)),
    ):
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("features", [5, 255, 256, 257, 600])
def test_panels_cover_the_matrix_and_the_mean_is_symmetric(features):
    inputs = torch.randn(300, features)
    hessian = Hessian(features)
    hessian.update(inputs)
    found = hessian.mean
    assert torch.equal(found, found.T)
    assert_same(found, oracle(inputs, inputs), inputs, inputs)
    assert torch.linalg.eigvalsh(found.double()).min() > -1e-6
    moments = ChannelMoments(features)
    moments.update(inputs)
    torch.testing.assert_close(found.diagonal(), moments.second_moment, rtol=1e-6, atol=0)


@pytest.mark.parametrize("features", [7, 100, 300, 576])
def test_the_number_of_threads_does_not_change_a_bit(features):
    inputs = torch.randn(1100, features)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        hessian = Hessian(features, cross=True)
        hessian.update(inputs, reference=inputs.flip(0))
        found.append((hessian.mean, hessian.cross_mean))
    torch.set_num_threads(before)
    for mean, cross in found[1:]:
        assert torch.equal(mean, found[0][0])
        assert torch.equal(cross, found[0][1])


def test_long_batches_are_as_right_as_short_ones():
    inputs = 3 + torch.randn(3 * module.ROWS + 5, 4)  # a mean, so that float32 sums grow
    at_once, in_parts = Hessian(4), Hessian(4)
    at_once.update(inputs)
    for part in inputs.split(100):
        in_parts.update(part)
    torch.testing.assert_close(at_once.mean, oracle(inputs, inputs).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(at_once.mean, in_parts.mean, rtol=1e-6, atol=0)


def test_cross_mean_has_the_reference_first():
    inputs, reference = torch.zeros(2, 3), torch.zeros(2, 3)
    inputs[:, 2], reference[:, 0] = 1, 5
    hessian = Hessian(3, cross=True)
    hessian.update(inputs, reference=reference)
    assert hessian.cross_mean.nonzero().tolist() == [[0, 2]]
    assert hessian.cross_mean[0, 2] == 5


def test_weights_are_repetitions_and_none_means_one():
    inputs = torch.randn(4, 6)
    weighted, repeated, plain = Hessian(6), Hessian(6), Hessian(6)
    weighted.update(inputs, weights=torch.tensor([0, 1, 2, 3]))
    repeated.update(inputs[[1, 2, 2, 3, 3, 3]])
    torch.testing.assert_close(weighted.mean, repeated.mean)
    assert (weighted.tokens, weighted.total_weight) == (4, 6)
    plain.update(inputs)
    assert plain.total_weight == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_summed_as_float32(dtype):
    inputs = torch.randn(20, 6).to(dtype)
    hessian, exact = Hessian(6), Hessian(6)
    hessian.update(inputs)
    exact.update(inputs.float())
    assert torch.equal(hessian.mean, exact.mean)
    assert hessian.mean.dtype == torch.float32


def test_products_ignore_the_precision_that_the_process_chose():
    inputs = torch.randn(64, 300)
    exact = Hessian(300)
    exact.update(inputs)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        hessian = Hessian(300)
        hessian.update(inputs)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(hessian.mean, exact.mean)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e18])
@pytest.mark.parametrize("make", [Hessian, ChannelMoments])
def test_values_that_cannot_be_squared_are_named(make, bad):
    statistic = make(4, name="model.layers.3.mlp.down_proj")
    inputs = torch.zeros(5, 4)
    inputs[2, 1] = bad
    message = r"model\.layers\.3\.mlp\.down_proj: 1 of 20 inputs .*, the first at token 2, channel 1: "
    with pytest.raises(CalibrationError, match=message):
        statistic.update(inputs)
    assert statistic.tokens == 0


def test_values_that_can_only_just_be_squared_are_taken():
    hessian = Hessian(4)
    hessian.update(torch.full((module.ROWS, 4), module.LARGEST))
    assert hessian.mean.isfinite().all()


def test_bad_reference_and_weights_are_named():
    hessian = Hessian(3, cross=True, name="fc1")
    fine = torch.zeros(2, 3)
    with pytest.raises(CalibrationError, match=r"fc1 \(reference\): 6 of 6 inputs"):
        hessian.update(fine, reference=fine + torch.nan)
    for weights in ([1.0, -1.0], [1.0, torch.inf], [torch.nan, 1.0]):
        with pytest.raises(CalibrationError, match="fc1: token weights"):
            hessian.update(fine, reference=fine, weights=torch.tensor(weights))
    assert hessian.tokens == 0


def test_statistics_of_nothing_are_refused():
    for statistic in (Hessian(3, name="fc1"), ChannelMoments(3, name="fc1")):
        statistic.update(torch.zeros(0, 3))
        with pytest.raises(CalibrationError, match=r"fc1: .*needed some; calibrate on more tokens"):
            _ = statistic.mean
    weightless = Hessian(3)
    weightless.update(torch.ones(2, 3), weights=torch.zeros(2))
    with pytest.raises(CalibrationError, match="2 tokens of weight 0"):
        _ = weightless.mean


def test_misuse_is_refused():
    plain, cross = Hessian(3), Hessian(3, cross=True)
    x = torch.zeros(2, 3)
    for call, message in (
        (lambda: plain.update(x, reference=x), "exactly when"),
        (lambda: cross.update(x), "exactly when"),
        (lambda: cross.update(x, reference=x[:1]), "1 reference tokens for 2 tokens"),
        (lambda: plain.update(torch.zeros(2, 4)), r"\[2, 4\], needed floats \[tokens, 3\]"),
        (lambda: plain.update(torch.zeros(1, 2, 3)), r"\[1, 2, 3\]"),
        (lambda: plain.update(x.long()), "int64"),
        (lambda: plain.update(x, weights=torch.ones(3)), r"weights \[3\], needed \[2\]"),
        (lambda: plain.merge(Hessian(4)), "3 and 4 features"),
        (lambda: plain.merge(cross), "cross False and True"),
        (lambda: plain.cross_mean, "cross=True"),
        (lambda: ChannelMoments(3).merge(ChannelMoments(4)), "3 and 4 features"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
