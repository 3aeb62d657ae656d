"""Activation quantizers against a slow oracle in float64, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bitwright.numeric.activation import (
    ActivationSpec,
    InputSite,
    KvSpec,
    dynamic_range,
    fake_quantize,
    static_range,
)
from bitwright.numeric.hadamard import hadamard_blocks

BITS = range(2, 9)


def oracle_grid(low: float, high: float, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero of a range, by the definition."""
    low, high = min(low, 0.0), max(high, 0.0)
    top = 2**bits - 1
    if symmetric:
        return max(-low, high) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
    scale = (high - low) / top
    return scale, min(max(round(-low / scale), 0), top) if scale else 0


def oracle(x: Tensor, spec: ActivationSpec | KvSpec) -> Tensor:
    """Every value of every token on its own, in Python floats."""
    clip = spec.clip if isinstance(spec, ActivationSpec) else 1.0
    tokens = []
    for token in x.double().reshape(-1, x.shape[-1]).tolist():
        scale, zero = oracle_grid(clip * min(token), clip * max(token), spec.bits, spec.symmetric)
        least, top = (1 if spec.symmetric else 0), 2**spec.bits - 1
        codes = [min(max(round(value / scale + zero), least), top) if scale else zero for value in token]
        tokens.append([scale * (code - zero) for code in codes])
    return torch.tensor(tokens, dtype=torch.float64).reshape(x.shape)


def tokens(seed: int = 0) -> Tensor:
    """Rows of either sign and both, small and large, with outliers: [7, 33]."""
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(seed))
    x[1], x[2] = x[1].abs() + 3, -x[2].abs() - 0.1
    x[3], x[4] = x[3] * 1e-5, x[4] * 1e4
    x[5, 4] = 80.0
    return x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", [1.0, 0.85])
def test_against_the_oracle(bits: int, symmetric: bool, clip: float) -> None:
    spec = ActivationSpec(bits=bits, symmetric=symmetric, clip=clip)
    x = tokens(bits)
    # One float32 rounding away from the oracle, or at a tie one step; the seeds have no tie.
    torch.testing.assert_close(fake_quantize(x, spec).double(), oracle(x, spec), rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_and_codes_are_integers_of_the_bits(bits: int, symmetric: bool) -> None:
    spec = ActivationSpec(bits=bits, symmetric=symmetric)
    x = tokens()
    scale, zero = dynamic_range(x, spec)
    assert torch.equal(zero, zero.round())
    assert bool(((zero >= 0) & (zero < 2**bits)).all())
    codes = fake_quantize(x, spec) / scale + zero
    assert bool(((codes > -0.01) & (codes < 2**bits - 0.99)).all())
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, -0.0, 3.7, -2.1, 1e-44, 3e38])
def test_tokens_of_one_value_survive(symmetric: bool, value: float) -> None:
    x = torch.full((2, 5), value)
    result = fake_quantize(x, ActivationSpec(bits=4, symmetric=symmetric))
    torch.testing.assert_close(result, x, rtol=1e-6, atol=1e-37)


def test_the_whole_range_of_float32() -> None:
    x = torch.tensor([[-3e38, 0.0, 3e38]])
    assert bool(torch.isfinite(fake_quantize(x, ActivationSpec(bits=8))).all())


def test_zero_stays_zero_and_extremes_stay_extreme() -> None:
    x = tokens().abs()
    x[:, 0] = 0
    result = fake_quantize(x, ActivationSpec(bits=3))
    assert bool((result[:, 0] == 0).all())
    torch.testing.assert_close(result.amax(1), x.amax(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_go_through_float32(dtype: torch.dtype) -> None:
    spec = ActivationSpec(bits=5)
    x = (tokens() / 4).to(dtype)
    assert torch.equal(fake_quantize(x, spec), fake_quantize(x.float(), spec).to(dtype))


def test_invariant_11_the_order_of_tokens_permutes_through() -> None:
    x, order = tokens(), torch.tensor([4, 0, 6, 2, 1, 5, 3])
    for spec in (ActivationSpec(bits=4), ActivationSpec(bits=4, symmetric=True, clip=0.9), KvSpec(bits=3)):
        assert torch.equal(fake_quantize(x[order], spec), fake_quantize(x, spec)[order])


def test_invariant_11_padding_changes_nothing() -> None:
    """A range belongs to one token, whatever stands beside it."""
    x = tokens()
    padded = torch.cat([torch.full((3, 33), 1e6), x])
    assert torch.equal(fake_quantize(padded, ActivationSpec(bits=4))[3:], fake_quantize(x, ActivationSpec(bits=4)))


def test_quantizing_again_changes_next_to_nothing() -> None:
    once = fake_quantize(tokens(), ActivationSpec(bits=4))
    torch.testing.assert_close(fake_quantize(once, ActivationSpec(bits=4)), once, rtol=1e-5, atol=1e-9)


def test_rounding_passes_gradients_and_clamping_does_not() -> None:
    x = torch.tensor([[0.2, -0.4, 5.0, -7.0, 1.49]], requires_grad=True)
    fake_quantize(x, ActivationSpec(bits=3, granularity="tensor"), scale=0.5, zero=4).sum().backward()
    # Codes 0..7 with zero 4 reach from -2 to 1.5.
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0, 1.0]]


