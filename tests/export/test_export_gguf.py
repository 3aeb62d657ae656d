"""Whole models to GGUF: read back by the gguf package, by transformers, by our own reader, and by our import."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import quantize_into, requantize
from native_folders import resealed
from transformers import AutoConfig, AutoModelForCausalLM

import bitwright
from bitwright.checkpoint.gguf import GgufSource
from bitwright.checkpoint.load import load_model
from bitwright.checkpoint.manifest import verify_manifest
from bitwright.checkpoint.quiet import quiet_transformers
from bitwright.errors import FormatError, PlanError, ResumeError
from bitwright.export.folder import NativeFolder
from bitwright.export.gguf import export_gguf
from bitwright.export.gguf_import import import_gguf
from bitwright.export.gguf_model import rope_halves, rope_pairs

TOKENS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))
SYM4 = {"scheme": "w4a16g32-sym"}


Quantize = Callable[..., Path]


@pytest.fixture(scope="module")
def quantized(tiny_llama_folder: Path) -> Quantize:
    """Makes a native folder inside a folder: architecture, recipe, changes of the config."""
    return lambda folder, *args, **changes: quantize_into(folder, tiny_llama_folder, *args, **changes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, quantized: Quantize) -> Path:
    return quantized(tmp_path_factory.mktemp("llama"), "llama", SYM4)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a native folder, decoded, by the checkpoint's names."""
    native = NativeFolder.open(folder)
    return {f"{m}.weight": native.weight(m) for m in native.entries} | {n: native.read(n) for n in native.kept}


def loaded(path: Path) -> Any:
    """The model that transformers makes of the file."""
    config = AutoConfig.for_model(**GgufSource(path).config)
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32
        ).eval()


@pytest.mark.parametrize(
    ("architecture", "recipe", "changes"),
    [
        ("llama", SYM4, {}),
        ("llama", {"scheme": "w3a16g64-asym"}, {"attention_bias": True, "mlp_bias": True}),
        ("llama", {**SYM4, "rules": [{"match": "model.embed_tokens"}]}, {"tie_word_embeddings": True}),
        ("qwen2", {"scheme": "w8a16g32-sym"}, {"tie_word_embeddings": True}),
        ("qwen3", {"scheme": "w4a16g32-asym", "rules": [{"match": "lm_head"}]}, {}),
    ],
    ids=["llama", "llama-bias", "llama-tied", "qwen2-tied", "qwen3"],
)
def test_file_computes_what_the_folder_computes(
    tmp_path: Path, quantized: Quantize, architecture: str, recipe: dict, changes: dict
) -> None:
    folder = quantized(tmp_path, architecture, recipe, **changes)
    path = tmp_path / "model.gguf"
    seen: list[tuple[str, int, int]] = []
    result = export_gguf(folder, path, progress=lambda *args: seen.append(args))

    source = GgufSource(path)
    for name, value in weights(folder).items():
        assert torch.equal(source.read(name).float(), value.float()), name
    expected = logits(load_model(str(folder)).model)
    assert torch.allclose(logits(loaded(path)), expected, atol=1e-5)
    assert {row.action for row in result.rows} == {"exact", "kept"}
    assert not result.lossy
    assert seen[-1][1] == seen[-1][2]
    assert result.bytes == sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    assert [row.name for row in result.rows] == [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    assert result.to_json()["tensors"][0]["kind"] == result.rows[0].kind


def test_metadata_and_tokenizer(tmp_path: Path, llama: Path) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(llama, path)
    reader = gguf.GGUFReader(path)
    found = {key: field.contents() for key, field in reader.fields.items()}
    tokenizer = load_model(str(llama)).tokenizer
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "float",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert found["tokenizer.ggml.tokens"][: len(tokens)] == tokens
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert len(found["tokenizer.ggml.tokens"]) == 320
    # types as llama.cpp reads them
    assert reader.fields["llama.block_count"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["tokenizer.ggml.token_type"].types[1] == gguf.GGUFValueType.INT32


def test_same_folder_gives_the_same_bytes(tmp_path: Path, llama: Path) -> None:
    sums = set()
    for name in ("one.gguf", "two.gguf"):
        export_gguf(llama, tmp_path / name)
        sums.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(sums) == 1


def test_import_gives_back_the_folder(tmp_path: Path, quantized: Quantize) -> None:
    folder = quantized(tmp_path, "llama", SYM4)
    export_gguf(folder, tmp_path / "model.gguf")
    back = tmp_path / "back"
    result = import_gguf(tmp_path / "model.gguf", back)
    assert verify_manifest(back) == []
    ours, theirs = NativeFolder.open(folder), NativeFolder.open(back)
    assert theirs.entries == ours.entries
    for module in ours.entries:
        one, other = ours.unpack(module), theirs.unpack(module)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.grid.scale, other.grid.scale)
    assert {row.action for row in result.rows} == {"exact", "kept"}
    assert torch.equal(logits(load_model(str(back)).model), logits(load_model(str(folder)).model))
    # and once more the same file
    export_gguf(back, tmp_path / "again.gguf")
    first, second = (gguf.GGUFReader(tmp_path / name).tensors for name in ("model.gguf", "again.gguf"))
    for one, other in zip(first, second, strict=True):
        assert (one.name, one.tensor_type) == (other.name, other.tensor_type)
        assert np.array_equal(one.data, other.data)


KINDS = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}


