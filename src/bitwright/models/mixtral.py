"""Mixtral: Llama's attention, and a router that sends each token to a few of many gated feed-forwards.

The router reads the same norm as the experts, so it takes part in their edge. Each expert has its own exact edge
from up to down, as in Llama. `transformers` holds all experts in two tensors; checkpoints store them one by one.
"""

from __future__ import annotations

from dataclasses import replace

from bitwright.errors import PlanError
from bitwright.models.adapter import Adapter
from bitwright.models.edges import Config, ExpertEdge, NormEdge
from bitwright.models.llama import QUERY_KEY_VALUE, llama

ROUTER, GATE_UP, DOWN = "mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def mixtral(config: Config) -> Adapter:
    """Adapter of a Mixtral checkpoint; PlanError if `config` lacks the sizes of a block."""
    # transformers' MixtralConfig assumes these where the keys are absent
    config = {"num_key_value_heads": 8, "num_local_experts": 8, **config}
    return with_experts(llama(config), config["num_local_experts"])


def with_experts(block: Adapter, experts: object) -> Adapter:
    """Llama's block with a router and `experts` feed-forwards of `block.shape.intermediate` in place of the one.

    Raises:
        PlanError: `experts` is not a positive integer.
    """
    if not isinstance(experts, int) or isinstance(experts, bool) or experts < 1:
        raise PlanError(
            f"config.json gives {experts!r} experts; a positive integer is needed as num_local_experts (Mixtral) or "
            "num_experts (Qwen); correct the file"
        )
    attention = tuple(edge for edge in block.edges if not any(name.startswith("mlp.") for name in edge.modules))
    return replace(
        block,
        shared_inputs=(QUERY_KEY_VALUE, ("self_attn.o_proj",)),
        edges=(
            *attention,
            NormEdge("post_attention_layernorm", (ROUTER,), stacks=(GATE_UP,)),
            ExpertEdge(GATE_UP, DOWN, experts),
        ),
        routers=(ROUTER,),
        stacks=(GATE_UP, DOWN),
    )
