"""Hostile native tensors and configs: every one is refused with a FormatError that names the culprit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.native import (
    TensorEntry,
    check_parts,
    pack,
    quantization_config,
    read_quantization_config,
    read_sites,
    read_tied,
    unpack,
)
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec

SPEC = WeightSpec(bits=3, group_size=16)
LEVEL = {"axis": "row", "size": 16, "scale_bits": 3, "zero_bits": None}
Stored = dict[str, Tensor]


@pytest.fixture
def sample(make_qtensor: Callable[..., QTensor]) -> tuple[Stored, TensorEntry]:
    """A 3x20 matrix with outliers at columns 2, 5, 9 of rows 0 and 2."""
    q = make_qtensor((3, 20), SPEC)
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[0, [2, 5, 9]] = mask[2, [2, 5, 9]] = True
    q = QTensor(q.codes, q.grid, Outliers.gather(mask, torch.ones(3, 20)))
    return pack(q), TensorEntry.of(q)


@pytest.fixture
def two_level(make_qtensor: Callable[..., QTensor]) -> tuple[Stored, TensorEntry]:
    """A 7x300 matrix: 4 bits, two superblocks of 4 rows and 19 ragged groups, 8-bit outliers in rows 0 and 6."""
    level = Bilevel(axis="row", size=4, scale_bits=3, zero_bits=3)
    q = make_qtensor((7, 300), WeightSpec(bits=4, group_size=16, zero="float", bilevel=level))
    mask = torch.zeros(7, 300, dtype=torch.bool)
    mask[0, [2, 255, 256]] = mask[6, [5, 299]] = True
    q = QTensor(q.codes, q.grid, Outliers.gather(mask, torch.ones(7, 300), 8))
    return pack(q), TensorEntry.of(q)


def changed(part: str, change: Callable[[Tensor], Any]) -> Callable[[Stored], Stored]:
    """`part` replaced by `change(part)`, or changed in place where that returns None."""

    def apply(stored: Stored) -> Stored:
        tensor = stored[part].clone()
        result = change(tensor)
        return {**stored, part: tensor if result is None else result}

    return apply


def put(index: Any, value: float) -> Callable[[Tensor], None]:
    return lambda tensor: tensor.__setitem__(index, value)


DAMAGE = {
    "missing part": (lambda s: {k: v for k, v in s.items() if k != "weight_scale"}, "weight_scale: missing"),
    "missing zero": (lambda s: {k: v for k, v in s.items() if k != "weight_zero"}, "weight_zero: missing"),
    "unknown part": (lambda s: {**s, "weight": s["weight_scale"]}, "weight: unknown"),
    "part of two levels": (lambda s: {**s, "scale_codes": s["weight_packed"]}, "scale_codes: unknown"),
    "steps of 16-bit values": (lambda s: {**s, "outlier_step": torch.ones(3).half()}, "outlier_step: unknown"),
    "truncated codes": (changed("weight_packed", lambda t: t[:, :-1].contiguous()), "weight_packed: found"),
    "truncated rows": (changed("weight_packed", lambda t: t[:-1]), "weight_packed: found"),
    "truncated zeros": (changed("weight_zero", lambda t: t[:0]), "weight_zero: found"),
    "truncated values": (changed("outlier_val", lambda t: t[:-1]), "outlier_val: found"),
    "wrong dtype of codes": (changed("weight_packed", lambda t: t.long()), "torch.int64"),
    "wrong dtype of scales": (changed("weight_scale", lambda t: t.float()), "torch.float32"),
    "float zeros": (changed("weight_zero", lambda t: t.float()), "weight_zero: found torch.float32"),
    "wrong dtype of columns": (changed("outlier_idx", lambda t: t.int()), "outlier_idx: found torch.int32"),
    "padding of codes": (changed("weight_packed", put((1, -1), 1 << 30)), "weight_packed: padding"),
    "padding of zeros": (changed("weight_zero", put(0, 1 << 30)), "weight_zero: padding"),
    "NaN scale": (changed("weight_scale", put((0, 0), float("nan"))), "weight_scale: holds NaN"),
    "infinite scale": (changed("weight_scale", put((2, 1), float("-inf"))), "weight_scale: holds NaN"),
    "NaN outlier": (changed("outlier_val", put(3, float("nan"))), "outlier_val: holds NaN"),
    "column out of range": (changed("outlier_idx", put(2, 20)), "outlier_idx: columns"),
    "unsorted columns": (changed("outlier_idx", put(0, 7)), "ascending"),
    "repeated column": (changed("outlier_idx", put(1, 2)), "ascending"),
    # Tiles of 3, 0 and 3 outliers are the bits 111 0 0 111 0, lowest first.
    "one outlier less": (changed("outlier_counts", put(0, 0b011000111)), "add up to 5 in 3 tiles, needed 6"),
    "one outlier more": (changed("outlier_counts", put(0, 0b011101111)), "add up to 7"),
    "no tile behind the last outlier": (changed("outlier_counts", put(0, 0b111000111)), "a 0 at the end"),
    "outliers in the padding": (changed("outlier_counts", put(0, -1)), "outlier_counts: padding"),
    "more outliers in a row": (changed("outlier_counts", put(0, 0b000111111)), "ascending"),
}

TWO_LEVEL_DAMAGE = {
    "missing statistics": (
        lambda s: {k: v for k, v in s.items() if k != "superblock_statistics"},
        "superblock_statistics: missing",
    ),
    "one-level scales": (lambda s: {**s, "weight_scale": torch.ones(7, 19).half()}, "weight_scale: unknown"),
    "other superblocks": (changed("superblock_statistics", lambda t: t[:1]), "superblock_statistics: found"),
    "other axis": (changed("superblock_statistics", lambda t: t.transpose(0, 1).contiguous()), r"found .*\[19, 2, 4\]"),
    "float scale codes": (changed("scale_codes", lambda t: t.float()), "scale_codes: found torch.float32"),
    "truncated scale codes": (changed("scale_codes", lambda t: t[:-1]), "scale_codes: found"),
    "missing zero codes": (lambda s: {k: v for k, v in s.items() if k != "zero_codes"}, "zero_codes: missing"),
    "padding of scale codes": (changed("scale_codes", put(-1, -1)), "scale_codes: padding"),
    "padding of zero codes": (changed("zero_codes", put(-1, -1)), "zero_codes: padding"),
    "NaN statistic": (
        changed("superblock_statistics", put((1, 3, 0), float("nan"))),
        "superblock_statistics: holds NaN",
    ),
    "infinite zero statistic": (
        changed("superblock_statistics", put((0, 0, 3), float("inf"))),
        "superblock_statistics: holds NaN",
    ),
    "scale of zero": (
        changed("superblock_statistics", put((1, 2, slice(0, 2)), 0.0)),
        "scale_codes: decode to a scale",
    ),
    "NaN step": (changed("outlier_step", put(6, float("nan"))), "outlier_step: holds NaN"),
    "negative step": (changed("outlier_step", put(0, -0.5)), "outlier_step: holds NaN, Inf or negative"),
    "value beyond the largest": (changed("outlier_val", put(1, -128)), "outlier_val: holds -128"),
    "half values": (changed("outlier_val", lambda t: t.half()), "outlier_val: found torch.float16"),
    "missing steps": (lambda s: {k: v for k, v in s.items() if k != "outlier_step"}, "outlier_step: missing"),
    "column beyond the ragged tile": (changed("outlier_idx", put(4, 44)), "outlier_idx: columns 2..300"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tensors(sample: tuple[Stored, TensorEntry], case: str) -> None:
    stored, entry = sample
    damage, message = DAMAGE[case]
    check_parts("model.proj", stored, entry)
    for reader in (unpack, check_parts):
        with pytest.raises(FormatError, match=message) as error:
            reader("model.proj", damage(stored), entry)
        assert str(error.value).startswith("model.proj")


@pytest.mark.parametrize("case", TWO_LEVEL_DAMAGE)
def test_damaged_second_levels(two_level: tuple[Stored, TensorEntry], case: str) -> None:
    stored, entry = two_level
    damage, message = TWO_LEVEL_DAMAGE[case]
    check_parts("model.proj", stored, entry)
    for reader in (unpack, check_parts):
        with pytest.raises(FormatError, match=message) as error:
            reader("model.proj", damage(stored), entry)
        assert str(error.value).startswith("model.proj")


@pytest.mark.parametrize("symmetric", [False, True])
def test_column_codes_of_a_scale_of_zero(make_qtensor: Callable[..., QTensor], symmetric: bool) -> None:
    level = Bilevel(axis="column", size=2, scale_bits=4)
    spec = WeightSpec(bits=4, group_size=4, symmetric=symmetric, bilevel=level)
    q = make_qtensor((2, 16), spec)
    stored = pack(q)
    # The first code, in the lowest four bits: 0, and -0 of the signed codes.
    nothing = 8 if symmetric else 0
    stored["scale_codes"][0] = (stored["scale_codes"][0] & ~15) | nothing
    with pytest.raises(FormatError, match="scale_codes: decode to a scale of 0"):
        check_parts("w", stored, TensorEntry.of(q))


def test_a_second_level_beyond_float32(make_qtensor: Callable[..., QTensor]) -> None:
    level = Bilevel(axis="row", size=2, scale_bits=8)
    spec = WeightSpec(bits=4, group_size=4, scale_dtype="bfloat16", bilevel=level)
    q = make_qtensor((2, 16), spec)
    stored = pack(q)
    stored["superblock_statistics"].fill_(3e38)
    with pytest.raises(FormatError, match="beyond float32"):
        check_parts("w", stored, TensorEntry.of(q))


def config() -> dict[str, Any]:
    return quantization_config({"proj": TensorEntry(SPEC, (3, 20), 6)})


def with_spec(**changes: Any) -> dict[str, Any]:
    return {**config(), "specs": [{**config()["specs"][0], **changes}]}


def with_level(**changes: Any) -> dict[str, Any]:
    """Two levels; `...` leaves a key out."""
    table = {key: value for key, value in {**LEVEL, **changes}.items() if value is not ...}
    return with_spec(levels=2, bilevel=table)


def with_tensor(**changes: Any) -> dict[str, Any]:
    return {**config(), "tensors": {"proj": {**config()["tensors"]["proj"], **changes}}}


def with_activation(**changes: Any) -> dict[str, Any]:
    """A dynamic spec that nothing uses; `...` leaves a key out."""
    spec = {"bits": 4, "granularity": "token", "symmetric": False, "clip": 1.0, **changes}
    return {**config(), "activations": [{key: value for key, value in spec.items() if value is not ...}]}


def with_kv_cache(**changes: Any) -> dict[str, Any]:
    table = {"bits": 4, "rope": "after", "symmetric": False, "past_only": False, **changes}
    return {**config(), "kv_cache": {key: value for key, value in table.items() if value is not ...}}


SCALES = {"attn": {"k": 0.5, "v": 0.25}}


def with_fp8(**changes: Any) -> dict[str, Any]:
    return with_kv_cache(**{"bits": 8, "grid": "fp8", "scales": SCALES, **changes})


def with_input(granularity: str = "tensor", **changes: Any) -> dict[str, Any]:
    """The input of the one tensor, by a spec of 4 bits."""
    site = {"transform": None, "activation": 0, "scale": 0.5, "zero": 3, **changes}
    tensor = config()["tensors"]["proj"] | {"input": {key: value for key, value in site.items() if value is not ...}}
    return with_activation(granularity=granularity) | {"tensors": {"proj": tensor}}


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


CONFIGS = {
    "other method": ({**config(), "quant_method": "gptq"}, "quant_method: found 'gptq', needed 'bitwright'"),
    "other format": ({**config(), "format": "gguf"}, "format: found 'gguf'"),
    "newer version": ({**config(), "version": 4}, "found 4, needed 3; it was written by a newer bitwright"),
    "first version": ({**config(), "version": 1}, "found 1, needed 3; .* quantize the model again"),
    "second version": ({**config(), "version": 2}, "found 2, needed 3; .* quantize the model again"),
    "version zero": ({**config(), "version": 0}, "found 0, needed 3"),
    "boolean version": ({**config(), "version": True}, "version"),
    "no version": (without(config(), "version"), "version: found None"),
    "unknown key": ({**config(), "act_order": True}, "act_order"),
    "no specs": (without(config(), "specs"), "specs"),
    "three levels": (with_spec(levels=3), "levels: found 3, needed 1 or 2; it was written by a newer bitwright"),
    "two levels without a table": (with_spec(levels=2), "2 levels with bilevel None"),
    "one level with a table": (with_spec(bilevel=LEVEL), "1 levels with bilevel"),
    "no bilevel": ({**config(), "specs": [without(config()["specs"][0], "bilevel")]}, "bilevel"),
    "default left out of the table": (with_level(zero_bits=...), "zero_bits"),
    "unknown key of the table": (with_level(offset=1), "offset"),
    "diagonal axis": (with_level(axis="diagonal"), "axis"),
    "empty superblocks": (with_level(size=0), "size"),
    "nine scale bits": (with_level(scale_bits=9), "scale_bits"),
    "text for scale bits": (with_level(scale_bits="3"), "scale_bits"),
    "two-level integer zeros": (with_level(zero_bits=3), "zero='float'"),
    "boolean level": (with_spec(levels=True), "levels"),
    "no level": ({**config(), "specs": [without(config()["specs"][0], "levels")]}, "levels"),
    "default left out": ({**config(), "specs": [without(config()["specs"][0], "symmetric")]}, "symmetric"),
    "nine bits": (with_spec(bits=9), r"specs\.0\.bits"),
    "text for a number": (with_spec(bits="3"), r"specs\.0\.bits"),
    "unknown spec key": (with_spec(permutation=True), "permutation"),
    "symmetric with float zeros": (with_spec(symmetric=True, zero="float"), "fixed zero"),
    "spec out of range": (with_tensor(spec=1), "spec 1 of 1"),
    "negative spec": (with_tensor(spec=-1), "spec"),
    "empty matrix": (with_tensor(shape=[0, 20]), "proj: shape"),
    "absurd matrix": (with_tensor(shape=[1 << 40, 1 << 40]), "proj: shape"),
    "three axes": (with_tensor(shape=[3, 20, 1]), "shape"),
    "fractional size": (with_tensor(shape=[3, 20.5]), "shape"),
    "too many outliers": (with_tensor(outliers=61), "61 outliers"),
    "negative outliers": (with_tensor(outliers=-1), "outliers"),
    "seven bits per value": (with_tensor(value_bits=7), "value_bits 7"),
    "eight bits of nothing": (with_tensor(outliers=0, value_bits=8), "value_bits 8 for 0 outliers"),
    "no activations": (without(config(), "activations"), "activations"),
    "no KV cache": (without(config(), "kv_cache"), "kv_cache"),
    "nine bits of activations": (with_activation(bits=9), r"activations\.0\.bits"),
    "text for bits of activations": (with_activation(bits="4"), r"activations\.0\.bits"),
    "default left out of activations": (with_activation(clip=...), "missing clip"),
    "clip of nothing": (with_activation(clip=0), r"activations\.0\.clip"),
    "clip of everything and more": (with_activation(clip=1.5), r"activations\.0\.clip"),
    "granularity of another program": (with_activation(granularity="channel"), "granularity"),
    "unknown key of activations": (with_activation(group_size=64), "group_size"),
    "static and clipped": (with_activation(granularity="tensor", clip=0.5), "activations.granularity=token"),
    "one bit of KV cache": (with_kv_cache(bits=1), r"kv_cache\.bits"),
    "number for a switch": (with_kv_cache(past_only=1), r"kv_cache\.past_only"),
    "default left out of the KV cache": (with_kv_cache(rope=...), "missing rope"),
    "past only before RoPE": (with_kv_cache(past_only=True, rope="before"), "kv.rope=after"),
    "unknown key of the KV cache": (with_kv_cache(clip=1.0), r"kv_cache\.clip"),
    "scales missing": (with_fp8(scales=...), "kv_cache: .* exactly where grid is 'fp8'"),
    "no scale in the table": (with_fp8(scales={}), "kv_cache: .* exactly where grid is 'fp8'"),
    "scales of integers": (with_kv_cache(scales=SCALES), "kv_cache: .* exactly where grid is 'fp8'"),
    "grid of another program": (with_fp8(grid="e5m2"), r"kv_cache\.grid"),
    "four bits of fp8": (with_fp8(bits=4), "grid 'fp8' has 8 bits"),
    "fp8 before RoPE": (with_fp8(rope="before"), "kv.rope=after"),
    "fp8 of the past": (with_fp8(past_only=True), "kv.past_only=false"),
    "symmetric fp8": (with_fp8(symmetric=True), "floats have none"),
    "default left out of fp8": (with_fp8(rope=...), "missing rope"),
    "one scale": (with_fp8(scales={"attn": {"k": 1.0}}), r"scales\.attn\.v"),
    "three scales": (with_fp8(scales={"attn": {"k": 1.0, "v": 1.0, "q": 1.0}}), r"scales\.attn\.q"),
    "scale of zero in fp8": (with_fp8(scales={"attn": {"k": 0.0, "v": 1.0}}), r"scales\.attn\.k: .*greater than 0"),
    "negative scale in fp8": (with_fp8(scales={"attn": {"k": 1.0, "v": -1.0}}), r"scales\.attn\.v: .*greater than 0"),
    "NaN for a scale": (with_fp8(scales={"attn": {"k": float("nan"), "v": 1.0}}), r"scales\.attn\.k: .*finite"),
    "infinite scale in fp8": (with_fp8(scales={"attn": {"k": float("inf"), "v": 1.0}}), r"scales\.attn\.k: .*finite"),
    "fp8 scale that is no float32": (with_fp8(scales={"attn": {"k": 0.1, "v": 1.0}}), "not a float32"),
    "text for an fp8 scale": (with_fp8(scales={"attn": {"k": "1", "v": 1.0}}), r"scales\.attn\.k"),
    "list of scales": (with_fp8(scales=[[1.0, 1.0]]), r"kv_cache\.scales"),
    "transform of another program": (with_input(transform="fourier"), r"proj\.input\.transform"),
    "key left out of an input": (with_input(zero=...), r"proj\.input\.zero"),
    "unknown key of an input": (with_input(clip=1), r"proj\.input\.clip"),
    "negative activation": (with_input(activation=-1), r"proj\.input\.activation"),
    "boolean activation": (with_input(activation=True), r"proj\.input\.activation"),
    "text for a scale": (with_input(scale="0.5"), r"proj\.input\.scale"),
    "infinite scale": (with_input(scale=float("inf")), r"proj\.input\.scale"),
    "fractional zero": (with_input(zero=3.5), r"proj\.input\.zero"),
    "not JSON": ({**config(), "tensors": {"proj": object()}}, "not JSON"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_damaged_configs(case: str) -> None:
    read_sites(with_fp8())
    damaged, message = CONFIGS[case]
    with pytest.raises(FormatError, match=message):
        read_quantization_config(damaged)


INPUTS = {
    "activation out of range": (with_input(activation=1), "activation 1 of 1 activations"),
    "nothing happens": (with_input(activation=None, scale=None, zero=None), "nothing happens"),
    "static without a range": (with_input(scale=None, zero=None), "exactly where"),
    "static without a zero": (with_input(zero=None), "exactly where"),
    "dynamic with a range": (with_input("token"), "exactly where"),
    "transform with a range": (with_input(transform="hadamard", activation=None), "exactly where"),
    "scale of zero": (with_input(scale=0.0), "greater than 0"),
    "negative scale": (with_input(scale=-0.5), "greater than 0"),
    "scale that is no float32": (with_input(scale=0.1), "not a float32"),
    "scale below float32": (with_input(scale=1e-60), "not a float32"),
    "zero beyond the codes": (with_input(zero=16), r"zero 16 is outside 0\.\.15"),
    "negative zero": (with_input(zero=-1), "greater than or equal to 0"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_damaged_inputs(case: str) -> None:
    damaged, message = INPUTS[case]
    read_sites(with_input())
    with pytest.raises(FormatError, match=rf"tensors\.proj\.input: .*{message}"):
        read_sites(damaged)


@pytest.mark.parametrize("tied", [{"proj": "proj"}, {"head": "absent"}])
def test_damaged_ties(tied: dict[str, str]) -> None:
    with pytest.raises(FormatError, match="tied"):
        read_tied({**config(), "tied": tied})
