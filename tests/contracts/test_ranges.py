"""The contract of every range: never worse than min-max on its own objective; odd groups survive."""

import itertools

import pytest
import torch
from torch import Tensor

from bitwright.numeric.grid import decode, encode
from bitwright.numeric.spec import WeightSpec
from bitwright.ranges import RANGES, Hqq, Minmax, Mse, MseAdam, fit_grid, minmax
from bitwright.ranges.hqq import objective

ALL = [Minmax(), Mse(), MseAdam(learning_rate=1e-3, steps=50), Hqq()]
SPECS = [
    WeightSpec(bits=bits, group_size=16, symmetric=symmetric, zero=zero)  # type: ignore[arg-type]
    for bits, (symmetric, zero) in itertools.product((2, 3, 4, 8), ((False, "int"), (True, "int"), (False, "float")))
]


def groups(n: int = 200, width: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator) * torch.rand(n, 1, generator=generator) + 0.05


def errors(weights: Tensor, scale: Tensor, zero: Tensor, spec: WeightSpec) -> Tensor:
    scale, zero = scale.unsqueeze(1), zero.unsqueeze(1)
    return weights - decode(encode(weights, scale, zero, spec), scale, zero)


def test_every_range_is_under_contract() -> None:
    assert {type(settings) for settings in ALL} == set(RANGES)


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
@pytest.mark.parametrize("settings", ALL, ids=lambda s: s.name)
def test_results_are_as_stored(settings, spec: WeightSpec) -> None:
    scale, zero = RANGES[type(settings)](groups(), None, None, spec, settings)
    assert torch.equal(scale, scale.half().float())
    assert bool((scale != 0).all())
    if spec.symmetric:
        assert bool((zero == spec.centre).all())
    elif spec.zero == "int":
        assert torch.equal(zero, zero.round().clamp(0, spec.max_code))
    else:
        assert torch.equal(zero, zero.half().float())


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
@pytest.mark.parametrize("masked", [False, True])
def test_mse_is_never_worse_than_minmax_in_squared_error(spec: WeightSpec, masked: bool) -> None:
    weights = groups()
    inliers = weights.abs() < 0.9 * weights.abs().amax(dim=1, keepdim=True) if masked else None
    importance = torch.rand(weights.shape, generator=torch.Generator().manual_seed(1))
    weighing = importance if inliers is None else importance * inliers
    best = (errors(weights, *RANGES[Mse](weights, inliers, importance, spec, Mse()), spec) ** 2 * weighing).sum(1)
    base = (errors(weights, *minmax.fit(weights, inliers, importance, spec, Minmax()), spec) ** 2 * weighing).sum(1)
    assert bool((best <= base * (1 + 1e-5) + 1e-12).all())
    if spec.bits <= 4:
        assert best.sum() < 0.97 * base.sum()


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
def test_hqq_is_never_worse_than_minmax_in_its_norm(spec: WeightSpec) -> None:
    weights = groups()
    best = objective(errors(weights, *RANGES[Hqq](weights, None, None, spec, Hqq()), spec), 0.7, None)
    base = objective(errors(weights, *minmax.fit(weights, None, None, spec, Minmax()), spec), 0.7, None)
    assert bool((best <= base * (1 + 1e-5) + 1e-9).all())


def test_mse_lands_within_a_percent_of_an_exhaustive_search() -> None:
    weights = groups(40, 32)
    spec = WeightSpec(bits=3, group_size=32)
    found = errors(weights, *RANGES[Mse](weights, None, None, spec, Mse()), spec).square().sum()
    best = torch.full((40,), torch.inf)
    low, high = weights.aminmax(dim=1)
    for a, b in itertools.product(torch.linspace(0.2, 1, 33).tolist(), repeat=2):
        best = torch.minimum(best, errors(weights, *minmax.span(low * a, high * b, spec), spec).square().sum(dim=1))
    assert found <= 1.015 * best.sum()


