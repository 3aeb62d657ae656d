"""Export to plain floats: float32 is exact, 16-bit types are the nearest, rotations are undone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from native_folders import NativeFolders, logits, resealed
from safetensors.torch import load_file

from bitwright.errors import FormatError
from bitwright.export.float_folder import export_float
from bitwright.export.folder import NativeFolder
from bitwright.numeric.activation import ActivationSpec, InputSite, KvSpec
from bitwright.numeric.spec import Bilevel, WeightSpec

LEVEL = Bilevel(axis="row", size=16, scale_bits=3, zero_bits=3)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_weight_is_the_nearest(native_folder: NativeFolders, tmp_path: Path, dtype) -> None:
    spec = WeightSpec(bits=3, group_size=16, zero="float", bilevel=LEVEL)
    folder = native_folder(lambda name: spec, outlier_share=0.01)
    result = export_float(folder, tmp_path / "hf", dtype=dtype)
    kind, stored, native = getattr(torch, dtype), tensors_of(tmp_path / "hf"), NativeFolder.open(folder)
    assert {tensor.dtype for tensor in stored.values()} == {kind}
    for module in native.entries:
        assert torch.equal(stored[f"{module}.weight"], native.weight(module).to(kind))
    assert result.bytes == sum(tensor.numel() * kind.itemsize for tensor in stored.values())
    assert not result.lossy
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == dtype
    assert "quantization_config" not in config
    if dtype == "float32":
        torch.testing.assert_close(logits(tmp_path / "hf"), logits(folder), atol=1e-5, rtol=1e-5)
        assert all(row.sqnr_db is None for row in result.rows)


def test_shared_embedding_is_shared_again(native_folder: NativeFolders, tmp_path: Path) -> None:
    folder = native_folder(tied=True)
    export_float(folder, tmp_path / "hf", dtype="float32")
    assert "lm_head.weight" not in tensors_of(tmp_path / "hf")
    torch.testing.assert_close(logits(tmp_path / "hf"), logits(folder), atol=1e-5, rtol=1e-5)


def test_rotations_of_inputs_are_undone(native_folder: NativeFolders, tmp_path: Path) -> None:
    rotated = InputSite(transform="hadamard")
    folder = native_folder(sites=lambda name: rotated if name.endswith("down_proj") else None)
    assert export_float(folder, tmp_path / "hf", dtype="float32").notes == ()
    torch.testing.assert_close(logits(tmp_path / "hf"), logits(folder), atol=1e-4, rtol=1e-4)


def test_what_is_left_behind_is_said(native_folder: NativeFolders, tmp_path: Path) -> None:
    folder = native_folder(sites=lambda name: InputSite(activation=ActivationSpec(bits=8)), kv_cache=KvSpec(bits=4))
    said: list[str] = []
    result = export_float(folder, tmp_path / "hf", say=said.append)
    assert tuple(said) == result.notes
    assert len(said) == 2


def test_values_that_do_not_fit_are_refused(native_folder: NativeFolders, tmp_path: Path) -> None:
    folder = native_folder(lambda name: WeightSpec(bits=4, scale_dtype="bfloat16", symmetric=True))
    native = NativeFolder.open(folder)
    shard, info = native.place["model.layers.0.self_attn.q_proj.weight_scale"]
    data = bytearray(shard.read_bytes())
    data[info.start : info.start + 2] = torch.tensor([1e6]).bfloat16().view(torch.uint8).numpy().tobytes()
    shard.write_bytes(bytes(data))
    resealed(folder)
    with pytest.raises(FormatError, match=r"q_proj\.weight: a weight of .* does not fit torch\.float16"):
        export_float(folder, tmp_path / "hf", dtype="float16")
    assert not (tmp_path / "hf").exists()
    export_float(folder, tmp_path / "hf", dtype="bfloat16")
