"""The native format: declared layout, byte counts, config round trip."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bitwright.errors import FormatError
from bitwright.formats.native import (
    FORMAT_VERSION,
    Sites,
    TensorEntry,
    pack,
    packed_bytes,
    parts,
    quantization_config,
    read_quantization_config,
    read_sites,
    read_tied,
    unpack,
)
from bitwright.numeric.activation import ActivationSpec, InputSite, KvSpec
from bitwright.numeric.fp8 import KvScales
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec

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


@pytest.mark.parametrize("value_bits", [16, 8])
def test_bits_per_weight(value_bits: int) -> None:
    """The arithmetic of docs/formats/native.md, at 4 bits, groups of 16, 16-row superblocks of 3/3 bits, 0.5 %."""
    level = Bilevel(axis="row", size=16, scale_bits=3, zero_bits=3)
    spec = WeightSpec(bits=4, group_size=16, zero="float", bilevel=level)
    weights, count = 4096 * 4096, 4096 * 4096 // 200
    assert 8 * packed_bytes(TensorEntry(spec, (4096, 4096))) / weights == 4 + 6 / 16 + 64 / 256
    entry = TensorEntry(spec, (4096, 4096), count, value_bits)
    share, steps = count / weights, 16 / 4096 if value_bits == 8 else 0
    expected = 4.625 + share * (value_bits + 9) + 1 / 256 + steps
    assert 8 * packed_bytes(entry) / weights == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 255), (3, 256), (2, 257), (2, 1000), (1, 70000)])
@pytest.mark.parametrize("pattern", ["first", "last", "all", "tile"])
def test_places_of_outliers(make_qtensor: Make, shape: tuple[int, int], pattern: str) -> None:
    """Empty, full and ragged tiles."""
    q = make_qtensor(shape, WeightSpec(bits=2))
    mask = torch.full(shape, pattern == "all")
    if pattern == "first":
        mask[0, 0] = True
    elif pattern == "last":
        mask[-1, -1] = True
    elif pattern == "tile":
        mask[:, :256] = True
    for value_bits in (16, 8):
        q = QTensor(q.codes, q.grid, Outliers.gather(mask, torch.randn(shape), value_bits))
        restored = unpack("w", pack(q), TensorEntry.of(q))
        assert restored.outliers is not None
        assert torch.equal(restored.outliers.row_pointer, q.outliers.row_pointer)
        assert torch.equal(restored.outliers.column, q.outliers.column)
        assert torch.equal(restored.outliers.residual, q.outliers.residual)


def test_no_outliers_store_nothing(make_qtensor: Make) -> None:
    q = make_qtensor((3, 8), SPEC)
    empty = Outliers.gather(torch.zeros(3, 8, dtype=torch.bool), torch.zeros(3, 8))
    assert pack(QTensor(q.codes, q.grid, empty)).keys() == pack(q).keys()


def test_config_round_trip() -> None:
    other = WeightSpec(bits=8, symmetric=True, scale_dtype="bfloat16")
    level = Bilevel(axis="column", size=8, scale_bits=6, zero_bits=6)
    entries = {
        "a": TensorEntry(SPEC, (8, 32), 3),
        "b": TensorEntry(other, (4, 8)),
        "c": TensorEntry(SPEC, (2, 32)),
        "d": TensorEntry(WeightSpec(bits=4, group_size=32, zero="float", bilevel=level), (2, 512), 9, 8),
    }
    config = json.loads(json.dumps(quantization_config(entries, {"head": "b"})))
    assert config["version"] == FORMAT_VERSION
    assert len(config["specs"]) == 3
    assert [spec["levels"] for spec in config["specs"]] == [1, 1, 2]
    assert read_quantization_config(config) == entries
    assert read_tied(config) == {"head": "b"}
    assert "tied" not in quantization_config(entries)
    assert read_tied(quantization_config(entries)) == {}


def test_sites_round_trip() -> None:
    dynamic, static = ActivationSpec(bits=4, clip=0.9), ActivationSpec(bits=8, granularity="tensor")
    entries = {name: TensorEntry(SPEC, (8, 32)) for name in "abcdef"}
    inputs = {
        "a": InputSite(activation=dynamic),
        "b": InputSite(activation=dynamic, transform="hadamard"),
        # Scales that decimal fractions only approximate: they must come back to the last bit.
        "c": InputSite.static(static, -0.1, 1 / 3),
        "d": InputSite.static(static, 0.0, 1e-30, "hadamard"),
        "e": InputSite(transform="hadamard"),
    }
    sites = Sites(inputs, KvSpec(bits=3, past_only=True))
    config = json.loads(json.dumps(quantization_config(entries, sites=sites)))
    assert read_sites(config) == sites
    assert read_quantization_config(config) == entries
    assert config["activations"] == [dynamic.model_dump(), static.model_dump()]
    assert [config["tensors"][name].get("input", {}).get("activation") for name in "abcdef"] == [0, 0, 1, 1, None, None]
    assert "input" not in config["tensors"]["f"]
    nothing = quantization_config(entries)
    assert (nothing["activations"], nothing["kv_cache"]) == ([], None)
    assert read_sites(nothing) == Sites()
    with pytest.raises(FormatError, match="input of x is quantized, and its weight is not"):
        quantization_config(entries, sites=Sites({"x": inputs["a"]}))


def test_scales_of_the_kv_cache_round_trip() -> None:
    entries = {"a": TensorEntry(SPEC, (8, 32))}
    # Scales that decimal fractions only approximate.
    scales = {f"layers.{n}.attn": KvScales.of(0.1 * (n + 1), 1e-30 / (n + 1)) for n in range(12)}
    sites = Sites({}, KvSpec(bits=8, grid="fp8"), scales)
    config = json.loads(json.dumps(quantization_config(entries, sites=sites)))
    assert read_sites(config) == sites
    assert list(config["kv_cache"]) == ["grid", "rope", "symmetric", "past_only", "bits", "scales"]
    # A cache of integers is written as it was before there was another grid.
    whole = quantization_config(entries, sites=Sites(kv_cache=KvSpec(bits=8)))["kv_cache"]
    assert whole == {"bits": 8, "rope": "after", "symmetric": False, "past_only": False}
    for wrong in (Sites({}, KvSpec(bits=8, grid="fp8")), Sites({}, KvSpec(bits=8), scales)):
        with pytest.raises(FormatError, match="fp8, and no other, has them"):
            quantization_config(entries, sites=wrong)


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


def test_pack_refuses_levels_that_do_not_decode_to_the_grid(make_qtensor: Make) -> None:
    level = Bilevel(axis="row", size=2, scale_bits=4)
    spec = WeightSpec(bits=3, group_size=4, bilevel=level)
    q = make_qtensor((3, 8), spec)
    for grid, message in (
        (replace(q.grid, scale=q.grid.scale * 2), "second level decodes"),
        (replace(q.grid, levels=None), "levels do not agree"),
        (replace(q.grid, spec=spec.one_level), "levels do not agree"),
    ):
        with pytest.raises(FormatError, match=message):
            pack(QTensor(q.codes, grid))
    statistics = q.grid.levels.statistics * (1 + 2.0**-20)
    grid = type(q.grid).of_levels(replace(q.grid.levels, statistics=statistics), q.grid.zero, spec)
    with pytest.raises(FormatError, match="superblock statistic is not representable"):
        pack(QTensor(q.codes, grid))


@pytest.mark.parametrize(
    ("shape", "outliers", "value_bits"),
    [((0, 4), 0, 16), ((4, 1 << 40), 0, 16), ((2, 2), 5, 16), ((2, 2), -1, 16), ((2, 2), 1, 4), ((2, 2), 0, 8)],
)
def test_impossible_entries(shape: tuple[int, int], outliers: int, value_bits: int) -> None:
    with pytest.raises(FormatError):
        TensorEntry(SPEC, shape, outliers, value_bits)
