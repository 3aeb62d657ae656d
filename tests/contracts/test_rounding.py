"""The contract of every rounding: on-grid weights return exactly, the result is deterministic and as stored."""

import pytest
import torch

from bitwright.numeric.measure import squared_error
from bitwright.numeric.outliers import NoOutliers, NSigma
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.ranges import Hqq, Minmax, Mse, MseAdam, Ranging
from bitwright.rounding import nearest
from bitwright.rounding.nearest import quantize_nearest, row_chunks


def matrix(out: int = 48, width: int = 80, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_on_the_grid_return_exactly(bits: int, symmetric: bool) -> None:
    spec = WeightSpec(bits=bits, group_size=16, symmetric=symmetric)
    generator = torch.Generator().manual_seed(bits)
    steps = torch.randint(0, spec.max_code + 1, (24, 32), generator=generator)
    steps[:, ::16], steps[:, 1::16] = 0, spec.max_code  # every group reaches both ends of its grid
    zero = spec.centre
    weight = 2.0**-6 * (steps - zero)
    for settings in (Minmax(), Mse()):
        result = quantize_nearest(weight, None, Ranging(spec, settings), NoOutliers())
        assert torch.equal(result.dequantize(), weight)


def test_outliers_return_exactly_at_float16_precision() -> None:
    weight = matrix()
    weight[5, 7], weight[40, 0] = 3.0, -2.0
    result = quantize_nearest(weight, None, Ranging(WeightSpec(bits=3, group_size=16), Mse()), NSigma(n=4))
    assert result.outliers is not None
    error = (result.dequantize() - weight).abs()
    assert error[5, 7] < 2e-3
    assert error[40, 0] < 2e-3
    assert result.validate("w") is result


def test_everything_kept_apart_is_lossless_to_float16() -> None:
    weight = matrix()
    result = quantize_nearest(weight, None, Ranging(WeightSpec(bits=2), Minmax()), NSigma(n=1e-9, max_share=1.0))
    assert result.outliers is not None
    assert result.outliers.count == weight.numel()
    assert torch.allclose(result.dequantize(), weight, atol=2e-4)


def test_the_result_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec, policy = matrix(), WeightSpec(bits=4, group_size=32), NSigma(n=2.5)
    whole = quantize_nearest(weight, None, Ranging(spec, Mse()), policy)
    monkeypatch.setattr(nearest, "CHUNK_WEIGHTS", 160)
    assert len(row_chunks((48, 80))) == 24
    parts = quantize_nearest(weight, None, Ranging(spec, Mse()), policy)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.dequantize(), parts.dequantize())


@pytest.mark.parametrize("axis", ["row", "column"])
def test_chunks_do_not_cut_superblocks(axis, monkeypatch: pytest.MonkeyPatch) -> None:
    bilevel = Bilevel(axis=axis, size=16, scale_bits=4, zero_bits=4)
    weight, spec = matrix(), WeightSpec(bits=4, group_size=16, zero="float", bilevel=bilevel)
    whole = quantize_nearest(weight, None, Ranging(spec, Mse()), NoOutliers())
    monkeypatch.setattr(nearest, "CHUNK_WEIGHTS", 160)
    parts = quantize_nearest(weight, None, Ranging(spec, Mse()), NoOutliers())
    assert torch.equal(whole.dequantize(), parts.dequantize())
    assert parts.validate("w") is parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type(dtype: torch.dtype) -> None:
    weight = matrix().to(dtype)
    spec = WeightSpec(bits=8, group_size=16)
    result = quantize_nearest(weight, None, Ranging(spec, Minmax()), NoOutliers())
    assert torch.allclose(result.dequantize(), weight.float(), atol=2e-3)


def test_importance_moves_error_away_from_what_matters() -> None:
    weight = matrix(64, 64)
    importance = torch.ones(1, 64)
    importance[0, :8] = 100.0
    spec = WeightSpec(bits=3, group_size=64)
    plain = quantize_nearest(weight, None, Ranging(spec, Mse()), NoOutliers()).dequantize() - weight
    weighed = quantize_nearest(weight, importance, Ranging(spec, Mse()), NoOutliers()).dequantize() - weight
    assert weighed[:, :8].square().sum() < plain[:, :8].square().sum()


def test_rows_slice_like_the_tensor() -> None:
    result = quantize_nearest(matrix(), None, Ranging(WeightSpec(bits=4, group_size=16), Mse()), NSigma(n=2))
    rows = slice(10, 23)
    assert torch.equal(result.rows(rows).dequantize(), result.dequantize()[rows])


@pytest.mark.parametrize("group", [64, None, 7])
@pytest.mark.parametrize("settings", [Minmax(), Mse(), Hqq(), MseAdam(steps=3)], ids=lambda s: s.name)
def test_threads_do_not_change_a_bit(settings, group: int | None) -> None:
    """Operations above PyTorch's grain size of 32768 elements are split between threads; rows are not."""
    weight = torch.cat([matrix(150, 1111), 0.1 * matrix(150, 1111, seed=1) ** 3])
    spec, before = WeightSpec(bits=4, group_size=group), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for scope in ("tensor", "channel"):
                result = quantize_nearest(weight, None, Ranging(spec, settings), NSigma(n=3, scope=scope))
                error = squared_error(weight, result.dequantize())
                results.append((result.codes, result.grid.scale, result.grid.zero, result.dequantize(), error))
    finally:
        torch.set_num_threads(before)
    for first, other in zip(results[:2] * 2, results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[:4], other[:4], strict=True))
        assert first[4] == other[4]
