"""Quantized KV caches: against loops in float64, with and without a cache, with padding, one model beside another.

Models compute in float64: noise then is far below a rounding of float32, and no code flips between two equal ways.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import modeling_llama

from bitwright.numeric.activation import KvSpec, fake_quantize
from bitwright.numeric.fp8 import KvScales, fake_quantize_fp8
from bitwright.runtime.attention import KvQuantization, past_only_attention, quantize_kv, watched_kv

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 39,
    "pad_token_id": 39,
}
GROUPED = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3, "head_dim": 8}
SPECS = {
    "after": KvSpec(bits=3),
    "symmetric": KvSpec(bits=4, symmetric=True),
    "before": KvSpec(bits=3, rope="before"),
    "past": KvSpec(bits=3, past_only=True),
    "fp8": KvSpec(bits=8, grid="fp8"),
}
IDS = torch.tensor([[1, 5, 9, 2, 30, 7, 7, 12], [3, 8, 38, 1, 1, 6, 21, 4]])


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**GROUPED | changes)).eval().double()


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(**SIZES, word_embed_proj_dim=32, ffn_dim=48, init_std=0.3)
    return OPTForCausalLM(config).eval().double()


def qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**GROUPED)).eval().double()


def mistral() -> MistralForCausalLM:
    """A window of 4 tokens."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4)).eval().double()


BUILDS = {"llama": llama, "opt": opt, "qwen3": qwen3, "mistral": mistral}


def scales_of(model: nn.Module) -> dict[str, KvScales]:
    """Of every attention others, small enough to saturate some keys and values."""
    names = [name for name, module in model.named_modules() if hasattr(module, "k_proj")]
    return {name: KvScales(k=2.0**-8 * (3 + index), v=2.0**-10 * (5 + index)) for index, name in enumerate(names)}


def quantized(model: nn.Module, spec: KvSpec) -> KvQuantization:
    return quantize_kv(model, spec, scales_of(model) if spec.grid == "fp8" else None)


def rounded(token: Tensor, spec: KvSpec, scale: float) -> Tensor:
    """A key or a value of one token and head."""
    return fake_quantize_fp8(token, scale) if spec.grid == "fp8" else fake_quantize(token[None], spec)[0]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    return model(ids, use_cache=False, **arguments).logits


@torch.no_grad()
def step_by_step(model: PreTrainedModel, first: int) -> Tensor:
    """Logits of a prefill of `first` tokens, then one token at a time."""
    output = model(IDS[:, :first], use_cache=True)
    found = [output.logits]
    for place in range(first, IDS.shape[1]):
        output = model(IDS[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits)
    return torch.cat(found, dim=1)


def slow_attention(query: Tensor, key: Tensor, value: Tensor, spec: KvSpec, window: int = 99) -> Tensor:
    """Softmax attention of one query at a time; [batch, heads, tokens, head_dim] to [batch, tokens, heads, ...]."""
    repeats = query.shape[1] // key.shape[1]
    scales = (3 * 2.0**-8, 5 * 2.0**-10)  # of the first attention
    result = torch.zeros_like(query)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        seen = range(max(0, i - window + 1), i + 1)
        keys, values = [], []
        for j in seen:
            own = spec.past_only and i == j
            for states, list_, scale in ((key, keys, scales[0]), (value, values, scales[1])):
                token = states[b, h // repeats, j]
                list_.append(token if own else rounded(token, spec, scale))
        shares = torch.softmax(torch.stack(keys) @ query[b, h, i] * query.shape[-1] ** -0.5, 0)
        result[b, h, i] = shares @ torch.stack(values)
    return result.transpose(1, 2)


def record_attention(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """Queries, keys and values of every attention of `model`, as transformers' own function gets them."""
    calls: list[tuple[Tensor, ...]] = []
    original = modeling_llama.eager_attention_forward

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query, key, value))
        return original(module, query, key, value, *args, **kwargs)

    model.set_attn_implementation("eager")
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", record)
    return calls


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["after", "symmetric", "past", "fp8"])
def test_attention_against_loops(kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(num_hidden_layers=1)
    calls = record_attention(model, monkeypatch)
    logits(model)
    (query, key, value), attention = calls[0], model.model.layers[0].self_attn
    found: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    model.set_attn_implementation(implementation)
    with quantized(model, SPECS[kind]):
        logits(model)
    expected = slow_attention(query, key, value, SPECS[kind]).flatten(2)
    # transformers' eager attention takes its softmax in float32.
    limit = 3e-6 if implementation == "eager" and kind != "past" else 1e-10
    torch.testing.assert_close(found[0], expected, rtol=limit, atol=limit)


def test_past_only_without_a_mask_and_with_windows() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 7, 5, dtype=torch.float64) for _ in range(3))
    spec = SPECS["past"]
    pairs = [(states, fake_quantize(states, spec)) for states in (key, value)]
    scaled = query * 5**-0.5
    expected = slow_attention(query, key, value, spec)
    torch.testing.assert_close(past_only_attention(scaled, *pairs, None)[0], expected)
    last = past_only_attention(scaled[:, :, 5:], *pairs, None)[0]
    torch.testing.assert_close(last, expected[:, 5:])
    places = torch.arange(7)
    window = (places <= places[:, None]) & (places > places[:, None] - 3)
    windowed, shares = past_only_attention(scaled, *pairs, window[None, None])
    torch.testing.assert_close(windowed, slow_attention(query, key, value, spec, window=3))
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", SPECS)
def test_prefill_agrees_with_decoding_step_by_step(build: str, kind: str) -> None:
    model = BUILDS[build]()
    plain = logits(model)
    with quantized(model, SPECS[kind]):
        whole = logits(model)
        for first in (1, 5):
            torch.testing.assert_close(step_by_step(model, first), whole, rtol=1e-9, atol=1e-9)
    assert (whole - plain).abs().max() > 1e-3
    assert torch.equal(logits(model), plain)


