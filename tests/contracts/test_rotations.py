"""Contract of rotations: the logits of the whole model do not change, and outliers are spread.

Checked on checkpoints of the real transformers models with grouped-query attention, RoPE and random biases: to
1e-12 in true float64 and to 1e-5 in float32.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # packages that transformers imports where they are installed may warn of their own deprecations
    warnings.simplefilter("ignore")
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitwright.models import adapter_for
    from bitwright.models.discover import Float64

from bitwright.calibration.blocks import BlockRunner
from bitwright.checkpoint.quiet import quiet_transformers
from bitwright.checkpoint.shard import write_shard
from bitwright.checkpoint.source import HuggingFaceSource, Source
from bitwright.models import block_count
from bitwright.numeric.hadamard import hadamard_blocks
from bitwright.transforms.rotate import Rotate, online_hadamards, rotated

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,  # 16 * 3: the rotation has a random orthogonal factor
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SIZES, "intermediate_size": 80, "num_key_value_heads": 2, "tie_word_embeddings": False}
OPT = {**SIZES, "model_type": "opt", "ffn_dim": 80, "word_embed_proj_dim": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**GATED, "model_type": "llama"},
    "llama-tied": {**GATED, "model_type": "llama", "tie_word_embeddings": True},
    "llama-bias": {**GATED, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-one-kv-head": {**GATED, "model_type": "llama", "num_key_value_heads": 1, "head_dim": 6},
    "mistral": {**GATED, "model_type": "mistral", "sliding_window": 4},
    "qwen2": {**GATED, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**GATED, "model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "opt": OPT,
    "opt-untied": {**OPT, "tie_word_embeddings": False},
    "opt-no-bias": {**OPT, "enable_bias": False, "activation_function": "gelu"},
}
SETTINGS = {
    "residual": Rotate(values=False),
    "values": Rotate(residual=False),
    "both": Rotate(),
    "online": Rotate(online_down=True),
    "online-alone": Rotate(residual=False, values=False, online_down=True),
}
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}
SEED = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Callable[[str], Source]:
    """Name of a config -> a checkpoint in float64 whose norms and biases are far from one and zero."""
    made: dict[str, Source] = {}

    def make(name: str) -> Source:
        if name not in made:
            with torch.random.fork_rng(devices=[]), quiet_transformers():
                torch.manual_seed(0)
                model = build(CONFIGS[name], torch.float64)
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.ndim == 1:
                            parameter.uniform_(0.5, 1.5)
                        else:
                            parameter.normal_(std=parameter.shape[1] ** -0.5)
                folder = tmp_path_factory.mktemp(name)
                model.save_pretrained(folder)
            made[name] = HuggingFaceSource(folder)
        return made[name]

    return make


def build(config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    config = dict(config)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    return model.to(dtype).eval()


def rotate(source: Source, settings: Rotate, dtype: torch.dtype = torch.float64) -> Source:
    return rotated(source, adapter_for(source.config), settings, SEED, dtype)


@contextmanager
def online(model: nn.Module, source: Source, settings: Rotate) -> Iterator[None]:
    """Within, the model does what `online_hadamards` asks the runtime for."""
    adapter = adapter_for(source.config)
    handles = [
        model.get_submodule(adapter.block_prefix(index) + name).register_forward_pre_hook(
            lambda _, args: (hadamard_blocks(args[0]),)
        )
        for index in range(block_count(source.config))
        for name in online_hadamards(adapter, settings)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(source: Source, dtype: torch.dtype, settings: Rotate | None = None, **tensors: Tensor) -> Any:
    """Output of the model of `source`, computed in `dtype`."""
    model = build(source.config, dtype)
    weights = {name: source.read(name) for name in source.tensors} | tensors
    if source.config.get("tie_word_embeddings", True):
        weights.setdefault("lm_head.weight", weights[f"{adapter_for(source.config).embedding}.weight"])
    model.load_state_dict(weights)
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    transformed = online(model, source, settings) if settings else nullcontext()
    with transformed, Float64() if dtype == torch.float64 else nullcontext():
        return model(input_ids=tokens, use_cache=False, output_hidden_states=True)


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rotation_keeps_the_logits(checkpoint, name: str, dtype: torch.dtype) -> None:
    source = checkpoint(name)
    before = run(source, dtype).logits
    for label, settings in SETTINGS.items():
        after = run(rotate(source, settings, dtype), dtype, settings).logits
        assert distance(before, after) <= LIMIT[dtype], label


@pytest.mark.parametrize("name", ["llama-bias", "llama-tied", "opt"])
def test_every_rewritten_tensor_counts(checkpoint, name: str) -> None:
    """The contract would be empty if a tensor could keep its old value unnoticed."""
    source = checkpoint(name)
    settings = SETTINGS["online"]
    result = rotate(source, settings)
    expected = run(source, torch.float64).logits
    rewritten = [tensor for tensor in source.tensors if not torch.equal(source.read(tensor), result.read(tensor))]
    assert {tensor for tensor in source.tensors if tensor.endswith("weight")} <= set(rewritten)
    for tensor in rewritten:
        if name == "opt" and tensor.endswith("k_proj.bias"):
            continue  # without RoPE it adds the same to all scores of a query
        changed = run(result, torch.float64, settings, **{tensor: source.read(tensor)})
        assert distance(expected, changed.logits) > 1e-4, tensor


def test_without_its_online_transform_the_output_is_another(checkpoint) -> None:
    source = checkpoint("llama")
    result = rotate(source, SETTINGS["online"])
    assert distance(run(source, torch.float64).logits, run(result, torch.float64).logits) > 1e-2


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_massive_channels_are_spread(checkpoint, name: str) -> None:
    class Planted(HuggingFaceSource):
        def read(self, name: str) -> Tensor:
            values = super().read(name)
            if name.endswith("embed_tokens.weight"):
                values[:, 5] += 100
            return values

    source = Planted(checkpoint(name).folder)

    def peak(source: Source) -> float:
        stream = run(source, torch.float64).hidden_states[1].abs()
        return (stream.max() / stream.median()).item()

    result = rotate(source, Rotate())
    before, after = peak(source), peak(result)
    assert before > 30
    assert after < before / 4


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "opt"])
def test_blocks_run_one_at_a_time(checkpoint, name: str) -> None:
    source = checkpoint(name)
    ids = torch.randint(3, 64, (3, 16), generator=torch.Generator().manual_seed(2))

    def logits(source: Source) -> Tensor:
        runner = BlockRunner(source, adapter_for(source.config), ids)
        with runner.first_inputs() as stream:
            for index in range(runner.blocks):
                runner.advance(index, runner.block(index), stream)
            with runner.head() as logits_of, torch.no_grad():
                return torch.cat([logits_of(hidden) for hidden in stream])

    assert distance(logits(source), logits(rotate(source, Rotate(), torch.float32))) <= 1e-4


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "opt", "opt-no-bias"])
def test_saved_rotation_is_a_plain_checkpoint(checkpoint, name: str, tmp_path: Path) -> None:
    source = checkpoint(name)
    result = rotate(source, Rotate(), torch.float32)
    write_shard(tmp_path / "model.safetensors", {name: result.read(name) for name in result.tensors}, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(result.config))
    saved = HuggingFaceSource(tmp_path)
    assert {name: (info.shape, info.dtype) for name, info in saved.tensors.items()} == {
        name: (info.shape, info.dtype) for name, info in result.tensors.items()
    }
    with quiet_transformers():
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.eval()(input_ids=tokens, use_cache=False).logits
    assert distance(run(source, torch.float32).logits, found) <= 1e-5
