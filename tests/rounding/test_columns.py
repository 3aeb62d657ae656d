"""The column kernels against their PyTorch reference, bit for bit, and both against what they promise."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright.errors import WeightError
from bitwright.numeric.grid import Grid, decode
from bitwright.numeric.spec import WeightSpec
from bitwright.rounding import columns
from bitwright.rounding.columns import (
    ColumnGrid,
    Columns,
    backend,
    backend_reason,
    reference_refine_codes,
    reference_round_columns,
    refine_codes,
    round_columns,
)

SHAPES = [(rows, width) for rows in (1, 7, 16, 33) for width in (1, 5, 64, 130)]


@pytest.fixture
def _keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_hessian(width: int, seed: int = 0) -> Tensor:
    """A correlated, well conditioned Hessian, float32."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    inputs = torch.randn(2 * width + 8, width, generator=generator) @ mixed
    return inputs.T @ inputs / inputs.shape[0] + 0.05 * torch.eye(width)


def make_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with inverse(H) = Uᵀ U, float32."""
    return torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float()


def make_grid(rows: int, width: int, seed: int = 0, max_code: int = 15) -> ColumnGrid:
    """Groups of uneven size whose columns are scattered, as an activation order scatters them; float zeros."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 + width // 7
    return ColumnGrid(
        scale=(torch.rand(rows, groups, generator=generator) + 1) * 3 / max_code,
        zero=torch.rand(rows, groups, generator=generator) * max_code,
        group=torch.randint(groups, (width,), generator=generator, dtype=torch.int32),
        max_code=max_code,
    )


def make_weight(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 99))


def decoded(codes: Tensor, grid: ColumnGrid) -> Tensor:
    return decode(codes, *grid.expand())


def objective(residual: Tensor, hessian: Tensor) -> Tensor:
    """r H rᵀ of every row, in float64."""
    return ((residual.double() @ hessian.double()) * residual.double()).sum(dim=1)