def test_gradients_of_dynamic_ranges_are_those_of_the_scale() -> None:
    """Against autograd on a formula in which rounding is a constant difference and the zero a constant."""
    spec = ActivationSpec(bits=4)
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float32, requires_grad=True)
    weights = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    (fake_quantize(x, spec) * weights).sum().backward()
    y = x.detach().double().requires_grad_()
    low, high = y.amin(1, keepdim=True).clamp_max(0), y.amax(1, keepdim=True).clamp_min(0)
    scale = (high - low) / 15
    zero = torch.round(-low / scale).detach()
    steps = y / scale + zero
    codes = torch.clamp(steps + (steps.round() - steps).detach(), 0, 15)
    ((codes - zero) * scale * weights).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("low", "high"), [(-1.5, 4.0), (0.5, 3.0), (-6.0, -1.0), (0.0, 0.0), (-0.1, 0.12)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_static_ranges(bits: int, low: float, high: float, symmetric: bool) -> None:
    spec = ActivationSpec(bits=bits, granularity="tensor", symmetric=symmetric)
    scale, zero = static_range(low, high, spec)
    expected, centre = oracle_grid(low, high, bits, symmetric)
    assert scale == pytest.approx(expected, rel=1e-6, abs=2e-38)
    assert zero == centre
    assert scale == torch.tensor(scale).item()
    # The same range as a dynamic one that sees just its ends.
    x = torch.tensor([low, high])
    dynamic = fake_quantize(x, ActivationSpec(bits=bits, symmetric=symmetric))
    assert torch.equal(fake_quantize(x, spec, scale, zero), dynamic)


def test_static_ranges_that_are_none() -> None:
    spec = ActivationSpec(bits=8, granularity="tensor")
    for low, high in ((1.0, 0.0), (-math.inf, 0.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="finite bounds in order"):
            static_range(low, high, spec)
    with pytest.raises(ValueError, match="needs 'tensor'"):
        static_range(0.0, 1.0, ActivationSpec(bits=8))
    with pytest.raises(ValueError, match="static range"):
        fake_quantize(torch.ones(1, 2), spec)
    with pytest.raises(ValueError, match="go together"):
        fake_quantize(torch.ones(1, 2), spec, scale=1.0)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ActivationSpec, {"bits": 9}, "less than or equal to 8"),
        (ActivationSpec, {"bits": 8, "clip": 0.0}, "greater than 0"),
        (ActivationSpec, {"bits": 8, "clip": 0.9, "granularity": "tensor"}, "activations.granularity=token"),
        (ActivationSpec, {"bits": 8, "rope": "after"}, "Extra inputs"),
        (KvSpec, {"bits": 1}, "greater than or equal to 2"),
        (KvSpec, {"bits": 4, "past_only": True, "rope": "before"}, "activations.kv.rope=after"),
        (InputSite, {}, "nothing happens"),
        (InputSite, {"transform": "fourier"}, "hadamard"),
        (InputSite, {"transform": "hadamard", "scale": 1.0, "zero": 0}, "exactly where"),
        (InputSite, {"activation": {"bits": 8}, "scale": 1.0, "zero": 0}, "exactly where"),
        (InputSite, {"activation": {"bits": 8, "granularity": "tensor"}}, "exactly where"),
        (InputSite, {"activation": {"bits": 8, "granularity": "tensor"}, "scale": 1.0}, "exactly where"),
        (InputSite, {"activation": {"bits": 8, "granularity": "tensor"}, "scale": 0.1, "zero": 0}, "not a float32"),
        (InputSite, {"activation": {"bits": 4, "granularity": "tensor"}, "scale": 1.0, "zero": 16}, r"outside 0\.\.15"),
        (
            InputSite,
            {"activation": {"bits": 4, "granularity": "tensor", "symmetric": True}, "scale": 1.0, "zero": 7},
            r"outside 8\.\.8",
        ),
    ],
)
def test_settings_that_mean_nothing(kind: type, settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(settings)


def test_sites_transform_first() -> None:
    spec = ActivationSpec(bits=4)
    x = torch.randn(3, 48)
    assert torch.equal(InputSite(transform="hadamard").apply(x), hadamard_blocks(x))
    both = InputSite(transform="hadamard", activation=spec)
    assert torch.equal(both.apply(x), fake_quantize(hadamard_blocks(x), spec))
    assert both.label() == "hadamard-a4-token-asym"
    static = ActivationSpec(bits=8, granularity="tensor")
    site = InputSite.static(static, -2.0, 5.0)
    assert torch.equal(site.apply(x), fake_quantize(x, static, *static_range(-2.0, 5.0, static)))
