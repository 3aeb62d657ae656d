"""The adapter: what bitwright must know about an architecture, as data.

We run the real `transformers` blocks and never copy a decoder layer; an adapter only says where things are.
Inside a block names are relative (`self_attn.q_proj`); outside they are whole (`model.embed_tokens`). All are
module names as the checkpoint spells them: add `.weight` or `.bias` for a tensor. Experts are named as the
blocks of `transformers` hold them, which checkpoints may spell otherwise (one tensor for each expert).
"""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.errors import PlanError
from bitwright.models.edges import BlockShape, Config, Edge


@dataclass(frozen=True)
class Adapter:
    """One architecture.

    Attributes:
        model_type: as in `config.json`.
        blocks: the list of decoder blocks, `model.layers`.
        embedding: the token embedding.
        final_norm: the norm behind the last block; None where there is none.
        head: the linear that gives logits.
        shape: the sizes of a block.
        shared_inputs: the linears of a block in order of execution, grouped by the input they share and
            hence by Hessian; each linear is in exactly one group.
        edges: the function-preserving rescalings of a block, in order of execution.
        norms: the norms of a block that have weights, in order of execution.
        kept: other modules outside the blocks that have weights, such as learned positions (OPT).
        routers: the modules of a block that choose experts; they have a `weight` [experts, hidden], are no linears,
            and stay in float.
        stacks: the tensors (not modules) of a block that hold all experts' weights, [experts, out, in].
        tied_head: the head uses the embedding's weight and has none in the checkpoint.

    Raises:
        ValueError: a linear is listed twice, or an edge names a module that is not listed.
    """

    model_type: str
    blocks: str
    embedding: str
    final_norm: str | None
    head: str
    shape: BlockShape
    shared_inputs: tuple[tuple[str, ...], ...]
    edges: tuple[Edge, ...]
    norms: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    tied_head: bool = False

    def __post_init__(self) -> None:
        """Refuse an adapter that contradicts itself."""
        if len(set(self.linears)) != len(self.linears):
            raise ValueError(f"{self.model_type}: a linear is in two groups of shared_inputs: {self.shared_inputs}")
        known = {*self.linears, *self.norms, *self.routers, *self.stacks}
        for edge in self.edges:
            if unknown := [name for name in edge.modules if name not in known]:
                raise ValueError(f"{self.model_type}: {edge} names {unknown}, which is not in the block")

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear of a block, in order of execution."""
        return tuple(name for group in self.shared_inputs for name in group)

    def block_prefix(self, index: int) -> str:
        """What precedes a block's own names, with the dot: `model.layers.7.`."""
        return f"{self.blocks}.{index}."


def block_count(config: Config) -> int:
    """How many decoder blocks the model has.

    Raises:
        PlanError: `config.json` does not say so.
    """
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        count = config.get(key)
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            return count
    raise PlanError("config.json has no num_hidden_layers (a positive integer); add it to the file")
