"""e4m3 against a table of its codes in float64, and the scales of KV caches."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bitwright.numeric.fp8 import E4M3_MAX, KvScales, fake_quantize_fp8, fp8_scale, round_e4m3


def decoded(code: int) -> float:
    """The value of a code without its sign, 0 to 126, from its bits."""
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


MAGNITUDES = torch.tensor([decoded(code) for code in range(127)], dtype=torch.float64)


def slow_e4m3(x: Tensor) -> Tensor:
    """The nearest of all values, in float64; of two the one whose code is even."""
    found = []
    for value in x.double().flatten().tolist():
        distance = (MAGNITUDES - min(abs(value), E4M3_MAX)).abs()
        nearest = (distance == distance.min()).nonzero().flatten().tolist()
        code = nearest[0] if len(nearest) == 1 else next(code for code in nearest if code % 2 == 0)
        found.append(math.copysign(float(MAGNITUDES[code]), value))
    return torch.tensor(found, dtype=torch.float64).reshape(x.shape)


def test_the_table_is_that_of_the_type() -> None:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert torch.equal(values, MAGNITUDES)
    assert MAGNITUDES.max() == E4M3_MAX


def test_rounding_against_the_table() -> None:
    between = ((MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2).float()
    near = [between, between.nextafter(torch.tensor(0.0)), between.nextafter(torch.tensor(1e9)), MAGNITUDES.float()]
    wide = torch.randn(4000) * torch.logspace(-5, 3, 4000)
    x = torch.cat([*near, wide, torch.tensor([0.0, 1e-30, 448.1, 464.0, 465.0, 1e9, 3e38])])
    for sign in (1, -1):
        assert torch.equal(round_e4m3(sign * x).double(), slow_e4m3(sign * x))


def test_what_is_no_number() -> None:
    found = round_e4m3(torch.tensor([math.inf, -math.inf, math.nan]))
    assert found[:2].tolist() == [448, -448]
    assert bool(found[2].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_over_a_scale(dtype: torch.dtype) -> None:
    x, scale = (torch.randn(7, 33) * 3).to(dtype), fp8_scale(6.1)
    found = fake_quantize_fp8(x, scale)
    assert found.dtype == dtype
    expected = slow_e4m3(x.float() / torch.tensor(scale)) * scale
    torch.testing.assert_close(found.double(), expected.float().to(dtype).double(), rtol=0, atol=0)
    # What has been rounded stays as it is, which a cache that holds codes relies on.
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(fake_quantize_fp8(found, scale), found)


def test_the_greatest_magnitude_is_kept() -> None:
    for absmax in (1e-3, 0.7, 3.0, 28.49145, 1e30):
        x = torch.tensor([absmax, -absmax, absmax / 2, 3 * absmax])
        found = fake_quantize_fp8(x, fp8_scale(absmax))
        torch.testing.assert_close(found, torch.tensor([absmax, -absmax, absmax / 2, absmax]), rtol=2e-7, atol=0)


def test_gradients_pass_where_nothing_is_saturated() -> None:
    x = torch.tensor([0.3, -100.0, 449.0, -1e4], requires_grad=True)
    (2 * round_e4m3(x)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 0, 0]


def test_scales() -> None:
    assert fp8_scale(448.0) == 1.0
    assert fp8_scale(7.0) == 2.0**-6
    assert fp8_scale(0.0) == torch.finfo(torch.float32).tiny
    assert KvScales.of(448.0, 3.0) == KvScales(k=1.0, v=torch.tensor(3.0).div(448).item())
    for absmax in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="greatest magnitude"):
            fp8_scale(absmax)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0.0, "greater than 0"),
        (-1.0, "greater than 0"),
        (math.nan, "finite number"),
        (math.inf, "finite number"),
        (0.1, "not a float32"),
        (1e-60, "not a float32"),
        (1e60, "not a float32"),
        ("one", "valid number"),
    ],
)
def test_scales_that_are_none(k: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        KvScales.model_validate({"k": k, "v": 1.0})
