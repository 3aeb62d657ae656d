"""GGUF files read back: every family that export writes, and files that llama.cpp mixes of several types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_models import quantize_into, random_blocks, rewrite
from transformers import AutoTokenizer

from bitwright.checkpoint.load import load_model
from bitwright.checkpoint.manifest import verify_manifest
from bitwright.errors import FormatError
from bitwright.export.folder import NativeFolder
from bitwright.export.gguf import export_gguf
from bitwright.export.gguf_import import import_gguf
from bitwright.export.gguf_model import rope_halves
from bitwright.formats.gguf import TYPES
from bitwright.formats.gguf_codebook import CODEBOOK_TYPES, decode_codebook

SYM4 = {"scheme": "w4a16g32-sym"}
LLAMA3 = {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
# Seven blocks: five with a sliding window, a full one, and one more. Nothing of the window or the head is a default.
GEMMA = {"sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 7, "tie_word_embeddings": True}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES = {
    "llama": ("llama", SYM4, {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": (
        "llama",
        SYM4,
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "max_position_embeddings": 16384},
    ),
    "mistral": ("mistral", SYM4, {"sliding_window": 32}),
    "qwen2": ("qwen2", {"scheme": "w8a16g32-sym"}, {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", SYM4, {"num_hidden_layers": 1}),
    "gemma3": ("gemma3_text", SYM4, GEMMA),
    "gemma3-untied": ("gemma3_text", SYM4, {**GEMMA, "tie_word_embeddings": False, "rope_parameters": GEMMA_ROPE}),
}
TEXT = "The lazy dog,  naïve</s> and 42 of 1234!\n"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a native folder, decoded, by the checkpoint's names."""
    native = NativeFolder.open(folder)
    return {f"{m}.weight": native.weight(m) for m in native.entries} | {n: native.read(n) for n in native.kept}


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return load_model(str(folder)).model(input_ids=tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_comes_back(tmp_path: Path, tiny_llama_folder: Path, family: str) -> None:
    architecture, recipe, changes = FAMILIES[family]
    folder, back = quantize_into(tmp_path, tiny_llama_folder, architecture, recipe, **changes), tmp_path / "back"
    export_gguf(folder, tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", back)
    assert verify_manifest(back) == []
    ours, theirs = weights(folder), weights(back)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if architecture == "gemma3_text" and value.ndim == 1:
            # the file has one plus the weight in float32, and the model computes with nothing else
            assert torch.equal(theirs[name] + 1, value + 1), name
        else:
            assert torch.equal(theirs[name], value), name
    assert torch.equal(logits(back), logits(folder))
    first, second = (AutoTokenizer.from_pretrained(place) for place in (folder, back))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert first(TEXT) == second(TEXT)
    assert first.special_tokens_map == second.special_tokens_map


def test_gemma_norms_of_bfloat16_come_back_exactly(tmp_path: Path, tiny_llama_folder: Path) -> None:
    """As released checkpoints have them: one plus a bfloat16 number is a float32 number, unless it is tiny."""
    folder = quantize_into(tmp_path, tiny_llama_folder, "gemma3_text", SYM4, **{**GEMMA, "num_hidden_layers": 1})
    path, name = tmp_path / "model.gguf", "output_norm.weight"
    export_gguf(folder, path)
    generator = torch.Generator().manual_seed(0)
    norm = (torch.randn(64, generator=generator) * 3).bfloat16().float()
    norm[:4] = torch.tensor([0.0, -1.0, 2.0**-16, 61.5])
    rewrite(path, tmp_path / "other.gguf", tensors={name: ((norm + 1).numpy(), "F32")})
    import_gguf(tmp_path / "other.gguf", tmp_path / "back")
    assert torch.equal(weights(tmp_path / "back")["model.norm.weight"], norm)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A file with rows of 256 columns: a Llama of one block with a tied head."""
    place = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    folder = quantize_into(
        place, tiny_llama_folder, "llama", {"scheme": "w8a16g32-sym"}, **sizes, tie_word_embeddings=True
    )
    export_gguf(folder, place / "wide.gguf")
    return place / "wide.gguf"


# As `llama-quantize` mixes them: a file of one name holds several types, the embedding another one.
MIXES = {
    "two levels": {
        "token_embd": "Q6_K",
        "attn_q": "Q4_K",
        "attn_k": "Q5_K",
        "attn_v": "Q6_K",
        "ffn_up": "Q2_K",
        "ffn_down": "Q3_K",
    },
    "one level": {"token_embd": "Q8_0", "attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "ffn_down": "Q5_1"},
    "tables": {"token_embd": "Q5_K", "attn_q": "IQ4_NL", "attn_k": "IQ4_XS", "ffn_up": "IQ4_XS", "ffn_down": "IQ4_NL"},
}


def oracle(path: Path) -> dict[str, torch.Tensor]:
    """The weights that the gguf package decodes, float32, rows in the order of the checkpoint."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2])
        found[tensor.name] = rope_halves(values, heads) if heads else values
    return found


def assert_decodes_as(path: Path, folder: Path, compare: Callable[[str, torch.Tensor, torch.Tensor], None]) -> None:
    result = import_gguf(path, folder)
    ours, theirs = weights(folder), oracle(path)
    assert {row.name for row in result.rows} == theirs.keys()
    for row in result.rows:
        compare(row.kind, ours[row.tensor], theirs[row.name])


def same(kind: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To the last bit; types with a minimum round `d * code - m` and `scale * (code - zero)` differently."""
    if kind in TYPES and TYPES[kind].minimum:
        assert (ours - theirs).abs().max() <= 2.0**-22 * theirs.abs().max(), kind
    else:
        assert torch.equal(ours.float(), theirs), kind


@pytest.mark.parametrize("mix", MIXES)
def test_files_of_several_types(tmp_path: Path, wide: Path, mix: str) -> None:
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape[::-1]) for tensor in gguf.GGUFReader(wide).tensors}
    changed = {}
    for part, kind in MIXES[mix].items():
        name = f"{part}.weight" if part == "token_embd" else f"blk.0.{part}.weight"
        changed[name] = (random_blocks(kind, shapes[name]), kind)
    path = rewrite(wide, tmp_path / "mixed.gguf", tensors=changed)
    assert_decodes_as(path, tmp_path / "native", same)
    # the head shares the embedding's blocks, or is computed from it
    assert torch.isfinite(logits(tmp_path / "native")).all()


@pytest.mark.parametrize("kind", CODEBOOK_TYPES)
def test_tables_of_integers_fit_eight_bits(kind: str) -> None:
    raw = random_blocks(kind, (6, 768), first=0.0)
    q = decode_codebook(kind, raw, 768, "m").validate("m")
    values = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(q.dequantize(), values)
    assert q.spec.bits == 8


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q2_K", "Q3_K_M", "Q5_K_M", "IQ4_XS"])
def test_files_of_llama_cpp_itself(tmp_path: Path, wide: Path, kind: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    import ctypes

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    parameters.allow_requantize = True
    path = tmp_path / "model.gguf"
    assert llama_cpp.llama_model_quantize(bytes(wide), bytes(path), ctypes.byref(parameters)) == 0
    assert_decodes_as(path, tmp_path / "native", same)


def test_tables_leave_as_eight_bits_where_a_type_has_them(tmp_path: Path, wide: Path) -> None:
    for kind, message in (("IQ4_NL", None), ("IQ4_XS", "GGUF's two-level types have at most 6 bits")):
        place = tmp_path / kind
        place.mkdir()
        changed = {"blk.0.attn_v.weight": (random_blocks(kind, (128, 256)), kind)}
        import_gguf(rewrite(wide, place / "model.gguf", tensors=changed), place / "native")
        if message is not None:
            with pytest.raises(FormatError, match=message):
                export_gguf(place / "native", place / "again.gguf")
        else:
            export_gguf(place / "native", place / "again.gguf")
            name = "blk.0.attn_v.weight"
            assert torch.equal(oracle(place / "again.gguf")[name], oracle(place / "model.gguf")[name])
