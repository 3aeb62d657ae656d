"""Loading native folders with transformers: tiny random Llama and OPT, tied embeddings, hostile folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from bitwright.errors import FormatError
from bitwright.formats.native import TensorEntry, pack, parts, quantization_config
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.runtime.huggingface import register
from bitwright.runtime.linear import PackedModule, QuantizedEmbedding, QuantizedLinear, TiedLinear

register()

Quantize = Callable[..., QTensor]
IDS = torch.tensor([[1, 5, 9, 2, 30]])
LINEAR_SPEC = WeightSpec(bits=3, group_size=16)
LEVEL = Bilevel(axis="row", size=16, scale_bits=3, zero_bits=3)
TWO_LEVEL_SPEC = WeightSpec(bits=4, group_size=16, zero="float", bilevel=LEVEL)
OTHER_SPEC = WeightSpec(bits=4, symmetric=True, scale_dtype="float32")
SPECS = {"down_proj": OTHER_SPEC, "up_proj": TWO_LEVEL_SPEC, "fc2": TWO_LEVEL_SPEC}
EMBEDDING_SPEC = WeightSpec(bits=8, group_size=16, zero="float", scale_dtype="bfloat16")


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=39,
        pad_token_id=39,
    )
    return LlamaForCausalLM(config).eval()


def tiny_opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40,
        hidden_size=24,
        word_embed_proj_dim=24,
        ffn_dim=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        init_std=0.2,
        bos_token_id=0,
        eos_token_id=39,
        pad_token_id=39,
    )
    model = OPTForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def write_folder(model: PreTrainedModel, folder: Path, quantize: Quantize, dtype: torch.dtype) -> PreTrainedModel:
    """Write `model` quantized to `folder`; it becomes the decoded model, which loading must reproduce."""
    tied = model.config.tie_word_embeddings
    entries, tensors = {}, {}
    for name, module in model.named_modules():
        if type(module) is nn.Embedding and tied:
            spec = EMBEDDING_SPEC
        elif type(module) is nn.Linear and not (tied and name == "lm_head"):
            spec = SPECS.get(name.rpartition(".")[2], LINEAR_SPEC)
        else:
            continue
        share, value_bits = 0.0 if spec is OTHER_SPEC else 0.02, 8 if spec is TWO_LEVEL_SPEC else 16
        q = quantize(module.weight, spec, share, value_bits)
        entries[name] = TensorEntry.of(q)
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack(q).items()}
        module.weight.data = q.dequantize()
    quantized = {f"{name}.weight" for name in entries} | ({"lm_head.weight"} if tied else set())
    for name, tensor in model.state_dict().items():
        if name not in quantized:
            tensors[name] = tensor.to(dtype).contiguous()
            tensor.copy_(tensors[name])
    config = model.config.to_dict()
    ties = {"lm_head": "model.embed_tokens"} if tied else None
    config |= {
        "architectures": [type(model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        "quantization_config": quantization_config(entries, ties),
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def load(folder: Path, **arguments: Any) -> PreTrainedModel:
    """The model, with nothing missing, unexpected or mismatched."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def generated(model: PreTrainedModel) -> list[int]:
    return model.generate(IDS, max_new_tokens=4, do_sample=False)[0].tolist()


@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_llama(tied=True), tiny_opt], ids=["llama", "tied", "opt"])
def test_loads_and_computes_what_the_decoded_model_computes(
    build: Callable[[], PreTrainedModel], tmp_path: Path, quantize_minmax: Quantize
) -> None:
    decoded = write_folder(build(), tmp_path, quantize_minmax, torch.float32)
    model = load(tmp_path)
    torch.testing.assert_close(logits(model), logits(decoded), rtol=1e-4, atol=1e-4)
    assert generated(model) == generated(decoded)
    assert sum(type(m) is nn.Linear for m in model.modules()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_stored_types_do_not_depend_on_dtype(dtype: Any, tmp_path: Path, quantize_minmax: Quantize) -> None:
    write_folder(tiny_llama(tied=True), tmp_path, quantize_minmax, torch.float16)
    model = load(tmp_path, dtype=dtype)
    expected = torch.float16 if dtype == "auto" else dtype
    assert model.dtype == expected
    assert logits(model).dtype == expected
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedModule)}
    assert isinstance(packed["model.embed_tokens"], QuantizedEmbedding)
    assert isinstance(model.lm_head, TiedLinear)
    stored = load_file(tmp_path / "model.safetensors")
    for name, module in packed.items():
        assert {part: (tuple(t.shape), t.dtype) for part, t in module.stored().items()} == parts(module.entry)
        for part, tensor in module.stored().items():
            assert torch.equal(tensor.view(torch.uint8), stored[f"{name}.{part}"].view(torch.uint8))


