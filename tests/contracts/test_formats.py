"""Contract of formats: an exact round trip for every bit width, group, kind of zero and ragged shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.formats import native
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec

SCALE_DTYPES = ("float16", "bfloat16", "float32")
SPECS = st.builds(
    lambda bits, group_size, kind, dtype: WeightSpec(
        bits=bits,
        group_size=group_size,
        symmetric=kind == "symmetric",
        zero="float" if kind == "float" else "int",
        scale_dtype=dtype,
    ),
    st.integers(2, 8),
    st.one_of(st.none(), st.integers(1, 40)),
    st.sampled_from(("int", "float", "symmetric")),
    st.sampled_from(SCALE_DTYPES),
)


def assert_equal(left: QTensor, right: QTensor) -> None:
    assert left.spec == right.spec
    assert torch.equal(left.codes, right.codes)
    assert torch.equal(left.grid.scale, right.grid.scale)
    assert torch.equal(left.grid.zero, right.grid.zero)
    assert (left.outliers is None) == (right.outliers is None or right.outliers.count == 0)
    assert torch.equal(left.dequantize(), right.dequantize())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(SPECS, st.integers(1, 9), st.integers(1, 70), st.sampled_from((0.0, 0.02, 0.5)), st.integers(0, 2**31))
def test_native_round_trip(
    make_qtensor: Callable[..., QTensor], spec: WeightSpec, rows: int, columns: int, share: float, seed: int
) -> None:
    q = make_qtensor((rows, columns), spec, share, seed)
    assert_equal(native.unpack("weight", native.pack(q), native.TensorEntry.of(q)), q)


@pytest.mark.parametrize("bits", range(2, 9))
def test_native_is_deterministic(make_qtensor: Callable[..., QTensor], bits: int) -> None:
    q = make_qtensor((4, 33), WeightSpec(bits=bits, group_size=8), 0.1)
    first, second = native.pack(q), native.pack(q)
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)
