"""Targets for other inputs, against least squares on the inputs themselves."""

import torch

from bitwright.rounding.correction import corrected


def test_the_whole_correction_is_least_squares_on_the_new_inputs() -> None:
    torch.manual_seed(0)
    weight, float_inputs = torch.randn(6, 10), torch.randn(400, 10)
    inputs = float_inputs + 0.3 * torch.randn(400, 10) @ torch.randn(10, 10)
    hessian, cross = inputs.T @ inputs / 400, float_inputs.T @ inputs / 400
    wanted = torch.linalg.lstsq(inputs.double(), (float_inputs @ weight.T).double()).solution.T
    torch.testing.assert_close(corrected(weight, hessian, cross, 1.0, 0.0).double(), wanted, rtol=1e-4, atol=1e-4)
    half = corrected(weight, hessian, cross, 0.5, 0.0)
    torch.testing.assert_close(half.double(), (weight.double() + wanted) / 2, rtol=1e-4, atol=1e-4)
    # and it is closer to what the float model gives
    errors = [(inputs @ w.T - float_inputs @ weight.T).square().mean() for w in (weight, half, wanted.float())]
    assert errors[0] > errors[1] > errors[2]


def test_equal_inputs_and_useless_hessians_change_nothing() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(3, 5), torch.randn(50, 5)
    hessian = inputs.T @ inputs
    assert torch.equal(corrected(weight, hessian, hessian, 1.0, 0.01), weight)
    assert torch.equal(corrected(weight, torch.zeros(5, 5), torch.eye(5), 1.0, 0.01), weight)
