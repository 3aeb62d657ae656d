"""The contract of every range: never worse than min-max on its own objective; odd groups survive."""

import itertools

import pytest
import torch
from torch import Tensor

from bitwright.numeric.grid import decode, encode
from bitwright.numeric.spec import WeightSpec
from bitwright.numeric.straight_through import fake_quantize
from bitwright.ranges import RANGES, Clip, Clipping, Hqq, Minmax, Mse, MseAdam, Ranging, clip, fit_grid, minmax
from bitwright.ranges.clip import search_clipping
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


ODD = torch.stack(
    [
        torch.zeros(16),
        torch.full((16,), 0.25),
        torch.full((16,), -0.25),
        torch.linspace(0.5, 1.0, 16),
        torch.linspace(-1.0, -0.5, 16),
        torch.full((16,), 1e-9),
        torch.linspace(-1.0, 0.01, 16),
    ]
)


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
    odd = ODD[:6]
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
    grid = fit_grid(weight, None, None, Ranging(spec, settings))
    assert tuple(grid.scale.shape) == (shape[0], spec.groups(shape[1]))
    # A group is fitted on its own weights alone: the tail's grid equals that of the tail as a matrix.
    tail = shape[1] % 16
    if tail and shape[1] > 16:
        alone = fit_grid(weight[:, -tail:].contiguous(), None, None, Ranging(spec, settings))
        assert torch.equal(alone.scale[:, 0], grid.scale[:, -1])


# --- clip: shares from learning or a search; invariants numbered as in the research notes on OmniQuant ---------------


def logits(rows: int, groups: int, value: float = 4.0) -> tuple[Tensor, Tensor]:
    upper, lower = (torch.full((rows, groups), value, requires_grad=True) for _ in range(2))
    return upper, lower


