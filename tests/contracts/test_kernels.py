"""Contract of kernels: `opcheck`, and the result of `QTensor.dequantize` in float64, over every layout.

Every kernel registered for a device is held to the same table; the reference is the first of them, the compiled
kernels for the CPU the second.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitwright.formats.native import PART_NAMES, pack
from bitwright.numeric.measure import sqnr_db, squared_error
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime import ops, reference
from bitwright.runtime.reference import PackedWeight

Make = Callable[..., QTensor]

SYMMETRIC, INT_ZERO, FLOAT_ZERO = {"symmetric": True}, {"zero": "int"}, {"zero": "float"}


def bilevel(kind: dict, axis: str, size: int, scale_bits: int, zero_bits: int | None = None) -> dict:
    return {**kind, "bilevel": {"axis": axis, "size": size, "scale_bits": scale_bits, "zero_bits": zero_bits}}


# (out, in), group size, kind of zero, share of outliers, their bits: whole and ragged groups and superblocks, one
# row, one column, more than one tile of outliers.
LAYOUTS = [
    ((8, 64), 32, INT_ZERO, 0.0, 16),
    ((8, 64), None, SYMMETRIC, 0.05, 16),
    ((5, 33), 16, FLOAT_ZERO, 0.1, 16),
    ((7, 19), 64, INT_ZERO, 0.3, 8),
    ((3, 300), 64, SYMMETRIC, 0.02, 8),
    ((1, 1), None, INT_ZERO, 0.0, 16),
    ((8, 64), 16, bilevel(FLOAT_ZERO, "row", 4, 3, 3), 0.05, 16),
    ((7, 33), 16, bilevel(FLOAT_ZERO, "row", 4, 6, 5), 0.05, 8),
    ((5, 19), 4, bilevel(INT_ZERO, "row", 2, 4), 0.0, 16),
    ((6, 40), 8, bilevel(SYMMETRIC, "row", 16, 8), 0.1, 8),
    ((4, 70), 8, bilevel(FLOAT_ZERO, "column", 4, 6, 6), 0.05, 16),
    ((3, 64), 4, bilevel(SYMMETRIC, "column", 16, 6), 0.0, 16),
    ((3, 35), 4, bilevel(FLOAT_ZERO, "column", 4, 4), 0.0, 16),
]
# SQNR in dB that a product of the type must reach. Weights are exact, so only the arithmetic of x and of the
# sum counts, whatever the bit width: 24, 11 and 8 significant bits, less a margin for the sum.
FLOORS_DB = {torch.float64: 280, torch.float32: 110, torch.float16: 55, torch.bfloat16: 40}


@pytest.fixture(params=["compiled", "reference", "reference in chunks"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run everything with each kernel, and the reference once more in chunks of a few rows."""
    if request.param == "compiled":
        assert ops.cpu_kernel() is not None
    else:
        monkeypatch.delitem(ops._linear_kernels, "cpu")
        monkeypatch.delitem(ops._embedding_kernels, "cpu")
    if request.param == "reference in chunks":
        monkeypatch.setattr(reference, "_CHUNK", 40)


def packed(q: QTensor) -> PackedWeight:
    return PackedWeight.of(pack(q), q.spec, q.shape[1])


def arguments(weight: PackedWeight) -> tuple[list[Tensor | None], list]:
    tensors = [getattr(weight, name) for name in PART_NAMES]
    return tensors, [weight.bits, weight.group_size, weight.in_features, list(weight.bilevel)]


def sqnr(expected: Tensor, result: Tensor) -> float:
    return sqnr_db(*squared_error(expected, result))


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_linear(make_qtensor: Make, bits: int, layout: tuple) -> None:
    shape, group_size, kind, share, value_bits = layout
    q = make_qtensor(shape, WeightSpec(bits=bits, group_size=group_size, **kind), share, bits, value_bits)
    weight, bias = packed(q), torch.randn(shape[0])
    for dtype, floor_db in FLOORS_DB.items():
        for batch in ((), (3,), (2, 0), (2, 1, 4)):
            x = torch.randn(*batch, shape[1]).to(dtype)
            expected = x.double() @ q.dequantize().double().T + bias.double()
            result = ops.linear(x, weight, bias)
            assert result.dtype == dtype
            assert result.shape == expected.shape
            assert sqnr(expected, result) > floor_db


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_embedding(make_qtensor: Make, bits: int, layout: tuple) -> None:
    shape, group_size, kind, share, value_bits = layout
    q = make_qtensor(shape, WeightSpec(bits=bits, group_size=group_size, **kind), share, bits, value_bits)
    for ids in (
        torch.randint(shape[0], (2, 5)),
        torch.tensor(0, dtype=torch.int32),
        torch.empty(0, 2).long(),
    ):
        for dtype in FLOORS_DB:
            result = ops.embedding(ids, packed(q), dtype)
            assert torch.equal(result, q.dequantize()[ids.long()].to(dtype))
    assert torch.equal(reference.dequantize(packed(q), torch.float32), q.dequantize())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [2, 8])
def test_spec_is_read_off_the_tensors(make_qtensor: Make, bits: int, layout: tuple) -> None:
    shape, group_size, kind, share, value_bits = layout
    q = make_qtensor(shape, WeightSpec(bits=bits, group_size=group_size, **kind), share, bits, value_bits)
    weight = packed(q)
    assert weight.spec == q.spec.model_copy(update={"group_size": q.spec.group_width(shape[1])})
    assert torch.equal(weight.grid().scale, q.grid.scale)
    assert torch.equal(weight.grid().zero, q.grid.zero)
    assert (weight.outliers() is None) == (q.outliers is None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [3])
def test_opcheck(make_qtensor: Make, bits: int, layout: tuple) -> None:
    shape, group_size, kind, share, value_bits = layout
    q = make_qtensor(shape, WeightSpec(bits=bits, group_size=group_size, **kind), share, bits, value_bits)
    tensors, sizes = arguments(packed(q))
    for bias in (None, torch.randn(shape[0])):
        x = torch.randn(2, shape[1])
        torch.library.opcheck(torch.ops.bitwright.linear.default, (x, *tensors, bias, *sizes))
    ids = torch.randint(shape[0], (2, 3))
    torch.library.opcheck(torch.ops.bitwright.embedding.default, (ids, *tensors, *sizes, torch.bfloat16))
