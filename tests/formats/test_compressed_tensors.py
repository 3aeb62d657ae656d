"""compressed-tensors: exact round trips, bytes worked out by hand, both layouts of odd bits, its config."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.compressed_tensors import INT8, PACKED, WeightArgs, dense_layout, pack, refusal, unpack
from bitwright.formats.compressed_tensors_config import (
    Scheme,
    is_kv_part,
    kv_tensors,
    quantization_config,
    read_groups,
    read_kv_cache,
    read_kv_scales,
    scheme_of,
)
from bitwright.formats.layout import TensorEntry
from bitwright.numeric.activation import ActivationSpec, KvSpec
from bitwright.numeric.fp8 import KvScales
from bitwright.numeric.grid import Grid
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec

Make = Callable[..., QTensor]
NOW = "0.18.0"


def slow_unpack(words: np.ndarray, bits: int, n: int, dense: bool) -> np.ndarray:
    """Codes of each row, bit by bit."""
    per_word, codes = 32 // bits, np.zeros((words.shape[0], n), dtype=np.int64)
    unsigned = words.astype(np.int64) & 0xFFFFFFFF
    for row in range(words.shape[0]):
        for i in range(n):
            for bit in range(bits):
                at = i * bits + bit if dense else (i // per_word) * 32 + (i % per_word) * bits + bit
                codes[row, i] |= ((unsigned[row, at // 32] >> (at % 32)) & 1) << bit
    return codes


def slow_weight(parts: dict[str, Tensor], args: WeightArgs) -> np.ndarray:
    """The weights of stored parts in float64, by the library's definition: (signed code - zero point) * scale."""
    centre, scale = 1 << (args.bits - 1), parts["weight_scale"].double().numpy()
    if args.format == INT8:
        codes = parts["weight"].numpy().astype(np.int64)
        zeros = parts["weight_zero_point"].numpy() if "weight_zero_point" in parts else np.zeros(scale.shape)
    else:
        out_features, in_features = parts["weight_shape"].tolist()
        codes = slow_unpack(parts["weight_packed"].numpy(), args.bits, in_features, True) - centre
        zeros = np.zeros(scale.shape)
        if "weight_zero_point" in parts:
            zeros = slow_unpack(parts["weight_zero_point"].numpy().T, args.bits, out_features, True).T - centre
    width = codes.shape[1] // scale.shape[1]
    return (codes - np.repeat(zeros, width, 1)) * np.repeat(scale, width, 1)


def same(one: QTensor, other: QTensor) -> bool:
    pairs = ((one.codes, other.codes), (one.grid.scale, other.grid.scale), (one.grid.zero, other.grid.zero))
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((5, 24), 8), ((33, 48), 16), ((1, 7), None), ((9, 35), None), ((3, 6), 16), ((2, 1), 1)]
)
def test_round_trip_is_exact(make_qtensor: Make, bits: int, symmetric: bool, shape, group_size: int | None) -> None:
    spec = WeightSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    q = make_qtensor(shape, spec, seed=bits)
    for format_name in (PACKED, INT8):
        args = WeightArgs.of(TensorEntry.of(q), format_name)
        parts = pack(q, format_name)
        again = unpack("m", parts, args, NOW)
        assert same(q, again)
        assert again.spec.bits == bits
        assert again.spec.symmetric == symmetric
        assert torch.equal(again.dequantize(), q.dequantize())
        np.testing.assert_allclose(slow_weight(parts, args), q.dequantize().double().numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_scales_keep_their_type(make_qtensor: Make, scale_dtype) -> None:
    q = make_qtensor((4, 32), WeightSpec(bits=4, group_size=16, scale_dtype=scale_dtype))
    args = WeightArgs.of(TensorEntry.of(q), PACKED)
    again = unpack("m", pack(q, PACKED), args, NOW)
    assert again.spec.scale_dtype == scale_dtype
    assert same(q, again)


def hand_made() -> QTensor:
    """Two rows of eight 4-bit codes in groups of four."""
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5, 0.25], [1.0, -2.0]]), torch.tensor([[8.0, 3.0], [0.0, 15.0]])
    return QTensor(codes, Grid(scale, zero, WeightSpec(bits=4, group_size=4)))


