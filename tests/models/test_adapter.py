"""Adapters as data, and the table that finds them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitwright.errors import PlanError
from bitwright.models import ADAPTERS, adapter_for, block_count
from bitwright.models.edges import LinearEdge, NormEdge, RotaryEdge

SIZES = {"hidden_size": 128, "num_attention_heads": 32, "intermediate_size": 64}


@pytest.mark.parametrize("model_type", ADAPTERS)
def test_table_finds_every_family(model_type: str) -> None:
    adapter = adapter_for({**SIZES, "model_type": model_type})
    assert adapter.model_type == model_type
    assert adapter.block_prefix(7) == f"{adapter.blocks}.7."
    assert adapter.linears == tuple(name for group in adapter.shared_inputs for name in group)


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "head_dim"),
    [
        *[("llama", 32, 4), ("mistral", 8, 4), ("qwen3", 32, 128)],
        *[("gemma3_text", 4, 256), ("falcon", 1, 4), ("mixtral", 8, 4), ("qwen3_moe", 4, 4)],
    ],
)
def test_absent_keys_mean_what_transformers_assumes(model_type: str, kv_heads: int, head_dim: int) -> None:
    shape = adapter_for({**SIZES, "model_type": model_type}).shape
    assert (shape.kv_heads, shape.head_dim) == (kv_heads, head_dim)


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": 3}])
def test_a_config_without_model_type_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="model_type"):
        adapter_for(config)


def test_adapter_refuses_to_contradict_itself() -> None:
    adapter = adapter_for({**SIZES, "model_type": "llama"})
    with pytest.raises(ValueError, match="in two groups"):
        replace(adapter, shared_inputs=(*adapter.shared_inputs, ("mlp.up_proj",)))
    with pytest.raises(ValueError, match="not in the block"):
        replace(adapter, edges=(LinearEdge("mlp.up_proj", "mlp.absent"),))
    with pytest.raises(ValueError, match="not in the block"):
        replace(adapter, edges=(RotaryEdge("self_attn.q_norm", "self_attn.k_norm"),))


EXPERTS = {**SIZES, "model_type": "qwen3_moe"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**EXPERTS, "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\].*experts in every block"),
        ({**EXPERTS, "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({**EXPERTS, "num_experts": 0}, "gives 0 experts"),
        ({**SIZES, "model_type": "mixtral", "num_local_experts": "8"}, "gives '8' experts"),
        ({**SIZES, "model_type": "falcon", "new_decoder_architecture": True, "parallel_attn": False}, "cannot run"),
        ({**SIZES, "model_type": "falcon", "num_ln_in_parallel_attn": 2}, "cannot run"),
    ],
)
def test_blocks_that_cannot_be_described_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        adapter_for(config)


def test_falcon_s_three_layouts() -> None:
    config = {**SIZES, "model_type": "falcon"}
    qkv, up = "self_attention.query_key_value", "mlp.dense_h_to_4h"
    assert adapter_for(config).edges == (NormEdge("input_layernorm", (qkv, up)),)
    new = {**config, "new_decoder_architecture": True, "num_kv_heads": 8}
    assert adapter_for(new).edges == (NormEdge("ln_attn", (qkv,)), NormEdge("ln_mlp", (up,)))
    assert adapter_for(new).shape.kv_heads == 8
    serial = {**config, "parallel_attn": False, "multi_query": False}
    assert [edge.modules for edge in adapter_for(serial).edges] == [
        ("input_layernorm", qkv),
        ("post_attention_layernorm", up),
    ]
    assert adapter_for(serial).shape.kv_heads == 32


def test_block_count() -> None:
    assert block_count({"num_hidden_layers": 30}) == 30
    assert block_count({"n_layer": 2}) == 2
    for config in ({}, {"num_hidden_layers": 0}, {"num_hidden_layers": "4"}, {"num_hidden_layers": True}):
        with pytest.raises(PlanError, match="num_hidden_layers"):
            block_count(config)
