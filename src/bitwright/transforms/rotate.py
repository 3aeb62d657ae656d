"""Rotations of a whole checkpoint: the same outputs, but far smaller outliers in weights and activations.

The residual stream x becomes x Q with one random orthogonal Q: what writes to the stream is followed by Q, what
reads it is preceded by Q transposed. A norm commutes with Q once its weight is folded into the linears behind it.
The values of each head become v R, which the output projection takes back. Whatever can be is fused into the
weights, so a stock model runs the result; only `online_down` needs work at run time.

    embedding, positions    E Q
    norms                   weight to one, bias into the biases behind it
    q k v gate up, head     W diag(norm weight) Q, and rows R^T on v
    o                       Q^T W R
    down                    Q^T W, or Q^T W H with H applied to its input at run time

Source: QuaRot (Ashkboos et al. 2024), section 4, stages 1a to 1c. Departures: Q fixes the ones vector, so LayerNorm
models need neither mean-centring nor RMSNorm in its place; no Hadamard transform across heads and none on queries
and keys. Folding and rotating run in float64 and are rounded once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from bitwright.checkpoint.shard import TensorInfo
from bitwright.checkpoint.source import Source
from bitwright.errors import CheckpointError, PlanError
from bitwright.models import ADAPTERS, Adapter, block_count
from bitwright.models.edges import LinearEdge, NormEdge, RotaryEdge
from bitwright.numeric.hadamard import hadamard_blocks, random_rotation
from bitwright.numeric.settings import Settings

_ROWS = 8192  # of an embedding that are in float64 at once
REMEDY = "use --set rotate=none, or --set rotate.residual=false"


class Rotate(Settings):
    """Which rotations to fuse.

    Attributes:
        residual: rotate the residual stream.
        values: rotate the values of each head, between the value and the output projection.
        online_down: the runtime applies `hadamard_blocks` to the input of the last linear of each block (see
            `online_hadamards`), whose weight takes that back. Without it the model's output would be wrong.
    """

    name: Literal["rotate"] = "rotate"
    residual: bool = True
    values: bool = True
    online_down: bool = False

    @model_validator(mode="after")
    def _does_something(self) -> Rotate:
        if not (self.residual or self.values or self.online_down):
            raise ValueError(
                "rotate with residual, values and online_down all false does nothing; use --set rotate=none"
            )
        return self


def online_hadamards(adapter: Adapter, settings: Rotate) -> tuple[str, ...]:
    """The linears of a block, by relative name, whose input the runtime must put through `hadamard_blocks`."""
    return (adapter.linears[-1],) if settings.online_down else ()


def rotated(
    source: Source, adapter: Adapter, settings: Rotate, seed: int, dtype: torch.dtype = torch.float32
) -> Source:
    """`source` with the rotations of `settings` fused into its tensors; one tensor is in memory at a time.

    Rewritten tensors are `dtype`; the others are those of the source. A head that was tied to the embedding has a
    weight of its own afterwards, because the final norm is folded into it: `config` says so, `tensors` has it, and
    the model is larger by one embedding. Make a new adapter from the `config` of the result.

    Args:
        source: of the float weights.
        adapter: of its architecture.
        settings: what to rotate.
        seed: of the rotations; with the settings it is part of the identity and the fingerprint of the result.
        dtype: of rewritten tensors.

    Raises:
        PlanError: the rotation would not be exact for this architecture, or a norm's bias cannot be moved.
        CheckpointError: a norm cannot be read.
    """
    return _RotatedSource(source, adapter, settings, seed, dtype)


@dataclass(frozen=True)
class _Rewriting:
    """What becomes of a linear or an embedding: weight [out, in], bias [out]."""

    norm: str | None = None  # folded in: the norm whose output it reads
    columns: Literal["residual", "heads", "hadamard"] | None = None
    rows: Literal["residual", "heads"] | None = None


class _RotatedSource(Source):
    """See `rotated`."""

    def __init__(self, source: Source, adapter: Adapter, settings: Rotate, seed: int, dtype: torch.dtype):
        _check_architecture(adapter, settings)
        self.label, self.config, self.tensors = source.label, source.config, source.tensors
        self.left_out = source.left_out
        self._source, self._adapter, self._seed, self._dtype = source, adapter, seed, dtype
        self._tag = f"{settings.model_dump_json()} seed {seed} {dtype}"
        self._blocks = block_count(source.config)
        self._norms = _folded_norms(adapter) if settings.residual else {}
        self._rewritings = _rewritings(adapter, settings)
        self._stored_as: dict[str, str] = {}
        if settings.residual:
            self._check_tensors()
            self._untie_head()
        self.tensors = {
            name: TensorInfo(info.shape, dtype) if self._rewrites(name) else info for name, info in self.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.label}: no tensor {name}")
        prefix, module, leaf = self._place(name)
        if module in self._norms:
            values = self._norm(prefix, self._norms[module], leaf)
        elif module not in self._rewritings:
            return self._source.read(name)
        elif leaf == "bias":
            values = self._bias(prefix, module, self._rewritings[module])
        else:
            return self._weight(name, prefix, self._rewritings[module])
        return values.to(self._dtype)

    def files(self) -> list[Path]:
        """See `Source.files`."""
        return self._source.files()

    def write_side_files(self, folder: Path) -> list[str]:
        """See `Source.write_side_files`."""
        return self._source.write_side_files(folder)

    def identity(self) -> dict[str, str]:
        """See `Source.identity`; settings and seed count, too."""
        return {**self._source.identity(), "rotation": self._tag}

    def fingerprint(self) -> str:
        """See `Source.fingerprint`; settings and seed count, too."""
        return hashlib.sha256(f"{self._source.fingerprint()} {self._tag}".encode()).hexdigest()

    @cached_property
    def _residual(self) -> Tensor:
        """Q, float64 [hidden, hidden]."""
        return random_rotation(self._adapter.shape.hidden, self._seed, fixes_ones=True)

    @cached_property
    def _head(self) -> Tensor:
        """R, float64 [head_dim, head_dim]: one for all heads, hence the same for all that share keys and values."""
        return random_rotation(self._adapter.shape.head_dim, self._seed + 1)

    def _place(self, name: str) -> tuple[str, str, str]:
        """Prefix of the block (empty outside), module and leaf of a tensor."""
        start = f"{self._adapter.blocks}."
        module, _, leaf = name.rpartition(".")
        if not module.startswith(start):
            return "", module, leaf
        index, _, local = module.removeprefix(start).partition(".")
        return f"{start}{index}.", local, leaf

    def _rewrites(self, name: str) -> bool:
        _, module, _ = self._place(name)
        return module in self._rewritings or module in self._norms

    def _double(self, name: str) -> Tensor:
        return self._source.read(self._stored_as.get(name, name)).double()

    def _weight(self, name: str, prefix: str, rewriting: _Rewriting) -> Tensor:
        stored = self._source.read(self._stored_as.get(name, name))
        gain = None if rewriting.norm is None else self._gain(prefix, self._norms[rewriting.norm])
        result = torch.empty(stored.shape, dtype=self._dtype)
        height = _ROWS if rewriting.rows is None else len(stored)
        for start in range(0, len(stored), max(1, height)):
            part = stored[start : start + height].double()
            folded = part if gain is None else part * gain
            result[start : start + height] = self._rotate_rows(self._rotate_columns(folded, rewriting), rewriting)
        return result

    def _bias(self, prefix: str, module: str, rewriting: _Rewriting) -> Tensor:
        bias = self._double(f"{prefix}{module}.bias")
        if rewriting.norm is not None and self._absorbed(prefix, self._norms[rewriting.norm]):
            bias = bias + self._double(f"{prefix}{module}.weight") @ self._double(f"{prefix}{rewriting.norm}.bias")
        return self._rotate_rows(bias[:, None], rewriting)[:, 0]

    def _norm(self, prefix: str, edge: NormEdge, leaf: str) -> Tensor:
        if leaf == "weight":
            return torch.full(self._source.tensors[f"{prefix}{edge.norm}.weight"].shape, 1.0 - edge.offset)
        bias = self._double(f"{prefix}{edge.norm}.bias")
        if self._absorbed(prefix, edge):
            return torch.zeros_like(bias)
        gain = self._gain(prefix, edge)
        return torch.where(bias == 0, 0.0, bias / gain) @ self._residual

    def _gain(self, prefix: str, edge: NormEdge) -> Tensor:
        """What the norm multiplies by, [hidden]."""
        return self._double(f"{prefix}{edge.norm}.weight") + edge.offset

    def _absorbed(self, prefix: str, edge: NormEdge) -> bool:
        """Whether the norm has a bias and everything that reads it has one to take it."""
        return all(f"{prefix}{module}.bias" in self._source.tensors for module in edge.modules)

    def _rotate_columns(self, weight: Tensor, rewriting: _Rewriting) -> Tensor:
        """The weight [out, in] for rotated inputs."""
        if rewriting.columns == "residual":
            return weight @ self._residual
        if rewriting.columns == "heads":
            by_head = weight.reshape(len(weight), -1, self._adapter.shape.head_dim) @ self._head
            return by_head.reshape(weight.shape)
        return hadamard_blocks(weight) if rewriting.columns == "hadamard" else weight

    def _rotate_rows(self, weight: Tensor, rewriting: _Rewriting) -> Tensor:
        """The weight [out, in] for rotated outputs."""
        if rewriting.rows == "residual":
            return self._residual.T @ weight
        if rewriting.rows == "heads":
            by_head = self._head.T @ weight.reshape(-1, self._adapter.shape.head_dim, weight.shape[1])
            return by_head.reshape(weight.shape)
        return weight

    def _untie_head(self) -> None:
        """Give a tied head a tensor of its own, made from the embedding."""
        head, embedding = f"{self._adapter.head}.weight", f"{self._adapter.embedding}.weight"
        if self._adapter.tied_head and embedding in self.tensors:
            self.config = {**self.config, "tie_word_embeddings": False}
            self.tensors = {**self.tensors, head: self.tensors[embedding]}
            self._stored_as[head] = embedding

    def _check_tensors(self) -> None:
        """Refuse tensors that a rotated residual stream would meet unprepared."""
        hidden = self._adapter.shape.hidden
        known = {*self._adapter.linears, *self._adapter.norms, *self._rewritings, *self._norms}
        for name, info in self._source.tensors.items():
            prefix, module, _ = self._place(name)
            # old checkpoints store the RoPE frequencies
            if module not in known and not name.endswith(".inv_freq"):
                raise PlanError(f"{name} is in no linear or norm that the rotation knows of; {REMEDY}")
            stream = not prefix and module != self._adapter.final_norm and len(info.shape) >= 2
            if stream and info.shape[-1] != hidden:
                raise PlanError(f"{name} {list(info.shape)} is not {hidden} wide, as the stream is; {REMEDY}")
        for prefix, edge in self._places_of_norms():
            bias = f"{prefix}{edge.norm}.bias"
            if bias not in self._source.tensors or self._absorbed(prefix, edge):
                continue
            lost = int(((self._gain(prefix, edge) == 0) & (self._double(bias) != 0)).sum())
            if lost:
                raise PlanError(
                    f"{bias} cannot be rotated: not all of {', '.join(edge.linears)} have a bias to take it, and "
                    f"{lost} of its channels have weight zero; {REMEDY}"
                )

    def _places_of_norms(self) -> Iterator[tuple[str, NormEdge]]:
        """Every folded norm with the prefix of its block."""
        for module, edge in self._norms.items():
            if module == self._adapter.final_norm:
                yield "", edge
            else:
                yield from ((self._adapter.block_prefix(index), edge) for index in range(self._blocks))


def _folded_norms(adapter: Adapter) -> dict[str, NormEdge]:
    """The norms that read the residual stream: those of a block by relative name, and the final one.

    The final norm is taken to add the same offset to its weight as those of the blocks.
    """
    edges = {edge.norm: edge for edge in adapter.edges if isinstance(edge, NormEdge)}
    if adapter.final_norm is None:
        return edges
    like = next(iter(edges.values()))
    return {**edges, adapter.final_norm: replace(like, norm=adapter.final_norm, linears=(adapter.head,))}


def _rewritings(adapter: Adapter, settings: Rotate) -> dict[str, _Rewriting]:
    """By module: relative names inside a block, whole names outside."""
    found: dict[str, _Rewriting] = {}

    def add(module: str, **changes: Any) -> None:
        found[module] = replace(found.get(module, _Rewriting()), **changes)

    if settings.residual:
        for norm, edge in _folded_norms(adapter).items():
            for linear in edge.linears:
                add(linear, norm=norm, columns="residual")
        for module in (adapter.embedding, *adapter.kept):
            add(module, columns="residual")
        for linear in _writers(adapter):
            add(linear, rows="residual")
    attention = _attention(adapter)
    if settings.values and attention is not None:
        add(attention.producer, rows="heads")
        add(attention.consumer, columns="heads")
    for linear in online_hadamards(adapter, settings):
        add(linear, columns="hadamard")
    return found


def _writers(adapter: Adapter) -> tuple[str, ...]:
    """The linears of a block that read no norm: they write to the residual stream."""
    readers = {linear for edge in adapter.edges if isinstance(edge, NormEdge) for linear in edge.linears}
    return tuple(linear for linear in adapter.linears if linear not in readers)


def _attention(adapter: Adapter) -> LinearEdge | None:
    """The edge from the values to the output projection."""
    return next((edge for edge in adapter.edges if isinstance(edge, LinearEdge) and edge.attention), None)


def _check_architecture(adapter: Adapter, settings: Rotate) -> None:
    """Refuse an architecture for which the rotation is not exact, or not known to be."""
    kind, attention = adapter.model_type, _attention(adapter)
    if kind not in ADAPTERS:
        # an edge promises equality under rescaling only: gated attention has one and allows no rotation
        raise PlanError(
            f"rotate: {kind} is a discovered architecture, and nobody has checked that rotations leave its output "
            f"unchanged; they do for {', '.join(sorted(ADAPTERS))}; use --set rotate=none"
        )
    if adapter.stacks:
        raise PlanError(f"rotate: {kind} holds experts in {adapter.stacks[0]}, which are not rotated; {REMEDY}")
    if settings.values and attention is None:
        raise PlanError(
            f"rotate: {kind} has no edge from values to the output projection; use --set rotate.values=false"
        )
    if not settings.residual:
        return
    explained = {name for edge in adapter.edges if isinstance(edge, NormEdge | RotaryEdge) for name in edge.modules}
    if beside := [norm for norm in adapter.norms if norm not in explained]:
        raise PlanError(
            f"rotate: {beside[0]} of {kind} does not stand between the residual stream and linears (a norm behind the "
            f"residual sum?), so its weight cannot be folded; {REMEDY}"
        )
    outputs = {adapter.linears[-1]} | ({attention.consumer} if attention is not None else set())
    if reading := [linear for linear in _writers(adapter) if linear not in outputs]:
        raise PlanError(f"rotate: no norm edge of {kind} says what {reading[0]} reads; {REMEDY}")
    if adapter.final_norm is None:
        raise PlanError(f"rotate: {kind} has no norm before its head; {REMEDY}")
