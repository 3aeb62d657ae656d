"""Hadamard transforms against the matrix written out, rotations against the definition of orthogonality."""

import math

import pytest
import torch
from torch import Tensor

from bitwright.numeric.hadamard import block_size, hadamard, hadamard_blocks, random_rotation

WIDTHS = [1, 2, 7, 8, 48, 64, 96, 128, 576, 1536, 8192]


def by_parity(order: int) -> Tensor:
    """The definition: entry (i, j) is minus one to the number of bits that i and j share."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)]) / order**0.5


@pytest.mark.parametrize("order", [1, 2, 8, 64])
def test_matrix_is_its_definition(order: int) -> None:
    torch.testing.assert_close(hadamard(order).float(), by_parity(order))


@pytest.mark.parametrize("order", [0, 3, 12, -4])
def test_matrix_needs_a_power_of_two(order: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(order)


@pytest.mark.parametrize("width", [1, 6, 48, 256, 576])
def test_blocks_are_products_with_the_matrix(width: int) -> None:
    x = torch.randn(2, 3, width, dtype=torch.float64)
    size = block_size(width)
    expected = torch.stack([part @ hadamard(size) for part in x.split(size, dim=-1)], dim=-2).reshape(x.shape)
    torch.testing.assert_close(hadamard_blocks(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("width", WIDTHS)
def test_transform_undoes_itself_and_keeps_lengths(width: int) -> None:
    x = torch.randn(4, width, dtype=torch.float64)
    once = hadamard_blocks(x)
    torch.testing.assert_close(hadamard_blocks(once), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(once.norm(dim=1), x.norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_stays_and_halves_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(5, 1024).to(dtype)
    transformed = hadamard_blocks(x)
    assert transformed.dtype == dtype
    exact = hadamard_blocks(x.double())
    assert ((transformed - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 2e-6).all()


@pytest.mark.parametrize("width", [7, 48])
def test_input_is_left_alone(width: int) -> None:
    x = torch.randn(3, width)
    before = x.clone()
    hadamard_blocks(x).zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("width", [5, 12, 256])
def test_gradients(width: int) -> None:
    x = torch.randn(2, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard_blocks, x)


def test_views_and_empty_batches() -> None:
    x = torch.randn(48, 6).T
    torch.testing.assert_close(hadamard_blocks(x), hadamard_blocks(x.contiguous()))
    assert hadamard_blocks(torch.empty(0, 4, 48)).shape == (0, 4, 48)


@pytest.mark.parametrize("fixes_ones", [False, True])
@pytest.mark.parametrize("features", [1, 2, 3, 7, 32, 48, 96, 576, 1024])
def test_rotation_is_orthogonal(features: int, fixes_ones: bool) -> None:
    rotation = random_rotation(features, 3, fixes_ones)
    assert rotation.dtype == torch.float64
    identity = torch.eye(features, dtype=torch.float64)
    assert (rotation.T @ rotation - identity).abs().max() <= 1e-12
    stored = rotation.float().double()
    assert (stored.T @ stored - identity).abs().max() <= 1e-6


@pytest.mark.parametrize("features", [1, 2, 3, 48, 576])
def test_ones_are_fixed_from_both_sides(features: int) -> None:
    rotation = random_rotation(features, 5, fixes_ones=True)
    ones = torch.ones(features, dtype=torch.float64)
    torch.testing.assert_close(rotation @ ones, ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(ones @ rotation, ones, rtol=0, atol=1e-12)


def test_ones_are_not_fixed_by_chance() -> None:
    ones = torch.ones(48, dtype=torch.float64)
    assert (random_rotation(48, 5) @ ones - ones).abs().max() > 0.1


@pytest.mark.parametrize("features", [48, 576])
def test_layer_norm_commutes_with_a_rotation_that_fixes_ones(features: int) -> None:
    norm = torch.nn.LayerNorm(features, elementwise_affine=False, dtype=torch.float64)
    x = 3 * torch.randn(5, features, dtype=torch.float64) + 2
    fixing, other = random_rotation(features, 0, fixes_ones=True), random_rotation(features, 0)
    torch.testing.assert_close(norm(x @ fixing), norm(x) @ fixing, rtol=0, atol=1e-12)
    assert (norm(x @ other) - norm(x) @ other).abs().max() > 0.1


@pytest.mark.parametrize("fixes_ones", [False, True])
@pytest.mark.parametrize("features", [64, 96, 576, 768, 1024])
def test_entries_are_incoherent(features: int, fixes_ones: bool) -> None:
    """Where m = 1 all entries have one size; the random factor of another width has entries below one."""
    largest = random_rotation(features, 1, fixes_ones).abs().max().item()
    bound = 1.0 if features == block_size(features) and not fixes_ones else 4.0
    assert largest <= bound * (features // block_size(features)) ** 0.5 / math.sqrt(features) + 1e-12


def test_seed_decides() -> None:
    assert torch.equal(random_rotation(96, 4), random_rotation(96, 4))
    assert not torch.equal(random_rotation(96, 4), random_rotation(96, 5))


def test_random_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    random_rotation(48, 0, fixes_ones=True)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_features_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        random_rotation(0, 0)
