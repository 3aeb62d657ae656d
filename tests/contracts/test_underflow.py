"""Weights of any size come out as well as ordinary ones, or are refused with a remedy that works: never as zeros."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from bitwright.errors import WeightError
from bitwright.journey import process_row
from bitwright.method import Method
from bitwright.numeric.outliers import NoOutliers, NSigma
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.ranges import RANGES, MseAdam
from bitwright.recipe import load_recipe
from bitwright.rows import Row

SPECS = {
    "integer zeros": WeightSpec(bits=4, group_size=32),
    "symmetric": WeightSpec(bits=3, group_size=32, symmetric=True),
    "float zeros": WeightSpec(bits=4, group_size=32, zero="float"),
    "rows of 8 bits": WeightSpec(bits=8),
    "two levels along rows": WeightSpec(
        bits=3, group_size=16, zero="float", bilevel=Bilevel(axis="row", size=16, scale_bits=3, zero_bits=3)
    ),
    "two levels along columns": WeightSpec(
        bits=4, group_size=16, symmetric=True, bilevel=Bilevel(axis="column", size=4, scale_bits=6)
    ),
}
FACTORS = (1e-5, 1e-7, 1e-9, 1e-12, 1e-20)
ALLOWED_DB = 8.0  # twice the step is 6 dB, and ranges gain some by clipping
ENOUGH_DB = 25.0
REFUSAL = r"^block\.up\.weight: .*use (--set scale_dtype=bfloat16 )?.*--set keep=block\.up --set kept_dtype=source"
# MseAdam takes steps of a fixed size, as published: small scales are beyond it.
SCALE_FREE = [kind for kind in RANGES if kind is not MseAdam]


def result(weight: Tensor, spec: WeightSpec, method: Method) -> float:
    row = Row("block.up.weight", tuple(weight.shape), torch.float32, "quantize", "default", 0, spec=spec, method=method)
    found = process_row(row, weight, {}).record["sqnr_db"]
    assert isinstance(found, float)
    return found


def attempt(weight: Tensor, spec: WeightSpec, method: Method) -> float | str:
    """The SQNR in dB, or the message of the refusal."""
    try:
        return result(weight, spec, method)
    except WeightError as error:
        return str(error)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("outliers", [NoOutliers(), NSigma(n=2.5)], ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("settings", SCALE_FREE, ids=lambda kind: kind.__name__)
def test_small_weights(weight: Tensor, settings: type, name: str, outliers: NoOutliers | NSigma) -> None:
    method = load_recipe("rtn", "w4a16").method
    assert method is not None
    method = method.model_copy(update={"range": settings(), "outliers": outliers})
    for scale_dtype in ("float16", "bfloat16"):
        spec = SPECS[name].model_copy(update={"scale_dtype": scale_dtype})
        ordinary, refused = result(weight, spec, method), []
        for factor in FACTORS:
            found = attempt(weight * factor, spec, method)
            if isinstance(found, str):
                assert re.search(REFUSAL, found)
                refused.append(factor)
            else:
                assert found > min(ordinary - ALLOWED_DB, ENOUGH_DB), (factor, scale_dtype)
        if scale_dtype == "float16":
            assert 1e-12 in refused
        if isinstance(outliers, NoOutliers) and scale_dtype == "bfloat16":
            assert not refused


def test_nothing_but_zeros_is_refused(weight: Tensor) -> None:
    method = load_recipe("rtn", "w4a16").method
    assert method is not None
    message = attempt(weight * 1e-5, SPECS["integer zeros"], method.model_copy(update={"range": MseAdam()}))
    assert isinstance(message, str)
    assert "decodes to zero" in message


def test_rows_of_almost_nothing_are_no_loss(weight: Tensor) -> None:
    """Dead channels of an ordinary matrix: their weights become zeros, and nothing is lost."""
    method = load_recipe("rtn", "w4a16").method
    assert method is not None
    dead = weight.clone()
    dead[::2] *= 1e-12
    spec = SPECS["integer zeros"]
    assert result(dead, spec, method) > result(weight, spec, method) - 1


@pytest.mark.parametrize(("values", "refused"), [(1e-9, True), (1e-3, False)])
def test_kept_tensors_too_small_for_float16(values: float, refused: bool) -> None:
    row = Row("head.weight", (8, 8), torch.float32, "keep", "default", 0, stored_dtype=torch.float16)
    if refused:
        with pytest.raises(WeightError, match=r"head\.weight: .* too small for float16; use --set kept_dtype=bfloat16"):
            process_row(row, torch.full((8, 8), values), {})
    else:
        process_row(row, torch.full((8, 8), values), {})