def assert_same(found: Columns, expected: Columns) -> None:
    for name in ("codes", "target", "error", "outlier"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def test_the_compiled_kernel_is_at_work() -> None:
    expected = "reference" if os.environ.get("BITWRIGHT_NATIVE") == "0" else "native"
    assert backend() == expected, backend_reason()


def test_backend_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITWRIGHT_NATIVE", raising=False)
    assert backend_reason().startswith("compiled for ")
    monkeypatch.setenv("BITWRIGHT_NATIVE", "0")
    assert (backend(), backend_reason()) == ("reference", "BITWRIGHT_NATIVE=0 is set")


def test_without_a_usable_module_the_reason_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    module, why = columns._load_native()
    assert module is None
    assert "No module named 'bitwright._native'" in why
    assert "install bitwright again" in why
    monkeypatch.undo()
    monkeypatch.setattr(columns, "INTERFACE", -1)
    module, why = columns._load_native()
    assert module is None
    assert "another version" in why


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("kept", ["none", "limit", "mask", "both"])
def test_rounding_equals_the_reference_bit_for_bit(rows: int, width: int, kept: str) -> None:
    weight, factor = make_weight(rows, width), make_factor(make_hessian(width))
    generator = torch.Generator().manual_seed(1)
    limit = torch.rand(rows, generator=generator) * 0.1 if kept in ("limit", "both") else None
    mask = torch.rand(rows, width, generator=generator) < 0.1 if kept in ("mask", "both") else None
    for max_code in (3, 15, 255):
        grid = make_grid(rows, width, max_code=max_code)
        found = round_columns(weight, factor, grid, limit, mask)
        assert_same(found, reference_round_columns(weight, factor, grid, limit, mask))
        assert not torch.any(found.error[found.outlier])
        if mask is not None:
            assert torch.all(found.outlier[mask])
        if kept == "none":
            assert not torch.any(found.outlier)
        if kept == "limit" and rows * width > 100:
            assert 0 < found.outlier.float().mean() < 1


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_refinement_equals_the_reference_bit_for_bit(rows: int, width: int) -> None:
    weight, hessian, grid = make_weight(rows, width), make_hessian(width), make_grid(rows, width)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(16, (rows, width), generator=generator, dtype=torch.uint8)
    frozen = torch.rand(rows, width, generator=generator) < 0.1
    residual = weight - decoded(codes, grid)
    for sweeps, mask in ((1, None), (3, frozen)):
        found = refine_codes(codes, residual, hessian, grid, mask, sweeps)
        assert found.dtype == torch.uint8
        assert torch.equal(found, reference_refine_codes(codes, residual @ hessian, hessian, grid, mask, sweeps))
        if mask is not None:
            assert torch.equal(found[mask], codes[mask])


@pytest.mark.usefixtures("_keep_threads")
def test_threads_and_instruction_sets_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width = 400, 384  # enough work for four threads
    weight, hessian, grid = make_weight(rows, width), make_hessian(width), make_grid(rows, width)
    # Small integers: the matrix product before the refinement is exact, whatever PyTorch's threads do.
    whole, residual = (hessian * 8).round(), (weight * 4).round()
    factor, limit = make_factor(hessian), torch.full((rows,), 0.05)
    codes = torch.randint(16, (rows, width), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    rounded = reference_round_columns(weight, factor, grid, limit)
    refined = reference_refine_codes(codes, residual @ whole, whole, grid, sweeps=2)
    assert not torch.equal(refined, codes)
    native = columns._NATIVE
    for isa in [] if native is None else native.isas():
        if native is not None:
            monkeypatch.setattr(native, "isas", lambda isa=isa: [isa])
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            assert_same(round_columns(weight, factor, grid, limit), rounded)
            assert torch.equal(refine_codes(codes, residual, whole, grid, sweeps=2), refined)


def test_a_loop_over_numbers_agrees() -> None:
    rows, width = 3, 9
    weight, factor, grid = make_weight(rows, width), make_factor(make_hessian(width)), make_grid(rows, width)
    limit = torch.full((rows,), 0.05)
    found = round_columns(weight, factor, grid, limit)
    work = weight.double().tolist()
    for row in range(rows):
        for j in range(width):
            group = int(grid.group[j])
            scale, zero = grid.scale[row, group].item(), grid.zero[row, group].item()
            code = min(max(round(work[row][j] / scale + zero), 0), grid.max_code)
            error = (work[row][j] - scale * (code - zero)) / factor[j, j].item()
            outlier = error * error > limit[row].item()
            assert found.codes[row, j].item() == code
            assert found.outlier[row, j].item() == outlier
            assert found.target[row, j].item() == pytest.approx(work[row][j], abs=1e-5)
            error = 0.0 if outlier else error
            assert found.error[row, j].item() == pytest.approx(error, abs=1e-5)
            for k in range(j + 1, width):
                work[row][k] -= error * factor[j, k].item()


def test_squared_errors_add_up_to_the_objective() -> None:
    rows, width = 20, 64
    weight, hessian, grid = make_weight(rows, width), make_hessian(width), make_grid(rows, width)
    found = round_columns(weight, make_factor(hessian), grid)
    expected = objective(weight - decoded(found.codes, grid), hessian)
    assert torch.allclose(found.error.double().square().sum(dim=1), expected, rtol=1e-4)
    nearest = torch.clamp(torch.round(weight / grid.expand()[0] + grid.expand()[1]), 0, grid.max_code)
    assert expected.sum() < objective(weight - decoded(nearest, grid), hessian).sum()


def test_blocks_and_one_matrix_product_each_are_the_whole() -> None:
    rows, width, block = 9, 96, 40
    weight, factor, grid = make_weight(rows, width), make_factor(make_hessian(width)), make_grid(rows, width)
    whole, work = round_columns(weight, factor, grid), weight.clone()
    for start in range(0, width, block):
        here, beyond = slice(start, start + block), slice(start + block, width)
        part = round_columns(work[:, here], factor[here, here], replace(grid, group=grid.group[here]))
        assert torch.equal(part.codes, whole.codes[:, here])
        work[:, beyond] -= part.error @ factor[here, beyond]


def test_a_diagonal_factor_rounds_to_nearest() -> None:
    spec = WeightSpec(bits=3, group_size=16)
    weight = make_weight(5, 64)
    grid = Grid(torch.full((5, 4), 0.5), torch.full((5, 4), 3.0), spec)
    group = (torch.arange(64) // 16).to(torch.int32)
    found = round_columns(weight, torch.eye(64) * 0.5, ColumnGrid(grid.scale, grid.zero, group, spec.max_code))
    assert torch.equal(found.codes, grid.encode(weight))
    assert torch.equal(found.target, weight)


def test_halves_round_to_even_and_codes_stay_in_range() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, 7.5, -1e30, 1e30, 6.5]])
    grid = ColumnGrid(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(8, dtype=torch.int32), 7)
    found = round_columns(weight, torch.eye(8), grid)
    assert found.codes.tolist() == [[0, 2, 2, 0, 7, 0, 7, 6]]
    assert_same(found, reference_round_columns(weight, torch.eye(8), grid))


