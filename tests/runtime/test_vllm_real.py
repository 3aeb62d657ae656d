"""vLLM itself, where it is installed: a native folder through the plugin speaks as the decoded weights do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import bitwright
from bitwright.formats.native import parts, read_quantization_config, read_sites, unpack
from bitwright.numeric.activation import InputSite
from bitwright.numeric.fp8 import E4M3_MAX
from bitwright.runtime import attention
from bitwright.runtime.attention import quantize_kv
from bitwright.runtime.sites import input_sites

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

NEW_TOKENS = 12
PROMPTS = [[3, 14, 15, 92, 65], [35, 89, 79, 32, 38, 46, 26]]
# In a process of its own: vLLM warns, starts threads and keeps state.
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
settings = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]), ignore_eos=True, detokenize=False)
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64)
found = llm.generate([{"prompt_token_ids": ids} for ids in json.loads(sys.argv[3])], settings, use_tqdm=False)
print("TOKENS", json.dumps([list(each.outputs[0].token_ids) for each in found]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Outliers, a float shard, quantized inputs, and an embedding in 8 bits that the head shares."""
    place = tmp_path_factory.mktemp("native")
    source, out = place / "llama", place / "out"
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2
    )
    LlamaForCausalLM(config).save_pretrained(source)
    for file in tiny_llama_folder.glob("tokenizer*"):
        (source / file.name).write_bytes(file.read_bytes())
    recipe = out.with_name("recipe.toml")
    recipe.write_text(
        'method = "easyquant"\nscheme = "w4a16g32"\n[[rules]]\nmatch = "model.embed_tokens"\nscheme = "w8a16g32"\n'
        '[[rules]]\nmatch = "*.v_proj"\nkeep = true\n[[rules]]\nmatch = "*.down_proj"\nscheme = "w4a8g32"\n'
    )
    bitwright.quantize(str(source), out, recipe=recipe)
    return out


def decoded(folder: Path) -> tuple[LlamaForCausalLM, dict[str, InputSite]]:
    """The model in float with the decoded weights, and what happens to inputs."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, entry in read_quantization_config(quantization).items():
        found = {part: stored.pop(f"{name}.{part}") for part in parts(entry)}
        stored[f"{name}.weight"] = unpack(name, found, entry).dequantize()
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.load_state_dict(stored)
    return model, dict(read_sites(quantization).inputs)


@torch.no_grad()
def greedy(model: LlamaForCausalLM, sites: dict[str, InputSite]) -> list[list[int]]:
    wanted = []
    with input_sites(model, sites):
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            wanted.append(ids[len(prompt) :])
    return wanted


def served(folder: Path) -> list[list[int]]:
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SERVE, str(folder), str(NEW_TOKENS), json.dumps(PROMPTS)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    found: list[list[int]] = json.loads(lines[-1].removeprefix("TOKENS "))
    return found


def test_tokens_are_those_of_the_decoded_weights(folder: Path) -> None:
    assert served(folder) == greedy(*decoded(folder))


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 KV cache needs AVX-512")
def test_an_fp8_kv_cache(folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of keys and values that are far from 1: without them the cache would be another."""
    recipe = bitwright.load_recipe(
        "rtn",
        "w8a16kv8g32-sym",
        overrides=[
            "activations.kv.grid=fp8",
            f"calibration.text={json.dumps(str(text_file))}",
            "calibration.windows=2",
            "calibration.window_tokens=32",
        ],
    )
    bitwright.quantize(str(folder.with_name("llama")), tmp_path / "out", recipe=recipe)
    model, sites = decoded(tmp_path / "out")
    config = read_sites(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    assert config.kv_cache is not None
    plain = greedy(model, sites)
    with quantize_kv(model, config.kv_cache, config.kv_scales):
        nearest = greedy(model, sites)
        monkeypatch.setattr(attention, "fake_quantize_fp8", cut_off)
        cut = greedy(model, sites)
    assert plain not in (nearest, cut)
    assert served(tmp_path / "out") in (nearest, cut)


def cut_off(x: torch.Tensor, scale: float) -> torch.Tensor:
    """What vLLM's kernel for processors (0.32) does instead of rounding: digits beyond the third are dropped."""
    steps = (x / torch.tensor(scale)).clamp(-E4M3_MAX, E4M3_MAX)
    step = 2.0 ** (torch.frexp(steps).exponent.clamp_min(-5) - 4)
    return (steps / step).trunc() * step * scale
