"""GGUF blocks: every type's bytes by hand, round trips through the gguf package, and which grid fits which type."""

from __future__ import annotations

from collections.abc import Callable

import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from bitwright.errors import FormatError
from bitwright.formats import native
from bitwright.formats.gguf import TYPES, decode, dequantized, encode, gguf_type, rounded_type, tolerance
from bitwright.formats.gguf_blocks import Blocks, pack_blocks, unpack_blocks
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec

Make = Callable[..., QTensor]
K4 = Bilevel(axis="column", size=8, scale_bits=6, zero_bits=6)
# fp16 of 1.5, -0.25 as the file has them
D, M = bytes.fromhex("003e"), bytes.fromhex("00b4")


def ramp(count: int, bits: int) -> np.ndarray:
    """Codes 0, 7, 14, ... modulo 2**bits: no two neighbouring nibbles or bit planes are alike."""
    return (np.arange(count) * 7 % (1 << bits)).astype(np.uint8)


def by_definition(name: str) -> bytes:
    """The bytes of one block of `ramp` codes, written out bit by bit from ggml's structures."""
    found = TYPES[name]
    q = [int(code) for code in ramp(found.weights, found.bits)]
    groups = found.weights // found.group
    sc = [int(code) for code in ramp(groups, found.scale_bits or 1) ^ 1]
    mc = [int(code) for code in ramp(groups, found.scale_bits or 1) ^ 2]
    nibbles = bytes(q[j] & 15 | (q[j + 16] & 15) << 4 for j in range(16)) if found.weights == 32 else b""
    fifth = sum((code >> 4) << j for j, code in enumerate(q)).to_bytes(32, "little")[:4] if found.bits == 5 else b""
    if name in ("Q4_0", "Q5_0"):
        return D + fifth + nibbles
    if name in ("Q4_1", "Q5_1"):
        return D + M + fifth + nibbles
    if name == "Q8_0":
        return D + bytes((code - 128) % 256 for code in q)
    twos = bytearray(64)
    for i, code in enumerate(q):
        twos[i // 128 * 32 + i % 32] |= (code & 3) << 2 * (i % 128 // 32)
    if name == "Q2_K":
        return bytes(s | m << 4 for s, m in zip(sc, mc, strict=True)) + bytes(twos) + D + M
    if name == "Q3_K":
        mask = bytearray(32)
        for i, code in enumerate(q):
            mask[i % 32] |= (code >> 2) << i // 32
        scales = bytearray(12)
        for i, code in enumerate(sc):
            scales[i % 8] |= (code & 15) << 4 * (i // 8)
            scales[8 + i % 4] |= (code >> 4) << 2 * (i // 4)
        return bytes(mask) + bytes(twos) + bytes(scales) + D
    if name == "Q6_K":
        low, high = bytearray(128), bytearray(64)
        for i, code in enumerate(q):
            low[i // 128 * 64 + i % 64] |= (code & 15) << 4 * (i % 128 // 64)
            high[i // 128 * 32 + i % 32] |= (code >> 4) << 2 * (i % 128 // 32)
        return bytes(low) + bytes(high) + bytes((code - 128) % 256 for code in sc) + D
    scales = bytearray(12)
    for i in range(4):
        scales[i] = sc[i] | (sc[i + 4] >> 4) << 6
        scales[4 + i] = mc[i] | (mc[i + 4] >> 4) << 6
        scales[8 + i] = (sc[i + 4] & 15) | (mc[i + 4] & 15) << 4
    low, high = bytearray(128), bytearray(32)
    for i, code in enumerate(q):
        low[i // 64 * 32 + i % 32] |= (code & 15) << 4 * (i % 64 // 32)
        high[i % 32] |= (code >> 4) << i // 32
    return D + M + bytes(scales) + (bytes(high) if name == "Q5_K" else b"") + bytes(low)


def ramp_block(name: str) -> Blocks:
    found = TYPES[name]
    groups = found.weights // found.group
    two = found.scale_bits is not None
    return Blocks(
        ramp(found.weights, found.bits)[None],
        np.array([1.5], np.float16),
        np.array([-0.25], np.float16) if found.minimum else None,
        (ramp(groups, found.scale_bits or 1) ^ 1)[None] if two else None,
        (ramp(groups, found.scale_bits or 1) ^ 2)[None] if two and found.minimum else None,
    )


@pytest.mark.parametrize("name", TYPES)
def test_bytes_are_those_of_the_definition(name: str) -> None:
    raw = pack_blocks(name, ramp_block(name))
    assert raw.tobytes() == by_definition(name)
    assert raw.shape == (1, TYPES[name].block_bytes)
    for field, value in vars(unpack_blocks(name, raw, TYPES[name].weights)).items():
        expected = getattr(ramp_block(name), field)
        assert (value is None) == (expected is None)
        assert value is None or np.array_equal(value, expected)


GOLDEN = {
    "Q4_0": "003e0077ee55cc33aa1188ff66dd44bb2299",
    "Q4_1": "003e00b40077ee55cc33aa1188ff66dd44bb2299",
    "Q5_0": "003e983367cc0077ee55cc33aa1188ff66dd44bb2299",
    "Q5_1": "003e00b4983367cc0077ee55cc33aa1188ff66dd44bb2299",
    "Q8_0": "003e80878e959ca3aab1b8bfc6cdd4dbe2e9f0f7fe050c131a21282f363d444b5259",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    assert pack_blocks(name, ramp_block(name)).tobytes().hex() == GOLDEN[name]


@pytest.mark.parametrize("name", TYPES)
def test_twin_round_trip(make_qtensor: Make, name: str) -> None:
    found = TYPES[name]
    q = make_qtensor((5, 2 * found.weights), found.spec, seed=1)
    if found.minimum and found.scale_bits is None:
        q = decode(name, encode(q, name, rounded=True), q.shape[1], "w")
    assert gguf_type(found.spec, q.shape[1]) == name
    raw = encode(q, name)
    assert raw.shape == (5, 2 * found.block_bytes)
    back = decode(name, raw, q.shape[1], "w").validate("w")
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.grid.scale, q.grid.scale)
    assert torch.equal(back.grid.zero, q.grid.zero)
    assert np.array_equal(encode(back, name), raw)
    native.pack(back)
    assert within(dequantized(name, raw), back, name)


def within(values: torch.Tensor, q: QTensor, name: str) -> bool:
    return bool(((values - q.dequantize()).abs() <= tolerance(q, name)).all())


WIDER = {
    "w2 sym g32": ({"bits": 2, "group_size": 32, "symmetric": True}, "Q4_0"),
    "w3 sym g64": ({"bits": 3, "group_size": 64, "symmetric": True}, "Q4_0"),
    "w3 asym g32": ({"bits": 3, "group_size": 32}, "Q4_0"),
    "w4 sym per channel": ({"bits": 4, "symmetric": True}, "Q4_0"),
    "w4 sym g96, ragged": ({"bits": 4, "symmetric": True, "group_size": 96}, "Q4_0"),
    "w4 asym g128": ({"bits": 4, "group_size": 128}, "Q5_0"),
    "w5 sym": ({"bits": 5, "group_size": 32, "symmetric": True}, "Q5_0"),
    "w5 asym": ({"bits": 5, "group_size": 32}, "Q8_0"),
    "w7 asym": ({"bits": 7, "group_size": 32}, "Q8_0"),
    "w8 sym": ({"bits": 8, "group_size": 32, "symmetric": True}, "Q8_0"),
    "column 2": ({"bits": 2, "group_size": 32, "bilevel": {"size": 16, "scale_bits": 5}}, "Q3_K"),
    "column 3 of 64": (
        {"bits": 3, "group_size": 64, "zero": "float", "bilevel": {"size": 4, "scale_bits": 5, "zero_bits": 6}},
        "Q4_K",
    ),
    "column 4, one superblock": (
        {"bits": 4, "group_size": 32, "zero": "float", "bilevel": {"size": 99, "scale_bits": 6, "zero_bits": 3}},
        "Q4_K",
    ),
    "column 4, narrow": (
        {"bits": 4, "group_size": 16, "bilevel": {"size": 16, "scale_bits": 7}},
        "Q6_K",
    ),
    "column 5": (
        {"bits": 5, "group_size": 128, "zero": "float", "bilevel": {"size": 2, "scale_bits": 6, "zero_bits": 6}},
        "Q5_K",
    ),
}


@pytest.mark.parametrize("case", WIDER)
def test_grids_fit_wider_types_exactly(make_qtensor: Make, case: str) -> None:
    settings, name = WIDER[case]
    settings = dict(settings)
    if "bilevel" in settings:
        settings["bilevel"] = {"axis": "column", **settings["bilevel"]}
    spec = WeightSpec.model_validate(settings)
    q = make_qtensor((4, 512), spec)
    assert gguf_type(spec, 512) == name
    assert within(dequantized(name, encode(q, name)), q, name)
    # what a smaller type would lose, encode refuses as well
    for smaller in list(TYPES)[: list(TYPES).index(name)]:
        with pytest.raises(FormatError):
            encode(q, smaller)


REFUSED = {
    "no multiple of 32": ({"bits": 4, "group_size": 32, "symmetric": True}, 80, "multiples of 32 columns"),
    "narrow groups": ({"bits": 4, "group_size": 16, "symmetric": True}, 64, "groups of GGUF's types"),
    "odd groups": ({"bits": 4, "group_size": 48, "symmetric": True}, 96, "groups of GGUF's types"),
    "8 bits with zeros": ({"bits": 8, "group_size": 32}, 64, "signed bytes of Q8_0"),
    "float zeros": ({"bits": 4, "group_size": 32, "zero": "float"}, 64, "offset"),
    "float32": ({"bits": 4, "group_size": 32, "symmetric": True, "scale_dtype": "float32"}, 64, "scales are float32"),
    "rows": ({"bits": 4, "group_size": 32, "bilevel": Bilevel(axis="row", size=16, scale_bits=3)}, 512, "of rows"),
    "half a superblock": ({"bits": 4, "group_size": 32, "zero": "float", "bilevel": K4}, 576, "whole blocks"),
    "7-bit codes": (
        {"bits": 4, "group_size": 32, "zero": "float", "bilevel": K4.model_copy(update={"zero_bits": 7})},
        512,
        "superblocks of 256",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_grids_are_refused_with_a_remedy(make_qtensor: Make, case: str) -> None:
    settings, columns, reason = REFUSED[case]
    spec = WeightSpec.model_validate(settings)
    with pytest.raises(FormatError, match=reason) as refusal:
        gguf_type(spec, columns)
    assert "w4a16g32-sym" in str(refusal.value)
    for name in TYPES:
        with pytest.raises(FormatError):
            encode(make_qtensor((3, columns), spec), name)


def test_outliers_are_refused(make_qtensor: Make) -> None:
    q = make_qtensor((4, 64), TYPES["Q4_0"].spec, 0.1)
    with pytest.raises(FormatError, match="no place for"):
        encode(q, "Q4_0")


@pytest.mark.parametrize(
    ("settings", "name", "floor_db"),
    [
        ({"bits": 4, "group_size": 32, "zero": "float"}, "Q4_1", 60),
        ({"bits": 5, "group_size": 64, "zero": "float"}, "Q5_1", 60),
        ({"bits": 3, "group_size": 32, "bilevel": Bilevel(axis="row", size=16, scale_bits=3)}, "Q4_0", 60),
        ({"bits": 4, "group_size": 32, "symmetric": True, "scale_dtype": "float32"}, "Q4_0", 60),
        ({"bits": 4, "group_size": 32, "zero": "float", "bilevel": K4.model_copy(update={"size": 4})}, "Q4_1", 60),
    ],
)
def test_rounded_types_keep_the_codes(make_qtensor: Make, settings: dict, name: str, floor_db: float) -> None:
    spec = WeightSpec.model_validate(settings)
    q = make_qtensor((16, 128), spec)
    assert rounded_type(spec, 128) == name
    raw = encode(q, name, rounded=True)
    weight = q.dequantize()
    error = dequantized(name, raw) - weight
    assert 10 * torch.log10(weight.square().sum() / error.square().sum()) > floor_db


def test_no_rounded_type() -> None:
    assert rounded_type(WeightSpec(bits=8, group_size=32), 64) is None
    assert rounded_type(WeightSpec(bits=4, group_size=16), 64) is None
    assert rounded_type(WeightSpec(bits=6, group_size=32, zero="float"), 64) is None


@pytest.mark.parametrize("name", TYPES)
def test_any_block_decodes_to_its_values(name: str) -> None:
    """Random bytes with finite scales, groups without a scale among them, as other programs may write them."""
    found = TYPES[name]
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (64, found.block_bytes), dtype=np.uint8)
    blocks = unpack_blocks(name, raw, found.weights)
    d = random.normal(size=64).astype(np.float16) * np.float16(0.01)
    d[::7] = 0
    if blocks.scale_codes is not None:
        blocks.scale_codes[1::5, ::3] = 0 if found.minimum else 1 << (found.scale_bits or 1) - 1
    minimum = None if blocks.minimum is None else d[::-1].copy()
    raw = pack_blocks(name, Blocks(blocks.codes, d, minimum, blocks.scale_codes, blocks.minimum_codes))
    raw = raw.reshape(8, -1)
    q = decode(name, raw, 8 * found.weights, "w").validate("w")
    theirs = torch.from_numpy(gguf.quants.dequantize(raw, GGMLQuantizationType[name]))
    assert ((theirs - q.dequantize()).abs() <= tolerance(q, name)).all()
    assert native.unpack("w", native.pack(q), native.TensorEntry.of(q)).shape == q.shape
    assert within(dequantized(name, encode(q, name)), q, name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", TYPES)
def test_hostile_scales_are_refused(name: str, value: float) -> None:
    block = ramp_block(name)
    for field in ("d", "minimum"):
        if getattr(block, field) is not None:
            changed = Blocks(**{**vars(block), field: np.array([value], np.float16)})
            with pytest.raises(FormatError, match=r"blk\.0: a scale"):
                decode(name, pack_blocks(name, changed), TYPES[name].weights, "blk.0")


def test_large_scales_do_not_become_infinite(make_qtensor: Make) -> None:
    q = make_qtensor((2, 32), WeightSpec(bits=4, group_size=32, symmetric=True, scale_dtype="float32"))
    q.grid.scale.fill_(1e6)
    with pytest.raises(FormatError, match="does not fit fp16"):
        encode(q, "Q4_0", rounded=True)