@pytest.mark.parametrize("seed", range(5))
def test_refinement_never_raises_a_row_s_objective(seed: int) -> None:
    rows, width = 24, 48
    weight, hessian, grid = make_weight(rows, width, seed), make_hessian(width, seed), make_grid(rows, width, seed)
    nearest = torch.clamp(torch.round(weight / grid.expand()[0] + grid.expand()[1]), 0, grid.max_code)
    fed_back = round_columns(weight, make_factor(hessian), grid).codes
    for codes in (nearest.to(torch.uint8), fed_back):
        residual = weight - decoded(codes, grid)
        before = objective(residual, hessian)
        refined = refine_codes(codes, residual, hessian, grid, sweeps=4)
        after = objective(weight - decoded(refined, grid), hessian)
        changed = (refined != codes).any(dim=1)
        assert torch.all(after[changed] < before[changed])
        assert changed.any()
        # At the end no single code can be changed for the better.
        again = refine_codes(refined, weight - decoded(refined, grid), hessian, grid, sweeps=20)
        assert torch.all(objective(weight - decoded(again, grid), hessian) <= after)


def test_refinement_keeps_columns_without_curvature() -> None:
    hessian = make_hessian(6)
    hessian[2] = hessian[:, 2] = 0
    codes, grid = torch.full((4, 6), 9, dtype=torch.uint8), make_grid(4, 6)
    residual = torch.full((4, 6), 5.0)
    found = refine_codes(codes, residual, hessian, grid)
    assert torch.equal(found[:, 2], codes[:, 2])
    assert torch.equal(found, reference_refine_codes(codes, residual @ hessian, hessian, grid))


