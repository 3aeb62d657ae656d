"""OPT: LayerNorm, learned positions, one key-value head per head, ReLU feed-forward, biases everywhere.

ReLU commutes with positive factors, so `fc1` -> `fc2` is exact; no RoPE, so every query-key channel is free.
In OPT-350m (`do_layer_norm_before` false) the norms stand behind the residual sum and feed the next residual
as well: they have no edge. There too, `project_in` and `project_out` are linears outside the blocks.
"""

from __future__ import annotations

from bitwright.models.adapter import Adapter
from bitwright.models.edges import BlockShape, Config, Edge, LinearEdge, NormEdge, RotaryEdge

QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
NORMS = ("self_attn_layer_norm", "final_layer_norm")


def opt(config: Config) -> Adapter:
    """Adapter of an OPT checkpoint; PlanError if `config` lacks the sizes of a block."""
    shape = BlockShape.from_config(config)
    pre_norm = config.get("do_layer_norm_before", True)
    affine = config.get("layer_norm_elementwise_affine", True)
    embedding_width = config.get("word_embed_proj_dim") or shape.hidden
    kept = ["model.decoder.embed_positions"]
    if embedding_width != shape.hidden:
        kept += ["model.decoder.project_in", "model.decoder.project_out"]
    has_final_norm = pre_norm and not config.get("_remove_final_layer_norm", False)
    return Adapter(
        model_type=config.get("model_type", "opt"),
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm" if has_final_norm else None,
        head="lm_head",
        shape=shape,
        shared_inputs=(QUERY_KEY_VALUE, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        edges=_edges(pre_norm and affine, config.get("activation_function", "relu") == "relu"),
        norms=NORMS if affine else (),
        kept=tuple(kept),
        tied_head=bool(config.get("tie_word_embeddings", True)),
    )


def _edges(norms: bool, relu: bool) -> tuple[Edge, ...]:
    edges: list[Edge] = [
        RotaryEdge("self_attn.q_proj", "self_attn.k_proj", rotary=0),
        LinearEdge("self_attn.v_proj", "self_attn.out_proj", attention=True),
    ]
    if norms:
        edges.insert(0, NormEdge("self_attn_layer_norm", QUERY_KEY_VALUE))
        edges.append(NormEdge("final_layer_norm", ("fc1",)))
    if relu:
        edges.append(LinearEdge("fc1", "fc2"))
    return tuple(edges)
