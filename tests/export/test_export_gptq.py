"""Export to GPTQ and AWQ: exact round trips through folders, and refusals before any write."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from native_folders import NativeFolders, logits, resealed
from safetensors.torch import load_file

from bitwright.errors import FormatError
from bitwright.export.folder import NativeFolder
from bitwright.export.gptq import export_awq, export_gptq
from bitwright.export.importing import import_folder
from bitwright.numeric.activation import ActivationSpec, InputSite, KvSpec
from bitwright.numeric.spec import WeightSpec


def spec_of(name: str) -> WeightSpec | None:
    """8 bits for one family, floats for another, 4 bits for the rest."""
    if name.endswith("o_proj"):
        return WeightSpec(bits=8, group_size=64, symmetric=True)
    return None if name.endswith(("lm_head", "k_proj")) else WeightSpec(bits=4, group_size=32)


def same_decoded(one: Path, other: Path) -> None:
    first, second = NativeFolder.open(one), NativeFolder.open(other)
    assert first.entries.keys() == second.entries.keys()
    for module in first.entries:
        a, b = first.unpack(module), second.unpack(module)
        assert torch.equal(a.codes, b.codes), module
        assert torch.equal(a.dequantize(), b.dequantize()), module


@pytest.mark.parametrize("version", [1, 2])
def test_mixed_model_there_and_back(native_folder: NativeFolders, tmp_path: Path, version) -> None:
    folder = native_folder(spec_of)
    result = export_gptq(folder, tmp_path / "gptq", version=version)
    assert not result.lossy
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == {1: "gptq", 2: "gptq_v2"}[version]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, False, False)
    own = {
        key: value for key, value in config["dynamic"].items() if re.match(key[2:], "model.layers.1.self_attn.o_proj")
    }
    assert own == {r"+:^model\.layers\.1\.self_attn\.o_proj$": {"bits": 8, "group_size": -1, "sym": True}}
    assert r"-:^model\.layers\.0\.self_attn\.k_proj$" in config["dynamic"]
    import_folder(tmp_path / "gptq", tmp_path / "back")
    same_decoded(folder, tmp_path / "back")
    assert torch.equal(logits(folder), logits(tmp_path / "back"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width(native_folder: NativeFolders, tmp_path: Path, bits: int) -> None:
    folder = native_folder(lambda name: WeightSpec(bits=bits, group_size=32, symmetric=True))
    export_gptq(folder, tmp_path / "gptq")
    import_folder(tmp_path / "gptq", tmp_path / "back")
    same_decoded(folder, tmp_path / "back")


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_there_and_back(native_folder: NativeFolders, tmp_path: Path, symmetric: bool) -> None:
    spec = WeightSpec(bits=4, group_size=32, symmetric=symmetric)
    folder = native_folder(lambda name: None if name == "lm_head" else spec)
    export_awq(folder, tmp_path / "awq")
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["version"], config["zero_point"]) == (4, 32, "gemm", True)
    assert config["modules_to_not_convert"] == ["lm_head", "model.embed_tokens"]
    import_folder(tmp_path / "awq", tmp_path / "back")
    same_decoded(folder, tmp_path / "back")


REFUSED = {
    "has 5 bits": {"specs": lambda name: WeightSpec(bits=5, group_size=32)},
    "outliers": {"outlier_share": 0.01},
    "rotated or quantized input": {"sites": lambda name: InputSite(activation=ActivationSpec(bits=8))},
    "embed_tokens: is an embedding": {"tied": True, "specs": lambda name: WeightSpec(bits=4, symmetric=True)},
    "the KV cache": {"kv_cache": KvSpec(bits=8), "specs": lambda name: WeightSpec(bits=4, symmetric=True)},
    "float32 scales": {"specs": lambda name: WeightSpec(bits=4, symmetric=True, scale_dtype="float32")},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_leave_nothing(native_folder: NativeFolders, tmp_path: Path, reason: str) -> None:
    folder = native_folder(**REFUSED[reason])
    with pytest.raises(FormatError, match=reason):
        export_gptq(folder, tmp_path / "gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_awq_has_one_group_size(native_folder: NativeFolders, tmp_path: Path) -> None:
    folder = native_folder(lambda name: WeightSpec(bits=4, group_size=16 if name.endswith("o_proj") else 32))
    with pytest.raises(FormatError, match="has groups of 16, needed 32"):
        export_awq(folder, tmp_path / "awq")
    result = export_awq(folder, tmp_path / "awq", allow_lossy=True)
    assert [row.tensor for row in result.lossy] == [f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 1)]
    import_folder(tmp_path / "awq", tmp_path / "back")
    torch.testing.assert_close(logits(tmp_path / "back"), logits(folder), atol=0.02, rtol=0)


def test_lossy_export_restores_a_shared_embedding(native_folder: NativeFolders, tmp_path: Path) -> None:
    folder, said = native_folder(lambda name: WeightSpec(bits=4, symmetric=True), tied=True), []
    export_gptq(folder, tmp_path / "gptq", allow_lossy=True, say=said.append)
    assert len(said) == 1
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["tie_word_embeddings"] is True
    import_folder(tmp_path / "gptq", tmp_path / "back")
    torch.testing.assert_close(logits(tmp_path / "back"), logits(folder), atol=0.02, rtol=0)


def test_zero_of_0_needs_version_2(native_folder: NativeFolders, tmp_path: Path) -> None:
    folder = native_folder(lambda name: WeightSpec(bits=4, group_size=32))
    native = NativeFolder.open(folder)
    shard, info = native.place["model.layers.0.self_attn.q_proj.weight_zero"]
    data = bytearray(shard.read_bytes())
    data[info.start : info.start + 4] = bytes(4)
    shard.write_bytes(bytes(data))
    resealed(folder)
    with pytest.raises(FormatError, match=r"q_proj: has a zero of 0, .*version 1"):
        export_gptq(folder, tmp_path / "gptq")
    export_gptq(folder, tmp_path / "gptq", version=2)
    stored = {name: t for file in (tmp_path / "gptq").glob("*.safetensors") for name, t in load_file(file).items()}
    assert stored["model.layers.0.self_attn.q_proj.qzeros"][0, 0] & 0xF == 0
