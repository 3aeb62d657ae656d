"""The dense bit stream against an obvious implementation with Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import FormatError
from bitwright.formats import bits as bits_module
from bitwright.formats.bits import has_padding_bits, pack_rows, row_words, unpack_rows


def reference_pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """One big integer per row, cut into 32-bit words."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32).reshape(codes.shape[0], -1)


def random_codes(rows: int, n: int, bits: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, n), generator=random, dtype=torch.uint8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 5, 8, 9, 31, 32, 33, 95])
def test_matches_the_reference(bits: int, n: int) -> None:
    codes = random_codes(3, n, bits)
    words = pack_rows(codes, bits)
    assert torch.equal(words, reference_pack(codes, bits))
    assert torch.equal(unpack_rows(words, bits, n), codes)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 5), st.integers(0, 200), st.integers(0, 2**31))
def test_round_trip(bits: int, rows: int, n: int, seed: int) -> None:
    codes = random_codes(rows, n, bits, seed)
    words = pack_rows(codes, bits)
    assert words.shape == (rows, row_words(bits, n))
    assert torch.equal(unpack_rows(words, bits, n), codes)


@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("shape", [(1, 200), (2, 129), (40, 7)])
def test_tiling_changes_nothing(bits: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits_module, "_TILE", 64)
    codes = random_codes(*shape, bits)
    assert torch.equal(pack_rows(codes, bits), reference_pack(codes, bits))
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, shape[1]), codes)


def test_strided_and_unaligned_input() -> None:
    codes = random_codes(40, 33, 5)
    for view in (codes[:, 1:9], codes.T, codes[1:, ::2], codes.flatten()[1:33].reshape(1, 32)):
        words = pack_rows(view, 5)
        assert torch.equal(words, reference_pack(view, 5))
        wide = torch.cat([words, words], dim=1)[:, words.shape[1] :]
        assert torch.equal(unpack_rows(wide, 5, view.shape[1]), view)


@pytest.mark.parametrize("bits", range(2, 9))
def test_padding_is_zero_and_seen_when_not(bits: int) -> None:
    words = pack_rows(torch.full((2, 3), (1 << bits) - 1, dtype=torch.uint8), bits)
    assert not has_padding_bits(words, bits, 3)
    words[1, -1] |= 1 << (3 * bits)
    assert has_padding_bits(words, bits, 3)


def test_refusals() -> None:
    with pytest.raises(FormatError, match="code 8 does not fit 3 bits"):
        pack_rows(torch.tensor([[8]], dtype=torch.uint8), 3)
    with pytest.raises(FormatError, match="needed uint8"):
        pack_rows(torch.zeros(2, 2), 3)
    with pytest.raises(FormatError, match="2 to 8"):
        pack_rows(torch.zeros(2, 2, dtype=torch.uint8), 1)
    with pytest.raises(FormatError, match=r"needed int32 \[rows, 1\] for 4 codes"):
        unpack_rows(torch.zeros(2, 2, dtype=torch.int32), 4, 4)
