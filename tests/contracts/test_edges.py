"""Contract of every edge of every hand-written adapter: the float output of the model does not change.

Checked on the real transformers models with grouped-query attention, RoPE and random biases: to 1e-12 in true
float64 and to 1e-5 in float32.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # packages that transformers imports where they are installed may warn of their own deprecations
    warnings.simplefilter("ignore")
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitwright.models import Adapter, adapter_for
    from bitwright.models.discover import Float64

from bitwright.models.edges import Edge, Factors, NormEdge, apply_factors, merge_factors

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
OPT = {**SIZES, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
CONFIGS = {
    "llama": {**GATED, "model_type": "llama"},
    "llama-bias": {**GATED, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-one-kv-head": {**GATED, "model_type": "llama", "num_key_value_heads": 1, "head_dim": 6},
    "mistral": {**GATED, "model_type": "mistral", "sliding_window": 4},
    "qwen2": {**GATED, "model_type": "qwen2"},
    "qwen3": {**GATED, "model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "opt": OPT,
    "opt-post-norm": {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "opt-gelu": {**OPT, "activation_function": "gelu", "enable_bias": False},
    "opt-plain-norms": {**OPT, "layer_norm_elementwise_affine": False},
}
EDGES = [
    pytest.param(name, index, id=f"{name}-{'-'.join(edge.modules)}")
    for name, config in CONFIGS.items()
    for index, edge in enumerate(adapter_for(config).edges)
]
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


@cache
def build(name: str) -> nn.Module:
    """A random model whose norms and biases are far from one and zero, in float64."""
    torch.manual_seed(0)
    config = dict(CONFIGS[name])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


@torch.no_grad()
def logits(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    keywords = {"input_ids": tokens, "use_cache": False}
    tensors = {key: value.to(dtype) for key, value in {**dict(model.named_parameters()), **tensors}.items()}
    with Float64() if dtype == torch.float64 else nullcontext():
        return torch.func.functional_call(model, tensors, (), keywords).logits


def rescaled(adapter: Adapter, model: nn.Module, edges: tuple[Edge, ...], seed: int) -> dict[str, Tensor]:
    """The tensors of all blocks after random log-normal rescalings, different in every block."""
    torch.manual_seed(seed)
    stored = dict(model.named_parameters())
    changed = {}
    for index in range(2):
        scales = [torch.exp(0.5 * torch.randn(e.width(adapter.shape), dtype=torch.float64)) for e in edges]
        several = [edge.factors(scale, adapter.shape) for edge, scale in zip(edges, scales, strict=True)]
        for key, factors in merge_factors(several).items():
            whole = adapter.block_prefix(index) + key
            if whole in stored:
                changed[whole] = apply_factors(stored[whole], factors)
    return changed


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("name", "index"), EDGES)
def test_edge_keeps_the_float_output(name: str, index: int, dtype: torch.dtype) -> None:
    model, adapter = build(name), adapter_for(CONFIGS[name])
    edge = adapter.edges[index]
    changed = rescaled(adapter, model, (edge,), seed=index)
    before = logits(model, {}, dtype)
    assert distance(before, logits(model, changed, dtype)) <= LIMIT[dtype]

    # half of the rescaling must show, or the edge would be tested on nothing
    half = {key: value for key, value in changed.items() if f".{edge.modules[0]}." in key}
    assert len(half) in (2, 4)
    assert distance(before, logits(model, half, dtype)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_edges_together_keep_the_float_output(name: str, dtype: torch.dtype) -> None:
    model, adapter = build(name), adapter_for(CONFIGS[name])
    changed = rescaled(adapter, model, adapter.edges, seed=7)
    assert distance(logits(model, {}, dtype), logits(model, changed, dtype)) <= LIMIT[dtype]


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_those_of_the_model(name: str) -> None:
    model, adapter = build(name), adapter_for(CONFIGS[name])
    modules = dict(model.named_modules())
    for index in range(2):
        prefix = adapter.block_prefix(index)
        block = {key.removeprefix(prefix): part for key, part in modules.items() if key.startswith(prefix)}
        linears = [key for key, part in block.items() if isinstance(part, nn.Linear)]
        assert sorted(linears) == sorted(adapter.linears)
        others = [
            key
            for key, part in block.items()
            if key not in linears and any(True for _ in part.parameters(recurse=False))
        ]
        assert sorted(others) == sorted(adapter.norms)
    assert modules[adapter.embedding] is model.get_input_embeddings()
    assert modules[adapter.head] is model.get_output_embeddings()
    outside = {adapter.embedding, adapter.head, *adapter.kept}
    outside |= {adapter.final_norm} if adapter.final_norm else set()
    assert outside <= modules.keys()
    unclaimed = [
        key
        for key in model.state_dict()
        if not key.startswith(f"{adapter.blocks}.") and key.rpartition(".")[0] not in outside
    ]
    assert unclaimed == []
    assert adapter.tied_head == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


def test_post_norm_opt_claims_no_norm_edge() -> None:
    adapter = adapter_for(CONFIGS["opt-post-norm"])
    assert not any(isinstance(edge, NormEdge) for edge in adapter.edges)
    assert adapter.final_norm is None
    assert "model.decoder.project_in" in adapter.kept


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_gradients_reach_every_scale(name: str) -> None:
    model, adapter = build(name), adapter_for(CONFIGS[name])
    scales = [torch.ones(e.width(adapter.shape), dtype=torch.float64, requires_grad=True) for e in adapter.edges]
    factors = merge_factors(
        [edge.factors(scale, adapter.shape) for edge, scale in zip(adapter.edges, scales, strict=True)]
    )
    total = torch.zeros((), dtype=torch.float64)
    for key, factor in factors.items():
        tensor = model.state_dict().get(adapter.block_prefix(0) + key)
        if tensor is not None:
            total = total + (apply_factors(tensor, factor) * torch.randn_like(tensor)).sum()
    total.backward()
    assert all(scale.grad is not None and (scale.grad != 0).all() for scale in scales)


def test_merging_is_the_same_in_any_order() -> None:
    rows, columns = torch.rand(3), torch.rand(4)
    one, other = {"a.weight": Factors(rows=rows)}, {"a.weight": Factors(rows=rows, columns=columns)}
    tensor = torch.rand(3, 4)
    forward, backward = merge_factors([one, other]), merge_factors([other, one])
    in_turn = apply_factors(apply_factors(tensor, one["a.weight"]), other["a.weight"])
    for merged in (forward, backward):
        torch.testing.assert_close(apply_factors(tensor, merged["a.weight"]), in_turn)