def test_generation_goes_through_the_quantized_cache() -> None:
    model = llama()
    ids = IDS[:1]
    with quantized(model, KvSpec(bits=2)):
        cached = model.generate(ids, max_new_tokens=6, do_sample=False)
        for _ in range(6):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids[:, : cached.shape[1]])


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("build", ["llama", "qwen3", "mistral"])
def test_invariant_11_padding_on_the_left_changes_nothing(build: str, kind: str) -> None:
    model = BUILDS[build]()
    padded = torch.cat([torch.full((2, 3), 39), IDS], dim=1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(IDS.shape)], dim=1).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with quantized(model, SPECS[kind]):
        expected = logits(model)
        found = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 3:]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_invariant_11_keys_have_another_range_before_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(num_hidden_layers=1)
    calls = record_attention(model, monkeypatch)
    before: list[Tensor] = []
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, keys: before.append(keys))
    logits(model)
    unrotated = before[0].unflatten(-1, (2, 8)).transpose(1, 2)
    rotated = calls[0][1]
    # RoPE turns pairs of channels: their lengths stay, ranges do not (but at position 0, where it turns nothing).
    torch.testing.assert_close(rotated.norm(dim=-1), unrotated.norm(dim=-1), rtol=1e-5, atol=1e-5)
    width, width_before = (k.amax(-1) - k.amin(-1) for k in (rotated, unrotated))
    assert bool(((width - width_before).abs()[:, :, 1:] > 1e-6).all())
    with quantized(model, SPECS["after"]):
        after = logits(model)
    with quantized(model, SPECS["before"]):
        assert (logits(model) - after).abs().max() > 1e-3


def test_keys_before_rope_are_what_the_projection_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers' own rotation of keys that were rounded by hand."""
    model, spec = llama(num_hidden_layers=1), SPECS["before"]
    attention = model.model.layers[0].self_attn
    reference = copy.deepcopy(model)
    calls = record_attention(reference, monkeypatch)
    reference.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, args, keys: torch.cat([fake_quantize(head, spec) for head in keys.split(8, dim=-1)], dim=-1)
    )
    logits(reference)
    query, key, value = calls[0]
    found: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with quantized(model, spec):
        logits(model)
    # Keys are rounded already; values are not.
    mask = torch.full((8, 8), -torch.inf, dtype=torch.float64).triu(1)
    shares = torch.softmax(query @ key.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5 + mask, -1)
    expected = (shares @ fake_quantize(value, spec).repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-10)