def test_biases_are_kept(tmp_path: Path, quantize_minmax: Quantize) -> None:
    decoded = write_folder(tiny_opt(), tmp_path, quantize_minmax, torch.float32)
    module = load(tmp_path).get_submodule("model.decoder.layers.0.fc1")
    assert isinstance(module, QuantizedLinear)
    assert module.bias is not None
    assert torch.equal(module.bias, decoded.get_submodule("model.decoder.layers.0.fc1").bias)


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_again(tied: bool, tmp_path: Path, quantize_minmax: Quantize) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    write_folder(tiny_llama(tied), first, quantize_minmax, torch.float32)
    model = load(first)
    model.save_pretrained(second)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    assert after["quantization_config"] == before["quantization_config"]
    assert torch.equal(logits(load(second)), logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_dequantize_gives_plain_modules(tied: bool, tmp_path: Path, quantize_minmax: Quantize) -> None:
    write_folder(tiny_llama(tied), tmp_path, quantize_minmax, torch.float32)
    model = load(tmp_path)
    before = logits(model)
    plain = model.dequantize()
    assert not any(isinstance(module, PackedModule | TiedLinear) for module in plain.modules())
    assert type(plain.lm_head) is nn.Linear
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(plain), before)
    plain.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(load(tmp_path / "plain")), before)


def test_register_twice() -> None:
    register()
    register()


def test_compiled_model(tmp_path: Path, quantize_minmax: Quantize) -> None:
    write_folder(tiny_llama(), tmp_path, quantize_minmax, torch.float32)
    model = load(tmp_path)
    torch.compiler.reset()
    with torch.no_grad():
        result = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS, use_cache=False).logits
    torch.testing.assert_close(result, logits(model))


QKV, UP = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def drop(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def scaled(tensors: dict[str, Tensor], name: str, value: float) -> None:
    tensors[name][0] = value


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing scale": (lambda t: drop(t, f"{QKV}.weight_scale"), rf"{QKV}\.weight_scale: missing"),
    "truncated": (
        lambda t: t.update({f"{QKV}.weight_packed": t[f"{QKV}.weight_packed"][:-1]}),
        rf"{QKV}\.weight_packed: found torch.int32 \[23, 3\]",
    ),
    "wrong type": (
        lambda t: t.update({f"{QKV}.weight_scale": t[f"{QKV}.weight_scale"].float()}),
        rf"{QKV}\.weight_scale: found torch.float32",
    ),
    "type of no part": (
        lambda t: t.update({f"{QKV}.outlier_idx": t[f"{QKV}.outlier_idx"].long()}),
        rf"{QKV}\.outlier_idx: found I64",
    ),
    "unknown part": (
        lambda t: t.update({f"{QKV}.scale_codes": torch.zeros(2)}),
        rf"{QKV}\.scale_codes: unknown",
    ),
    "column out of range": (
        lambda t: scaled(t, f"{QKV}.outlier_idx", 250),
        rf"{QKV}\.outlier_idx: columns",
    ),
    "bad counts": (lambda t: scaled(t, f"{QKV}.outlier_counts", -7), rf"{QKV}\.outlier_counts"),
    "wrong type of values": (
        lambda t: t.update({f"{UP}.outlier_val": t[f"{UP}.outlier_val"].view(torch.uint8)}),
        rf"{UP}\.outlier_val: found torch.uint8",
    ),
    "scale of zero": (
        lambda t: t[f"{UP}.superblock_statistics"].zero_(),
        rf"{UP}\.scale_codes: decode to a scale of 0",
    ),
    "missing statistics": (
        lambda t: drop(t, f"{UP}.superblock_statistics"),
        rf"{UP}\.superblock_statistics: missing",
    ),
    "NaN scale": (
        lambda t: scaled(t, f"{QKV}.weight_scale", float("nan")),
        rf"{QKV}\.weight_scale: holds NaN",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_hostile_tensors(case: str, tmp_path: Path, quantize_minmax: Quantize) -> None:
    write_folder(tiny_llama(), tmp_path, quantize_minmax, torch.float32)
    damage, message = DAMAGE[case]
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_bias_is_not_invented(tmp_path: Path, quantize_minmax: Quantize) -> None:
    write_folder(tiny_opt(), tmp_path, quantize_minmax, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.decoder.layers.0.fc1.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"fc1\.bias: missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"].update(version=4), "newer bitwright"),
        (lambda c: c["quantization_config"].update(version=2), "quantize the model again"),
        (lambda c: c["quantization_config"]["tensors"]["lm_head"].update(shape=[41, 24]), "the model needs"),
        (
            lambda c: c["quantization_config"]["tensors"].update({"model.norm": {"spec": 0, "shape": [1, 24]}}),
            "is a",
        ),
        (
            lambda c: c["quantization_config"]["tensors"].update({"nowhere": {"spec": 0, "shape": [1, 1]}}),
            "no such",
        ),
        (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings is true, needed false"),
    ],
)
def test_hostile_configs(
    change: Callable[[dict], None], message: str, tmp_path: Path, quantize_minmax: Quantize
) -> None:
    write_folder(tiny_llama(), tmp_path, quantize_minmax, torch.float32)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_headless_class_is_refused_with_the_remedy(tmp_path: Path, quantize_minmax: Quantize) -> None:
    write_folder(tiny_llama(), tmp_path, quantize_minmax, torch.float32)
    with pytest.raises(FormatError, match="AutoModelForCausalLM"):
        AutoModel.from_pretrained(tmp_path)
