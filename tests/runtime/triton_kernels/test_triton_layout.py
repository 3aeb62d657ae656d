"""The kernels' layout against a decoder that follows its description place by place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.native import pack
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime import ops, reference
from bitwright.runtime.reference import PackedWeight
from bitwright.runtime.triton.layout import PLANES, TritonWeight, high_position, supports

Make = Callable[..., QTensor]

LEVELS = {"zero": "float", "bilevel": {"axis": "row", "size": 32, "scale_bits": 3, "zero_bits": 4}}
COLUMN_LEVELS = {"zero": "float", "bilevel": {"axis": "column", "size": 8, "scale_bits": 6, "zero_bits": 6}}
KINDS = {
    "symmetric": ({"symmetric": True}, 16),
    "int zeros": ({"zero": "int"}, 48),
    "float zeros": ({"zero": "float", "scale_dtype": "bfloat16"}, None),
    "levels": (LEVELS, 16),
    "decoded levels": (COLUMN_LEVELS, 32),
}


def packed(q: QTensor) -> PackedWeight:
    return PackedWeight.of(pack(q), q.spec, q.shape[1])


def field(plane: Tensor, row: int, unit: int, position: int, bits: int) -> int:
    """`bits` bits from `position` of the stream that the words of a unit are."""
    words = plane[row // 16, unit * bits : (unit + 1) * bits, row % 16].tolist()
    stream = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return stream >> position & (1 << bits) - 1


def decoded(weight: TritonWeight) -> tuple[Tensor, Tensor]:
    """Codes, and weights in float32."""
    low_bits, high_bits = PLANES[weight.bits]
    codes = torch.zeros(weight.out_features, weight.in_features)
    values = torch.zeros_like(codes)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            unit, inner = divmod(column, 32)
            code = field(weight.low, row, unit, inner * low_bits, low_bits)
            if weight.high is not None:
                place = high_position(inner, low_bits, high_bits)
                code |= field(weight.high, row, unit, place, high_bits) << low_bits
            codes[row, column] = code
            at = (row // 16, column // weight.group_width, row % 16)
            scale = weight.scale[at].float()
            zero = torch.tensor(2.0 ** (weight.bits - 1)) if weight.zero is None else weight.zero[at].float()
            if weight.statistics is not None:
                s = weight.statistics[at[:2]].float()
                both = int(weight.scale[at])
                scale, zero = s[0] + s[1] * (both & 15), s[2] + s[3] * (both >> 4)
            values[row, column] = scale * (code - zero)
    if weight.slot_start is not None:
        start = weight.slot_start.tolist()
        for tile in range(weight.tiles):
            for slot in range(start[tile], start[tile + 1]):
                for row in range(min(16, weight.out_features - 16 * tile)):
                    value = weight.slot_value[slot, row].float()
                    step = 1.0 if weight.step is None else weight.step[16 * tile + row].float()
                    values[16 * tile + row, int(weight.slot_column[slot, row]) & 0xFFFF] += step * value
    return codes, values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_layout_holds_exactly_the_weight(make_qtensor: Make, bits: int, kind: str) -> None:
    options, group_size = KINDS[kind]
    spec = WeightSpec(bits=bits, group_size=group_size, **options)
    q = make_qtensor((19, 77), spec, 0.03, seed=bits, value_bits=8 if bits % 2 else 16)
    codes, values = decoded(TritonWeight.of(packed(q)))
    assert torch.equal(codes, q.codes.float())
    assert torch.equal(values, q.dequantize())


def test_codes_take_their_bits_and_levels_stay_packed(make_qtensor: Make) -> None:
    q = make_qtensor((64, 256), WeightSpec(bits=3, group_size=16, **LEVELS))
    weight = TritonWeight.of(packed(q))
    assert weight.bytes * 8 / (64 * 256) == 3 + 8 / 16 + 4 * 16 / (16 * 16)
    assert TritonWeight.of(packed(make_qtensor((64, 256), WeightSpec(bits=7, group_size=64)))).low.numel() == 64 * 64


def test_high_fields_fill_their_words() -> None:
    for low_bits, high_bits in {planes for planes in PLANES.values() if planes[1]}:
        places = sorted(high_position(column, low_bits, high_bits) for column in range(32))
        assert places == list(range(0, 32 * high_bits, high_bits))


def test_what_has_no_layout(make_qtensor: Make) -> None:
    assert not supports(packed(make_qtensor((3, 100), WeightSpec(bits=4, group_size=24))))
    assert supports(packed(make_qtensor((3, 100), WeightSpec(bits=4, group_size=None))))
    weight = packed(make_qtensor((3, 100), WeightSpec(bits=4, group_size=32)))
    weight.weight_scale[0, 0] = float("nan")
    with pytest.raises(FormatError, match="NaN"):
        TritonWeight.of(weight)


def test_without_triton_the_reference_serves(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ops._triton_kernel.cache_clear()
    weight = packed(make_qtensor((5, 64), WeightSpec(bits=4, group_size=32)))
    x, ids = torch.randn(2, 64), torch.tensor([3, 0])
    assert torch.equal(ops._cuda_linear(x, weight, None), reference.linear(x, weight, None))
    assert torch.equal(ops._cuda_embedding(ids, weight, x.dtype), reference.embedding(ids, weight, x.dtype))
    ops._triton_kernel.cache_clear()
