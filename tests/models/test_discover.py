"""Discovery finds what the hand-written adapters say, works beyond them, and refuses what it cannot do."""

from __future__ import annotations

import pytest
import torch

from bitwright.errors import PlanError
from bitwright.models import ADAPTERS, adapter_for
from bitwright.models import discover as module
from bitwright.models.discover import discover
from bitwright.models.edges import LinearEdge, NormEdge, RotaryEdge

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
OPT = {**SIZES, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
FALCON = {**SIZES, "model_type": "falcon", "ffn_hidden_size": 96}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
VALUE = LinearEdge("self_attn.v_proj", "self_attn.o_proj", attention=True)
UP_DOWN = LinearEdge("mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    "config",
    [
        {**GATED, "model_type": "llama"},
        {**GATED, "model_type": "mistral"},
        {**GATED, "model_type": "qwen2"},
        {**GATED, "model_type": "qwen3", "head_dim": 16},
        {**GATED, "model_type": "llama", "num_key_value_heads": 4, "attention_bias": True},
        OPT,
        {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
        {**OPT, "activation_function": "gelu"},
        {**OPT, "layer_norm_elementwise_affine": False},
        {**GATED, "model_type": "gemma3_text", "attention_bias": True},
        FALCON,
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        {**FALCON, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
        {**FALCON, "activation": "relu"},
    ],
    ids=[
        *["llama", "mistral", "qwen2", "qwen3", "llama-mha", "opt", "opt-350m", "opt-gelu", "opt-plain"],
        *["gemma3", "falcon", "falcon-new", "falcon-new-one-norm", "falcon-serial", "falcon-relu"],
    ],
)
def test_discovery_agrees_with_the_adapters_written_by_hand(config: dict[str, object]) -> None:
    found, written = discover(config), adapter_for(config)
    assert set(found.edges) == set(written.edges)
    assert set(found.kept) == set(written.kept)
    for attribute in ("shape", "shared_inputs", "norms", "blocks", "embedding", "final_norm", "head"):
        assert getattr(found, attribute) == getattr(written, attribute)
    assert found.tied_head == written.tied_head


EXPECTED = {
    "phi": {
        NormEdge("input_layernorm", (*QKV, "mlp.fc1")),
        RotaryEdge("self_attn.q_proj", "self_attn.k_proj", rotary=4),
        LinearEdge("self_attn.v_proj", "self_attn.dense", attention=True),
    },
    "stablelm": {
        NormEdge("input_layernorm", QKV),
        RotaryEdge("self_attn.q_proj", "self_attn.k_proj", rotary=2),
        VALUE,
        NormEdge("post_attention_layernorm", GATE_UP),
        UP_DOWN,
    },
    "cohere": {
        NormEdge("input_layernorm", (*QKV, *GATE_UP)),
        RotaryEdge("self_attn.q_proj", "self_attn.k_proj", pairing="interleaved"),
        VALUE,
        UP_DOWN,
    },
    "olmo2": {RotaryEdge("self_attn.q_norm", "self_attn.k_norm"), VALUE, UP_DOWN},
    "gpt_neox": {
        NormEdge("input_layernorm", ("attention.query_key_value",)),
        NormEdge("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    },
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_discovery_of_architectures_nobody_described(model_type: str) -> None:
    assert model_type not in ADAPTERS
    adapter = adapter_for({**GATED, "model_type": model_type})
    assert set(adapter.edges) == EXPECTED[model_type]
    assert len(adapter.edges) == len(EXPECTED[model_type])


def test_the_head_is_named_as_checkpoints_store_it() -> None:
    assert discover({**GATED, "model_type": "gpt_neox"}).head == "embed_out"


def test_float32_probes_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**GATED, "model_type": "qwen3"}
    precise = discover(config)
    monkeypatch.setattr(module, "FLOAT64_PARAMETERS", 0)
    assert discover(config) == precise


def test_discovery_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    discover({**GATED, "model_type": "llama"})
    assert torch.equal(torch.rand(3), expected)


MOE = {**GATED, "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**SIZES, "model_type": "gpt2"}, r"attn\.c_attn\.weight \(Conv1D\)"),
        (MOE, r"mlp\.experts\.gate_up_proj"),
        ({**MOE, "mlp_only_layers": [0]}, "blocks 0 and 1 differ"),
        ({"model_type": "t5"}, "cannot run t5 as a causal LM"),
        ({**GATED, "model_type": "no_such_model"}, "does not know"),
        ({**GATED, "model_type": "stablelm", "hidden_size": "wide"}, "refuses config.json of stablelm"),
        ({"model_type": "gemma3", "text_config": GATED}, "multimodal"),
    ],
    ids=["conv1d", "experts", "mixed", "encoder-decoder", "unknown", "bad-config", "multimodal"],
)
def test_discovery_refuses_with_a_reason(config: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        discover(config)
