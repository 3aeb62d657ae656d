"""The operators: checks before any kernel, the seam for kernels, compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bitwright.errors import FormatError
from bitwright.formats.native import pack
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.runtime import ops, reference
from bitwright.runtime.reference import PackedWeight


@pytest.fixture(scope="module")
def weight(make_qtensor: Callable[..., QTensor]) -> PackedWeight:
    """A 6x24 matrix, 3 bits in groups of 8, with outliers."""
    q = make_qtensor((6, 24), WeightSpec(bits=3, group_size=8), 0.2)
    return PackedWeight.of(pack(q), q.spec, 24)


@pytest.fixture(scope="module")
def two_level(make_qtensor: Callable[..., QTensor]) -> PackedWeight:
    """A 6x24 matrix, 3 bits in groups of 8, 2x4 superblock statistics, 8-bit outliers."""
    level = Bilevel(axis="row", size=3, scale_bits=3, zero_bits=4)
    q = make_qtensor((6, 24), WeightSpec(bits=3, group_size=8, zero="float", bilevel=level), 0.2, value_bits=8)
    return PackedWeight.of(pack(q), q.spec, 24)


@pytest.fixture
def _restore_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_linear_kernels", dict(ops._linear_kernels))
    monkeypatch.setattr(ops, "_embedding_kernels", dict(ops._embedding_kernels))


def test_wrong_inputs(weight: PackedWeight) -> None:
    x = torch.randn(2, 24)
    for wrong in (x[:, :23], x.long(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"needed floats \[\.\.\., 24\]"):
            ops.linear(wrong, weight)
    with pytest.raises(ValueError, match=r"bias is \[5\] on cpu, needed \[6\] on cpu"):
        ops.linear(x, weight, torch.zeros(5))
    with pytest.raises(ValueError, match="is on cpu, needed meta as the input"):
        ops.linear(x.to("meta"), weight)
    with pytest.raises(ValueError, match="needed int32 or int64"):
        ops.embedding(x, weight, torch.float32)
    for row in (6, -1):
        with pytest.raises(IndexError):
            ops.embedding(torch.tensor([row]), weight, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": 25}, "weight_scale: found"),
        ({"bits": 4}, "weight_zero: found"),
        ({"bits": 5}, "weight_packed: found"),
        ({"group_size": 4}, "weight_scale: found"),
        ({"weight_packed": torch.zeros(6, dtype=torch.int32)}, "1 axes"),
        ({"weight_packed": torch.zeros(6, 3)}, "weight_packed: found torch.float32"),
        ({"weight_packed": torch.zeros(3, 6, dtype=torch.int32).T}, "contiguous"),
        ({"weight_scale": torch.ones(6, 3, dtype=torch.float64)}, "scales of torch.float64"),
        ({"weight_scale": None}, "scales of None"),
        ({"weight_zero": torch.zeros(6, 3)}, "weight_zero: found torch.float32"),
        ({"outlier_counts": None}, "outlier_counts: missing"),
        ({"outlier_val": None}, "unknown"),
        ({"outlier_step": torch.ones(6).half()}, "outlier_val: found torch.float16"),
        ({"scale_codes": torch.zeros(2, dtype=torch.int32)}, "scale_codes: unknown"),
        ({"bilevel": (0, 3, 3, 0)}, "scales of None"),
        ({"bilevel": (0, 3)}, r"bilevel \[0, 3\]"),
    ],
)
def test_wrong_weights_are_refused_before_any_kernel(weight: PackedWeight, changes: dict, message: str) -> None:
    wrong = replace(weight, **changes)
    with pytest.raises(FormatError, match=message):
        ops.linear(torch.randn(2, wrong.in_features), wrong)
    with pytest.raises(FormatError, match=message):
        ops.embedding(torch.tensor([0]), wrong, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bilevel": (0, 2, 3, 4)}, r"superblock_statistics: found torch.float16 \[2, 3, 4\]"),
        ({"bilevel": (1, 3, 3, 4)}, "superblock_statistics: found"),
        ({"bilevel": (2, 3, 3, 4)}, "bilevel"),
        ({"bilevel": (0, 3, 9, 4)}, "scale_bits"),
        ({"bilevel": (0, 3, 8, 4)}, "scale_codes: found"),
        ({"bilevel": (0, 3, 3, 0)}, "zero_codes: unknown"),
        ({"bilevel": ()}, "scales of None"),
        ({"zero_codes": None}, "symmetric|zero_bits"),
        ({"outlier_step": None}, "outlier_val: found torch.int8"),
        ({"superblock_statistics": None}, "scales of None"),
    ],
)
def test_wrong_second_levels_are_refused(two_level: PackedWeight, changes: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        ops.linear(torch.randn(2, 24), replace(two_level, **changes))


@pytest.mark.usefixtures("_restore_kernels")
def test_a_registered_kernel_takes_over_and_gives_back(weight: PackedWeight) -> None:
    x, ids = torch.randn(2, 24), torch.tensor([1])
    ops.set_linear_kernel("cpu", lambda x, weight, bias: reference.linear(x, weight, bias) + 1)
    ops.set_embedding_kernel("cpu", lambda ids, weight, dtype: reference.embedding(ids, weight, dtype) + 1)
    assert torch.equal(ops.linear(x, weight), reference.linear(x, weight, None) + 1)
    assert torch.equal(ops.embedding(ids, weight, torch.float32), reference.embedding(ids, weight, torch.float32) + 1)
    ops.set_linear_kernel("cpu", None)
    assert torch.equal(ops.linear(x, weight), reference.linear(x, weight, None))


def test_no_silent_gradient(weight: PackedWeight) -> None:
    x = torch.randn(2, 24, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no backward"):
        ops.linear(x, weight).sum().backward()


@pytest.mark.parametrize("name", ["weight", "two_level"])
def test_compiles_as_one_graph(name: str, request: pytest.FixtureRequest) -> None:
    weight = request.getfixturevalue(name)

    def function(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return ops.linear(torch.relu(x), weight).sum() + ops.embedding(ids, weight, x.dtype)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for batch in (1, 3):
        x, ids = torch.randn(batch, 24), torch.randint(6, (batch,))
        assert torch.equal(compiled(x, ids), function(x, ids))
