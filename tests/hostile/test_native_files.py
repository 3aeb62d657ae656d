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
    read_tied,
    unpack,
)
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec

SPEC = WeightSpec(bits=3, group_size=16)
Stored = dict[str, Tensor]


@pytest.fixture
def sample(make_qtensor: Callable[..., QTensor]) -> tuple[Stored, TensorEntry]:
    """A 3x20 matrix with outliers at columns 2, 5, 9 of rows 0 and 2."""
    q = make_qtensor((3, 20), SPEC)
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[0, [2, 5, 9]] = mask[2, [2, 5, 9]] = True
    q = QTensor(q.codes, q.grid, Outliers.gather(mask, torch.ones(3, 20)))
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
    "part of a newer version": (lambda s: {**s, "scale_codes": s["weight_packed"]}, "newer bitwright"),
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
    "huge column": (changed("outlier_idx", put(2, 65535)), "outlier_idx: columns"),
    "unsorted columns": (changed("outlier_idx", put(0, 7)), "ascending"),
    "repeated column": (changed("outlier_idx", put(1, 2)), "ascending"),
    "pointer starts late": (changed("outlier_ptr", put(0, 1)), "outlier_ptr"),
    "pointer ends early": (changed("outlier_ptr", put(-1, 5)), "outlier_ptr"),
    "pointer ends late": (changed("outlier_ptr", put(-1, 2**31 - 1)), "outlier_ptr"),
    "falling pointers": (changed("outlier_ptr", put(1, 6)), None),
    "negative pointer": (changed("outlier_ptr", put(1, -4)), "outlier_ptr"),
    "pointer beyond the end": (changed("outlier_ptr", put(1, 1000)), "outlier_ptr"),
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


def config() -> dict[str, Any]:
    return quantization_config({"proj": TensorEntry(SPEC, (3, 20), 6)})


def with_spec(**changes: Any) -> dict[str, Any]:
    return {**config(), "specs": [{**config()["specs"][0], **changes}]}


def with_tensor(**changes: Any) -> dict[str, Any]:
    return {**config(), "tensors": {"proj": {**config()["tensors"]["proj"], **changes}}}


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


CONFIGS = {
    "other method": ({**config(), "quant_method": "gptq"}, "quant_method: found 'gptq', needed 'bitwright'"),
    "other format": ({**config(), "format": "gguf"}, "format: found 'gguf'"),
    "newer version": ({**config(), "version": 2}, "found 2, needed 1; it was written by a newer bitwright"),
    "older version": ({**config(), "version": 0}, "found 0, needed 1"),
    "boolean version": ({**config(), "version": True}, "version"),
    "no version": (without(config(), "version"), "version: found None"),
    "unknown key": ({**config(), "act_order": True}, "act_order"),
    "no specs": (without(config(), "specs"), "specs"),
    "two levels": (with_spec(levels=2), "levels: found 2, needed 1; it was written by a newer bitwright"),
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
    "not JSON": ({**config(), "tensors": {"proj": object()}}, "not JSON"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_damaged_configs(case: str) -> None:
    damaged, message = CONFIGS[case]
    with pytest.raises(FormatError, match=message):
        read_quantization_config(damaged)


@pytest.mark.parametrize("tied", [{"proj": "proj"}, {"head": "absent"}])
def test_damaged_ties(tied: dict[str, str]) -> None:
    with pytest.raises(FormatError, match="tied"):
        read_tied({**config(), "tied": tied})