@pytest.mark.parametrize("kind", KINDS)
def test_k_blocks_from_a_recipe_and_back(tmp_path: Path, quantized: Quantize, kind: str) -> None:
    recipe = {
        "method": {"name": "custom", "range": {"name": "minmax"}, "grid": "gguf"},
        "scheme": f"w{KINDS[kind]}a16",
    }
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    folder = quantized(tmp_path, "llama", recipe, **sizes)
    path = tmp_path / "model.gguf"
    result = export_gguf(folder, path)
    assert {row.kind for row in result.rows if row.action == "exact"} == {kind}
    # native and GGUF take the same bytes
    assert all(row.bytes == row.source_bytes for row in result.rows if row.action == "exact")
    source = GgufSource(path)
    for name, value in weights(folder).items():
        assert torch.allclose(source.read(name).float(), value.float(), rtol=0, atol=1e-6), name
    import_gguf(path, tmp_path / "back")
    ours, theirs = NativeFolder.open(folder), NativeFolder.open(tmp_path / "back")
    for module in ours.entries:
        one, other = ours.unpack(module), theirs.unpack(module)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.grid.zero, other.grid.zero)


def test_error_feedback_on_the_grid_of_each_matrix(tiny_llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Rows of 64 and 128 columns are no superblocks: they take blocks of 32 with at least the bits asked for."""
    small = [f"calibration.text={json.dumps(str(text_file))}", "calibration.windows=2", "calibration.window_tokens=48"]
    for bits, kind in ((3, "Q4_0"), (5, "Q5_0"), (6, "Q8_0")):
        recipe = bitwright.load_recipe("gptq", f"w{bits}a16", overrides=["grid=gguf", *small])
        bitwright.quantize(str(tiny_llama_folder), tmp_path / kind, recipe=recipe)
        result = export_gguf(tmp_path / kind, tmp_path / f"{kind}.gguf")
        assert {row.kind for row in result.rows if row.action != "kept"} == {kind}
        assert result.lossy == ()


@pytest.mark.parametrize(
    ("scheme", "override", "message"),
    [
        ("w4a16g32", "grid=gguf", "groups, symmetry and float16 scales of its own"),
        ("w4a16", "scale_dtype=bfloat16", "with bfloat16 scales"),
    ],
)
def test_grids_that_gguf_does_not_have(tiny_llama_folder: Path, scheme: str, override: str, message: str) -> None:
    recipe = bitwright.load_recipe("rtn", scheme, overrides=["grid=gguf", override])
    with pytest.raises(PlanError, match=message):
        bitwright.plan(str(tiny_llama_folder), recipe=recipe)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_files_of_others_are_imported_and_exported_as_they_are(tmp_path: Path, llama: Path, kind: str) -> None:
    """What llama.cpp quantizes to types with an offset comes in exactly, and leaves with the same bytes."""
    export_gguf(llama, tmp_path / "source.gguf")
    requantize(tmp_path / "source.gguf", tmp_path / "other.gguf", kind)
    import_gguf(tmp_path / "other.gguf", tmp_path / "native")
    result = export_gguf(tmp_path / "native", tmp_path / "back.gguf")
    assert {row.kind for row in result.rows if row.action == "exact"} == {kind}
    first, second = (gguf.GGUFReader(tmp_path / name).tensors for name in ("other.gguf", "back.gguf"))
    for one, other in zip(first, second, strict=True):
        values = [gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in (one, other)]
        assert np.array_equal(*values), one.name
        # the padding token's row, all zeros, has scales of 1 now
        assert one.name == "token_embd.weight" or np.array_equal(one.data, other.data), one.name


def test_gemma3_norms_and_sliding_window(tmp_path: Path, quantized: Quantize) -> None:
    folder = quantized(
        tmp_path, "gemma3_text", SYM4, sliding_window=8, query_pre_attn_scalar=16, tie_word_embeddings=True
    )
    path = tmp_path / "model.gguf"
    export_gguf(folder, path)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    native = NativeFolder.open(folder)
    for name, theirs in {
        "model.norm": "output_norm",
        "model.layers.1.post_attention_layernorm": "blk.1.post_attention_norm",
        "model.layers.1.self_attn.q_norm": "blk.1.attn_q_norm",
        "model.layers.0.pre_feedforward_layernorm": "blk.0.ffn_norm",
    }.items():
        assert np.array_equal(tensors[f"{theirs}.weight"], native.read(f"{name}.weight").float().numpy() + 1)
    found = {key: field.contents() for key, field in reader.fields.items()}
    assert found["gemma3.attention.sliding_window"] == 8
    assert found["gemma3.rope.freq_base"] == 1e6


def test_rope_rows_are_undone() -> None:
    values = torch.arange(48).reshape(24, 2)
    assert rope_pairs(values, 3)[:4, 0].tolist() == [0, 8, 2, 10]
    assert torch.equal(rope_halves(rope_pairs(values, 3), 3), values)


ROPE = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "rope",
    [
        ROPE,
        {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
        {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_scaling_is_read_back(tmp_path: Path, quantized: Quantize, rope: dict) -> None:
    folder = quantized(tmp_path, "llama", SYM4, rope_parameters=rope)
    export_gguf(folder, tmp_path / "model.gguf")
    found = GgufSource(tmp_path / "model.gguf").config["rope_parameters"]
    assert {key: found[key] for key in rope} == pytest.approx(rope)


# --- refusals ----------------------------------------------------------------------------------------------


def change_config(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of `folder` with keys of its config changed."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(config))
    return resealed(to)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 3, and the files hold 2 blocks"),
        ({"num_hidden_layers": 1}, "num_hidden_layers = 1, and the files hold 2 blocks"),
        ({"vocab_size": 200}, "config.json has vocab_size 200"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path: Path, llama: Path, changes: dict, reason: str) -> None:
    folder = change_config(llama, tmp_path / "native", **changes)
    with pytest.raises(FormatError, match=reason):
        export_gguf(folder, tmp_path / "model.gguf", allow_lossy=True)
    assert not list(tmp_path.glob("*.gguf*"))


LOSSY = {
    "outliers": ({"method": "easyquant", "scheme": "w4a16g32-sym"}, "outliers have no place", "Q8_0", 30),
    "float zeros": ({"method": "hqq", "scheme": "w4a16g32"}, "rounds the offset", "Q4_1", 55),
    "8 bits with zeros": ({"scheme": "w8a16g32-asym"}, "signed bytes of Q8_0", "Q8_0", 40),
    "narrow groups": ({"scheme": "w4a16g16-sym"}, "multiples of 32 columns", "Q8_0", 40),
    "bfloat16 scales": ({**SYM4, "scale_dtype": "bfloat16"}, "scales are bfloat16", "Q4_0", 60),
}


@pytest.mark.parametrize("case", LOSSY)
def test_losses_are_refused_or_measured(tmp_path: Path, quantized: Quantize, case: str) -> None:
    recipe, reason, kind, floor_db = LOSSY[case]
    folder, path = quantized(tmp_path, "llama", recipe, num_hidden_layers=1), tmp_path / "model.gguf"
    with pytest.raises(FormatError, match=reason) as refusal:
        export_gguf(folder, path)
    assert "model.layers.0" in str(refusal.value)
    assert "--allow-lossy" in str(refusal.value)
    assert not list(tmp_path.glob("*.gguf*"))
    said: list[str] = []
    result = export_gguf(folder, path, allow_lossy=True, say=said.append)
    assert {row.kind for row in result.lossy} == {kind}
    assert len(said) == len(result.lossy)
    decoded, source = weights(folder), GgufSource(path)
    for row in result.lossy:
        weight = decoded[row.tensor]
        error = (source.read(row.tensor) - weight).square().sum()
        if row.sqnr_db is None:
            assert error == 0
        else:
            assert row.sqnr_db == pytest.approx(float(10 * torch.log10(weight.square().sum() / error)), abs=1e-3)
            assert row.sqnr_db > floor_db


def test_quantized_inputs_and_kv_cache_are_refused_or_left_in_float(
    tmp_path: Path, quantized: Quantize, text_file: Path
) -> None:
    recipe = {"scheme": "w4a8kv8g32-sym"}
    folder, path = quantized(tmp_path, "llama", recipe), tmp_path / "model.gguf"
    with pytest.raises(FormatError, match=r"KV cache.*without kv"):
        export_gguf(folder, path)
    result = export_gguf(folder, path, allow_lossy=True)
    assert result.notes[0].startswith("the KV cache: quantized to 8 bits")
    # the codes move all the same
    assert {row.kind for row in result.lossy} == {"Q4_0"}
    assert {row.action for row in result.lossy} == {"exact"}


def test_existing_files_stay(tmp_path: Path, llama: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    with pytest.raises(ResumeError, match="exists"):
        export_gguf(llama, path)
    assert path.read_text() == "mine"


def test_nothing_is_left_of_a_failed_export(tmp_path: Path, llama: Path) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(llama, tmp_path / "model.gguf", progress=fail)
    assert not list(tmp_path.iterdir())


def test_other_types_are_not_imported(tmp_path: Path, llama: Path) -> None:
    export_gguf(llama, tmp_path / "source.gguf")
    requantize(tmp_path / "source.gguf", tmp_path / "other.gguf", "MXFP4")
    with pytest.raises(FormatError, match="MXFP4, which has no native grid"):
        import_gguf(tmp_path / "other.gguf", tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_hostile_scales_are_not_imported(tmp_path: Path, llama: Path) -> None:
    path = tmp_path / "source.gguf"
    export_gguf(llama, path)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(np.array(np.nan, np.float16).tobytes())
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: a scale of a Q4_0 block is NaN"):
        import_gguf(path, tmp_path / "native")
    assert not (tmp_path / "native").exists()
    assert not list(tmp_path.glob("*.exporting"))
