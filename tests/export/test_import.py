"""Import of foreign folders: what is accepted beyond our own exports, and hostile folders, which leave nothing."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from functools import partial
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
from bitwright.numeric.activation import ActivationSpec, InputSite, KvSpec
from bitwright.numeric.spec import WeightSpec

Tensors = dict[str, Tensor]
ATTENTION = "model.layers.0.self_attn"
Q = f"{ATTENTION}.q_proj"
KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
STATIC = InputSite(activation=ActivationSpec(bits=8, granularity="tensor"), scale=0.03125, zero=113)


class Foreign:
    """An exported folder in one shard, to be changed before it is imported."""

    def __init__(self, native_folder: NativeFolders, place: Path):
        self.native_folder, self.path, self.out = native_folder, place / "foreign", place / "imported"

    def make(self, kind: str, **arguments: Any) -> Path:
        """Export a native folder as `kind`; returns the native one."""
        folder = self.native_folder(**arguments)
        exports: dict[str, Callable[..., object]] = {
            "compressed-tensors": partial(export_compressed_tensors, odd_bits=True),
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


def test_other_layouts_of_compressed_tensors_are_named(foreign: Foreign) -> None:
    foreign.make("compressed-tensors")
    groups = strategy(foreign, "group")
    groups["group_0"]["format"] = "marlin-24"
    foreign.change(config_groups=groups)
    foreign.refused("config_groups.group_0.format: found 'marlin-24', needed")


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
        (None, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme.type"),
        (None, {"kv_cache_scheme": KV_SCHEME}, r"there are no tensors \*\.k_scale"),
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


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (drop(f"{ATTENTION}.k_scale"), {}, r"self_attn\.k_scale: Field required"),
        (lambda t: [t.pop(f"{ATTENTION}.{part}_scale") for part in "kv"], {}, "has no scales of keys and values"),
        (lambda t: t.update({f"{Q}.k_scale": torch.ones(1), f"{Q}.v_scale": torch.ones(1)}), {}, "is no attention"),
        (put(f"{ATTENTION}.v_scale", lambda t: t * 0), {}, r"self_attn\.v_scale: .*greater than 0"),
        (put(f"{ATTENTION}.v_scale", lambda t: t * float("nan")), {}, r"self_attn\.v_scale: .*finite"),
        (put(f"{ATTENTION}.v_scale", lambda t: t.repeat(2)), {}, r"self_attn\.v_scale: torch\.float32 \[2\]"),
        (None, {"kv_cache_scheme": KV_SCHEME | {"strategy": "attn_head"}}, "kv_cache_scheme.strategy"),
    ],
)
def test_hostile_scales_of_the_kv_cache(foreign: Foreign, tensors, config: dict[str, Any], message: str) -> None:
    spec = WeightSpec(bits=4, group_size=32)
    foreign.make(
        "compressed-tensors", specs=lambda name: spec if name == Q else None, kv_cache=KvSpec(bits=8, grid="fp8")
    )
    foreign.change(tensors, **config)
    foreign.refused(message)


def test_values_beyond_their_bits(foreign: Foreign) -> None:
    spec, site = WeightSpec(bits=4, symmetric=True), InputSite(activation=ActivationSpec(bits=8))
    foreign.make("compressed-tensors", specs=lambda name: spec if name == Q else None, sites=lambda name: site)
    foreign.change(put(f"{Q}.weight", lambda t: t + 8))
    foreign.refused("a value is outside the range of 4 bits")


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            put(f"{Q}.qweight", lambda t: t[:-1]),
            {},
            r"g_idx: is torch\.int32 \[64\], needed torch\.int32 \[56\], as qweight",
        ),
        (put(f"{Q}.g_idx", lambda t: t.flip(0)), {}, r"g_idx: column 0 is in group 1, needed 0.*without desc_act"),
        (put(f"{Q}.g_idx", lambda t: t.flip(0)), {"desc_act": True}, "column 0 is in group 1, .*without desc_act"),
        (put(f"{Q}.g_idx", lambda t: t.long()), {}, r"g_idx: is torch\.int64"),
        (put(f"{Q}.scales", lambda t: t * float("nan")), {}, "scales: holds NaN or Inf"),
        (drop(f"{Q}.qweight"), {}, "qweight: missing"),
        (lambda stored: [stored.pop(f"{Q}.{part}") for part in ("qweight", "g_idx")], {}, "qweight: missing"),
        (drop(f"{Q}.g_idx"), {"desc_act": True}, "g_idx: missing"),
        (put(f"{Q}.qzeros", lambda t: t | -1), {}, "a version 1 field holds 15"),
        (drop(f"{Q}.scales"), {}, "scales: missing"),
        (None, {"bits": 8}, r"g_idx: is .*\[64\], needed .*\[32\], as qweight has 8 rows of 8-bit codes"),
        (None, {"bits": 5}, "bits: found 5"),
        (None, {"bits": None}, "bits: found None"),
        (None, {"group_size": 64}, "g_idx"),
        (None, {"group_size": 0}, "group_size: found 0"),
        (None, {"checkpoint_format": "marlin"}, "found 'marlin'"),
        (None, {"checkpoint_format": "gptq_v3"}, "found 'gptq_v3', needed 'gptq' or 'gptq_v2'; convert"),
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
        (put(f"{Q}.scales", lambda t: t * float("inf")), {}, "scales: holds NaN or Inf"),
        (put(f"{Q}.qweight", lambda t: t.to(torch.int16)), {}, r"qweight: is torch\.int16"),
        (drop(f"{Q}.qweight"), {}, "qweight: missing"),
        (None, {"bits": 8}, "bits: found 8"),
        (None, {"version": "gemv"}, "version: found 'gemv'"),
        (None, {"version": "exllama"}, "version: found 'exllama', needed 'gemm'"),
        (None, {"group_size": 16}, "qzeros"),
        (lambda stored: stored.update({f"{Q}.g_idx": torch.zeros(64)}), {}, r"g_idx: unknown"),
    ],
)
def test_hostile_awq(foreign: Foreign, tensors, config: dict[str, Any], message: str) -> None:
    foreign.make("awq", specs=lambda name: WeightSpec(bits=4, group_size=32) if name == Q else None)
    foreign.change(tensors, **config)
    foreign.refused(message)


def padded(codes: Tensor, bits: int) -> Tensor:
    """Codes [out, in] in whole words, as compressed-tensors packed them before its version 0.18."""
    per_word = 32 // bits
    fields = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word)).reshape(len(codes), -1, per_word)
    words = (fields << bits * torch.arange(per_word)).sum(dim=2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_layout_that_changed_is_told_by_width_and_version(foreign: Foreign, bits: int) -> None:
    spec = WeightSpec(bits=bits, group_size=32, symmetric=True)
    folder = foreign.make("compressed-tensors", specs=lambda name: spec if name == Q else None)
    name, codes = f"{Q}.weight_packed", NativeFolder.open(folder).unpack(Q).codes
    width = load_file(foreign.path / "model.safetensors")[name].shape[1]
    foreign.change(version="0.17.1")
    foreign.refused(
        rf"weight_packed: {width} words for 64 codes of {bits} bits, needed .* in files of version 0\.17\.1"
    )
    foreign.change(put(name, lambda old: padded(codes, bits)), version="0.18.0")
    foreign.refused(r"weight_packed: .* in files of version 0\.18\.0")
    foreign.change(version="0.17.1")
    import_folder(foreign.path, foreign.out)
    assert torch.equal(decoded(foreign.out), decoded(folder))


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors"])
def test_full_disk_leaves_nothing(foreign: Foreign, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign.make(kind, specs=lambda name: WeightSpec(bits=4, group_size=32) if "self_attn" in name else None)
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        import_folder(foreign.path, foreign.out)
    assert len(calls) > 3
    assert sorted(path.name for path in foreign.out.parent.iterdir()) == ["foreign", "native"]


def test_damaged_folders(foreign: Foreign) -> None:
    foreign.make("compressed-tensors")
    shard, config = foreign.path / "model.safetensors", foreign.path / "config.json"
    whole, text = shard.read_bytes(), config.read_text()
    shard.write_bytes(whole[:-1])
    foreign.refused("truncated", CheckpointError)
    shard.write_bytes(whole)
    for content, message in (("{", "not JSON"), ("[]", "needed an object"), ("{}", "no quantization_config")):
        config.write_text(content)
        foreign.refused(message)
    config.write_text(text)
    save_file({"model.norm.weight": torch.ones(64)}, shard)
    foreign.refused("no tensors of compressed-tensors found")
    shard.unlink()
    foreign.refused("neither model.safetensors nor", CheckpointError)


def test_a_stored_head_is_the_models_own_whatever_the_flag_says(foreign: Foreign) -> None:
    folder = foreign.make("compressed-tensors")
    config = foreign.path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    import_folder(foreign.path, foreign.out)
    assert json.loads((foreign.out / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(folder), logits(foreign.out))


def test_existing_output_is_left_alone(foreign: Foreign) -> None:
    foreign.make("awq", specs=lambda name: WeightSpec(bits=4, group_size=32) if name == Q else None)
    foreign.out.mkdir()
    with pytest.raises(ResumeError, match="exists"):
        import_folder(foreign.path, foreign.out)
