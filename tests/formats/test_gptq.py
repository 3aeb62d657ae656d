"""GPTQ and AWQ checkpoints: exact round trips, bytes worked out by hand, and unpacking bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from bitwright.errors import FormatError
from bitwright.formats.gptq import (
    GPTQ_BITS,
    grid_refusal,
    pack_awq,
    pack_gptq,
    refusal,
    unpack_awq,
    unpack_gptq,
)
from bitwright.formats.layout import TensorEntry
from bitwright.numeric.grid import Grid
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec

Make = Callable[..., QTensor]


def bits_of(words: np.ndarray) -> np.ndarray:
    """Bits [words, 32] of 32-bit words, the least significant first."""
    return (words.astype(np.int64)[:, None] >> np.arange(32)) & 1


def slow_gptq(parts: dict[str, torch.Tensor], bits: int, version: int) -> np.ndarray:
    """Weights [out, in] in float64: fields of a column (a row, for zeros) are one stream of bits."""
    words, zero_words = parts["qweight"].numpy(), parts["qzeros"].numpy()
    scales, index = parts["scales"].double().numpy(), parts["g_idx"].numpy()
    powers = 1 << np.arange(bits)
    codes = np.stack([bits_of(column).reshape(-1, bits) @ powers for column in words.T])
    zeros = np.stack([bits_of(row).reshape(-1, bits) @ powers for row in zero_words])
    zeros = zeros + 1 if version == 1 else zeros
    return (codes - zeros.T[:, index]) * scales.T[:, index]


def slow_awq(parts: dict[str, torch.Tensor], width: int) -> np.ndarray:
    """Weights [out, in] in float64: the field of column c is the one whose place in the order is c."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def fields(words: np.ndarray) -> np.ndarray:
        found = np.zeros((words.shape[0], words.shape[1] * 8), dtype=np.int64)
        for word in range(words.shape[1]):
            for place, column in enumerate(order):
                found[:, word * 8 + column] = (words[:, word].astype(np.int64) >> (4 * place)) & 15
        return found

    codes, zeros = fields(parts["qweight"].numpy()), fields(parts["qzeros"].numpy())
    rows = np.arange(codes.shape[0]) // width
    return ((codes - zeros[rows]) * parts["scales"].double().numpy()[rows]).T


def without_zero_0(q: QTensor) -> QTensor:
    return QTensor(q.codes, Grid(q.grid.scale, q.grid.zero.clamp_min(1), q.spec))


def same(one: QTensor, other: QTensor) -> bool:
    pairs = ((one.codes, other.codes), (one.grid.scale, other.grid.scale), (one.grid.zero, other.grid.zero))
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("bits", GPTQ_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("shape", "group_size"), [((32, 64), 16), ((96, 32), None), ((64, 96), 32)])
def test_gptq_round_trip_is_exact(make_qtensor: Make, bits, symmetric, version, shape, group_size) -> None:
    q = make_qtensor(shape, WeightSpec(bits=bits, group_size=group_size, symmetric=symmetric), seed=bits)
    q = without_zero_0(q) if version == 1 else q
    parts = pack_gptq(q, version)
    again = unpack_gptq("m", parts, bits, group_size, version)
    assert same(q, again)
    assert again.spec.symmetric == symmetric
    assert torch.equal(again.dequantize(), q.dequantize())
    np.testing.assert_allclose(slow_gptq(parts, bits, version), q.dequantize().double().numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "group_size"), [((8, 12), 4), ((40, 7), None), ((16, 64), 32)])
def test_awq_round_trip_is_exact(make_qtensor: Make, symmetric: bool, shape, group_size) -> None:
    q = make_qtensor(shape, WeightSpec(bits=4, group_size=group_size, symmetric=symmetric))
    parts = pack_awq(q)
    again = unpack_awq("m", parts, group_size)
    assert same(q, again)
    assert again.spec.symmetric == symmetric
    expected = q.dequantize().double().numpy()
    np.testing.assert_allclose(slow_awq(parts, group_size or shape[1]), expected, rtol=1e-6, atol=0)