def clipped(upper: Tensor, lower: Tensor) -> Clipping:
    return Clipping(torch.sigmoid(upper), torch.sigmoid(lower))


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
@pytest.mark.parametrize("shape", [(6, 40), (5, 16), (3, 1)])
def test_4_whole_shares_are_minmax_to_the_last_bit(spec: WeightSpec, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    ones = torch.ones(shape[0], spec.groups(shape[1]))
    expected = fit_grid(weight, None, None, Ranging(spec, Minmax()))
    for clipping in (None, Clipping(ones, ones)):
        found = fit_grid(weight, None, None, Ranging(spec, Clip(), clipping))
        assert torch.equal(found.scale, expected.scale)
        assert torch.equal(found.zero, expected.zero)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_4_the_first_shares_are_a_little_better_than_minmax_on_gaussians(bits: int) -> None:
    weight = torch.randn(400, 128, generator=torch.Generator().manual_seed(5))
    spec = WeightSpec(bits=bits, group_size=128)
    with torch.no_grad():
        first = fit_grid(weight, None, None, Ranging(spec, Clip(), clipped(*logits(400, 1))))
    base = fit_grid(weight, None, None, Ranging(spec, Minmax()))
    ratio = [float((grid.decode(grid.encode(weight)) - weight).square().mean()) for grid in (first, base)]
    assert 0.95 < ratio[0] / ratio[1] < 0.99


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
def test_5_gradients_reach_the_shares_through_the_scale_alone(spec: WeightSpec) -> None:
    """By hand: with codes fixed, w = s (q - z), so d loss / d s = sum of d loss / d w times (q - z), plus what the
    straight-through position w / s + z gives inside the range; then s by low and high, and those by the logits.
    """
    weight, width = groups(24, 16), 16
    upper, lower = logits(24, 1, value=1.0)
    grid = fit_grid(weight, None, None, Ranging(spec, Clip(), clipped(upper, lower)))
    assert not grid.zero.requires_grad
    outer = torch.randn(weight.shape, generator=torch.Generator().manual_seed(8))
    (fake_quantize(weight, grid.scale, grid.zero, spec) * outer).sum().backward()

    scale, zero = grid.scale.detach().double(), grid.zero.double()
    position = weight.double() / scale + zero
    codes = position.round().clamp(0, spec.max_code)
    inside = (position.round() >= 0) & (position.round() <= spec.max_code)
    by_scale = (outer.double() * (codes - zero - torch.where(inside, weight.double() / scale, 0.0))).sum(1)
    low, high = weight.double().aminmax(dim=1)
    share = torch.sigmoid(torch.tensor(1.0)).item()
    slope = share * (1 - share)
    if spec.symmetric:
        # the side that decides the scale takes all of it: code 0 for the longer, the last code for the shorter
        down, up = -low * share, high * share
        longer_is_up = up > down
        longer, shorter = torch.maximum(down, up) / spec.centre, torch.minimum(down, up) / (spec.centre - 1)
        by_longer = longer > shorter
        steps = torch.where(by_longer, spec.centre, spec.centre - 1) * torch.sign(scale[:, 0])
        decides_up = longer_is_up == by_longer
        expected_upper = torch.where(decides_up, by_scale * high * slope / steps, 0.0)
        expected_lower = torch.where(decides_up, 0.0, by_scale * -low * slope / steps)
    else:
        if spec.zero == "int":
            low, high = low.clamp_max(0), high.clamp_min(0)
        expected_upper = by_scale * high * slope / spec.max_code
        expected_lower = by_scale * -low * slope / spec.max_code
    assert upper.grad is not None
    assert lower.grad is not None
    torch.testing.assert_close(upper.grad[:, 0].double(), expected_upper, rtol=2e-4, atol=2e-6 * width)
    torch.testing.assert_close(lower.grad[:, 0].double(), expected_lower, rtol=2e-4, atol=2e-6 * width)
    assert float((upper.grad != 0).double().mean()) > 0.3


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_5_the_scales_gradient_is_that_of_finite_differences(bits: int) -> None:
    """Of the range without storage rounding, which is smooth in the shares."""
    weight = groups(12, 16).double()
    low, high = weight.aminmax(dim=1)
    low, high = low.clamp_max(0), high.clamp_min(0)
    spec, step = WeightSpec(bits=bits, scale_dtype="float32"), 1e-6
    upper, lower = (torch.full((12,), 0.8, requires_grad=True) for _ in range(2))
    scale, _ = clip.fit(weight.float(), None, (upper, lower), spec)
    scale.sum().backward()

    def exact(up: float, down: float) -> Tensor:
        return (high * up - low * down) / spec.max_code

    for grad, numeric in (
        (upper.grad, (exact(0.8 + step, 0.8) - exact(0.8 - step, 0.8)) / (2 * step)),
        (lower.grad, (exact(0.8, 0.8 + step) - exact(0.8, 0.8 - step)) / (2 * step)),
    ):
        assert grad is not None
        torch.testing.assert_close(grad.double(), numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
@pytest.mark.parametrize("share", [(4.0, 4.0), (-2.0, 3.0), (-200.0, -200.0)], ids=["first", "uneven", "nothing"])
@pytest.mark.parametrize("width", [16, 1])
def test_6_odd_groups_survive_clipping_forward_and_backward(
    spec: WeightSpec, share: tuple[float, float], width: int
) -> None:
    weight = ODD[:, :width].clone().requires_grad_(True)
    upper, lower = (torch.full((len(ODD), 1), value, requires_grad=True) for value in share)
    grid = fit_grid(weight, None, None, Ranging(spec, Clip(), clipped(upper, lower)))
    if spec.symmetric:
        assert bool((grid.zero == spec.centre).all())
    elif spec.zero == "int":
        assert torch.equal(grid.zero, grid.zero.round().clamp(0, spec.max_code))
    codes = grid.encode(weight.detach())
    assert int(codes.max()) <= spec.max_code
    result = fake_quantize(weight, grid.scale, grid.zero, spec)
    assert torch.equal(result.detach(), grid.decode(codes))
    assert bool(result.isfinite().all())
    assert not result[0].any()
    result.square().sum().backward()
    for leaf in (weight, upper, lower):
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize(
    "spec", [*SPECS[:6], WeightSpec(bits=3), WeightSpec(bits=3, group_size=9)], ids=WeightSpec.label
)
def test_search_clipping_is_that_of_a_loop(spec: WeightSpec) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 40, generator=generator)
    inputs = torch.randn(200, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    hessian = inputs.T @ inputs / 200
    found = search_clipping(weight, hessian, spec)
    assert torch.equal(found.upper, found.lower)
    width = spec.group_width(40)
    one = spec.model_copy(update={"group_size": None})
    for row, start in itertools.product(range(5), range(0, 40, width)):
        group = weight[row : row + 1, start : start + width]
        block = hessian[start : start + width, start : start + width].double()
        losses = {}
        for point in range(20):
            share = 1 - 0.5 * point / 20
            low, high = group.aminmax(dim=1)
            scale, zero = minmax.span(low * share, high * share, one)
            change = errors(group, scale, zero, one)[0].double()
            losses[share] = float(change @ block @ change)
        chosen = float(found.upper[row, start // width])
        share = min(losses, key=lambda s: abs(s - chosen))
        assert share == pytest.approx(chosen, abs=1e-6)
        assert losses[share] <= min(losses.values()) * (1 + 1e-5)


def test_search_clipping_keeps_everything_where_nothing_is_gained() -> None:
    spec = WeightSpec(bits=4, group_size=16)
    on_grid = torch.arange(16.0).repeat(3, 2) / 16 - 0.25
    assert bool((search_clipping(on_grid, torch.eye(32), spec).upper == 1).all())
    assert bool((search_clipping(torch.zeros(3, 32), torch.eye(32), spec).upper == 1).all())
    assert bool((search_clipping(on_grid, torch.zeros(32, 32), spec).upper == 1).all())


def test_clippings_are_cut_with_their_matrix() -> None:
    weight, spec = groups(6, 40), WeightSpec(bits=3, group_size=16)
    generator = torch.Generator().manual_seed(4)
    upper, lower = (0.5 + 0.5 * torch.rand(6, 3, generator=generator) for _ in range(2))
    ranging = Ranging(spec, Clip(), Clipping(upper, lower))
    whole = ranging.fit(weight)
    part = ranging.rows(slice(2, 5)).groups(slice(1, 3)).fit(weight[2:5, 16:].contiguous())
    assert torch.equal(part.scale, whole.scale[2:5, 1:])
    assert torch.equal(part.zero, whole.zero[2:5, 1:])
    by_hand, _ = minmax.span(weight[4, 32:].min() * lower[4, 2], weight[4, 32:].max() * upper[4, 2], spec)
    assert float(whole.scale[4, 2]) == float(by_hand)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_groups_far_from_zero_have_a_finite_float_zero(dtype: str) -> None:
    weight = torch.full((1, 16), 0.5)
    weight[0, 0] += 6e-8
    spec = WeightSpec(bits=4, group_size=16, zero="float", scale_dtype=dtype)
    grid = fit_grid(weight, None, None, Ranging(spec, Minmax()))
    assert torch.isfinite(grid.zero).all()
    torch.testing.assert_close(grid.decode(grid.encode(weight)), weight, rtol=0.01, atol=0)