def test_golden_bytes() -> None:
    parts = pack(hand_made(), PACKED)
    assert set(parts) == {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}
    assert parts["weight_packed"].numpy().tobytes() == bytes.fromhex("10325476 EFCDAB89")
    # zeros go along the rows: 8 and 0 in the first group, 3 and 15 in the second
    assert parts["weight_zero_point"].numpy().tobytes() == bytes.fromhex("08000000 F3000000")
    assert parts["weight_zero_point"].shape == (1, 2)
    assert parts["weight_shape"].tolist() == [2, 8]
    assert parts["weight_shape"].dtype == torch.int64
    plain = pack(hand_made(), INT8)
    assert plain["weight"].tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1], [7, 6, 5, 4, 3, 2, 1, 0]]
    assert plain["weight_zero_point"].tolist() == [[0, -5], [-8, 7]]
    assert plain["weight"].dtype == plain["weight_zero_point"].dtype == torch.int8


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_older_layout_of_odd_bits_is_read(make_qtensor: Make, bits: int) -> None:
    q = make_qtensor((13, 160), WeightSpec(bits=bits, group_size=20), seed=1)
    args = WeightArgs.of(TensorEntry.of(q), PACKED)
    parts = pack(q, PACKED)
    parts["weight_packed"] = whole_codes(q.codes, bits)
    parts["weight_zero_point"] = whole_codes(q.grid.zero.to(torch.uint8).T, bits).T.contiguous()
    assert same(q, unpack("m", parts, args, "0.17.1"))
    assert same(q, unpack("m", parts, args, None)), "their width tells"
    with pytest.raises(FormatError, match=r"m\.weight_packed: .*needed .* in files of version 0\.18\.0"):
        unpack("m", parts, args, NOW)
    with pytest.raises(FormatError, match=r"needed .* in files of version 0\.17\.1"):
        unpack("m", pack(q, PACKED), args, "0.17.1")


