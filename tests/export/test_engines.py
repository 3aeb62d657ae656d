"""What vLLM will load, told from a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitwright.errors import PlanError
from bitwright.export.engines import Obstacle, for_engine
from bitwright.numeric.activation import ActivationSpec, KvSpec
from bitwright.numeric.spec import WeightSpec
from bitwright.plan import plan
from bitwright.rows import Row

A8 = ActivationSpec(bits=8, symmetric=True)


def row(name: str, spec: WeightSpec | None, shape=(256, 512), **fields) -> Row:
    action = "keep" if spec is None else "quantize"
    return Row(f"{name}.weight", shape, torch.bfloat16, action, "", 0, spec=spec, **fields)


def only(rows: list[Row], **arguments) -> Obstacle:
    found = for_engine("vllm", rows, **arguments)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("spec", "activation"),
    [
        (WeightSpec(bits=4, group_size=128), None),
        (WeightSpec(bits=4, group_size=32, symmetric=True), None),
        (WeightSpec(bits=8), None),
        (WeightSpec(bits=8, symmetric=True), A8),
        (WeightSpec(bits=8, symmetric=True), ActivationSpec(bits=8, granularity="tensor")),
    ],
)
def test_what_it_loads(spec: WeightSpec, activation: ActivationSpec | None) -> None:
    assert for_engine("vllm", [row("layers.0.o_proj", spec, activation=activation), row("norm", None, (256,))]) == []


@pytest.mark.parametrize(
    ("spec", "shape", "reason"),
    [
        (WeightSpec(bits=8, group_size=64, symmetric=True), (64, 576), "has 8 bits"),
        (WeightSpec(bits=4, group_size=16), (64, 560), "[64, 560]"),
    ],
)
def test_processors_have_fewer_kernels(spec: WeightSpec, shape: tuple[int, int], reason: str) -> None:
    (found,) = for_engine("vllm-cpu", [row("layers.0.o_proj", spec, shape)])
    assert reason in found.reason
    assert found.certain
    for loads in (WeightSpec(bits=4, group_size=16), WeightSpec(bits=4, symmetric=True)):
        assert for_engine("vllm-cpu", [row("layers.0.o_proj", loads, (64, 96))]) == []
    both = WeightSpec(bits=8, symmetric=True)
    assert for_engine("vllm-cpu", [row("layers.0.o_proj", both, (64, 96), activation=A8)]) == []


@pytest.mark.parametrize(
    ("spec", "fields", "certain", "reason"),
    [
        (WeightSpec(bits=3, group_size=128), {}, False, "versions before 0.32 need 4 or 8"),
        (WeightSpec(bits=3, group_size=128, symmetric=True), {}, False, "Humming"),
        (WeightSpec(bits=4, group_size=16), {}, False, "groups of 16, for which few kernels"),
        (WeightSpec(bits=4, group_size=128), {"shape": (256, 576)}, True, "576 inputs in groups of 128"),
        (WeightSpec(bits=4, group_size=64), {"shape": (256, 576)}, False, "no multiple of [64, 128]"),
        (WeightSpec(bits=4, group_size=128, zero="float"), {}, True, "float zeros"),
        (WeightSpec(bits=4, group_size=128), {"hadamard": True}, True, "rotated at run time"),
        (WeightSpec(bits=8), {"activation": A8}, True, "asymmetric weights"),
        (WeightSpec(bits=8, group_size=128, symmetric=True), {"activation": A8}, True, "w8a8 with groups"),
        (WeightSpec(bits=4, group_size=128, symmetric=True), {"activation": A8}, False, "few processors"),
        (WeightSpec(bits=4, symmetric=True), {"activation": ActivationSpec(bits=4)}, True, "w4a4"),
        (WeightSpec(bits=8, symmetric=True), {"activation": ActivationSpec(bits=8, clip=0.9)}, True, "clips"),
    ],
)
def test_what_it_does_not(spec: WeightSpec, fields, certain: bool, reason: str) -> None:
    found = only([row("layers.0.o_proj", spec, **fields)])
    assert reason in found.reason
    assert found.certain is certain
    assert found.remedy
    assert found.line().endswith("(depends on the version)") is not certain


def test_fused_linears_need_one_scheme() -> None:
    four, eight = WeightSpec(bits=4, group_size=128), WeightSpec(bits=8, group_size=128)
    rows = [row(f"layers.0.attn.{name}", four) for name in ("q_proj", "k_proj")]
    assert for_engine("vllm", rows) == []
    found = only([*rows, row("layers.0.attn.v_proj", eight)])
    assert found.module == "layers.0.attn"
    assert "w4g128-asym, w4g128-asym, w8g128-asym" in found.reason
    assert "float" in only([row("mlp.gate_proj", four), row("mlp.up_proj", None)]).reason


def test_embedding_and_kv_cache() -> None:
    spec = WeightSpec(bits=4, group_size=128, symmetric=True)
    found = only([row("model.embed_tokens", spec)], embedding="model.embed_tokens")
    assert "embedding" in found.reason
    assert not found.certain
    assert "fp8" in only([], kv_cache=KvSpec(bits=4)).reason
    for engine in ("vllm", "vllm-cpu"):
        assert for_engine(engine, [], kv_cache=KvSpec(bits=8, grid="fp8")) == []


def test_outliers_of_a_real_plan(tiny_llama_folder: Path) -> None:
    made = plan(str(tiny_llama_folder), "easyquant", "w4a16g32")
    found = for_engine("vllm", made.rows(), kv_cache=made.kv_cache, embedding=made.adapter.embedding)
    assert len(found) == 14
    assert all("outliers" in obstacle.reason for obstacle in found)


def test_unknown_engine() -> None:
    with pytest.raises(PlanError, match="needed one of vllm"):
        for_engine("tgi", [])
