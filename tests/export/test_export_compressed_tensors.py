"""Export to compressed-tensors: exact round trips through folders, refusals before any write, and the library itself
where it is installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from native_folders import EMBEDDING, IDS, KV_SCALES, SPEC, NativeFolders, load, logits
from safetensors.torch import load_file
from transformers import CompressedTensorsConfig

from bitwright.checkpoint.manifest import read_manifest, write_manifest
from bitwright.errors import FormatError, ResumeError
from bitwright.export.compressed_tensors import export_compressed_tensors
from bitwright.export.folder import NativeFolder
from bitwright.export.importing import import_folder
from bitwright.export.targets import export_model
from bitwright.formats.compressed_tensors import PACKED, pack
from bitwright.inspect import inspect
from bitwright.numeric.activation import ActivationSpec, InputSite, KvSpec
from bitwright.numeric.spec import Bilevel, WeightSpec

DYNAMIC = InputSite(activation=ActivationSpec(bits=8, symmetric=True))
STATIC = InputSite(activation=ActivationSpec(bits=8, granularity="tensor"), scale=0.03125, zero=113)
W8 = WeightSpec(bits=8, symmetric=True)
FP8 = KvSpec(bits=8, grid="fp8")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_matrices(one: Path, other: Path) -> None:
    first, second = NativeFolder.open(one), NativeFolder.open(other)
    assert first.entries.keys() == second.entries.keys()
    for module in first.entries:
        a, b = first.unpack(module), second.unpack(module)
        assert torch.equal(a.codes, b.codes), module
        assert torch.equal(a.grid.scale, b.grid.scale), module
        assert torch.equal(a.grid.zero, b.grid.zero), module
    assert first.kept.keys() == second.kept.keys()
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.kept)
    assert first.sites == second.sites


@pytest.mark.parametrize(
    "spec",
    [
        WeightSpec(bits=4, group_size=32),
        WeightSpec(bits=4, group_size=32, symmetric=True, scale_dtype="bfloat16"),
        WeightSpec(bits=8, group_size=16),
        WeightSpec(bits=2),
        WeightSpec(bits=8, symmetric=True),
    ],
    ids=WeightSpec.label,
)
def test_there_and_back(native_folder: NativeFolders, tmp_path: Path, spec: WeightSpec) -> None:
    folder = native_folder(lambda name: None if name == "lm_head" else spec)
    result = export_compressed_tensors(folder, tmp_path / "ct")
    assert {row.action for row in result.rows} == {"exact", "kept"}
    assert not result.lossy
    assert result.bytes == sum(t.numel() * t.dtype.itemsize for t in tensors_of(tmp_path / "ct").values())
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", "model.embed_tokens"]
    assert (tmp_path / "ct" / "tokenizer.json").exists()
    assert not (tmp_path / "ct" / "manifest.json").exists()
    import_folder(tmp_path / "ct", tmp_path / "back")
    assert inspect(tmp_path / "back", verify=True).complaints == []
    same_matrices(folder, tmp_path / "back")
    assert torch.equal(logits(folder), logits(tmp_path / "back"))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_odd_bits_only_when_asked(native_folder: NativeFolders, tmp_path: Path, bits: int) -> None:
    folder = native_folder(lambda name: WeightSpec(bits=bits, group_size=32))
    with pytest.raises(FormatError, match=f"{bits} bits, which compressed-tensors before 0.18.0 misreads"):
        export_compressed_tensors(folder, tmp_path / "ct")
    export_compressed_tensors(folder, tmp_path / "ct", odd_bits=True)
    import_folder(tmp_path / "ct", tmp_path / "back")
    same_matrices(folder, tmp_path / "back")


@pytest.mark.parametrize("site", [DYNAMIC, STATIC], ids=InputSite.label)
def test_quantized_inputs(native_folder: NativeFolders, tmp_path: Path, site: InputSite) -> None:
    folder = native_folder(
        lambda name: None if name == "lm_head" else W8, lambda name: site if name.endswith("down_proj") else None
    )
    result = export_compressed_tensors(folder, tmp_path / "ct")
    assert any("chooses dynamic ranges" in note for note in result.notes)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    down = next(group for group in config["config_groups"].values() if group["format"] == "int-quantized")
    assert down["targets"] == [r"re:.*\.down_proj$"]
    stored = tensors_of(tmp_path / "ct")
    if site is STATIC:
        assert stored["model.layers.0.mlp.down_proj.input_scale"].tolist() == [0.03125]
        assert stored["model.layers.0.mlp.down_proj.input_zero_point"].tolist() == [113 - 128]
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8
    import_folder(tmp_path / "ct", tmp_path / "back")
    same_matrices(folder, tmp_path / "back")
    assert torch.equal(logits(folder), logits(tmp_path / "back"))


def test_a_head_that_was_never_stored_is_ignored(native_folder: NativeFolders, tmp_path: Path) -> None:
    folder = native_folder(lambda name: None if name == EMBEDDING else SPEC, tied=True)
    content = read_manifest(folder)
    content["tensors"] = [record for record in content["tensors"] if record["action"] != "tied"]
    write_manifest(folder, content, {})
    export_compressed_tensors(folder, tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.embed_tokens"]


def test_shared_embedding_becomes_float_if_allowed(native_folder: NativeFolders, tmp_path: Path) -> None:
    folder = native_folder(tied=True)
    with pytest.raises(FormatError, match="embed_tokens: is an embedding"):
        export_compressed_tensors(folder, tmp_path / "ct")
    export_compressed_tensors(folder, tmp_path / "ct", allow_lossy=True)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.embed_tokens"]
    import_folder(tmp_path / "ct", tmp_path / "back")
    torch.testing.assert_close(logits(tmp_path / "back"), logits(folder), atol=0.02, rtol=0)


@pytest.mark.parametrize("site", [None, DYNAMIC, STATIC], ids=["weights", "dynamic", "static"])
def test_an_fp8_kv_cache_there_and_back(native_folder: NativeFolders, tmp_path: Path, site: InputSite | None) -> None:
    folder = native_folder(lambda name: W8, lambda name: site, kv_cache=FP8)
    result = export_compressed_tensors(folder, tmp_path / "ct")
    stored = tensors_of(tmp_path / "ct")
    for name, pair in KV_SCALES.items():
        for part, scale in (("k_scale", pair.k), ("v_scale", pair.v)):
            tensor = stored[f"{name}.{part}"]
            assert (tensor.dtype, tensor.shape, tensor.item()) == (torch.float32, (1,), scale)
    assert result.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert any("kv_cache_dtype=fp8 by itself" in note for note in result.notes)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert (config["kv_cache_scheme"]["type"], config["kv_cache_scheme"]["num_bits"]) == ("float", 8)
    import_folder(tmp_path / "ct", tmp_path / "back")
    same_matrices(folder, tmp_path / "back")
    assert NativeFolder.open(tmp_path / "back").sites.kv_scales == KV_SCALES
    assert torch.equal(logits(tmp_path / "back"), logits(folder))
    assert not torch.equal(logits(folder), logits(native_folder(lambda name: W8, lambda name: site)))


def test_other_formats_leave_an_fp8_kv_cache_out(native_folder: NativeFolders, tmp_path: Path) -> None:
    folder = native_folder(lambda name: WeightSpec(bits=4, group_size=32), kv_cache=FP8)
    for target in ("gptq", "awq", "gguf"):
        with pytest.raises(FormatError, match=r"the KV cache.* quantized"):
            export_model(folder, tmp_path / target, target)
        assert not (tmp_path / target).exists()
    for target in ("gptq", "awq", "hf"):
        result = export_model(folder, tmp_path / target, target, allow_lossy=True)
        assert any("KV cache" in note and "float" in note for note in result.notes)
        assert not any("k_scale" in name for name in tensors_of(tmp_path / target))


LEVEL = Bilevel(axis="row", size=16, scale_bits=3, zero_bits=3)
REFUSED = {
    "outliers": {"outlier_share": 0.01},
    "two-level grid": {"specs": lambda name: WeightSpec(bits=4, group_size=16, zero="float", bilevel=LEVEL)},
    "float zeros": {"specs": lambda name: WeightSpec(bits=4, group_size=16, zero="float")},
    "in groups of 40": {"specs": lambda name: WeightSpec(bits=4, group_size=40)},
    "rotated at run time": {"sites": lambda name: InputSite(transform="hadamard")},
    "clips the ranges": {
        "sites": lambda name: InputSite(activation=ActivationSpec(bits=8, symmetric=True, clip=0.9)),
        "specs": lambda name: W8,
    },
    "the KV cache: is quantized": {"kv_cache": KvSpec(bits=4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_leave_nothing(native_folder: NativeFolders, tmp_path: Path, reason: str) -> None:
    folder = native_folder(**REFUSED[reason])
    with pytest.raises(FormatError, match=reason):
        export_compressed_tensors(folder, tmp_path / "ct")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_lossy_export_writes_floats_and_says_so(native_folder: NativeFolders, tmp_path: Path) -> None:
    def specs(name: str) -> WeightSpec:
        return WeightSpec(bits=3, group_size=32) if name.endswith("o_proj") else WeightSpec(bits=4, group_size=32)

    folder, said = native_folder(specs), []
    with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.o_proj: .*\(2 tensors cannot be exported\)"):
        export_compressed_tensors(folder, tmp_path / "ct")
    result = export_compressed_tensors(folder, tmp_path / "ct", allow_lossy=True, say=said.append)
    assert [row.tensor for row in result.lossy] == [f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 1)]
    assert all(row.action == "float" and row.bytes == 64 * 64 * 2 > row.source_bytes for row in result.lossy)
    assert all(row.sqnr_db is None or row.sqnr_db > 60 for row in result.lossy)
    assert len(said) == 2
    assert "3 bits" in said[0]
    assert "bytes" in said[0]
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.self_attn.o_proj" in config["ignore"]
    native = NativeFolder.open(folder)
    name = "model.layers.0.self_attn.o_proj"
    assert torch.equal(tensors_of(tmp_path / "ct")[f"{name}.weight"], native.weight(name).half())


def test_lossy_export_undoes_rotations(native_folder: NativeFolders, tmp_path: Path) -> None:
    rotated = InputSite(transform="hadamard")
    folder = native_folder(sites=lambda name: rotated if name.endswith("down_proj") else None)
    export_compressed_tensors(folder, tmp_path / "ct", allow_lossy=True)
    import_folder(tmp_path / "ct", tmp_path / "back")
    torch.testing.assert_close(logits(tmp_path / "back"), logits(folder), atol=0.02, rtol=0)


def test_existing_output_is_left_alone(native_folder: NativeFolders, tmp_path: Path) -> None:
    folder = native_folder()
    (tmp_path / "ct").mkdir()
    with pytest.raises(ResumeError, match="exists"):
        export_compressed_tensors(folder, tmp_path / "ct")
    assert list((tmp_path / "ct").iterdir()) == []


def test_damage_in_the_source_leaves_nothing(native_folder: NativeFolders, tmp_path: Path) -> None:
    folder = native_folder()
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(Exception, match="truncated"):
        export_compressed_tensors(folder, tmp_path / "ct")
    assert not (tmp_path / "ct").exists()
    assert not (tmp_path / "ct.exporting").exists()


# --- the library itself ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("spec", "site"),
    [
        (WeightSpec(bits=4, group_size=32, symmetric=True), None),
        (WeightSpec(bits=7, symmetric=True), None),
        (WeightSpec(bits=4, group_size=32, scale_dtype="float32"), None),
        (WeightSpec(bits=8, group_size=16, scale_dtype="float32"), None),
        (WeightSpec(bits=3, group_size=32, scale_dtype="float32"), None),
        (W8, DYNAMIC),
        (W8, STATIC),
    ],
    ids=lambda value: "" if value is None else value.label(),
)
def test_the_library_decodes_to_the_last_bit(native_folder, tmp_path: Path, spec: WeightSpec, site) -> None:
    pytest.importorskip("compressed_tensors")
    folder = native_folder(
        lambda name: None if name == "lm_head" else spec, lambda name: site if name != "lm_head" else None
    )
    export_compressed_tensors(folder, tmp_path / "ct", odd_bits=True)
    # Version 0.20 cannot load packed zeros, not even its own, other than while decoding, in the type of the scales.
    arguments = {} if spec.symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model, native = load(tmp_path / "ct", **arguments), NativeFolder.open(folder)
    with torch.no_grad():
        found = model(IDS).logits  # decodes the weights
        for module in native.entries:
            assert torch.equal(model.get_submodule(module).weight, native.weight(module)), module
        if site is None:
            torch.testing.assert_close(found, logits(folder), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("site", [None, STATIC], ids=["weights", "static"])
def test_the_library_reads_scales_of_the_kv_cache(native_folder, tmp_path: Path, site: InputSite | None) -> None:
    pytest.importorskip("compressed_tensors")
    spec = WeightSpec(bits=8, symmetric=True, scale_dtype="float32")
    folder = native_folder(
        lambda name: None if name == "lm_head" else spec, lambda name: site if name != "lm_head" else None, FP8
    )
    export_compressed_tensors(folder, tmp_path / "ct")
    model = load(tmp_path / "ct")
    for name, pair in KV_SCALES.items():
        attention = model.get_submodule(name)
        assert (attention.k_scale.item(), attention.v_scale.item()) == (pair.k, pair.v)
    if site is None:
        with torch.no_grad():
            found = model(IDS).logits
        # Its caches hold keys and values that are rounded as ours are.
        torch.testing.assert_close(found, logits(folder), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_library_reads_several_groups(native_folder: NativeFolders, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")

    def specs(name: str) -> WeightSpec:
        return WeightSpec(bits=4, group_size=32, symmetric=True) if name.endswith("_proj") else W8

    folder = native_folder(specs)
    export_compressed_tensors(folder, tmp_path / "ct")
    torch.testing.assert_close(logits(tmp_path / "ct"), logits(folder), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_library_packs_to_the_same_bytes(make_qtensor, bits: int, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    q = make_qtensor((13, 48), WeightSpec(bits=bits, group_size=16, symmetric=symmetric, scale_dtype="float32"))
    weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=16)
    scheme, centre = QuantizationScheme(targets=["Linear"], weights=weights), 1 << (bits - 1)
    plain = {"weight": q.dequantize(), "weight_scale": q.grid.scale}
    plain["weight_zero_point"] = (q.grid.zero - centre).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs, ours = compressor.compress(plain, scheme), pack(q, PACKED)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert torch.equal(compressor.decompress(ours, scheme)["weight"], q.dequantize())
