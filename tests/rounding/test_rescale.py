"""Scales after rounding, against least squares row by row in float64."""

import pytest
import torch
from torch import Tensor

from bitwright.numeric.grid import Grid
from bitwright.numeric.spec import WeightSpec
from bitwright.ranges import Minmax, Ranging, fit_grid
from bitwright.rounding.rescale import refit_scales

SPECS = [
    WeightSpec(bits=4, group_size=8, scale_dtype="float32"),
    WeightSpec(bits=3, group_size=7, scale_dtype="float32"),  # a short last group
    WeightSpec(bits=2, scale_dtype="float32", symmetric=True),
]


def problem(spec: WeightSpec, seed: int) -> tuple[Tensor, Tensor, Grid, Tensor, Tensor]:
    """Weights, codes, grid, Hessian and kept weights."""
    torch.manual_seed(seed)
    weight, x = torch.randn(5, 24), torch.randn(200, 24) @ torch.randn(24, 24)
    grid = fit_grid(weight, None, None, Ranging(spec, Minmax()))
    return weight, grid.encode(weight), grid, x.T @ x / 200, torch.rand(5, 24) < 0.1


def error(left: Tensor, hessian: Tensor) -> Tensor:
    return torch.einsum("ri,ij,rj->r", left.double(), hessian.double(), left.double())


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
def test_scales_are_those_of_least_squares(spec: WeightSpec) -> None:
    weight, codes, grid, hessian, kept = problem(spec, seed=1)
    found = refit_scales(codes, grid, weight.masked_fill(kept, 0.0), hessian, kept)
    root = torch.linalg.cholesky(hessian.double()).T  # |d root^T|^2 = d H d^T
    width = spec.group_width(24)
    for row in range(5):
        steps = (codes[row].double() - grid.expand(24)[1][row].double()).masked_fill(kept[row], 0.0)
        design = torch.zeros(24, spec.groups(24), dtype=torch.float64)
        design[torch.arange(24), torch.arange(24) // width] = steps
        wanted = weight[row].double().masked_fill(kept[row], 0.0)
        best = torch.linalg.lstsq(root @ design, (root @ wanted).unsqueeze(1)).solution[:, 0]
        used = design.any(dim=0)  # a group without any step has no best scale
        torch.testing.assert_close(found.scale[row].double()[used], best[used], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_row_gets_worse(seed: int, dtype: str) -> None:
    spec = WeightSpec(bits=3, group_size=8, scale_dtype=dtype)
    weight, codes, grid, hessian, kept = problem(spec, seed)
    target = weight.masked_fill(kept, 0.1)  # keeping may leave something
    found = refit_scales(codes, grid, target, hessian, kept)
    before, after = (target - g.decode(codes).masked_fill(kept, 0.0) for g in (grid, found))
    assert (error(after, hessian) <= error(before, hessian) * (1 + 1e-6)).all()
    assert error(after, hessian).sum() < error(before, hessian).sum()
    assert torch.equal(found.zero, grid.zero)


def test_groups_without_any_step_keep_their_scale() -> None:
    spec = WeightSpec(bits=4, group_size=4)
    grid = Grid(torch.full((2, 2), 0.5), torch.full((2, 2), 8.0), spec)
    codes = torch.full((2, 8), 8, dtype=torch.uint8)
    found = refit_scales(codes, grid, torch.zeros(2, 8), torch.eye(8), torch.zeros(2, 8, dtype=torch.bool))
    assert torch.equal(found.scale, grid.scale)
