"""The compiled decode step against float64, on every instruction set and number of threads, and hostile calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bitwright.errors import PlanError
from bitwright.numeric.measure import sqnr_db, squared_error
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime import cpu
from bitwright.runtime.cpu import instruction_sets
from bitwright.runtime.decode import LeanDecoder
from bitwright.runtime.linear import QuantizedLinear
from bitwright.words import CpuMode

Quantize = Callable[..., QTensor]

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the compiled kernels are not built, or turned off")

LENGTH = 300
BASE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "initializer_range": 0.2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}


def llama(heads: int, kv_heads: int, head_dim: int, **more: Any) -> PreTrainedModel:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return LlamaForCausalLM(LlamaConfig(**(BASE | sizes | more)))


def qwen3(heads: int, kv_heads: int, head_dim: int) -> PreTrainedModel:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return Qwen3ForCausalLM(Qwen3Config(**BASE, **sizes))


# One key for one, two, three, five and seven heads; features in whole vectors, and not.
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "1 to 1 of 16": lambda: llama(3, 3, 16),
    "2 to 1 of 80, norms of heads": lambda: qwen3(4, 2, 80),
    "3 to 1 of 64": lambda: llama(9, 3, 64, hidden_size=45),
    "5 to 1 of 24, biases": lambda: llama(5, 1, 24, hidden_size=50, attention_bias=True, mlp_bias=True),
    "7 to 1 of 2, two blocks": lambda: llama(14, 2, 2, hidden_size=56, num_hidden_layers=2),
}


def random_model(name: str) -> PreTrainedModel:
    """Norms and biases matter, attention is far from uniform."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def quantized(model: PreTrainedModel, quantize: Quantize) -> PreTrainedModel:
    """`model` with every second linear packed, so that no product is joined; others stay float32."""
    names = [name for name, module in model.model.named_modules() if type(module) is nn.Linear]
    for name in names[::2]:
        module = model.model.get_submodule(name)
        q = quantize(module.weight, WeightSpec(bits=4, group_size=16), 0.02)
        bias = None if module.bias is None else module.bias.detach()
        model.model.set_submodule(name, QuantizedLinear.from_qtensor(q, bias))
    return model


# --- the definition, in float64 --------------------------------------------------------------------------------------


def linear(module: nn.Module, x: Tensor) -> Tensor:
    weight = module.dequantize() if isinstance(module, QuantizedLinear) else module.weight
    return functional.linear(x, weight.double(), None if module.bias is None else module.bias.double())