def test_inputs_of_any_layout_are_read_and_left_alone() -> None:
    rows, width = 17, 20
    weight, hessian, grid = make_weight(rows, width), make_hessian(width), make_grid(rows, width)
    factor, mask = make_factor(hessian), torch.zeros(rows, width, dtype=torch.bool)
    expected = round_columns(weight, factor, grid, None, mask)
    # What is below the diagonal is not read.
    factor = factor + torch.full_like(factor, torch.nan).tril(-1)
    turned = ColumnGrid(
        grid.scale.T.contiguous().T, grid.zero.T.contiguous().T, grid.group.repeat_interleave(2)[::2], 15
    )
    tensors = [weight.T.contiguous().T, factor.T.contiguous().T, mask.T.contiguous().T, turned.scale, turned.zero]
    before = [tensor.clone() for tensor in tensors]
    assert_same(round_columns(tensors[0], tensors[1], turned, None, tensors[2]), expected)
    residual = tensors[0] - decoded(expected.codes, turned)
    codes = expected.codes.T.contiguous().T
    refined = refine_codes(codes, residual, hessian.T, turned, tensors[2])
    assert torch.equal(refined, refine_codes(expected.codes, residual.contiguous(), hessian, grid))
    assert torch.equal(codes, expected.codes)
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_nothing_to_round(shape: tuple[int, int]) -> None:
    rows, width = shape
    grid = ColumnGrid(torch.ones(rows, 1), torch.zeros(rows, 1), torch.zeros(width, dtype=torch.int32), 7)
    found = round_columns(torch.zeros(shape), torch.eye(width), grid)
    assert found.codes.shape == found.error.shape == found.target.shape == found.outlier.shape == shape
    assert refine_codes(found.codes, torch.zeros(shape), torch.eye(width), grid).shape == shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(4)}, r"weight is \[4\], needed two axes"),
        ({"weight": torch.zeros(4, 6).double()}, r"weight is torch.float64 .* needed torch.float32"),
        ({"factor": torch.zeros(6, 5)}, r"factor is .*\[6, 5\].* needed torch.float32 \[6, 6\] on cpu"),
        ({"factor": torch.zeros(6, 6, device="meta")}, "factor is .* on meta, needed .* on cpu"),
        ({"scale": torch.ones(3, 2)}, r"grid.scale is .*\[3, 2\].* needed torch.float32 \[4, 2\]"),
        ({"scale": torch.ones(4)}, r"grid.scale is \[4\], needed two axes"),
        ({"zero": torch.ones(4, 3)}, r"grid.zero is .*\[4, 3\].* needed torch.float32 \[4, 2\]"),
        ({"group": torch.zeros(6, dtype=torch.int64)}, "grid.group is torch.int64 .* needed torch.int32"),
        ({"group": torch.zeros(5, dtype=torch.int32)}, r"grid.group is .*\[5\].* needed torch.int32 \[6\]"),
        ({"group": torch.full((6,), 2, dtype=torch.int32)}, "grid.group holds 2 to 2, needed .* 0 to 1"),
        ({"group": torch.full((6,), -1, dtype=torch.int32)}, "grid.group holds -1 to -1, needed .* 0 to 1"),
        ({"max_code": 256}, "grid.max_code is 256, needed 1 to 255"),
        ({"max_code": 0}, "grid.max_code is 0, needed 1 to 255"),
        ({"limit": torch.zeros(5)}, r"limit is .*\[5\].* needed torch.float32 \[4\]"),
        ({"mask": torch.zeros(4, 6)}, r"mask is torch.float32 .* needed torch.bool \[4, 6\]"),
    ],
)
def test_wrong_arguments_of_rounding(changes: dict, message: str) -> None:
    tensors = {"weight": torch.zeros(4, 6), "factor": torch.eye(6), "limit": None, "mask": None}
    grid = {"scale": torch.ones(4, 2), "zero": torch.zeros(4, 2), "group": torch.zeros(6, dtype=torch.int32)}
    values = {**tensors, **grid, "max_code": 7, **changes}
    made = ColumnGrid(*(values[name] for name in ("scale", "zero", "group", "max_code")))
    with pytest.raises(ValueError, match=message):
        round_columns(values["weight"], values["factor"], made, values["limit"], values["mask"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(4, 6)}, "codes is torch.float32 .* needed torch.uint8"),
        ({"residual": torch.zeros(4, 5)}, r"residual is .*\[4, 5\].* needed torch.float32 \[4, 6\]"),
        ({"hessian": torch.eye(5)}, r"hessian is .*\[5, 5\].* needed torch.float32 \[6, 6\]"),
        ({"frozen": torch.zeros(6, dtype=torch.bool)}, r"frozen is .*\[6\].* needed torch.bool \[4, 6\]"),
        ({"sweeps": 0}, "sweeps is 0, needed at least 1"),
    ],
)
def test_wrong_arguments_of_refinement(changes: dict, message: str) -> None:
    arguments = {
        "codes": torch.zeros(4, 6, dtype=torch.uint8),
        "residual": torch.zeros(4, 6),
        "hessian": torch.eye(6),
        "grid": make_grid(4, 6),
    }
    with pytest.raises(ValueError, match=message):
        refine_codes(**{**arguments, **changes})


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("weight", "factor", "scale", "zero") for value in (torch.nan, torch.inf)]
    + [("factor", 0.0), ("scale", 0.0)],
)
def test_values_that_are_not_finite_never_leave(
    monkeypatch: pytest.MonkeyPatch, native: str, name: str, value: float
) -> None:
    monkeypatch.setenv("BITWRIGHT_NATIVE", native)
    weight, factor, grid = make_weight(18, 6), make_factor(make_hessian(6)), make_grid(18, 6)
    grid = replace(grid, group=torch.zeros(6, dtype=torch.int32))
    where = {"weight": weight[17], "factor": factor[2, 2:], "scale": grid.scale[3], "zero": grid.zero[3]}
    where[name][:1] = value
    with pytest.raises(WeightError, match="NaN or Inf"):
        round_columns(weight, factor, grid)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    hessian = torch.full((6, 6), 1e38)
    codes = torch.zeros(4, 6, dtype=torch.uint8)
    with pytest.raises(WeightError, match="not finite"):
        refine_codes(codes, torch.full((4, 6), 1e10), hessian, make_grid(4, 6))