def test_gptq_golden_bytes() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]] * 7 + [[15, 14, 13, 12, 11, 10, 9, 8]], dtype=torch.uint8)
    zero = torch.tensor([[8.0, 1.0]] * 7 + [[15.0, 2.0]])
    q = QTensor(codes, Grid(torch.full((8, 2), 0.5), zero, WeightSpec(bits=4, group_size=4)))
    one, two = pack_gptq(q, 1), pack_gptq(q, 2)
    assert one["qweight"].shape == (1, 8)
    assert one["qweight"].numpy().tobytes() == bytes.fromhex("10325476") * 7 + bytes.fromhex("EFCDAB89")
    # zeros less one along the rows, group by group: 7 … 7 14, and 0 … 0 1
    assert one["qzeros"].numpy().tobytes() == bytes.fromhex("777777E7 00000010")
    assert two["qzeros"].numpy().tobytes() == bytes.fromhex("888888F8 11111121")
    assert one["g_idx"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert one["g_idx"].dtype == torch.int32
    assert one["scales"].shape == (2, 8)
    assert one["scales"].dtype == torch.float16


def test_three_bits_straddle_words_as_in_autogptq() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(8)[None].expand(32, 32).contiguous()
    q = QTensor(codes, Grid(torch.ones(32, 1), torch.full((32, 1), 4.0), WeightSpec(bits=3, symmetric=True)))
    words = pack_gptq(q, 1)["qweight"][:, 0].numpy().astype(np.int64) & 0xFFFFFFFF
    # AutoGPTQ: codes 0-9 and two bits of code 10; its third, 11-20 and one bit of code 21; its other two, and 22-31
    c = [int(code) for code in codes[0]]
    first = sum(c[i] << (3 * i) for i in range(10)) | (c[10] << 30) & 0xFFFFFFFF
    second = (c[10] >> 2) | sum(c[11 + i] << (3 * i + 1) for i in range(10)) | (c[21] << 31) & 0xFFFFFFFF
    third = (c[21] >> 1) | sum(c[22 + i] << (3 * i + 2) for i in range(10))
    assert words.tolist() == [first, second, third]


def test_awq_golden_bytes() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None]
    q = QTensor(codes, Grid(torch.ones(8, 1), torch.full((8, 1), 8.0), WeightSpec(bits=4, symmetric=True)))
    parts = pack_awq(q)
    # fields 0 2 4 6 1 3 5 7, the first in the low nibble
    assert parts["qweight"].numpy().tobytes() == bytes.fromhex("20643175")
    assert parts["qzeros"].numpy().tobytes() == bytes.fromhex("88888888")
    del parts["qzeros"]
    assert same(q, unpack_awq("m", parts, None)), "without zeros they are 8"


def test_refusals(make_qtensor: Make) -> None:
    def entry(bits: int = 4, shape: tuple[int, int] = (32, 64), outliers: int = 0, **spec) -> TensorEntry:
        return TensorEntry(WeightSpec(bits=bits, group_size=16, **spec), shape, outliers)

    assert refusal(entry()) is None
    assert "5 bits" in (refusal(entry(5)) or "")
    assert "3 bits" in (refusal(entry(3), awq=True) or "")
    assert "2 outliers" in (refusal(entry(outliers=2)) or "")
    assert "float zeros" in (refusal(entry(zero="float")) or "")
    assert "72 inputs in groups" in (refusal(entry(shape=(32, 72))) or "")
    assert "[30, 64]" in (refusal(entry(shape=(30, 64))) or "")
    assert "[32, 48] of 3 bits" in (refusal(entry(3, (32, 48))) or "")
    q = make_qtensor((32, 64), WeightSpec(bits=4, group_size=16))
    q.grid.zero[3, 1] = 0
    assert "zero of 0" in (grid_refusal(q.grid, 1) or "")
    assert grid_refusal(q.grid, 2) is None
    with pytest.raises(FormatError, match="zero of 0, which version 1 cannot hold"):
        pack_gptq(q, 1)
    wide = make_qtensor((32, 64), WeightSpec(bits=4, group_size=16, scale_dtype="float32"))
    assert "float32 scales" in (grid_refusal(wide.grid, 2) or "")


def test_bfloat16_scales_beyond_float16_stay(make_qtensor: Make) -> None:
    q = make_qtensor((32, 64), WeightSpec(bits=4, group_size=16, symmetric=True, scale_dtype="bfloat16"))
    tiny = QTensor(q.codes, Grid(q.grid.scale * 2.0**-40, q.grid.zero, q.spec))
    parts = pack_gptq(tiny, 1)
    assert parts["scales"].dtype == torch.bfloat16
    assert same(tiny, unpack_gptq("m", parts, 4, 16, 1))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", lambda t: t[:-1], "needed"),
        ("qweight", lambda t: t.to(torch.int64), r"qweight: is torch\.int64"),
        ("qzeros", lambda t: t[:, :-1], r"qzeros: is torch\.int32 \[4, 3\], needed \[4, 4\]"),
        ("qzeros", lambda t: None, "qzeros: missing"),
        ("qzeros", lambda t: torch.full_like(t, -1), "qzeros: a version 1 field holds 15"),
        ("scales", lambda t: t.double(), r"scales: is torch\.float64"),
        ("scales", lambda t: t[:2], r"scales: is torch\.float16 \[2, 32\]"),
        ("scales", lambda t: t * float("inf"), "scales: holds NaN or Inf"),
        ("g_idx", lambda t: t.flip(0), "g_idx: .*without desc_act"),
        ("g_idx", lambda t: t.long(), "g_idx"),
    ],
)
def test_damaged_gptq_is_refused(make_qtensor: Make, part: str, change, message: str) -> None:
    parts = pack_gptq(without_zero_0(make_qtensor((32, 64), WeightSpec(bits=4, group_size=16))), 1)
    changed = change(parts.pop(part))
    if changed is not None:
        parts[part] = changed
    with pytest.raises(FormatError, match=message):
        unpack_gptq("m", parts, 4, 16, 1)
