"""The lean decode path: the tokens and logits of the reference path, joined matrices, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bitwright.numeric.activation import ActivationSpec, InputSite, KvSpec
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime import cpu, reference
from bitwright.runtime.attention import quantize_kv
from bitwright.runtime.decode import LeanDecoder, supports
from bitwright.runtime.join import concatenate
from bitwright.runtime.linear import QuantizedEmbedding, QuantizedLinear, TiedLinear

Quantize = Callable[..., QTensor]

compiled = pytest.mark.skipif(not cpu.available(), reason="the compiled kernels are not built, or turned off")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, biases, llama3": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=24, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)),
}
W4 = WeightSpec(bits=4, group_size=32)
W8 = WeightSpec(bits=8, group_size=32, zero="float")
IDS = torch.tensor([3, 14, 15, 92, 65, 35, 89])
NEW_TOKENS = 24


def tiny(family: str) -> PreTrainedModel:
    """A random model whose biases and norms matter."""
    torch.manual_seed(0)
    model = BUILDERS[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def quantized(
    model: PreTrainedModel, quantize: Quantize, share: float = 0.02, spec: WeightSpec = W4
) -> PreTrainedModel:
    """`model` with packed linears and one packed matrix for embedding and head."""
    for name, module in list(model.model.named_modules()):
        if type(module) is nn.Linear:
            bias = None if module.bias is None else module.bias.detach()
            packed = QuantizedLinear.from_qtensor(quantize(module.weight, spec, share), bias)
            model.model.set_submodule(name, packed)
    embedding = QuantizedEmbedding.from_qtensor(quantize(model.model.embed_tokens.weight, W8))
    model.model.embed_tokens = embedding
    model.lm_head = TiedLinear(embedding)
    return model


@torch.no_grad()
def greedy(model: PreTrainedModel) -> tuple[list[int], Tensor]:
    """Tokens and the logits [NEW_TOKENS, vocabulary] they were taken from, without any cache."""
    ids, logits = IDS[None], []
    for _ in range(NEW_TOKENS):
        logits.append(model(ids, use_cache=False).logits[0, -1])
        ids = torch.cat([ids, logits[-1].argmax()[None, None]], dim=1)
    return ids[0, IDS.numel() :].tolist(), torch.stack(logits)


def lean(decoder: LeanDecoder) -> tuple[list[int], Tensor]:
    """The same on the lean path."""
    logits = [decoder.prefill(IDS).clone()]
    while len(logits) < NEW_TOKENS:
        logits.append(decoder.step(int(logits[-1].argmax())).clone())
    return [int(row.argmax()) for row in logits], torch.stack(logits)


@compiled
@pytest.mark.parametrize("family", BUILDERS)
def test_tokens_and_logits_are_those_of_the_reference(
    family: str, quantize_minmax: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(tiny(family), quantize_minmax)
    monkeypatch.setenv("BITWRIGHT_NATIVE", "0")
    tokens, logits = greedy(model)
    monkeypatch.delenv("BITWRIGHT_NATIVE")
    decoder = LeanDecoder(model, max_length=IDS.numel() + NEW_TOKENS)
    for _ in range(2):  # a second text forgets the first
        found, close = lean(decoder)
        assert found == tokens
        torch.testing.assert_close(close, logits, rtol=0, atol=1e-4)
    assert len(set(tokens)) > 4


@pytest.mark.parametrize("family", BUILDERS)
def test_float_models_need_no_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_NATIVE", "0")
    model = tiny(family)
    tokens, logits = greedy(model)
    found, close = lean(LeanDecoder(model))
    assert found == tokens
    torch.testing.assert_close(close, logits, rtol=0, atol=1e-4)


@compiled
def test_linears_that_cannot_be_joined_serve_one_by_one(quantize_minmax: Quantize) -> None:
    model = tiny("qwen2")
    layers = quantized(model, quantize_minmax).model.layers
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        linear = layers[0].get_submodule(name)
        layers[0].set_submodule(
            name, QuantizedLinear.from_qtensor(quantize_minmax(linear.dequantize(), W8), linear.bias)
        )
    plain = nn.Linear(64, 32)
    layers[1].self_attn.v_proj = plain.requires_grad_(False)
    tokens, logits = greedy(model)
    found, close = lean(LeanDecoder(model))
    assert found == tokens
    torch.testing.assert_close(close, logits, rtol=0, atol=1e-4)


@compiled
def test_fast_mode_is_the_kernels_fast_mode(quantize_minmax: Quantize) -> None:
    model = quantized(tiny("llama"), quantize_minmax, 0.0)
    exact, fast = LeanDecoder(model), LeanDecoder(model, "fast")
    expected, found = exact.prefill(IDS), fast.prefill(IDS)
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.1
    expected, found = exact.step(5), fast.step(5)
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.1


@compiled
def test_weight_bytes_are_those_of_the_layouts(quantize_minmax: Quantize) -> None:
    model = quantized(tiny("llama"), quantize_minmax, 0.0)
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    layouts = [module.cpu_weight() for module in (*linears, model.model.embed_tokens)]
    # Every layout has room for one cache line more, to start at one.
    assert abs(LeanDecoder(model).weight_bytes - sum(layout.bytes for layout in layouts if layout)) < 64 * len(layouts)


# --- joined matrices -------------------------------------------------------------------------------------------------

LEVELS = {"zero": "float", "bilevel": {"axis": "row", "size": 16, "scale_bits": 3, "zero_bits": 3}}
SCALE_LEVELS = {"bilevel": {"axis": "column", "size": 2, "scale_bits": 6, "zero_bits": None}}


@pytest.mark.parametrize(
    ("kind", "rows", "shares", "value_bits"),
    [
        ({"zero": "int"}, (7, 3, 5), (0.1, 0.0, 0.05), 16),
        ({"zero": "float"}, (7, 3, 5), (0.0, 0.2, 0.0), 8),
        ({"symmetric": True}, (1, 2), (0.0, 0.0), 16),
        (LEVELS, (32, 16, 7), (0.02, 0.02, 0.02), 8),
        (SCALE_LEVELS, (5, 9), (0.0, 0.0), 16),
    ],
    ids=["int zeros", "float zeros", "symmetric", "levels", "scale levels"],
)
def test_joined_rows_are_the_rows(
    make_qtensor: Quantize, kind: dict, rows: tuple[int, ...], shares: tuple[float, ...], value_bits: int
) -> None:
    spec = WeightSpec(bits=3, group_size=16, **kind)
    parts = [make_qtensor((n, 45), spec, share, n, value_bits) for n, share in zip(rows, shares, strict=True)]
    joined = concatenate([QuantizedLinear.from_qtensor(part) for part in parts])
    assert joined is not None
    expected = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(reference.dequantize(joined, torch.float32), expected)


def test_layouts_that_do_not_agree_are_not_joined(make_qtensor: Quantize) -> None:
    def linear(rows: int, spec: WeightSpec, value_bits: int = 16) -> QuantizedLinear:
        return QuantizedLinear.from_qtensor(make_qtensor((rows, 64), spec, 0.1, 0, value_bits))

    levels = WeightSpec(bits=3, group_size=16, **LEVELS)
    assert concatenate([linear(16, W4), linear(16, W8)]) is None
    assert concatenate([linear(16, W4), linear(16, W4, 8)]) is None
    assert concatenate([linear(8, levels), linear(16, levels)]) is None


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_not_covered_has_a_reason() -> None:
    model = tiny("llama")
    assert supports(model) is None
    with quantize_kv(model, KvSpec(bits=8)):
        assert "quantized KV cache" in str(supports(model))
    assert supports(model) is None
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert "layers.1.mlp has a hook" in str(supports(model))
    hook.remove()
    assert "training mode" in str(supports(model.train()))
    assert "bfloat16" in str(supports(tiny("llama").to(torch.bfloat16)))
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "dynamic" in str(supports(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dynamic)).eval()))
    assert "gelu" in str(supports(LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")).eval()))
    other = OPTConfig(vocab_size=40, hidden_size=24, ffn_dim=40, num_hidden_layers=1, num_attention_heads=4)
    assert "OPTForCausalLM" in str(supports(OPTForCausalLM(other)))


def test_a_window_only_matters_to_longer_texts() -> None:
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)).eval()
    assert supports(model, 16) is None
    assert "window of 16" in str(supports(model, 17))
    assert "window of 16" in str(supports(model))
    with pytest.raises(ValueError, match="window of 16"):
        LeanDecoder(model)


@compiled
def test_quantized_inputs_and_missing_kernels_are_refused(
    quantize_minmax: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(tiny("llama"), quantize_minmax)
    model.model.layers[1].mlp.down_proj.site = InputSite(activation=ActivationSpec(bits=8))
    assert "layers.1.down_proj quantizes or transforms" in str(supports(model))
    model.model.layers[1].mlp.down_proj.site = None
    assert supports(model) is None
    monkeypatch.setenv("BITWRIGHT_NATIVE", "0")
    assert "kernels are missing" in str(supports(model))


def test_calls_that_do_not_fit() -> None:
    model = tiny("llama")
    decoder = LeanDecoder(model, max_length=4)
    with pytest.raises(ValueError, match="0 tokens in the cache"):
        decoder.step(1)
    for ids in (torch.tensor([], dtype=torch.int64), torch.ones(5, dtype=torch.int64), IDS[None]):
        with pytest.raises(ValueError, match=r"needed \[1..4\]"):
            decoder.prefill(ids)
    decoder.prefill(IDS[:3])
    decoder.step(1)
    with pytest.raises(ValueError, match="4 tokens in the cache"):
        decoder.step(1)
    with pytest.raises(ValueError, match="needed one of exact, fast"):
        LeanDecoder(model, "quick")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length is 0"):
        LeanDecoder(model, max_length=0)
