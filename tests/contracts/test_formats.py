"""Contract of formats: an exact round trip for every bit width, group, kind of zero and ragged shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.formats import native
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec

SCALE_DTYPES = ("float16", "bfloat16", "float32")


def build_spec(bits: int, group_size: int | None, kind: str, dtype: str, level: tuple | None) -> WeightSpec:
    bilevel = None
    if level is not None:
        axis, size, scale_bits, zero_bits = level
        bilevel = {"axis": axis, "size": size, "scale_bits": scale_bits}
        bilevel["zero_bits"] = zero_bits if kind == "float" else None
    return WeightSpec.model_validate(
        {
            "bits": bits,
            "group_size": group_size,
            "symmetric": kind == "symmetric",
            "zero": "float" if kind == "float" else "int",
            "scale_dtype": dtype,
            "bilevel": bilevel,
        }
    )


LEVELS = st.tuples(
    st.sampled_from(("row", "column")),
    st.integers(1, 9),
    st.integers(2, 8),
    st.one_of(st.none(), st.integers(2, 8)),
)
SPECS = st.builds(
    build_spec,
    st.integers(2, 8),
    st.one_of(st.none(), st.integers(1, 40)),
    st.sampled_from(("int", "float", "symmetric")),
    st.sampled_from(SCALE_DTYPES),
    st.one_of(st.none(), LEVELS),
)


def assert_equal(left: QTensor, right: QTensor) -> None:
    assert left.spec == right.spec
    assert torch.equal(left.codes, right.codes)
    assert torch.equal(left.grid.scale, right.grid.scale)
    assert torch.equal(left.grid.zero, right.grid.zero)
    assert (left.outliers is None) == (right.outliers is None or right.outliers.count == 0)
    assert torch.equal(left.dequantize(), right.dequantize())
    for one, other in ((left.grid.levels, right.grid.levels), (left.outliers, right.outliers)):
        if one is not None and other is not None:
            for value, same in zip(vars(one).values(), vars(other).values(), strict=True):
                assert (value is None and same is None) or torch.equal(value, same)


@settings(derandomize=True, max_examples=120, deadline=None)
@given(
    SPECS,
    st.tuples(st.integers(1, 19), st.integers(1, 70)),
    st.sampled_from((0.0, 0.02, 0.5)),
    st.sampled_from((8, 16)),
    st.integers(0, 2**31),
)
def test_native_round_trip(
    make_qtensor: Callable[..., QTensor],
    spec: WeightSpec,
    shape: tuple[int, int],
    share: float,
    value_bits: int,
    seed: int,
) -> None:
    q = make_qtensor(shape, spec, share, seed, value_bits)
    entry = native.TensorEntry.of(q)
    packed = native.pack(q)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == native.parts(entry)
    assert_equal(native.unpack("weight", packed, entry), q)
    again = native.read_quantization_config(native.quantization_config({"weight": entry}))
    assert again == {"weight": entry}


@pytest.mark.parametrize("bits", range(2, 9))
def test_native_is_deterministic(make_qtensor: Callable[..., QTensor], bits: int) -> None:
    level = Bilevel(axis="row", size=3, scale_bits=3, zero_bits=3)
    q = make_qtensor((4, 33), WeightSpec(bits=bits, group_size=8, zero="float", bilevel=level), 0.1, value_bits=8)
    first, second = native.pack(q), native.pack(q)
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)