def test_norms_of_keys_come_before_the_rounding() -> None:
    model, spec = qwen3(), SPECS["before"]
    given: list[Tensor] = []
    norm = model.model.layers[1].self_attn.k_norm
    with quantized(model, spec):
        norm.register_forward_hook(lambda module, args, keys: given.append(keys))
        logits(model)
    # What leaves the norm is on the grid already.
    torch.testing.assert_close(fake_quantize(given[0], spec), given[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SPECS)
def test_models_that_share_a_config_do_not_disturb_each_other(kind: str) -> None:
    config = LlamaConfig(**GROUPED)
    torch.manual_seed(0)
    one, two, three = (LlamaForCausalLM(config).eval().double() for _ in range(3))
    two.load_state_dict(one.state_dict())
    three.load_state_dict(one.state_dict())
    plain = logits(one)
    with quantized(one, SPECS[kind]) as first:
        with quantized(two, KvSpec(bits=2)):
            coarse = logits(two)
            fine = logits(one)
            assert torch.equal(logits(three), plain)
            first.remove()
            assert torch.equal(logits(one), plain)
            assert torch.equal(logits(two), coarse)
        assert torch.equal(logits(two), plain)
    assert not torch.equal(coarse, fine)
    assert one.config is two.config is config
    assert not any(module._forward_hooks for module in one.modules())


def test_copies_stay_quantized() -> None:
    model = llama()
    with quantized(model, SPECS["before"]):
        clone = copy.deepcopy(model)
        expected = logits(model)
    assert torch.equal(logits(clone), expected)


def test_a_single_block() -> None:
    """Learning runs blocks on their own, with masks that transformers made for the float model."""
    model = llama()
    block = copy.deepcopy(model.model.layers[0])
    hidden = torch.randn(2, 8, 32, dtype=torch.float64)
    rotation = model.model.rotary_emb(hidden, torch.arange(8)[None])
    for spec in SPECS.values():
        with quantized(model, spec):
            layer = model.model.layers[0]
            expected: list[Tensor] = []
            hook = layer.register_forward_hook(lambda module, args, output, expected=expected: expected.append(output))
            embedded = model.model.embed_tokens(IDS)
            logits(model)
            hook.remove()
        with quantized(block, spec), torch.no_grad():
            found = block(embedded, attention_mask=None, position_embeddings=rotation)
        torch.testing.assert_close(found, expected[0], rtol=1e-9, atol=1e-9)


def test_gradients_reach_keys_and_values() -> None:
    model = llama()
    for spec in SPECS.values():
        model.zero_grad()
        with quantized(model, spec):
            model(IDS, labels=IDS).loss.backward()
        for layer in model.model.layers:
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                assert linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["before", "past", "fp8"])
def test_compiles_as_one_graph(kind: str) -> None:
    model = llama(num_hidden_layers=1).float()
    attention, hidden = model.model.layers[0].self_attn, torch.randn(2, 8, 32)
    rotation = model.model.rotary_emb(hidden, torch.arange(8)[None])
    torch.compiler.reset()
    with quantized(attention, SPECS[kind]), torch.no_grad():
        compiled = torch.compile(attention, fullgraph=True, backend="eager")
        found, expected = (call(hidden, rotation, None)[0] for call in (compiled, attention))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Linear has no causal attention"):
        quantize_kv(nn.Linear(2, 2), SPECS["after"])
    model = llama()
    with quantized(model, SPECS["after"]), pytest.raises(ValueError, match="quantized already"):
        quantized(model, SPECS["before"])
    falcon = FalconForCausalLM(FalconConfig(**SIZES))
    with pytest.raises(ValueError, match="does not let be replaced"):
        quantized(falcon, SPECS["after"])
    attention = model.model.layers[1].self_attn
    attention.key_proj, attention.k_proj = attention.k_proj, None
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn \(LlamaAttention\) has no k_proj"):
        quantized(model, SPECS["before"])
    assert model.config._attn_implementation == "sdpa"


def test_scales_that_are_not_those_of_the_model() -> None:
    model, spec = llama(), SPECS["fp8"]
    scales = scales_of(model)
    first, second = scales
    cases = [
        (spec, {}, rf"no scales for {first} and 1 more"),
        (spec, {first: scales[first]}, rf"no scales for {second} and 0 more"),
        (spec, {**scales, "model.layers.2.self_attn": scales[first]}, r"scales for model\.layers\.2\.self_attn, which"),
        (SPECS["after"], scales, rf"scales for {first}, which is no attention with an fp8 cache"),
    ]
    for wanted, given, message in cases:
        with pytest.raises(ValueError, match=message):
            quantize_kv(model, wanted, given)
    assert model.config._attn_implementation == "sdpa"


def test_nothing_is_left_behind() -> None:
    model = llama()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with quantized(model, SPECS["fp8"]):
        logits(model)
    with watched_kv(model):
        logits(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_watching_sees_what_enters_the_cache(build: str, implementation: str) -> None:
    model = BUILDS[build]()
    model.set_attn_implementation(implementation)
    plain = logits(model)
    with watched_kv(model) as seen:
        assert torch.equal(logits(model), plain)
        logits(model, IDS[:, :3])
    assert torch.equal(logits(model), plain)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    assert len(seen) == 2
    for (name, found), layer in zip(sorted(seen.items()), cache.layers, strict=True):
        if build != "mistral":  # whose window drops keys from the cache that earlier queries saw
            assert found == [float(states.float().abs().max()) for states in (layer.keys, layer.values)], name
