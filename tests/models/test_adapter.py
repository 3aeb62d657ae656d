"""Adapters as data, and the table that finds them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitwright.errors import PlanError
from bitwright.models import ADAPTERS, adapter_for, block_count
from bitwright.models.edges import LinearEdge, RotaryEdge

SIZES = {"hidden_size": 128, "num_attention_heads": 32, "intermediate_size": 64}


@pytest.mark.parametrize("model_type", ADAPTERS)
def test_table_finds_every_family(model_type: str) -> None:
    adapter = adapter_for({**SIZES, "model_type": model_type})
    assert adapter.model_type == model_type
    assert adapter.block_prefix(7) == f"{adapter.blocks}.7."
    assert adapter.linears == tuple(name for group in adapter.shared_inputs for name in group)


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "head_dim"), [("llama", 32, 4), ("mistral", 8, 4), ("qwen3", 32, 128)]
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


def test_block_count() -> None:
    assert block_count({"num_hidden_layers": 30}) == 30
    assert block_count({"n_layer": 2}) == 2
    for config in ({}, {"num_hidden_layers": 0}, {"num_hidden_layers": "4"}, {"num_hidden_layers": True}):
        with pytest.raises(PlanError, match="num_hidden_layers"):
            block_count(config)
