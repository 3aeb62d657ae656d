"""Second levels: decoding against Python numbers, cutting and joining, what a spec allows."""

import pytest
import torch
from pydantic import ValidationError

from bitwright.errors import FormatError
from bitwright.numeric.bilevel import SecondLevel
from bitwright.numeric.grid import Grid
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec


def spec_of(axis: str, size: int, zero_bits: int | None = 5, symmetric: bool = False) -> WeightSpec:
    level = {"axis": axis, "size": size, "scale_bits": 6, "zero_bits": None if symmetric else zero_bits}
    kind = {"symmetric": True} if symmetric else {"zero": "float" if zero_bits else "int"}
    return WeightSpec.model_validate({"bits": 4, "group_size": 4, "bilevel": level, **kind})


SPECS = [
    *(spec_of(axis, size, zero_bits) for axis in ("row", "column") for size in (1, 4, 99) for zero_bits in (5, None)),
    *(spec_of(axis, 4, symmetric=True) for axis in ("row", "column")),
]


def slow_decode(levels: SecondLevel, spec: WeightSpec, row: int, group: int) -> tuple[float, float | None]:
    """Scale and zero of one group with Python's floats."""
    bilevel = spec.bilevel
    assert bilevel is not None
    is_row = bilevel.axis == "row"
    place = (row // bilevel.size, group) if is_row else (row, group // bilevel.size)
    statistics = levels.statistics[place].tolist()
    code = int(levels.scale_codes[row, group])
    zero_code = None if levels.zero_codes is None else int(levels.zero_codes[row, group])
    if is_row:
        scale = statistics[0] + statistics[1] * code
        return scale, None if zero_code is None else statistics[2] + statistics[3] * zero_code
    scale = statistics[0] * (code - (32 if spec.symmetric else 0))
    return scale, None if zero_code is None else statistics[1] * zero_code / scale


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
def test_decode(make_qtensor, spec: WeightSpec) -> None:
    q = make_qtensor((9, 23), spec)
    levels = q.grid.levels
    assert q.validate("w") is q
    for row in range(9):
        for group in range(6):
            scale, zero = slow_decode(levels, spec, row, group)
            assert q.grid.scale[row, group].item() == pytest.approx(scale, rel=1e-6)
            if zero is not None:
                assert q.grid.zero[row, group].item() == pytest.approx(zero, rel=1e-6)


def test_a_fused_multiply_add_gives_the_same_scale(make_qtensor) -> None:
    """Products of 16-bit statistics and codes are exact in float32: float64 rounds once, as a fused kernel does."""
    for dtype in ("float16", "bfloat16"):
        spec = spec_of("row", 4).model_copy(update={"scale_dtype": dtype})
        q = make_qtensor((64, 64), spec)
        exact = SecondLevel(q.grid.levels.scale_codes, None, q.grid.levels.statistics.double()).decode(spec)[0]
        assert torch.equal(exact.float(), q.grid.scale)


@pytest.mark.parametrize("spec", SPECS, ids=WeightSpec.label)
def test_any_rows_decode_alike(make_qtensor, spec: WeightSpec) -> None:
    q = make_qtensor((11, 23), spec, 0.1, value_bits=8)
    for rows in (slice(0, 11), slice(4, 8), slice(8, 11), slice(0, 4), slice(3, 7), slice(2, 11), slice(5, None)):
        part = q.rows(rows)
        assert torch.equal(part.dequantize(), q.dequantize()[rows])
        assert part.validate("part") is part
        start, stop, _ = rows.indices(11)
        aligned = start % spec.row_multiple == 0 and (stop % spec.row_multiple == 0 or stop == 11)
        assert (part.spec == spec) == aligned
        assert (part.grid.levels is not None) == aligned


@pytest.mark.parametrize("spec", [spec_of("row", 4), spec_of("column", 4), spec_of("column", 4, None)])
def test_grids_join_again(make_qtensor, spec: WeightSpec) -> None:
    grid = make_qtensor((11, 23), spec).grid
    whole = [grid.rows(slice(0, 8)), grid.rows(slice(8, 11))]
    assert_same(Grid.concatenate(whole), grid)
    if spec.row_multiple > 1:
        with pytest.raises(ValueError, match=r"\[3, 8\] rows cut through superblocks of 4"):
            Grid.concatenate([make_qtensor((3, 23), spec).grid, grid.rows(slice(0, 8))])


def test_groups_join_again(make_qtensor) -> None:
    for spec, widths in ((spec_of("row", 4), (4, 8, 11)), (spec_of("column", 4), (16, 16, 7))):
        parts = [make_qtensor((9, width), spec, seed=width).grid for width in widths]
        joined = Grid.concatenate_groups(parts)
        codes = [torch.randint(16, (9, width), dtype=torch.uint8) for width in widths]
        apart = torch.cat([part.decode(code) for part, code in zip(parts, codes, strict=True)], dim=1)
        assert torch.equal(joined.decode(torch.cat(codes, dim=1)), apart)
        assert QTensor(torch.cat(codes, dim=1), joined).validate("w").spec == spec
    with pytest.raises(ValueError, match="groups cut through superblocks of 4"):
        Grid.concatenate_groups([parts[2], parts[0]])


def assert_same(left: Grid, right: Grid) -> None:
    assert left.spec == right.spec
    assert torch.equal(left.scale, right.scale)
    assert torch.equal(left.zero, right.zero)
    for one, other in zip(vars(left.levels).values(), vars(right.levels).values(), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_specs() -> None:
    spec = WeightSpec.model_validate(
        {
            "bits": 4,
            "group_size": 16,
            "zero": "float",
            "bilevel": {"axis": "row", "size": 16, "scale_bits": 3, "zero_bits": 3},
        }
    )
    assert spec.label() == "w4g16-asym-fzero-b16r3/3"
    assert (spec.row_multiple, spec.group_multiple) == (16, 1)
    assert spec.one_level.label() == "w4g16-asym-fzero"
    assert spec.one_level.scale_dtype == "float32"
    assert spec.one_level.one_level == spec.one_level
    column = spec_of("column", 8, None)
    assert column.label() == "w4g4-asym-b8c6"
    assert (column.row_multiple, column.group_multiple) == (1, 8)
    assert WeightSpec(bits=4).row_multiple == WeightSpec(bits=4).group_multiple == 1
    with pytest.raises(ValidationError, match="needs zero='float'"):
        WeightSpec(bits=4, bilevel=Bilevel(axis="row", size=2, scale_bits=3, zero_bits=3))
    with pytest.raises(ValidationError, match="needs zero='float'"):
        WeightSpec(bits=4, symmetric=True, bilevel=Bilevel(axis="row", size=2, scale_bits=3, zero_bits=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_codes": torch.full((2, 3), 64, dtype=torch.uint8)}, "reach 64, needed 6 bits"),
        ({"scale_codes": torch.zeros(2, 4, dtype=torch.uint8)}, "scale_codes are"),
        ({"zero_codes": None}, "zero_codes do not agree"),
        ({"zero_codes": torch.zeros(2, 3)}, "zero_codes are torch.float32"),
        ({"statistics": torch.ones(1, 3, 2)}, "statistics have shape"),
        ({"statistics": torch.full((1, 3, 4), torch.nan)}, "NaN"),
        ({"statistics": torch.zeros(1, 3, 4)}, "scale of 0"),
    ],
)
def test_impossible_levels(make_qtensor, changes: dict, message: str) -> None:
    spec = spec_of("row", 4)
    parts = {**vars(make_qtensor((2, 12), spec).grid.levels), **changes}
    with pytest.raises(FormatError, match=message):
        SecondLevel(**parts).validate("w", (2, 3), spec)