def norm(module: Any, x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight.double()


def attention(module: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tokens, dim = x.shape[0], module.head_dim
    parts = [linear(getattr(module, name), x).view(tokens, -1, dim) for name in ("q_proj", "k_proj", "v_proj")]
    if hasattr(module, "q_norm"):
        parts[:2] = norm(module.q_norm, parts[0]), norm(module.k_norm, parts[1])
    for i in range(2):
        first, second = parts[i].chunk(2, dim=-1)
        parts[i] = parts[i] * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    q, k, v = (part.transpose(0, 1) for part in parts)
    k, v = (part.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for part in (k, v))
    scores = q @ k.transpose(1, 2) * module.scaling
    weights = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)
    return linear(module.o_proj, (weights @ v).transpose(0, 1).reshape(tokens, -1))


@torch.no_grad()
def reference(model: Any, ids: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] behind each of `ids`."""
    cos, sin = (table[0].double() for table in model.model.rotary_emb(torch.empty(1), torch.arange(ids.numel())[None]))
    x = model.model.embed_tokens(ids).double()
    for layer in model.model.layers:
        x = x + attention(layer.self_attn, norm(layer.input_layernorm, x), cos, sin)
        y = norm(layer.post_attention_layernorm, x)
        gate, up = linear(layer.mlp.gate_proj, y), linear(layer.mlp.up_proj, y)
        x = x + linear(layer.mlp.down_proj, gate * torch.sigmoid(gate) * up)
    return linear(model.lm_head, norm(model.model.norm, x))


def steps(decoder: LeanDecoder, ids: Tensor, prompt: int) -> Tensor:
    """Logits behind each of `ids` from the last of the prompt on."""
    logits = [decoder.prefill(ids[:prompt]).clone()]
    logits += [decoder.step(int(token)).clone() for token in ids[prompt:]]
    return torch.stack(logits)


def tokens(count: int = LENGTH) -> Tensor:
    return torch.randint(50, (count,), generator=torch.Generator().manual_seed(1))


# --- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", BUILDERS)
def test_every_length_is_float64(name: str, quantize_minmax: Quantize) -> None:
    model = quantized(random_model(name), quantize_minmax)
    expected = reference(model, tokens())
    found = steps(LeanDecoder(model, max_length=LENGTH), tokens(), 1)
    worst = min(sqnr_db(*squared_error(a, b)) for a, b in zip(expected, found, strict=True))
    assert worst > 105


@pytest.mark.usefixtures("isa")
def test_fast_mode_rounds_inputs_of_packed_weights(quantize_minmax: Quantize) -> None:
    model = quantized(random_model("3 to 1 of 64"), quantize_minmax)
    expected = reference(model, tokens(40))
    found = steps(LeanDecoder(model, "fast", 40), tokens(40), 7)
    assert 25 < sqnr_db(*squared_error(expected[6:], found)) < 60


def test_float_weights_give_the_same_bits_on_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = random_model("2 to 1 of 80, norms of heads"), []
    for name in instruction_sets():
        monkeypatch.setenv("BITWRIGHT_ISA", name)
        found.append(steps(LeanDecoder(model, max_length=140), tokens(140), 1))
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.usefixtures("_keep_threads")
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_threads_change_nothing(mode: CpuMode, quantize_minmax: Quantize) -> None:
    torch.manual_seed(0)
    # Products and attention are worth four threads.
    model = quantized(llama(32, 8, 64, hidden_size=256, intermediate_size=1600).eval(), quantize_minmax)
    decoder = LeanDecoder(model, mode, LENGTH)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(1)
        decoder.prefill(tokens()[:-3])
        torch.set_num_threads(threads)
        found.append(torch.stack([decoder.step(int(token)).clone() for token in tokens()[-3:]]))
    assert all(torch.equal(found[0], other) for other in found)


def test_prompts_and_steps_fill_the_same_cache() -> None:
    model = random_model("3 to 1 of 64")
    stepped, prompted = LeanDecoder(model, max_length=50), LeanDecoder(model, max_length=50)
    steps(stepped, tokens(50), 1)
    prompted.prefill(tokens(50))
    torch.testing.assert_close(stepped._keys, prompted._keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stepped._values, prompted._values, rtol=1e-4, atol=1e-4)
    # A shorter text is not led astray by what an earlier one left behind.
    prompted._keys.fill_(torch.nan)
    fresh = LeanDecoder(model, max_length=50)
    assert torch.equal(steps(prompted, tokens(20), 3), steps(fresh, tokens(20), 3))


# --- hostile calls ---------------------------------------------------------------------------------------------------


def test_tokens_that_do_not_exist_change_nothing() -> None:
    decoder = LeanDecoder(random_model("1 to 1 of 16"), max_length=8)
    decoder.prefill(tokens(4))
    expected = decoder.step(3).clone()
    decoder.prefill(tokens(4))
    for token in (-1, 50, 2**62, -(2**62)):
        with pytest.raises(IndexError, match=f"token {token}, needed 0..49"):
            decoder.step(token)
    with pytest.raises(TypeError):
        decoder.step(2**70)
    assert decoder.length == 4
    assert torch.equal(decoder.step(3), expected)


def test_tensors_that_do_not_fit_are_refused() -> None:
    def broken(change: Callable[[Any], None]) -> PreTrainedModel:
        model = copy.deepcopy(random_model("2 to 1 of 80, norms of heads"))
        change(model.model.layers[0])
        return model

    def norm_of(layer: Any) -> None:
        layer.post_attention_layernorm.weight = nn.Parameter(torch.ones(47))

    def head_norm_of(layer: Any) -> None:
        layer.self_attn.k_norm.weight = nn.Parameter(torch.ones(81))

    def bias_of(layer: Any) -> None:
        layer.mlp.down_proj.bias = nn.Parameter(torch.ones(1))

    def qkv_of(layer: Any) -> None:
        layer.self_attn.v_proj = nn.Linear(48, 80)

    for change, message in (
        (norm_of, r"a norm is torch.float32 \[47\], needed contiguous float32 \[48\]"),
        (head_norm_of, r"a norm of heads is torch.float32 \[81\]"),
        (bias_of, r"a bias is \[1\], needed \[48\]"),
        (qkv_of, "qkv gives 560 features, needed 640"),
    ):
        with pytest.raises(ValueError, match=message):
            LeanDecoder(broken(change))


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_ISA", "z80")
    with pytest.raises(PlanError, match=r"BITWRIGHT_ISA is 'z80', needed one of baseline.* unset it"):
        LeanDecoder(random_model("1 to 1 of 16"))
