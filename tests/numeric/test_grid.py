"""The arithmetic of grids against a slow float64 reference written with Python numbers."""

import pytest
import torch

from bitwright.errors import WeightError
from bitwright.numeric.grid import (
    Grid,
    encode,
    expand_groups,
    group_rows,
    rounded_up,
    stored_scale,
    stored_zero,
    ungroup_rows,
)
from bitwright.numeric.spec import WeightSpec


def slow_nearest(weight: float, scale: float, zero: float, max_code: int) -> int:
    """The code whose value is nearest to `weight`, by trying all of them."""
    return min(range(max_code + 1), key=lambda code: abs(scale * (code - zero) - weight))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_encode_finds_the_nearest_code(bits: int, symmetric: bool) -> None:
    spec = WeightSpec(bits=bits, group_size=4, symmetric=symmetric)
    generator = torch.Generator().manual_seed(bits)
    weights = torch.randn(5, 7, generator=generator)
    scale = stored_scale(torch.rand(5, 2, generator=generator) * 4 / spec.max_code + 0.01, spec)
    zero = stored_zero(torch.full((5, 2), spec.max_code / 3), spec)
    codes = Grid(scale, zero, spec).encode(weights)
    for row in range(5):
        for column in range(7):
            s, z = scale[row, column // 4].item(), zero[row, column // 4].item()
            best = slow_nearest(weights[row, column].item(), s, z, spec.max_code)
            got = int(codes[row, column])
            # Ties and float32 rounding may pick the other neighbour, never a worse one.
            error = abs(s * (got - z) - weights[row, column].item())
            assert error <= abs(s * (best - z) - weights[row, column].item()) + 1e-6


def test_negative_scale_turns_the_long_side_to_positive_weights() -> None:
    spec = WeightSpec(bits=4, symmetric=True)
    scale, zero = torch.tensor([[-0.5]]), torch.tensor([[8.0]])
    assert Grid(scale, zero, spec).decode(torch.tensor([[0, 15]])).tolist() == [[4.0, -3.5]]


@pytest.mark.parametrize(("out", "width", "group"), [(3, 8, 4), (3, 10, 4), (2, 1, 4), (1, 5, 1), (4, 6, None)])
def test_groups_split_and_join_again(out: int, width: int, group: int | None) -> None:
    spec = WeightSpec(bits=4, group_size=group)
    matrix = torch.arange(out * width, dtype=torch.float32).reshape(out, width)
    sums = ungroup_rows([part.sum(dim=1) for part in group_rows(matrix, spec)], out)
    size = group or width
    slow = [[matrix[r, c : c + size].sum().item() for c in range(0, width, size)] for r in range(out)]
    assert sums.tolist() == slow
    expanded = expand_groups(sums, spec, width)
    assert expanded.tolist() == [[slow[r][c // size] for c in range(width)] for r in range(out)]


def test_stored_scale_is_representable_signed_and_never_zero() -> None:
    spec = WeightSpec(bits=4)
    scale = stored_scale(torch.tensor([0.1, -0.1, 1e-12, -1e-12]), spec)
    assert torch.equal(scale, scale.half().float())
    assert scale.sign().tolist() == [1, -1, 1, -1]
    with pytest.raises(WeightError, match="scale_dtype=bfloat16"):
        stored_scale(torch.tensor([1e6]), spec)
    assert stored_scale(torch.tensor([1e6]), WeightSpec(bits=4, scale_dtype="bfloat16")).item() > 9e5


def test_integer_zeros_stay_inside_the_code_range() -> None:
    spec = WeightSpec(bits=3)
    assert stored_zero(torch.tensor([-4.0, 2.6, 99.0]), spec).tolist() == [0.0, 3.0, 7.0]
    codes = encode(torch.tensor([-1e9, 1e9]), torch.tensor(1.0), torch.tensor(3.0), spec)
    assert codes.tolist() == [0.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_up(dtype: torch.dtype) -> None:
    values = torch.cat([torch.zeros(1), torch.logspace(-9, 4, 4001), torch.tensor([1.0, 2.0**-24, 65504.0])])
    result = rounded_up(values, dtype)
    assert bool((result >= values).all())
    assert torch.equal(result, result.to(dtype).float())
    exact = values.to(dtype).float() == values
    assert torch.equal(result[exact], values[exact])
    if dtype != torch.float32:
        below = (result[1:].to(dtype).view(torch.int16) - 1).view(dtype).float()
        assert bool((below < values[1:]).all())
