"""Damaged and foreign GGUF files: each is refused by name, with what was found and needed, and leaves nothing."""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_models import quantize_into, random_blocks, rewrite

from bitwright.errors import BitwrightError, CheckpointError, FormatError, ResumeError
from bitwright.export.gguf import export_gguf
from bitwright.export.gguf_import import import_gguf
from bitwright.formats.gguf import TYPES
from bitwright.formats.gguf_codebook import CODEBOOK_TYPES

SYM4 = {"scheme": "w4a16g32-sym"}
Q = "blk.0.attn_q.weight"


def make(place: Path, tokenizer: Path, architecture: str, **changes: object) -> Path:
    folder = quantize_into(place, tokenizer, architecture, SYM4, num_hidden_layers=1, **changes)
    export_gguf(folder, place / "model.gguf")
    return place / "model.gguf"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    return make(tmp_path_factory.mktemp("llama"), tiny_llama_folder, "llama", **sizes)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    changes = {"sliding_window": 8, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
    return make(tmp_path_factory.mktemp("gemma"), tiny_llama_folder, "gemma3_text", **changes)


def refused(path: Path, message: str, kind: type[BitwrightError] = CheckpointError) -> None:
    out = path.parent / "native"
    with pytest.raises(kind, match=message) as caught:
        import_gguf(path, out)
    assert path.name in str(caught.value) or kind is FormatError
    assert not list(path.parent.glob("native*"))


# --- bytes -------------------------------------------------------------------------------------------------


def entry_at(data: bytes, name: str) -> int:
    """Where the type of a tensor is in the header; its offset follows."""
    start = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    (rank,) = struct.unpack_from("<I", data, start)
    return start + 4 + 8 * rank


def put(position: int | Callable[[bytes], int], new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        start = position if isinstance(position, int) else position(data)
        return data[:start] + new + data[start + len(new) :]

    return change


BYTES = {
    "empty": (lambda data: b"", "does not start with 'GGUF'.*download it again"),
    "wrong magic": (put(0, b"GGML"), "does not start with 'GGUF'"),
    "version 1": (put(4, struct.pack("<I", 1)), "version 1 GGUF, needed little-endian version 2 or 3; convert"),
    "version 4": (put(4, struct.pack("<I", 4)), "version 4 GGUF, needed little-endian version 2 or 3"),
    "big endian": (put(4, struct.pack(">I", 3)), "big-endian GGUF, needed little-endian"),
    "cut in the header": (lambda data: data[:1000], "the header does not end within.* truncated"),
    "cut in the data": (lambda data: data[:-64], "ends at byte .* the file is truncated: download it again"),
    "count of keys": (put(16, struct.pack("<Q", 1 << 60)), r"model\.gguf: .*damaged"),
    "unknown type": (
        put(lambda d: entry_at(d, Q), struct.pack("<I", 99)),
        rf"tensor {Q} has type 99, unknown.*upgrade",
    ),
    "type of before": (put(lambda d: entry_at(d, Q), struct.pack("<I", 4)), rf"tensor {Q} has type 4, unknown"),
    "offset beyond the end": (
        put(lambda d: entry_at(d, Q) + 4, struct.pack("<Q", 1 << 40)),
        rf"tensor {Q} ends at byte .* truncated",
    ),
    "offset in another tensor": (put(lambda d: entry_at(d, Q) + 4, struct.pack("<Q", 32)), "starts at byte .* inside"),
}


@pytest.mark.parametrize("case", BYTES)
def test_damaged_bytes(tmp_path: Path, llama: Path, case: str) -> None:
    change, message = BYTES[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(change(llama.read_bytes()))
    refused(path, message)


def test_version_2_is_read(tmp_path: Path, llama: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(put(4, struct.pack("<I", 2))(llama.read_bytes()))
    assert import_gguf(path, tmp_path / "native").rows


# --- keys and tensors --------------------------------------------------------------------------------------

KEYS = {
    "no architecture": ({"general.architecture": "mamba"}, "general.architecture is mamba, needed one of"),
    "no width": ({"llama.embedding_length": None}, "llama.embedding_length is missing, needed a positive integer"),
    "no heads": ({"llama.attention.head_count": None}, "llama.attention.head_count is missing"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
    "no blocks": ({"llama.block_count": None}, "llama.block_count is missing"),
    "other width": (
        {"llama.embedding_length": 512},
        r"embed_tokens.weight has shape \[320, 256\], needed \[320, 512\]",
    ),
    "part of several": ({"split.count": 3, "split.no": 0}, "split.count is 3, needed a whole file; join.*--merge"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing, needed for a tokenizer"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
    "more tokens": ({"tokenizer.ggml.tokens": ["a"] * 321}, "has 321 tokens, needed at most the 320 rows"),
    "damaged remainder": ({"bitwright.tokenizer": "{"}, "bitwright.tokenizer gives no tokenizer.*export it again"),
    "later remainder": ({"bitwright.tokenizer": '{"version": 9}'}, "bitwright.tokenizer gives .*version 9, needed 1"),
    "foreign words": (
        {"bitwright.tokenizer": None, "tokenizer.ggml.pre": "viking"},
        "tokenizer.ggml.pre is 'viking', needed one of .*qwen2.*start from the Hugging Face checkpoint",
    ),
    "unnamed words": ({"bitwright.tokenizer": None, "tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is missing"),
    "foreign tokenizer": (
        {"bitwright.tokenizer": None, "tokenizer.ggml.model": "rwkv"},
        "transformers cannot rebuild its tokenizer",
    ),
    "types of fewer tokens": (
        {"bitwright.tokenizer": None, "tokenizer.ggml.token_type": [1, 1]},
        "tokenizer.ggml.. give no tokenizer",
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys(tmp_path: Path, llama: Path, case: str) -> None:
    keys, message = KEYS[case]
    refused(rewrite(llama, tmp_path / "model.gguf", keys=keys), message)


GEMMA_KEYS = {
    "no window": ({"gemma3.attention.sliding_window": None}, "gemma3.attention.sliding_window is missing"),
    "no width of a head": ({"gemma3.attention.key_length": None}, "gemma3.attention.key_length is missing"),
    "other values": ({"gemma3.attention.value_length": 8}, r"value_length is 8, needed the width of a head \(16\)"),
    "other pattern": ({"gemma3.attention.sliding_window_pattern": 2}, "sliding_window_pattern is 2, needed 6"),
    "other local base": ({"gemma3.rope.freq_base_swa": 5e4}, "rope.freq_base_swa is 50000.0, needed 10000.0"),
    "soft cap": ({"gemma3.final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, needed 0.0"),
    "other scaling": ({"gemma3.rope.scaling.type": "yarn"}, "rope.scaling.type is yarn, needed none or linear"),
    "no factor": ({"gemma3.rope.scaling.type": "linear"}, "rope.scaling.factor is missing, needed a positive number"),
    "heads": ({"gemma3.attention.head_count_kv": 3}, "head_count_kv is 3, needed a divisor of 4 heads"),
    "blocks": ({"gemma3.block_count": 999}, "block_count is 999, needed fewer than"),
    "token": ({"tokenizer.ggml.eos_token_id": 400}, "eos_token_id is 400, needed a token below 320"),
    "part of several": ({"split.count": 2}, "split.count is 2"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing"),
}


@pytest.mark.parametrize("case", GEMMA_KEYS)
def test_keys_of_gemma(tmp_path: Path, gemma: Path, case: str) -> None:
    keys, message = GEMMA_KEYS[case]
    refused(rewrite(gemma, tmp_path / "model.gguf", keys=keys), message)


@pytest.mark.parametrize("name", ["blk.0.attn_k.weight", "blk.0.post_ffw_norm.weight", "token_embd.weight"])
def test_missing_and_other_tensors_of_gemma(tmp_path: Path, gemma: Path, name: str) -> None:
    refused(rewrite(gemma, tmp_path / "model.gguf", tensors={name: None}), f"no tensor {name}")
    if name != "token_embd.weight":
        one = {name: (np.ones((8, 8), np.float32), "F32")}
        refused(rewrite(gemma, tmp_path / "other.gguf", tensors=one), rf"tensor {name} has shape \[8, 8\], needed \[")
    extra = {"blk.0.attn_qkv.weight": (np.ones(8, np.float32), "F32")}
    refused(rewrite(gemma, tmp_path / "more.gguf", tensors=extra), "tensor blk.0.attn_qkv.weight .* is not known")


@pytest.mark.parametrize("kind", [*TYPES, *CODEBOOK_TYPES])
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_that_are_no_numbers(tmp_path: Path, llama: Path, kind: str, scale: float) -> None:
    tensors = {Q: (random_blocks(kind, (256, 256), first=scale), kind)}
    path = rewrite(llama, tmp_path / "model.gguf", tensors=tensors)
    refused(path, rf"layers\.0\.self_attn\.q_proj\.weight: a scale of a {kind} block is NaN or Inf", FormatError)


def test_floats_that_are_no_numbers(tmp_path: Path, llama: Path) -> None:
    tensors = {"output_norm.weight": (np.full(256, np.nan, np.float32), "F32")}
    path = rewrite(llama, tmp_path / "model.gguf", tensors=tensors)
    refused(path, r"model\.norm\.weight: holds NaN or Inf, needed finite values", FormatError)


@pytest.mark.parametrize("kind", ["MXFP4", "TQ1_0"])
def test_types_without_a_grid(tmp_path: Path, llama: Path, kind: str) -> None:
    raw = gguf.quants.quantize(np.ones((256, 256), np.float32), gguf.GGMLQuantizationType[kind])
    path = rewrite(llama, tmp_path / "model.gguf", tensors={Q: (raw, kind)})
    message = (
        rf"q_proj\.weight is stored as {kind}, which has no native grid; take .*Q4_K.*bitwright quantize model\.gguf"
    )
    refused(path, message, FormatError)


# --- the destination ---------------------------------------------------------------------------------------


def test_an_existing_destination_is_left_alone(tmp_path: Path, llama: Path) -> None:
    out = tmp_path / "native"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(ResumeError, match=r"native: exists; choose another name or remove it"):
        import_gguf(llama, out)
    assert [path.name for path in tmp_path.rglob("*")] == ["native", "mine"]


@pytest.mark.parametrize("call", [1, 3, 5])
def test_a_full_disk_leaves_no_folder(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    calls = fill_disk(monkeypatch, "os.fsync", call)
    with pytest.raises(OSError, match="No space left"):
        import_gguf(llama, tmp_path / "native")
    assert len(calls) == call
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("gguf.GGUFWriter.write_kv_data_to_file", 1),
        ("gguf.GGUFWriter.write_tensor_data", 1),
        ("gguf.GGUFWriter.write_tensor_data", 3),
        ("os.fsync", 1),
    ],
)
def test_a_full_disk_leaves_no_file(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int
) -> None:
    calls = fill_disk(monkeypatch, function, call)
    with pytest.raises(OSError, match="No space left"):
        export_gguf(llama.parent / "native", tmp_path / "model.gguf")
    assert len(calls) == call
    assert not list(tmp_path.iterdir())


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> list[int]:
    """Let the `call`-th call of the function `name` find the disk full; the calls so far."""
    owner, _, attribute = name.rpartition(".")
    where = {"os": os, "gguf.GGUFWriter": gguf.GGUFWriter}[owner]
    real, calls = getattr(where, attribute), []

    def full(*args: object) -> object:
        calls.append(len(calls))
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(where, attribute, full)
    return calls


def test_export_makes_the_folder_of_the_file(tmp_path: Path, llama: Path) -> None:
    path = tmp_path / "new" / "model.gguf"
    export_gguf(llama.parent / "native", path)
    assert path.read_bytes() == llama.read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model-00001-of-*.safetensors"])
def test_export_of_a_damaged_folder_leaves_nothing(tmp_path: Path, llama: Path, name: str) -> None:
    folder = tmp_path / "native"
    shutil.copytree(llama.parent / "native", folder)
    (damaged,) = folder.glob(name)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(BitwrightError, match="native"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
