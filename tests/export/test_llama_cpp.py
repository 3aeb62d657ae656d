"""Exported models in llama.cpp itself, where llama-cpp-python is installed: the logits are ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_models import quantize_into, requantize

from bitwright.checkpoint.load import load_model
from bitwright.export.gguf import export_gguf

llama_cpp = pytest.importorskip("llama_cpp")

TOKENS = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(1)).tolist()
LLAMA3 = {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
BLOCKS = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
SYM4 = {"scheme": "w4a16g32-sym"}
CASES = {
    "llama": ("llama", SYM4, {}),
    "llama-bias": ("llama", {"scheme": "w3a16g32-asym"}, {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": (
        "llama",
        {**SYM4, "rules": [{"match": "model.embed_tokens"}]},
        {"tie_word_embeddings": True},
    ),
    "llama3": ("llama", SYM4, {"rope_parameters": LLAMA3}),
    "linear": ("llama", SYM4, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}),
    "yarn": ("llama", SYM4, {"rope_parameters": YARN}),
    "mistral": ("mistral", SYM4, {"sliding_window": 32}),
    "qwen2": ("qwen2", {"scheme": "w8a16g32-sym"}, {}),
    "qwen3": ("qwen3", {"scheme": "w4a16g32-asym"}, {"tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        SYM4,
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 6, "tie_word_embeddings": True},
    ),
}


def llama_logits(path: Path) -> np.ndarray:
    """Logits [tokens, vocabulary] by llama.cpp, with a float32 KV cache."""
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False)
    model.eval(TOKENS)
    return np.array(model.scores[: len(TOKENS)])


@pytest.mark.parametrize("case", CASES)
def test_logits_are_ours(tmp_path: Path, tiny_llama_folder: Path, case: str) -> None:
    architecture, recipe, changes = CASES[case]
    folder = quantize_into(tmp_path, tiny_llama_folder, architecture, recipe, **changes)
    export_gguf(folder, tmp_path / "model.gguf")
    with torch.inference_mode():
        expected = load_model(str(folder)).model(input_ids=torch.tensor([TOKENS])).logits[0].float().numpy()
    # llama.cpp rounds inputs of quantized matrices to 8 bits; of the same weights in floats it does not
    requantize(tmp_path / "model.gguf", tmp_path / "float.gguf", "F32")
    scale = np.abs(expected).max()
    # its GELU, Gemma's activation, is a table of float16
    limit = 2e-3 if architecture == "gemma3_text" else 1e-4
    assert np.abs(llama_logits(tmp_path / "float.gguf") - expected).max() < limit * scale
    assert np.abs(llama_logits(tmp_path / "model.gguf") - expected).max() < 0.06 * scale
