"""Qwen3-MoE: Qwen3's attention with norms on the heads of query and key, and Mixtral's router and experts.

Only models all of whose blocks have experts: a model with plain blocks among them has two kinds of blocks.
"""

from __future__ import annotations

from bitwright.errors import PlanError
from bitwright.models.adapter import Adapter
from bitwright.models.edges import Config
from bitwright.models.mixtral import with_experts
from bitwright.models.qwen3 import qwen3


def qwen3_moe(config: Config) -> Adapter:
    """Adapter of a Qwen3-MoE checkpoint; PlanError if `config` lacks the sizes of a block or has plain blocks."""
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise PlanError(
            f"config.json gives mlp_only_layers={config.get('mlp_only_layers')!r} and "
            f"decoder_sparse_step={config.get('decoder_sparse_step', 1)!r}, so that blocks differ; needed experts in "
            "every block ([] and 1); such a model cannot be quantized yet"
        )
    # transformers' Qwen3MoeConfig assumes these where the keys are absent; unlike Qwen3 it has no default head_dim
    config = {"num_key_value_heads": 4, "head_dim": None, "num_experts": 128, "moe_intermediate_size": 768, **config}
    block = qwen3({**config, "intermediate_size": config["moe_intermediate_size"]})
    return with_experts(block, config["num_experts"])
