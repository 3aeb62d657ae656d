"""The native format: declared layout, byte counts, config round trip."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from bitwright.errors import FormatError
from bitwright.formats.native import (
    FORMAT_VERSION,
    TensorEntry,
    pack,
    packed_bytes,
    parts,
    quantization_config,
    read_quantization_config,
    read_tied,
    unpack,
)
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec

Make = Callable[..., QTensor]
SPEC = WeightSpec(bits=3, group_size=16)


def test_declared_layout_is_what_is_packed(make_qtensor: Make) -> None:
    q = make_qtensor((5, 40), SPEC, 0.1)
    entry = TensorEntry.of(q)
    stored = pack(q)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == parts(entry)
    assert list(stored) == list(parts(entry))
    assert sum(t.numel() * t.itemsize for t in stored.values()) == packed_bytes(entry)


def test_zeros_cost_no_padding_per_row() -> None:
    entry = TensorEntry(WeightSpec(bits=3), (4096, 4096))
    assert parts(entry)["weight_zero"] == ((4096 * 3 // 32,), torch.int32)


def test_wide_matrices_index_with_32_bits(make_qtensor: Make) -> None:
    for width, dtype in ((65536, torch.uint16), (65537, torch.int32)):
        q = make_qtensor((1, width), WeightSpec(bits=2))
        mask = torch.zeros(1, width, dtype=torch.bool)
        mask[0, -1] = True
        q = QTensor(q.codes, q.grid, Outliers.gather(mask, torch.ones(1, width)))
        stored = pack(q)
        assert stored["outlier_idx"].dtype == dtype
        restored = unpack("w", stored, TensorEntry.of(q))
        assert restored.outliers is not None
        assert restored.outliers.column.tolist() == [width - 1]


def test_no_outliers_store_nothing(make_qtensor: Make) -> None:
    q = make_qtensor((3, 8), SPEC)
    empty = Outliers.gather(torch.zeros(3, 8, dtype=torch.bool), torch.zeros(3, 8))
    assert pack(QTensor(q.codes, q.grid, empty)).keys() == pack(q).keys()


def test_config_round_trip() -> None:
    other = WeightSpec(bits=8, symmetric=True, scale_dtype="bfloat16")
    entries = {
        "a": TensorEntry(SPEC, (8, 32), 3),
        "b": TensorEntry(other, (4, 8)),
        "c": TensorEntry(SPEC, (2, 32)),
    }
    config = json.loads(json.dumps(quantization_config(entries, {"head": "b"})))
    assert config["version"] == FORMAT_VERSION
    assert len(config["specs"]) == 2
    assert read_quantization_config(config) == entries
    assert read_tied(config) == {"head": "b"}
    assert "tied" not in quantization_config(entries)
    assert read_tied(quantization_config(entries)) == {}


def test_pack_refuses_what_it_could_not_restore(make_qtensor: Make) -> None:
    q = make_qtensor((3, 8), SPEC)
    with pytest.raises(FormatError, match="a scale is not representable"):
        pack(QTensor(q.codes, type(q.grid)(q.grid.scale + 1e-7, q.grid.zero, SPEC)))
    with pytest.raises(FormatError, match="a zero is not representable"):
        pack(QTensor(q.codes, type(q.grid)(q.grid.scale, torch.full_like(q.grid.zero, 0.5), SPEC)))
    with pytest.raises(FormatError, match=r"needed 0\.\.7"):
        pack(QTensor(q.codes, type(q.grid)(q.grid.scale, torch.full_like(q.grid.zero, 8.0), SPEC)))
    symmetric = WeightSpec(bits=3, symmetric=True)
    q = make_qtensor((3, 8), symmetric)
    with pytest.raises(FormatError, match="must all be 4"):
        pack(QTensor(q.codes, type(q.grid)(q.grid.scale, q.grid.zero + 1, symmetric)))


@pytest.mark.parametrize(("shape", "outliers"), [((0, 4), 0), ((4, 1 << 40), 0), ((2, 2), 5), ((2, 2), -1)])
def test_impossible_entries(shape: tuple[int, int], outliers: int) -> None:
    with pytest.raises(FormatError):
        TensorEntry(SPEC, shape, outliers)
