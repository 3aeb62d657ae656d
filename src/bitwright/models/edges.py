"""Edges: the diagonal rescalings of a block that leave its float output unchanged.

An edge joins a place that produces channels to the places that consume them. For a positive `scale` with one
entry per free parameter, the producer is divided and the consumers are multiplied, so the product stays:

    NormEdge    norm / scale             linears[:, i] * scale        SmoothQuant, AWQ, LET
    LinearEdge  producer rows / scale    consumer[:, i] * scale       V -> O (also under GQA), up -> down
    RotaryEdge  key rows / scale         query rows * scale           Q - K, through RoPE and QK norms
    ExpertEdge  up half / scale          down[:, :, i] * scale        up -> down of every expert of a stack

An edge says only by which factors tensors are multiplied; `apply_factors` does the multiplication. Both are
differentiable and never in place, so that learning and fusing run the same arithmetic. Names are relative to
the block and spelled as in the checkpoint. Every tensor an edge *may* touch has an entry: a bias appears
whether or not the checkpoint stores one, so look factors up by the tensors there are.

Scales must be positive: a ReLU between producer and consumer commutes with nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bitwright.errors import PlanError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class BlockShape:
    """The sizes of one decoder block that edges need.

    Raises:
        PlanError: a size is not a positive integer, or `heads` is not a multiple of `kv_heads`.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        """Refuse sizes that no block can have."""
        for name, size in vars(self).items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise PlanError(f"config.json gives {name}={size!r}; a positive integer is needed; correct the file")
        if self.heads % self.kv_heads:
            raise PlanError(
                f"config.json gives {self.heads} attention heads for {self.kv_heads} key-value heads; "
                "the first must be a multiple of the second; correct the file"
            )

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads

    @classmethod
    def from_config(cls, config: Config) -> BlockShape:
        """The shape told by `config.json`, under any of the names that model families give its keys.

        An absent or null `num_key_value_heads` means one per head, an absent `head_dim` means
        `hidden_size / num_attention_heads`, an absent feed-forward size means four times `hidden_size`.

        Raises:
            PlanError: the hidden size or the number of heads is missing or cannot be right.
        """
        hidden = _first(config, "hidden_size", "n_embd", "d_model")
        heads = _first(config, "num_attention_heads", "n_head", "n_heads")
        if hidden is None or heads is None:
            missing = "hidden_size" if hidden is None else "num_attention_heads"
            raise PlanError(
                f"config.json has no {missing}, which is needed to lay out a block; add it, or point to "
                "the text model of a multimodal checkpoint"
            )
        intermediate = _first(config, "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
        kv_heads = _first(config, "num_key_value_heads", "num_kv_heads", "n_head_kv")
        head_dim = _first(config, "head_dim", "attention_head_dim")
        if head_dim is None:
            head_dim = hidden // heads if isinstance(heads, int) and heads > 0 else 0
        return cls(
            hidden=hidden,
            intermediate=4 * hidden if intermediate is None else intermediate,
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
        )


@dataclass(frozen=True, eq=False)
class Factors:
    """What one stored tensor is multiplied by.

    Attributes:
        rows: factors of the outputs, [out]; the only ones that a bias or a norm vector can have. Of a stack of
            experts [experts, out].
        columns: factors of the inputs, the last axis, [in]. Of a stack [in], or [experts, in] where they differ.
        offset: the constant that the model adds to the stored value (Gemma multiplies by `1 + weight`).
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class NormEdge:
    """A norm and all the linears that read its output; nothing else may read it.

    `scale` is [hidden]: the norm's weight and bias are divided by it, the columns of the linears multiplied.
    `offset` is the constant the norm adds to its stored weight. A router counts as a linear; `stacks` are the
    tensors [experts, out, hidden] of experts that read the norm as well.
    """

    norm: str
    linears: tuple[str, ...]
    offset: float = 0.0
    stacks: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules and stacks it touches, producer first."""
        return (self.norm, *self.linears, *self.stacks)

    @property
    def consumers(self) -> dict[str, str]:
        """Tensor whose columns are multiplied, by the name of its linear or stack."""
        return {name: f"{name}.weight" for name in self.linears} | {name: name for name in self.stacks}

    def width(self, shape: BlockShape) -> int:
        """Number of scale parameters."""
        return shape.hidden

    def factors(self, scale: Tensor, shape: BlockShape) -> dict[str, Factors]:
        """Factors by tensor name, for `scale` [hidden]."""
        _check_scale(self, scale, shape)
        factors = _row_factors(self.norm, 1 / scale, self.offset)
        factors |= {tensor: Factors(columns=scale) for tensor in self.consumers.values()}
        return factors


@dataclass(frozen=True)
class LinearEdge:
    """Two linears with only channelwise, positively homogeneous arithmetic between them.

    With `attention` (V -> O) `scale` is [kv_heads * head_dim] and each entry serves the same channel of every
    query head of its group; without it (up -> down, fc1 -> ReLU -> fc2) `scale` is [intermediate].
    """

    producer: str
    consumer: str
    attention: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules it touches, producer first."""
        return (self.producer, self.consumer)

    @property
    def consumers(self) -> dict[str, str]:
        """Tensor whose columns are multiplied, by the name of its linear."""
        return {self.consumer: f"{self.consumer}.weight"}

    def width(self, shape: BlockShape) -> int:
        """Number of scale parameters."""
        return shape.kv_heads * shape.head_dim if self.attention else shape.intermediate

    def factors(self, scale: Tensor, shape: BlockShape) -> dict[str, Factors]:
        """Factors by tensor name, for `scale` [kv_heads * head_dim] or [intermediate]."""
        _check_scale(self, scale, shape)
        columns = per_query_head(scale, shape) if self.attention else scale
        return _row_factors(self.producer, 1 / scale) | {f"{self.consumer}.weight": Factors(columns=columns)}


@dataclass(frozen=True)
class RotaryEdge:
    """Query and key, whose product is all that attention sees.

    The dims that RoPE rotates into each other must share a scale. Of each head the first `rotary` dims are
    rotated (None: all, 0: no RoPE) and the rest are free; pair `j` is (j, j + rotary / 2) when `pairing` is
    "half" and (2j, 2j + 1) when it is "interleaved". `scale` holds, for each key-value head, first one entry
    per pair and then one per free dim.

    `query` and `key` are linears, or the norms behind them. With `shared` they are norms over one head,
    [head_dim], used by all heads, and `scale` holds the entries of one head. `offset` is as in `NormEdge`.
    """

    query: str
    key: str
    rotary: int | None = None
    pairing: Literal["half", "interleaved"] = "half"
    shared: bool = False
    offset: float = 0.0

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules it touches, producer first."""
        return (self.query, self.key)

    @property
    def consumers(self) -> dict[str, str]:
        """None: no columns are multiplied."""
        return {}

    def width(self, shape: BlockShape) -> int:
        """Number of scale parameters."""
        per_head = shape.head_dim - self._rotated(shape) // 2
        return per_head if self.shared else shape.kv_heads * per_head

    def factors(self, scale: Tensor, shape: BlockShape) -> dict[str, Factors]:
        """Factors by tensor name, for `scale` [kv_heads * (head_dim - rotary / 2)] (one head's if shared)."""
        _check_scale(self, scale, shape)
        keys = self._per_dim(scale, shape)
        queries = keys if self.shared else per_query_head(keys, shape)
        return _row_factors(self.query, queries, self.offset) | _row_factors(self.key, 1 / keys, self.offset)

    def _rotated(self, shape: BlockShape) -> int:
        return shape.head_dim if self.rotary is None else self.rotary

    def _per_dim(self, scale: Tensor, shape: BlockShape) -> Tensor:
        """Scale by pair -> scale by dim: [kv_heads * head_dim], or [head_dim] if shared."""
        rotated = self._rotated(shape)
        by_head = scale.reshape(-1, shape.head_dim - rotated // 2)
        pairs, free = by_head[:, : rotated // 2], by_head[:, rotated // 2 :]
        both = torch.cat([pairs, pairs], dim=1) if self.pairing == "half" else pairs.repeat_interleave(2, dim=1)
        return torch.cat([both, free], dim=1).flatten()


@dataclass(frozen=True)
class ExpertEdge:
    """The linear half of a gated feed-forward and what reads it, in each of a stack of experts.

    `gate_up` is a tensor [experts, 2 * intermediate, hidden] with the gates first, `down` one [experts, hidden,
    intermediate]. `scale` is [experts * intermediate], expert after expert.
    """

    gate_up: str
    down: str
    experts: int

    @property
    def modules(self) -> tuple[str, ...]:
        """The stacks it touches, producer first."""
        return (self.gate_up, self.down)

    @property
    def consumers(self) -> dict[str, str]:
        """Tensor whose columns are multiplied, by the name of its stack."""
        return {self.down: self.down}

    def width(self, shape: BlockShape) -> int:
        """Number of scale parameters."""
        return self.experts * shape.intermediate

    def factors(self, scale: Tensor, shape: BlockShape) -> dict[str, Factors]:
        """Factors by tensor name, for `scale` [experts * intermediate]."""
        _check_scale(self, scale, shape)
        by_expert = scale.reshape(self.experts, shape.intermediate)
        rows = torch.cat([torch.ones_like(by_expert), 1 / by_expert], dim=1)
        return {self.gate_up: Factors(rows=rows), self.down: Factors(columns=by_expert)}


Edge = NormEdge | LinearEdge | RotaryEdge | ExpertEdge


def merge_factors(several: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """One set of factors that does the work of `several`, in any order.

    Raises:
        ValueError: two edges disagree about the offset of a tensor.
    """
    merged: dict[str, Factors] = {}
    for factors in several:
        for name, new in factors.items():
            old = merged.get(name)
            merged[name] = new if old is None else _product(name, old, new)
    return merged


def apply_factors(tensor: Tensor, factors: Factors) -> Tensor:
    """`tensor` multiplied by its factors; a new tensor that carries gradients to both.

    Args:
        tensor: a weight [out, in], a stack of experts [experts, out, in], or a bias or norm vector [out].
        factors: `rows` and `columns`, each optional. Multiplying mixed dtypes promotes, so fp32
            factors give an fp32 result: rounding to the stored dtype is the caller's decision. Factors of one
            change no bit.

    Raises:
        ValueError: the factors do not have the sizes of the tensor.
    """
    _check_factors(tensor, factors)
    stacked = tensor.ndim > 2
    scaled = tensor
    if factors.columns is not None:
        scaled = tensor * (factors.columns.unsqueeze(-2) if stacked else factors.columns)
    if factors.rows is None:
        return scaled
    rows = factors.rows.reshape(*factors.rows.shape, *[1] * (tensor.ndim - factors.rows.ndim))
    # (t + offset) * rows - offset, without rounding t + offset in the dtype of t; subtracting 0 keeps a t of -0
    return scaled * rows - factors.offset * (1 - rows) if factors.offset else scaled * rows


def per_query_head(channels: Tensor, shape: BlockShape) -> Tensor:
    """Repeat each key-value head for the query heads of its group: [kv_heads * d] -> [heads * d]."""
    return channels.reshape(shape.kv_heads, -1).repeat_interleave(shape.queries_per_kv, dim=0).flatten()


def _check_factors(tensor: Tensor, factors: Factors) -> None:
    """Refuse sizes that would broadcast into something else."""
    rows, columns, size = factors.rows, factors.columns, tensor.shape
    wrong = None
    if rows is not None and rows.shape != (size[:-1] if tensor.ndim > 2 else size[:1]):
        wrong = (rows, 0)
    elif columns is not None and (tensor.ndim < 2 or columns.shape not in (size[-1:], (*size[:-2], size[-1]))):
        wrong = (columns, tensor.ndim - 1 if tensor.ndim > 1 else 1)
    if wrong is not None:
        raise ValueError(f"factors {tuple(wrong[0].shape)} do not fit axis {wrong[1]} of a tensor {tuple(size)}")


def _first(config: Config, *keys: str) -> Any:
    """The first value that is neither absent nor null."""
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _check_scale(edge: Edge, scale: Tensor, shape: BlockShape) -> None:
    if scale.shape != (edge.width(shape),):
        raise ValueError(f"{edge} takes a scale of shape ({edge.width(shape)},), got {tuple(scale.shape)}")


def _row_factors(module: str, rows: Tensor, offset: float = 0.0) -> dict[str, Factors]:
    """Factors of everything that a linear or a norm adds up to its output channels, [out]."""
    return {f"{module}.weight": Factors(rows=rows, offset=offset), f"{module}.bias": Factors(rows=rows)}


def _product(name: str, one: Factors, other: Factors) -> Factors:
    if one.offset != other.offset:
        raise ValueError(f"two edges give {name} the offsets {one.offset} and {other.offset}")
    return Factors(_times(one.rows, other.rows), _times(one.columns, other.columns), one.offset)


def _times(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one * other
