"""Import of foreign folders: what is accepted beyond our own exports, and hostile folders, which leave nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_folders import NativeFolders, logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.errors import BitwrightError, CheckpointError, FormatError, ResumeError
from bitwright.export.compressed_tensors import export_compressed_tensors
from bitwright.export.folder import NativeFolder
from bitwright.export.gptq import export_awq, export_gptq
from bitwright.export.importing import import_folder
from bitwright.inspect import inspect
from bitwright.numeric.activation import ActivationSpec, InputSite
from bitwright.numeric.spec import WeightSpec

Tensors = dict[str, Tensor]
Q = "model.layers.0.self_attn.q_proj"
STATIC = InputSite(activation=ActivationSpec(bits=8, granularity="tensor"), scale=0.03125, zero=113)


class Foreign:
    """An exported folder in one shard, to be changed before it is imported."""

    def __init__(self, native_folder: NativeFolders, place: Path):
        self.native_folder, self.path, self.out = native_folder, place / "foreign", place / "imported"

    def make(self, kind: str, **arguments: Any) -> Path:
        """Export a native folder as `kind`; returns the native one."""
        folder = self.native_folder(**arguments)
        exports: dict[str, Callable[..., object]] = {
            "compressed-tensors": export_compressed_tensors,
            "gptq": export_gptq,
            "awq": export_awq,
        }
        exports[kind](folder, self.path)
        tensors = {name: t for file in self.path.glob("*.safetensors") for name, t in load_file(file).items()}
        for file in self.path.glob("*.safetensors*"):
            file.unlink()
        save_file(tensors, self.path / "model.safetensors", metadata={"format": "pt"})
        return folder

    def change(self, tensors: Callable[[Tensors], object] | None = None, **config: Any) -> None:
        """Change tensors in place, and keys of `quantization_config` (None removes one)."""
        if tensors is not None:
            stored = load_file(self.path / "model.safetensors")
            tensors(stored)
            stored = {name: tensor.contiguous() for name, tensor in stored.items()}
            save_file(stored, self.path / "model.safetensors", metadata={"format": "pt"})
        whole = json.loads((self.path / "config.json").read_text())
        quantization = whole["quantization_config"] | config
        whole["quantization_config"] = {key: value for key, value in quantization.items() if value is not None}
        (self.path / "config.json").write_text(json.dumps(whole))

    def refused(self, message: str, kind: type[BitwrightError] = FormatError) -> None:
        with pytest.raises(kind, match=message):
            import_folder(self.path, self.out)
        assert not self.out.exists()
        assert not self.out.with_name("imported.exporting").exists()


@pytest.fixture
def foreign(native_folder: NativeFolders, tmp_path: Path) -> Foreign:
    return Foreign(native_folder, tmp_path)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda stored: stored.update({name: change(stored[name])})


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda stored: stored.pop(name)


def decoded(folder: Path, module: str = Q) -> Tensor:
    return NativeFolder.open(folder).weight(module)


# --- what others write otherwise ---------------------------------------------------------------------------


def test_one_shard_of_another_program(foreign: Foreign) -> None:
    folder, said = foreign.make("compressed-tensors"), []
    result = import_folder(foreign.path, foreign.out, say=said.append)
    assert said == [f"{foreign.path}: 15 matrices of compressed-tensors"]
    assert {row.action for row in result.rows} == {"exact", "kept"}
    found = inspect(foreign.out, verify=True)
    assert found.complaints == []
    inspected = inspect(foreign.out)
    assert inspected.bytes == result.bytes
    assert len(inspected.manifest["shards"]) == 3
    assert torch.equal(logits(folder), logits(foreign.out))


def test_unpacked_zeros_and_stored_symmetric_ones(foreign: Foreign) -> None:
    """As early versions of compressed-tensors wrote them."""
    folder = foreign.make("compressed-tensors")
    zero = NativeFolder.open(folder).grid(Q).zero - 8
    foreign.change(put(f"{Q}.weight_zero_point", lambda old: zero.to(torch.int8)))
    import_folder(foreign.path, foreign.out)
    assert torch.equal(decoded(foreign.out), decoded(folder))


def test_zeros_of_symmetric_codes_may_be_stored(foreign: Foreign) -> None:
    folder = foreign.make("compressed-tensors", specs=lambda name: WeightSpec(bits=4, symmetric=True))
    name = f"{Q}.weight_zero_point"
    foreign.change(lambda stored: stored.update({name: torch.zeros(64, 1, dtype=torch.int8)}))
    import_folder(foreign.path, foreign.out)
    assert torch.equal(decoded(foreign.out), decoded(folder))
    foreign.change(put(name, lambda old: old + 1))
    foreign.out = foreign.out.with_name("again")
    foreign.refused("weight_zero_point: is not 0, but config.json says symmetric")


def test_one_scale_for_a_matrix(foreign: Foreign) -> None:
    spec = WeightSpec(bits=8, symmetric=True)
    foreign.make("compressed-tensors", specs=lambda name: spec if name == Q else None)
    foreign.change(put(f"{Q}.weight_scale", lambda old: old[:1, 0]), config_groups=strategy(foreign, "tensor"))
    import_folder(foreign.path, foreign.out)
    grid = NativeFolder.open(foreign.out).grid(Q)
    assert torch.equal(grid.scale, grid.scale[:1].expand(64, 1))


def strategy(foreign: Foreign, name: str) -> dict[str, Any]:
    groups = json.loads((foreign.path / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["strategy"] = name
    return groups


def test_gptq_settings_in_a_file_of_their_own(foreign: Foreign) -> None:
    folder = foreign.make("gptq", specs=lambda name: WeightSpec(bits=4, group_size=32, symmetric=True))
    whole = json.loads((foreign.path / "config.json").read_text())
    settings = whole.pop("quantization_config")
    (foreign.path / "config.json").write_text(json.dumps(whole))
    old = {key: settings[key] for key in ("bits", "group_size", "desc_act", "sym")}
    (foreign.path / "quantize_config.json").write_text(json.dumps(old))
    import_folder(foreign.path, foreign.out)
    assert torch.equal(decoded(foreign.out), decoded(folder))
    assert NativeFolder.open(foreign.out).entries[Q].spec.symmetric


def test_gptq_order_that_changes_nothing(foreign: Foreign) -> None:
    folder = foreign.make("gptq", specs=lambda name: WeightSpec(bits=4, group_size=32, symmetric=True))
    foreign.change(desc_act=True)
    import_folder(foreign.path, foreign.out)
    assert torch.equal(decoded(foreign.out), decoded(folder))


# --- hostile folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (put(f"{Q}.weight_packed", lambda t: t[:, :-1]), {}, r"q_proj\.weight_packed: 7 words for 64 codes"),
        (put(f"{Q}.weight_packed", lambda t: t[:-1]), {}, r"weight_packed: is \[63, 8\], needed 64 rows"),
        (put(f"{Q}.weight_packed", lambda t: t.to(torch.int64)), {}, r"weight_packed: is torch\.int64"),
        (put(f"{Q}.weight_scale", lambda t: t[:, :1]), {}, r"weight_scale: is \[64, 1\], needed \[64, 2\]"),
        (put(f"{Q}.weight_scale", lambda t: t.double()), {}, r"weight_scale: is torch\.float64"),
        (put(f"{Q}.weight_scale", lambda t: t * float("nan")), {}, "weight_scale: holds NaN or Inf"),
        (put(f"{Q}.weight_zero_point", lambda t: t[:-1]), {}, r"weight_zero_point: is \[7, 2\], needed \[8, 2\]"),
        (put(f"{Q}.weight_zero_point", lambda t: t.float()), {}, r"weight_zero_point: is torch\.float32"),
        (put(f"{Q}.weight_shape", lambda t: t + 1), {}, "q_proj"),
        (put(f"{Q}.weight_shape", lambda t: -t), {}, "needed two sizes"),
        (put(f"{Q}.weight_shape", lambda t: t * 2**40), {}, "needed two sizes"),
        (put(f"{Q}.weight_shape", lambda t: t.float()), {}, r"weight_shape: is torch\.float32"),
        (drop(f"{Q}.weight_packed"), {}, "weight_packed: missing"),
        (drop(f"{Q}.weight_scale"), {}, "weight_scale: missing"),
        (drop(f"{Q}.weight_zero_point"), {}, "weight_zero_point: missing"),
        (drop(f"{Q}.weight_shape"), {}, "weight_shape: missing"),
        (lambda stored: stored.update({f"{Q}.weight": torch.zeros(64, 64)}), {}, r"q_proj\.weight: unknown"),
        (lambda stored: stored.update({f"{Q}.other": torch.zeros(1)}), {}, r"q_proj\.other: unknown"),
        (
            lambda stored: stored.update({f"{Q}.weight_g_idx": torch.arange(64).flip(0).int()}),
            {},
            "weight_g_idx: groups are not runs of columns",
        ),
        (None, {"quant_method": "hqq"}, "found 'hqq'"),
        (None, {"quant_method": None}, "found None"),
        (None, {"quant_method": "bitwright"}, "native already"),
        (None, {"quantization_status": "initialized"}, "quantization_status"),
        (None, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ],
)
def test_hostile_compressed_tensors(foreign: Foreign, tensors, config: dict[str, Any], message: str) -> None:
    foreign.make("compressed-tensors", specs=lambda name: WeightSpec(bits=4, group_size=32) if name == Q else None)
    foreign.change(tensors, **config)
    foreign.refused(message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (put(f"{Q}.weight", lambda t: t.to(torch.int16)), r"q_proj\.weight: is torch\.int16"),
        (put(f"{Q}.input_scale", lambda t: t * 0), "static range of inputs"),
        (put(f"{Q}.input_scale", lambda t: t.repeat(2)), r"input_scale: is \[2\]"),
        (drop(f"{Q}.input_scale"), "input_scale: is missing"),
        (drop(f"{Q}.input_zero_point"), "input_zero_point: is missing"),
    ],
)
def test_hostile_int8(foreign: Foreign, tensors, message: str) -> None:
    spec = WeightSpec(bits=8, symmetric=True)
    foreign.make("compressed-tensors", specs=lambda name: spec if name == Q else None, sites=lambda name: STATIC)
    foreign.change(tensors)
    foreign.refused(message)


def test_values_beyond_their_bits(foreign: Foreign) -> None:
    spec, site = WeightSpec(bits=4, symmetric=True), InputSite(activation=ActivationSpec(bits=8))
    foreign.make("compressed-tensors", specs=lambda name: spec if name == Q else None, sites=lambda name: site)
    foreign.change(put(f"{Q}.weight", lambda t: t + 8))
    foreign.refused("a value is outside the range of 4 bits")


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (put(f"{Q}.qweight", lambda t: t[:-1]), {}, "q_proj"),
        (put(f"{Q}.g_idx", lambda t: t.flip(0)), {}, "without desc_act"),
        (drop(f"{Q}.g_idx"), {"desc_act": True}, "g_idx: missing"),
        (put(f"{Q}.qzeros", lambda t: t | -1), {}, "a version 1 field holds 15"),
        (drop(f"{Q}.scales"), {}, "scales: missing"),
        (None, {"bits": 8}, "q_proj"),
        (None, {"bits": 5}, "bits: found 5"),
        (None, {"bits": None}, "bits: found None"),
        (None, {"group_size": 64}, "g_idx"),
        (None, {"group_size": 0}, "group_size: found 0"),
        (None, {"checkpoint_format": "marlin"}, "found 'marlin'"),
        (None, {"format": "gptq_v2"}, "checkpoint_format"),
        (None, {"pack_dtype": "int16"}, "pack_dtype"),
        (None, {"dynamic": {"-:.*q_proj": {}}}, "is not quantized; it is"),
        (None, {"dynamic": {"+:(": {}}}, "is no expression"),
    ],
)
def test_hostile_gptq(foreign: Foreign, tensors, config: dict[str, Any], message: str) -> None:
    foreign.make("gptq", specs=lambda name: WeightSpec(bits=4, group_size=32, symmetric=True) if name == Q else None)
    foreign.change(tensors, **config)
    foreign.refused(message)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (put(f"{Q}.qweight", lambda t: t[:, :-1]), {}, "qzeros"),
        (put(f"{Q}.scales", lambda t: t[:1]), {}, "scales"),
        (None, {"bits": 8}, "bits: found 8"),
        (None, {"version": "gemv"}, "version: found 'gemv'"),
        (None, {"group_size": 16}, "qzeros"),
        (lambda stored: stored.update({f"{Q}.g_idx": torch.zeros(64)}), {}, r"g_idx: unknown"),
    ],
)
def test_hostile_awq(foreign: Foreign, tensors, config: dict[str, Any], message: str) -> None:
    foreign.make("awq", specs=lambda name: WeightSpec(bits=4, group_size=32) if name == Q else None)
    foreign.change(tensors, **config)
    foreign.refused(message)


def test_damaged_folders(foreign: Foreign) -> None:
    foreign.make("compressed-tensors")
    shard, config = foreign.path / "model.safetensors", foreign.path / "config.json"
    whole, text = shard.read_bytes(), config.read_text()
    shard.write_bytes(whole[:-1])
    foreign.refused("truncated", CheckpointError)
    shard.write_bytes(whole)
    for content, message in (("{", "cannot be read"), ("[]", "needed an object"), ("{}", "no quantization_config")):
        config.write_text(content)
        foreign.refused(message)
    config.write_text(json.dumps(json.loads(text) | {"tie_word_embeddings": True}))
    foreign.refused("lm_head: is quantized and config.json says tie_word_embeddings")
    config.write_text(text)
    save_file({"model.norm.weight": torch.ones(64)}, shard)
    foreign.refused("no tensors of compressed-tensors found")
    shard.unlink()
    foreign.refused("neither model.safetensors nor", CheckpointError)


def test_existing_output_is_left_alone(foreign: Foreign) -> None:
    foreign.make("awq", specs=lambda name: WeightSpec(bits=4, group_size=32) if name == Q else None)
    foreign.out.mkdir()
    with pytest.raises(ResumeError, match="exists"):
        import_folder(foreign.path, foreign.out)
