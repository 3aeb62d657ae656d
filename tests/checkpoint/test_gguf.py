"""GGUF files written here with the gguf package are read back as the checkpoint they came from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind
from tiny_gguf import SIZES, stored_tensors, tiny_model, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bitwright.checkpoint.gguf import GgufSource
from bitwright.checkpoint.gguf_file import read_gguf_header
from bitwright.checkpoint.load import load_model
from bitwright.checkpoint.open import open_source
from bitwright.checkpoint.quiet import quiet_transformers
from bitwright.errors import CheckpointError


@pytest.fixture(scope="module")
def llama_tensors():
    return stored_tensors(tiny_model("llama"), "llama")


@pytest.fixture
def llama_file(tmp_path, llama_tensors):
    return write_gguf(tmp_path / "tiny.gguf", "llama", llama_tensors)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_float_file_gives_back_the_checkpoint(tmp_path, architecture, tied):
    model = tiny_model(architecture, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "tiny.gguf", architecture, stored_tensors(model, architecture))
    source = open_source(str(path))

    state = model.state_dict()
    assert state.keys() - source.tensors.keys() == ({"lm_head.weight"} if tied else set())
    for name, info in source.tensors.items():
        value = source.read(name)
        assert torch.equal(value, state[name]), name
        assert (info.shape, info.dtype) == (tuple(value.shape), value.dtype)
    config = AutoConfig.for_model(**source.config)
    for key in [*SIZES, "head_dim", "rope_parameters", "tie_word_embeddings", "model_type"]:
        assert getattr(config, key) == getattr(model.config, key), key
    assert source.config["architectures"] == [type(model).__name__]
    assert source.files() == [path]
    assert source.label == str(path)


def test_llama_biases_are_mapped_and_permuted(tmp_path):
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    source = GgufSource(write_gguf(tmp_path / "tiny.gguf", "llama", stored_tensors(model, "llama")))
    assert source.config["attention_bias"]
    assert source.config["mlp_bias"]
    for name, value in model.state_dict().items():
        assert torch.equal(source.read(name), value), name


@pytest.mark.parametrize(("architecture", "kind"), [("llama", Kind.Q8_0), ("qwen2", Kind.Q4_1), ("qwen3", Kind.F16)])
def test_agrees_with_transformers(tmp_path, architecture, kind):
    tensors = stored_tensors(tiny_model(architecture), architecture)
    path = write_gguf(tmp_path / "tiny.gguf", architecture, tensors, kind)
    source = GgufSource(path)
    config = AutoConfig.for_model(**source.config)
    # of qwen3 transformers does not read the width of a head, and assumes 128
    given = {"config": config} if architecture == "qwen3" else {}
    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32, **given)
    for name, value in theirs.state_dict().items():
        assert torch.equal(source.read(name).float(), value), name
    for key in [*SIZES, "rope_parameters", "tie_word_embeddings", "model_type"]:
        assert getattr(theirs.config, key) == getattr(config, key), key


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)])
def test_half_precision_stays_as_stored(tmp_path, llama_tensors, kind, dtype):
    source = GgufSource(write_gguf(tmp_path / "tiny.gguf", "llama", llama_tensors, kind))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert source.read(name).dtype == source.tensors[name].dtype == dtype
    assert source.read("model.norm.weight").dtype == torch.float32
    assert source.config["dtype"] == str(dtype).removeprefix("torch.")
    expected = torch.from_numpy(llama_tensors["blk.1.attn_v.weight"]).to(dtype)
    assert torch.equal(source.read("model.layers.1.self_attn.v_proj.weight"), expected)


def test_large_tensors_are_dequantized_in_pieces_without_seams(tmp_path, llama_tensors, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", llama_tensors, Kind.Q5_0)
    whole = GgufSource(path).read("model.embed_tokens.weight")
    monkeypatch.setattr("bitwright.checkpoint.gguf_file._PIECE_VALUES", 64 * 7)
    assert torch.equal(GgufSource(path).read("model.embed_tokens.weight"), whole)


def test_file_is_not_kept_open_or_mapped(llama_file):
    source = GgufSource(llama_file)
    source.read("model.embed_tokens.weight")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux's /proc")
    assert llama_file.name not in maps.read_text()
    assert not any(llama_file == link.resolve() for link in Path("/proc/self/fd").iterdir())


def test_fingerprint_follows_content_and_not_place(tmp_path, llama_tensors):
    one = GgufSource(write_gguf(tmp_path / "one.gguf", "llama", llama_tensors, Kind.Q8_0)).fingerprint()
    same = GgufSource(write_gguf(tmp_path / "two.gguf", "llama", llama_tensors, Kind.Q8_0)).fingerprint()
    other = GgufSource(write_gguf(tmp_path / "three.gguf", "llama", llama_tensors, Kind.Q4_0)).fingerprint()
    assert one == same != other


# --- RoPE --------------------------------------------------------------------------------------------------


def llama3_divisors(head_dim: int = 16) -> np.ndarray:
    """As transformers computes them, seen from the frequencies."""
    rope = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = tiny_model("llama", rope_parameters=rope).model.rotary_emb.inv_freq
    plain = tiny_model("llama").model.rotary_emb.inv_freq
    return (plain / scaled).numpy()


def test_llama3_scaling_is_recovered(tmp_path, llama_tensors):
    tensors = {"rope_freqs.weight": llama3_divisors(), **llama_tensors}
    source = GgufSource(write_gguf(tmp_path / "tiny.gguf", "llama", tensors))
    assert source.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 50000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not any("rope" in name for name in source.tensors)


@pytest.mark.parametrize("divisors", [np.linspace(1, 9, 8), np.ones(7), np.full(8, np.nan), np.zeros(8)])
def test_other_rope_divisors_are_refused(tmp_path, llama_tensors, divisors):
    tensors = {"rope_freqs.weight": divisors.astype(np.float32), **llama_tensors}
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        GgufSource(write_gguf(tmp_path / "tiny.gguf", "llama", tensors))


def test_linear_and_yarn_scaling(tmp_path, llama_tensors):
    changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    linear = GgufSource(write_gguf(tmp_path / "linear.gguf", "llama", llama_tensors, changes=changes))
    assert linear.config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}
    changes = {**changes, "llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 64}
    yarn = GgufSource(write_gguf(tmp_path / "yarn.gguf", "llama", llama_tensors, changes=changes))
    assert yarn.config["rope_parameters"]["original_max_position_embeddings"] == 64
    AutoConfig.for_model(**yarn.config)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.embedding_length": None}, r"llama\.embedding_length is missing, needed a positive integer"),
        ({"llama.attention.head_count": 0}, r"llama\.attention\.head_count is 0"),
        ({"llama.attention.head_count": [4, 4]}, r"llama\.attention\.head_count is \[4, 4\]"),
        ({"llama.attention.head_count_kv": 3}, r"head_count_kv is 3, needed a divisor of 4 heads"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.attention.value_length": 8}, r"value_length is 8, needed the width of a head \(16\)"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count is 8"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "none, linear or yarn"),
        ({"llama.expert_count": 8}, r"llama\.expert_count is 8"),
        ({"llama.block_count": 4_000_000_000}, "block_count is 4000000000"),
        ({"llama.block_count": 3}, r"no tensor for model\.layers\.2\."),
        ({"llama.block_count": 1}, r"holds model\.layers\.1\."),
        ({"llama.feed_forward_length": 100}, r"gate_proj\.weight has shape \[96, 64\], needed \[100, 64\]"),
        ({"tokenizer.ggml.eos_token_id": 400}, r"eos_token_id is 400, needed a token below 320"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
    ],
)
def test_metadata_that_cannot_be_served_is_named(tmp_path, llama_tensors, changes, message):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", llama_tensors, changes=changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufSource(path)
    assert str(path) in str(caught.value)


def test_unknown_architecture_is_named(tmp_path, llama_tensors):
    path = write_gguf(tmp_path / "tiny.gguf", "mamba", llama_tensors)
    with pytest.raises(CheckpointError, match=r"general\.architecture is mamba, needed one of llama, qwen2, qwen3"):
        GgufSource(path)


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "token_embd.weight", "output_norm.weight"])
def test_missing_tensor_is_named(tmp_path, llama_tensors, name):
    tensors = {key: value for key, value in llama_tensors.items() if key != name}
    with pytest.raises(CheckpointError, match="no tensor"):
        GgufSource(write_gguf(tmp_path / "tiny.gguf", "llama", tensors))


def test_unknown_tensor_is_named(tmp_path, llama_tensors):
    tensors = {**llama_tensors, "blk.0.attn_qkv.weight": np.zeros((32, 64), np.float32)}
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.attn_qkv\.weight is not known"):
        GgufSource(write_gguf(tmp_path / "tiny.gguf", "llama", tensors))


def test_type_without_dequantizer_is_refused_on_opening(tmp_path, llama_tensors):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", {**llama_tensors, "output.weight": np.zeros((320, 64), np.float32)})
    data = bytearray(path.read_bytes())
    name = len("output.weight").to_bytes(8, "little") + b"output.weight"
    entry = data.index(name) + len(name) + 4 + 16  # behind the rank and two dimensions
    data[entry : entry + 4] = (24).to_bytes(4, "little")  # I8, which fits where F32 did
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tensor output\.weight is stored as I8"):
        GgufSource(path)


def test_unknown_name_cannot_be_read(llama_file):
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        GgufSource(llama_file).read("nothing")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.gguf: cannot be read"):
        GgufSource(tmp_path / "none.gguf")


def test_every_truncation_is_refused(llama_file):
    data = llama_file.read_bytes()
    header_end = min(entry.start for entry in read_gguf_header(llama_file).tensors.values())
    for size in [*range(0, header_end, 13), header_end, len(data) // 2, len(data) - 64]:
        llama_file.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            GgufSource(llama_file)


def test_damaged_headers_raise_nothing_else(llama_file):
    data = llama_file.read_bytes()
    header_end = min(entry.start for entry in read_gguf_header(llama_file).tensors.values())
    choose = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(choose.choice([1, 1, 4])):
            damaged[choose.randrange(header_end)] = choose.choice([0, 1, 0x7F, 0xFF, choose.randrange(256)])
        llama_file.write_bytes(damaged)
        try:
            GgufSource(llama_file)
        except CheckpointError:
            refused += 1
    assert refused > 150


# --- tokenizer and loading ---------------------------------------------------------------------------------


def tokenizer_metadata(folder: Path) -> dict[str, Any]:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].get),
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(model["vocab"]) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
    }


@pytest.fixture
def complete_file(tmp_path, llama_tensors, tiny_llama_folder):
    changes = tokenizer_metadata(tiny_llama_folder)
    return write_gguf(tmp_path / "tiny.gguf", "llama", llama_tensors, Kind.Q8_0, changes)


def test_tokenizer_is_rebuilt_with_the_same_bytes_each_time(tmp_path, complete_file, tiny_llama_folder):
    folders = [tmp_path / "one", tmp_path / "two"]
    # beside the file, to mislead
    (tmp_path / "tokenizer.json").write_text("{}")
    for folder in folders:
        folder.mkdir()
        GgufSource(complete_file).write_side_files(folder)
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
        assert str(tmp_path) not in (folders[0] / name).read_text()
    ours = AutoTokenizer.from_pretrained(folders[0])
    theirs = AutoTokenizer.from_pretrained(tiny_llama_folder)
    text = "The lazy dog, näive</s> and 42!"
    assert ours(text).input_ids == theirs(text).input_ids
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
    assert ours.decode(ours(text).input_ids) == text


def test_file_without_tokenizer_says_so(tmp_path, llama_file):
    with pytest.raises(CheckpointError, match="cannot rebuild its tokenizer"):
        GgufSource(llama_file).write_side_files(tmp_path)


@torch.no_grad()
def test_loaded_model_computes_what_was_stored(complete_file, capfd):
    loaded = load_model(str(complete_file))
    assert (loaded.label, loaded.folder, loaded.quantized) == (str(complete_file), None, False)
    assert not loaded.model.training
    source = GgufSource(complete_file)
    reference = tiny_model("llama")
    reference.load_state_dict({name: source.read(name) for name in source.tensors})
    tokens = loaded.tokenizer("The quick brown fox", return_tensors="pt").input_ids
    assert torch.equal(loaded.model(tokens).logits, reference(tokens).logits)
    assert not any(buffer.is_meta for buffer in loaded.model.buffers())
    assert capfd.readouterr() == ("", "")
