"""What config.json, the tensors and the model say must agree, before every command; the message names who does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_folders import Change, Damaged, Tensors
from torch import Tensor

import bitwright
from bitwright.analyze.run import analyze
from bitwright.checkpoint.load import load_model
from bitwright.errors import BitwrightError
from bitwright.export.targets import export_model, import_model

COMMANDS: dict[str, tuple[str, Callable[[str, Path], object]]] = {
    "plan": ("float", lambda model, out: bitwright.plan(model, "rtn", "w4a16g32")),
    "quantize": ("float", lambda model, out: bitwright.quantize(model, out, "rtn", "w4a16g32")),
    "analyze": ("float", lambda model, out: analyze(model, out)),
    "load": ("float", lambda model, out: load_model(model)),
    "import": ("foreign", lambda model, out: import_model(model, out)),
    "load native": ("native", lambda model, out: load_model(model)),
    "inspect": ("native", lambda model, out: bitwright.inspect(model)),
    "export": ("native", lambda model, out: export_model(model, out, "hf")),
}


def drop(name: str) -> Change:
    return lambda stored: stored.pop(name, None)


def add(name: str, value: Tensor, beside: str = "model.norm.weight") -> Change:
    """Into the shard that holds `beside`."""
    return lambda stored: stored.update({name: value} if beside in stored else {})


def put(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda stored: stored.update({name: change(stored[name])} if name in stored else {})


def nan(values: Tensor) -> Tensor:
    values.view(-1)[3] = torch.nan
    return values


Case = tuple[Mapping[str, Any], Change | None, str]
NORM, EMBEDDING = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"
# changes of config.json, of tensors, and what the message says
CASES: dict[str, Case] = {
    "no embedding": ({}, drop(EMBEDDING), f"tensor {EMBEDDING} is missing"),
    "no norm of a block": ({}, drop(NORM), f"tensor {NORM} is missing"),
    "no last norm": ({}, drop("model.norm.weight"), "tensor model.norm.weight is missing"),
    "no head": ({}, drop("lm_head.weight"), "lm_head.weight is missing .* tie_word_embeddings false"),
    "a norm of another size": ({}, put(NORM, lambda t: t[:32]), rf"{NORM} has shape \[32\], needed \[64\]"),
    "a norm of integers": ({}, put(NORM, lambda t: t.to(torch.int8)), f"{NORM} is int8, needed float16"),
    "a bias": ({}, add("model.layers.1.mlp.up_proj.bias", torch.zeros(128)), "up_proj.bias is there .* mlp_bias false"),
    "a second norm": ({}, add("model.layers.1.mlp.norm.weight", torch.ones(4)), "mlp.norm.weight is there .* llama"),
    "frequencies of other heads": (
        {},
        add("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        r"inv_freq has shape \[4\], needed \[8\], as config.json has head_dim 16",
    ),
    "a block too many": ({"num_hidden_layers": 3}, None, "num_hidden_layers = 3, and the files hold 2 blocks"),
    "a block too few": ({"num_hidden_layers": 1}, None, "num_hidden_layers = 1, and the files hold 2 blocks"),
    "absurdly many blocks": ({"num_hidden_layers": 10**9}, None, "num_hidden_layers = 1000000000, and the files hold"),
    "hidden size": ({"hidden_size": 32}, None, "hidden_size 32"),
    "vocabulary": ({"vocab_size": 321}, None, "vocab_size 321"),
    "biases": ({"attention_bias": True}, None, "_proj.bias is missing .* attention_bias true"),
    "biases of the feed-forward": ({"mlp_bias": True}, None, "_proj.bias is missing .* mlp_bias true"),
    "another architecture": ({"model_type": "qwen3"}, None, "k_norm.weight is missing .* model_type qwen3"),
    "padding beyond the vocabulary": ({"pad_token_id": 999}, None, "transformers cannot build a llama"),
    "RoPE of another world": ({"rope_parameters": {"rope_type": "none"}}, None, "transformers cannot build a llama"),
    "a size in words": ({"hidden_size": "64"}, None, "transformers cannot build a llama"),
}
# sizes of quantized matrices: a foreign folder tells them once they are read, without the key
SIZES: dict[str, Case] = {
    "feed-forward": ({"intermediate_size": 96}, None, "intermediate_size 96"),
    "heads": ({"num_attention_heads": 8}, None, r"num_attention_heads 8 \* head_dim 16"),
    "heads, without their size": ({"num_attention_heads": 8, "head_dim": None}, None, r"k_proj.* needed \[16, 64\]"),
    "key-value heads": ({"num_key_value_heads": 4}, None, r"num_key_value_heads 4 \* head_dim 16"),
    "head size": ({"head_dim": 8}, None, r"num_key_value_heads 2 \* head_dim 8"),
}


def refused(command: str, damaged: Damaged, case: Case, out: Path) -> str:
    """The message of the error that `command` ends with."""
    config, change, _ = case
    damaged.config(config)
    if change is not None:
        damaged.tensors(change)
    damaged.reseal()
    with pytest.raises(BitwrightError) as caught:
        COMMANDS[command][1](str(damaged.folder), out)
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", CASES)
def test_contradictions_are_named(damage: Callable[[str], Damaged], tmp_path: Path, command: str, name: str) -> None:
    message = refused(command, damage(COMMANDS[command][0]), CASES[name], tmp_path / "out")
    # the manifest of a native folder tells of tensors that are gone, or not its own, before the model does
    told = "manifest.json have|have .*, and manifest.json do not" if COMMANDS[command][0] == "native" else "$^"
    assert re.search(f"{CASES[name][2]}|{told}", message), message


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_config(
    damage: Callable[[str], Damaged], tmp_path: Path, command: str, name: str
) -> None:
    message = refused(command, damage(COMMANDS[command][0]), SIZES[name], tmp_path / "out")
    late = "the model of config.json needs" if command == "import" else "$^"
    assert re.search(f"{SIZES[name][2]}|{late}", message), message


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"plan", "inspect"}))
@pytest.mark.parametrize("name", ["model.norm.weight", EMBEDDING])
def test_nan_is_named(damage: Callable[[str], Damaged], tmp_path: Path, command: str, name: str) -> None:
    message = refused(command, damage(COMMANDS[command][0]), ({}, put(name, nan), ""), tmp_path / "out")
    assert name in message
    assert "NaN" in message


@pytest.mark.parametrize("command", ["plan", "quantize", "load", "import"])
def test_what_the_model_has_no_use_for_is_left_out(
    damage: Callable[[str], Damaged], tmp_path: Path, command: str
) -> None:
    damaged = damage(COMMANDS[command][0])
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.1.self_attn.masked_bias": torch.tensor(-1e4),
        "v_head.weight": torch.ones(1, 64),
        "mtp.layers.0.proj.weight": torch.ones(64, 64),
    }
    damaged.tensors(lambda stored: stored.update(extra if "model.norm.weight" in stored else {}))
    done = COMMANDS[command][1](str(damaged.folder), tmp_path / "out")
    if isinstance(done, bitwright.Plan):
        assert set(done.left_out) == extra.keys()
    if command in ("quantize", "import"):
        export_model(tmp_path / "out", tmp_path / "exported", "hf")
        stored: Tensors = {}
        Damaged(tmp_path / "exported").tensors(lambda shard: stored.update(shard))
        assert not stored.keys() & extra.keys()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda shard: _flip(shard, -5), "SHA-256"),
    "a flipped bit of the first tensor": (lambda shard: _flip(shard, len(shard.read_bytes()) // 2), "SHA-256"),
    "a truncated shard": (lambda shard: shard.write_bytes(shard.read_bytes()[:-8]), "truncated"),
    "no shard": (lambda shard: shard.unlink(), "model-00002"),
    "another config": (lambda shard: _spaces(shard.with_name("config.json")), "config.json: its SHA-256"),
    "no manifest": (lambda shard: shard.with_name("manifest.json").unlink(), "manifest.json: missing"),
}


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def _spaces(path: Path) -> None:
    path.write_text(path.read_text() + " \n")


@pytest.mark.parametrize("target", ["hf", "gguf", "gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_are_not_exported(
    damage: Callable[[str], Damaged], tmp_path: Path, name: str, target: str
) -> None:
    change, message = DAMAGE[name]
    folder = damage("native").folder
    change(sorted(folder.glob("*.safetensors"))[1])
    with pytest.raises(BitwrightError, match=message):
        export_model(folder, tmp_path / "out", target, allow_lossy=True)
    assert not (tmp_path / "out").exists()


def test_null_means_not_quantized(damage: Callable[[str], Damaged], tmp_path: Path) -> None:
    damaged = damage("float")
    damaged.config({"quantization_config": None})
    bitwright.quantize(str(damaged.folder), tmp_path / "out", "rtn", "w4a16g32")
    load_model(str(damaged.folder))
    for read in (bitwright.inspect, lambda folder: import_model(folder, tmp_path / "native")):
        with pytest.raises(BitwrightError, match=r"manifest.json: missing|no quantization_config"):
            read(damaged.folder)