def whole_codes(codes: Tensor, bits: int) -> Tensor:
    """int32 words of `codes` [rows, n] with as many whole codes in each as fit."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word))
    shifted = padded.reshape(codes.shape[0], -1, per_word) << (torch.arange(per_word) * bits)
    return shifted.sum(dim=2).to(torch.int32)


def test_layout_is_never_guessed() -> None:
    assert dense_layout("w", 4, 100, 13, None)
    assert dense_layout("w", 3, 11, 2, "0.18.0")
    assert not dense_layout("w", 3, 11, 2, "0.17.1")
    assert dense_layout("w", 3, 10, 1, None), "ten codes are the same in both layouts"
    with pytest.raises(FormatError, match="neither their width nor version None"):
        dense_layout("w", 3, 11, 2, None)
    with pytest.raises(FormatError, match=r"version '0\.17\.2a20260601'"):
        dense_layout("w", 3, 11, 2, "0.17.2a20260601")
    with pytest.raises(FormatError, match="12 words for 100 codes of 4 bits, needed 13"):
        dense_layout("w", 4, 100, 12, NOW)


def test_what_cannot_be_held_is_refused(make_qtensor: Make) -> None:
    level = Bilevel(axis="row", size=16, scale_bits=3, zero_bits=3)
    cases = {
        "two-level grid": TensorEntry(WeightSpec(bits=4, group_size=16, zero="float", bilevel=level), (16, 32)),
        "float zeros": TensorEntry(WeightSpec(bits=4, group_size=16, zero="float"), (16, 32)),
        "3 outliers": TensorEntry(WeightSpec(bits=4, group_size=16), (16, 32), 3),
        "3 bits": TensorEntry(WeightSpec(bits=3, group_size=16), (16, 32)),
        "40 inputs in groups of 16": TensorEntry(WeightSpec(bits=4, group_size=16), (16, 40)),
    }
    for reason, entry in cases.items():
        assert reason in (refusal(entry) or ""), reason
    assert refusal(TensorEntry(WeightSpec(bits=3, group_size=16), (16, 32)), odd_bits=True) is None
    q = make_qtensor((4, 32), WeightSpec(bits=4, group_size=16))
    mask = torch.zeros(4, 32, dtype=torch.bool)
    mask[1, 2] = True
    with pytest.raises(FormatError, match="1 outliers"):
        pack(QTensor(q.codes, q.grid, Outliers.gather(mask, torch.ones(4, 32))), PACKED)


# --- config.json -----------------------------------------------------------------------------------------

W4 = Scheme(WeightArgs(4, False, "group", 64, PACKED), None)
W8A8 = Scheme(WeightArgs(8, True, "channel", None, INT8), ActivationSpec(bits=8, symmetric=True))


def test_config_of_one_scheme_is_what_the_library_writes() -> None:
    config = quantization_config({"model.layers.0.q_proj": W4}, {"lm_head", "model.embed_tokens"})
    assert config == {
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "dynamic": False,
                    "group_size": 64,
                    "num_bits": 4,
                    "strategy": "group",
                    "symmetric": False,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head", "model.embed_tokens"],
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.18.0",
    }


def test_several_schemes_are_told_apart_by_name() -> None:
    modules = {f"layers.{n}.{leaf}": W4 for n in range(3) for leaf in ("q_proj", "k_proj")}
    modules |= {f"layers.{n}.down_proj": W8A8 for n in range(3)} | {"layers.1.k_proj": W8A8, "lm_head": W8A8}
    config = quantization_config(modules, {"embed"})
    assert config["format"] == "mixed-precision"
    assert config["config_groups"]["group_0"]["targets"] == [r"re:.*\.q_proj$", "layers.0.k_proj", "layers.2.k_proj"]
    groups = read_groups(config)
    assert {name: scheme_of(name, groups) for name in modules} == modules
    with pytest.raises(FormatError, match="no group for embed"):
        scheme_of("embed", groups)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_config_reads_back(symmetric: bool, granularity) -> None:
    inputs = ActivationSpec(bits=8, granularity=granularity, symmetric=symmetric)
    scheme = Scheme(WeightArgs(8, symmetric, "channel", None, INT8), inputs)
    groups = read_groups(quantization_config({"a.b": scheme}, ()))
    assert [group.scheme for group in groups] == [scheme]
    assert groups[0].targets == ("Linear",)


def change(config: dict, path: str, value: object) -> dict:
    """A copy of `config` with the value at a dotted path replaced."""
    head, _, rest = path.partition(".")
    return {**config, head: change(config[head], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quant_method", "gptq", "quant_method"),
        ("quantization_status", "frozen", "quantization_status"),
        ("transform_config", {"config_groups": {}, "x": 1}, "transform_config"),
        ("config_groups", {}, "config_groups"),
        ("config_groups", {"W4A16": ["Linear"]}, "config_groups.W4A16"),
        ("config_groups.group_0.format", "float-quantized", "group_0.format: found 'float-quantized'"),
        ("config_groups.group_0.format", "marlin-24", "group_0.format"),
        ("config_groups.group_0.targets", "Linear", "targets"),
        ("config_groups.group_0.output_activations", {"num_bits": 8}, "output_activations"),
        ("config_groups.group_0.weights", None, "weights: found None"),
        ("config_groups.group_0.weights.type", "float", "weights.type: found 'float'"),
        ("config_groups.group_0.weights.num_bits", 1, "num_bits: found 1"),
        ("config_groups.group_0.weights.num_bits", True, "num_bits: found True"),
        ("config_groups.group_0.weights.strategy", "block", "strategy: found 'block'"),
        ("config_groups.group_0.weights.group_size", 0, "group_size: found 0"),
        ("config_groups.group_0.weights.actorder", "group", "actorder: found 'group'"),
        ("config_groups.group_0.weights.block_structure", [1, 2], "block_structure: unknown"),
        ("config_groups.group_0.weights.dynamic", True, "dynamic: found True"),
        ("config_groups.group_0.weights.symmetric", 1, "symmetric: found 1"),
    ],
)
def test_config_refuses(path: str, value: object, message: str) -> None:
    config = change(quantization_config({"a.b": W4}, ()), path, value)
    with pytest.raises(FormatError, match=message):
        read_groups(config)


FP8 = KvSpec(bits=8, grid="fp8")


def test_the_kv_cache_of_the_config() -> None:
    config = quantization_config({"a.b": W4}, (), FP8)
    assert config["kv_cache_scheme"] == {
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "strategy": "tensor",
        "symmetric": True,
        "type": "float",
    }
    assert read_kv_cache(config) == FP8
    assert [group.scheme for group in read_groups(config)] == [W4]
    observed = {**config["kv_cache_scheme"], "observer": "static_minmax", "observer_kwargs": {}, "actorder": None}
    assert read_kv_cache({**config, "kv_cache_scheme": observed}) == FP8
    assert read_kv_cache(quantization_config({"a.b": W4}, ())) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_bits", 4),
        ("type", "int"),
        ("strategy", "attn_head"),
        ("symmetric", False),
        ("dynamic", True),
        ("dynamic", "local"),
        ("block_structure", [1]),
    ],
)
def test_other_kv_caches_are_refused(key: str, value: object) -> None:
    config = quantization_config({"a.b": W4}, (), FP8)
    with pytest.raises(FormatError, match=rf"kv_cache_scheme\.{key}"):
        read_kv_cache(change(config, f"kv_cache_scheme.{key}", value))
    with pytest.raises(FormatError, match="kv_cache_scheme: found 'fp8', needed an object"):
        read_kv_cache({**config, "kv_cache_scheme": "fp8"})


def test_tensors_of_the_kv_cache() -> None:
    scales = {"layers.0.attn": KvScales.of(0.1, 3.0), "layers.1.attn": KvScales.of(1e30, 1e-30)}
    stored = kv_tensors(scales)
    assert list(stored) == [f"layers.{n}.attn.{part}_scale" for n in (0, 1) for part in "kv"]
    assert all(tensor.shape == (1,) and tensor.dtype == torch.float32 for tensor in stored.values())
    assert float(stored["layers.0.attn.v_scale"]) == float(torch.tensor(3.0) / 448)
    assert read_kv_scales(stored) == scales
    assert all(is_kv_part(name) for name in stored)
    assert not is_kv_part("layers.0.k_proj.weight_scale")
    # As other writers store them: 16 bits, no axis, zeros beside them.
    other = {"a.k_scale": torch.tensor(0.5).bfloat16(), "a.v_scale": torch.ones(1, 1), "a.k_zero_point": torch.zeros(1)}
    assert read_kv_scales(other) == {"a": KvScales(k=0.5, v=1.0)}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.v_scale", None, r"a\.v_scale: Field required"),
        ("a.k_scale", torch.ones(2), r"a\.k_scale: torch\.float32 \[2\], needed one float"),
        ("a.k_scale", torch.ones(1).int(), r"a\.k_scale: torch\.int32"),
        ("a.k_scale", torch.zeros(1), r"a\.k_scale: .*greater than 0"),
        ("a.k_scale", -torch.ones(1), r"a\.k_scale: .*greater than 0"),
        ("a.k_scale", torch.full((1,), float("nan")), r"a\.k_scale: .*finite number"),
        ("a.k_scale", torch.full((1,), float("inf")), r"a\.k_scale: .*finite number"),
        ("a.q_scale", torch.ones(1), r"a\.q_scale: .*needed one float in k_scale and v_scale"),
        ("a.v_zero_point", torch.ones(1).int(), r"a\.v_zero_point: is not 0"),
    ],
)
def test_damaged_scales_of_the_kv_cache(name: str, value: Tensor | None, message: str) -> None:
    stored = {**kv_tensors({"a": KvScales(k=0.5, v=0.25)}), name: value}
    with pytest.raises(FormatError, match=message):
        read_kv_scales({name: tensor for name, tensor in stored.items() if tensor is not None})
