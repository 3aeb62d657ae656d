"""Falcon: LayerNorms, fused query-key-value, and attention beside the feed-forward instead of before it.

Three layouts: one norm for both branches (Falcon-7B), one norm for each (the new decoder architecture, Falcon-40B),
and one after the other (Falcon-RW). An edge inside the fused `query_key_value` cannot be expressed: none is listed.
"""

from __future__ import annotations

from bitwright.errors import PlanError
from bitwright.models.adapter import Adapter
from bitwright.models.edges import BlockShape, Config, Edge, LinearEdge, NormEdge

QUERY_KEY_VALUE, DENSE = "self_attention.query_key_value", "self_attention.dense"
FIRST, SECOND = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"


def falcon(config: Config) -> Adapter:
    """Adapter of a Falcon checkpoint; PlanError if `config` lacks the sizes of a block or contradicts itself."""
    readers = _readers(config)
    shared = next((linears for linears in readers.values() if len(linears) == 2), None)
    first = (shared, (DENSE,)) if shared else ((QUERY_KEY_VALUE,), (DENSE,), (FIRST,))
    edges: list[Edge] = [NormEdge(norm, linears) for norm, linears in readers.items()]
    if config.get("activation", "gelu") == "relu":
        edges.append(LinearEdge(FIRST, SECOND))
    return Adapter(
        model_type=config.get("model_type", "falcon"),
        blocks="transformer.h",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        head="lm_head",
        shape=_shape(config),
        shared_inputs=(*first, (SECOND,)),
        edges=tuple(edges),
        norms=tuple(readers),
        tied_head=bool(config.get("tie_word_embeddings", True)),
    )


def _readers(config: Config) -> dict[str, tuple[str, ...]]:
    """The linears that read each norm, in order of execution."""
    new, parallel = bool(config.get("new_decoder_architecture")), bool(config.get("parallel_attn", True))
    norms = config.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if (new and not parallel) or (norms == 2 and parallel and not new):
        raise PlanError(
            f"config.json gives new_decoder_architecture={new}, parallel_attn={parallel} and {norms} norms, a block "
            "that transformers cannot run; the new architecture is parallel and alone has two norms; correct the file"
        )
    if norms == 2 and new:
        return {"ln_attn": (QUERY_KEY_VALUE,), "ln_mlp": (FIRST,)}
    if parallel:
        return {"input_layernorm": (QUERY_KEY_VALUE, FIRST)}
    return {"input_layernorm": (QUERY_KEY_VALUE,), "post_attention_layernorm": (FIRST,)}


def _shape(config: Config) -> BlockShape:
    if config.get("new_decoder_architecture"):
        return BlockShape.from_config(config)
    # without the new architecture num_kv_heads means nothing: all heads share one, or each has its own
    kv_heads = 1 if config.get("multi_query", True) else None
    return BlockShape.from_config({**config, "num_key_value_heads": kv_heads, "num_kv_heads": None})
