"""Contract of kernels: `opcheck`, and the result of `QTensor.dequantize` in float64, over every layout.

Every kernel registered for a device is held to the same table; the reference is the first of them.
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
# (out, in), group size, kind of zero, share of outliers: whole and ragged groups, one row, one column.
LAYOUTS = [
    ((8, 64), 32, INT_ZERO, 0.0),
    ((8, 64), None, SYMMETRIC, 0.05),
    ((5, 33), 16, FLOAT_ZERO, 0.1),
    ((7, 19), 64, INT_ZERO, 0.3),
    ((1, 1), None, INT_ZERO, 0.0),
]
# SQNR in dB that a product of the type must reach. Weights are exact, so only the arithmetic of x and of the
# sum counts, whatever the bit width: 24, 11 and 8 significant bits, less a margin for the sum.
FLOORS_DB = {torch.float64: 280, torch.float32: 110, torch.float16: 55, torch.bfloat16: 40}


@pytest.fixture(params=[None, 40], ids=["whole", "chunked"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run everything once more in chunks of a few rows."""
    if request.param is not None:
        monkeypatch.setattr(reference, "_CHUNK", request.param)


def packed(q: QTensor) -> PackedWeight:
    stored = pack(q)
    spec, columns = q.spec, q.shape[1]
    return PackedWeight(*(stored.get(name) for name in PART_NAMES), spec.bits, spec.group_width(columns), columns)


def arguments(weight: PackedWeight) -> tuple[list[Tensor | None], list[int]]:
    tensors = [getattr(weight, name) for name in PART_NAMES]
    return tensors, [weight.bits, weight.group_size, weight.in_features]


def sqnr(expected: Tensor, result: Tensor) -> float:
    return sqnr_db(*squared_error(expected, result))


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_linear(make_qtensor: Make, bits: int, layout: tuple) -> None:
    shape, group_size, kind, share = layout
    q = make_qtensor(shape, WeightSpec(bits=bits, group_size=group_size, **kind), share, bits)
    weight, bias = packed(q), torch.randn(shape[0])
    for dtype, floor_db in FLOORS_DB.items():
        for batch in ((), (3,), (2, 0), (2, 1, 4)):
            x = torch.randn(*batch, shape[1]).to(dtype)
            expected = x.double() @ q.dequantize().double().T + bias.double()
            result = ops.linear(x, weight, bias)
            assert result.dtype == dtype
            assert result.shape == expected.shape
            assert sqnr(expected, result) > floor_db


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_embedding(make_qtensor: Make, bits: int, layout: tuple) -> None:
    shape, group_size, kind, share = layout
    q = make_qtensor(shape, WeightSpec(bits=bits, group_size=group_size, **kind), share, bits)
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
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_opcheck(make_qtensor: Make, bits: int, layout: tuple) -> None:
    shape, group_size, kind, share = layout
    q = make_qtensor(shape, WeightSpec(bits=bits, group_size=group_size, **kind), share, bits)
    tensors, sizes = arguments(packed(q))
    for bias in (None, torch.randn(shape[0])):
        torch.library.opcheck(torch.ops.bitwright.linear.default, (torch.randn(2, shape[1]), *tensors, bias, *sizes))
    ids = torch.randint(shape[0], (2, 3))
    torch.library.opcheck(torch.ops.bitwright.embedding.default, (ids, *tensors, *sizes, torch.bfloat16))