def test_the_papers_gradient_is_that_of_finite_differences() -> None:
    """Invariant 12: 2 * sum (Q - w) * code, the clamped code, wherever no weight lies on a tie."""
    weights, step = groups(8, 32).double(), 1e-9
    scale = weights.abs().amax(dim=1, keepdim=True) / 10  # so that some weights are clamped

    def codes(at: torch.Tensor) -> torch.Tensor:
        return torch.round(weights / at).clamp(-7, 8)

    def loss(at: torch.Tensor) -> torch.Tensor:
        return (at * codes(at) - weights).square().sum(dim=1)

    assert torch.equal(codes(scale - step), codes(scale + step))  # no tie in between
    assert bool((codes(scale).abs() >= 7).any())
    gradient = (2 * (scale * codes(scale) - weights) * codes(scale)).sum(dim=1)
    numeric = (loss(scale + step) - loss(scale - step)) / (2 * step)
    torch.testing.assert_close(gradient, numeric, rtol=1e-4, atol=1e-6)


def test_adam_is_the_papers_adam() -> None:
    """Our written-out Adam equals torch.optim.Adam on the paper's gradient, which the test above checks."""
    weights = groups(8, 32)
    spec = WeightSpec(bits=4, symmetric=True)
    scale, _ = RANGES[MseAdam](weights, None, None, spec, MseAdam(learning_rate=1e-3, steps=100))
    parameter = torch.nn.Parameter(weights.abs().amax(dim=1, keepdim=True) / 8)
    optimiser = torch.optim.Adam([parameter], lr=1e-3)
    for _ in range(100):
        codes = torch.round(weights / parameter.detach()).clamp(-7, 8)
        parameter.grad = (2 * (parameter.detach() * codes - weights) * codes).sum(dim=1, keepdim=True)
        optimiser.step()
    assert torch.allclose(-scale, parameter.detach().squeeze(1), rtol=2e-3)


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
@pytest.mark.parametrize("settings", ALL, ids=lambda s: s.name)
def test_odd_groups_survive(settings, spec: WeightSpec) -> None:
    odd = torch.stack(
        [
            torch.zeros(16),
            torch.full((16,), 0.25),
            torch.full((16,), -0.25),
            torch.linspace(0.5, 1.0, 16),
            torch.linspace(-1.0, -0.5, 16),
            torch.full((16,), 1e-9),
        ]
    )
    scale, zero = RANGES[type(settings)](odd, None, None, spec, settings)
    result = odd - errors(odd, scale, zero, spec)
    assert bool(torch.isfinite(result).all())
    assert not result[0].any()
    assert bool((errors(odd, scale, zero, spec).abs() <= odd.abs().amax(dim=1, keepdim=True) + 1e-7).all())
    if isinstance(settings, Minmax):
        assert torch.allclose(result[1:3], odd[1:3], rtol=1e-3)
    nothing = torch.zeros_like(odd, dtype=torch.bool)
    scale, zero = RANGES[type(settings)](odd, nothing, None, spec, settings)
    assert bool(torch.isfinite(scale).all())
    assert bool(torch.isfinite(zero).all())


@pytest.mark.parametrize("settings", ALL, ids=lambda s: s.name)
def test_outliers_do_not_stretch_the_grid(settings) -> None:
    weights = groups(50)
    inliers = torch.ones_like(weights, dtype=torch.bool)
    inliers[:, 3] = False
    spec = WeightSpec(bits=4, group_size=16)
    stretched = weights.clone()
    stretched[:, 3] = 40.0
    one = RANGES[type(settings)](weights, inliers, None, spec, settings)
    other = RANGES[type(settings)](stretched, inliers, None, spec, settings)
    kept = [
        torch.where(inliers, errors(w, *grid, spec), 0.0).square().sum()
        for w, grid in ((weights, one), (stretched, other))
    ]
    assert abs(kept[0] - kept[1]) <= 0.02 * kept[0]


@pytest.mark.parametrize("settings", ALL, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(3, 40), (1, 1), (5, 1), (2, 16), (4, 17)])
def test_ragged_matrices(settings, shape: tuple[int, int]) -> None:
    spec = WeightSpec(bits=4, group_size=16)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    grid = fit_grid(weight, None, None, spec, settings)
    assert tuple(grid.scale.shape) == (shape[0], spec.groups(shape[1]))
    # A group is fitted on its own weights alone: the tail's grid equals that of the tail as a matrix.
    tail = shape[1] % 16
    if tail and shape[1] > 16:
        alone = fit_grid(weight[:, -tail:].contiguous(), None, None, spec, settings)
        assert torch.equal(alone.scale[:, 0], grid.scale[:, -1])
