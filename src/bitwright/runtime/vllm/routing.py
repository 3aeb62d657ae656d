"""Which matrices of a native folder a layer of vLLM consists of, and their tensors on the way there.

vLLM joins linears of one input: `qkv_proj` holds what the folder calls `q_proj`, `k_proj` and `v_proj`, its shards. A
shard is quantized in its own way, or not at all. Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.native import (
    PART_NAMES,
    TensorEntry,
    check_part,
    parts,
    read_quantization_config,
    read_sites,
    read_tied,
)
from bitwright.numeric.activation import InputSite
from bitwright.numeric.fp8 import KvScales

# The one tensor of a shard that is not quantized.
FLOAT_PART = "weight"
_QKV = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Shard:
    """A matrix [out, in] of the folder, `shape`, by its name there; without `entry` it is not quantized."""

    name: str
    shape: tuple[int, int]
    entry: TensorEntry | None
    site: InputSite | None = None


@dataclass(frozen=True)
class QuantizedModel:
    """`quantization_config` of a native folder: `entries` and `sites` by module, `tied` heads, and the scales of an fp8
    KV cache by attention.
    """

    entries: Mapping[str, TensorEntry]
    sites: Mapping[str, InputSite]
    tied: Mapping[str, str]
    kv_scales: Mapping[str, KvScales] = field(default_factory=dict)

    @staticmethod
    def read(config: Mapping[str, Any]) -> QuantizedModel:
        """What the JSON object `config` says.

        Raises:
            FormatError: it breaks the format, or asks for a KV cache of integers.
        """
        sites = read_sites(config)
        if sites.kv_cache is not None and sites.kv_cache.grid == "int":
            raise FormatError(
                f"quantization_config.kv_cache: {sites.kv_cache.bits} bits for each token and head, needed none: vLLM "
                "keeps its own KV cache; quantize with --set activations.kv.grid=fp8 or a scheme without kv, or run "
                "the model with transformers"
            )
        return QuantizedModel(read_quantization_config(config), sites.inputs, read_tied(config), sites.kv_scales)

    def renamed(self, rename: Callable[[str], str | None]) -> QuantizedModel:
        """The same under the names that vLLM's model has; what it has no name for (None), it does not load."""
        known = {*self.entries, *self.tied, *self.kv_scales}
        names = {name: new for name in known if (new := rename(name)) is not None}
        return QuantizedModel(
            {names[name]: entry for name, entry in self.entries.items() if name in names},
            {names[name]: site for name, site in self.sites.items() if name in names},
            {names[head]: names[owner] for head, owner in self.tied.items() if head in names and owner in names},
            {names[name]: pair for name, pair in self.kv_scales.items() if name in names},
        )

    def names(self, layer: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
        """The folder's names of the shards of the linear `layer`; empty where none of them is quantized.

        `fused`: last part of a name -> last parts of its shards' names, for linears that vLLM joins.
        """
        parent, _, last = layer.rpartition(".")
        names = [f"{parent}.{name}" if parent else name for name in fused.get(last, [last])]
        return names if any(name in self.entries for name in names) else []

    def shards(self, names: Sequence[str], rows: Sequence[int], in_features: int) -> list[Shard]:
        """The shards called `names` of a linear that vLLM makes of parts of so many `rows`, from top to bottom.

        Raises:
            FormatError: the linear is made of shards in another way, or of another size than config.json says.
        """
        if len(names) == 1:
            # The folder has them joined, too.
            rows = [sum(rows)]
        if len(names) != len(rows):
            raise FormatError(
                f"{', '.join(names)}: vLLM joins these into {len(rows)} parts; keep them in float, or run the model "
                "with transformers"
            )
        return [self._shard(name, (count, in_features)) for name, count in zip(names, rows, strict=True)]

    def embedding(self, layer: str, shape: tuple[int, int]) -> Shard | None:
        """The token embedding or head called `layer`, None where it is not quantized.

        Some of vLLM's models do not name their embedding (""): the folder's only embedding of that shape then.

        Raises:
            FormatError: of another shape than config.json says, or several could be meant.
        """
        if layer:
            return self._shard(layer, shape) if layer in self.entries else None
        owners = set(self.tied.values())
        found = [name for name in self.entries if name in owners or "emb" in name.rpartition(".")[2]]
        found = [name for name in found if self.entries[name].shape == shape]
        if len(found) > 1:
            raise FormatError(f"{', '.join(found)}: several quantized embeddings of {list(shape)}, needed one")
        return self._shard(found[0], shape) if found else None

    def inside(self, layer: str) -> str | None:
        """A quantized module below `layer`, None where there is none."""
        return next((name for name in self.entries if name.startswith(f"{layer}.")), None)

    def scales_of(self, layer: str) -> KvScales | None:
        """The scales of the KV cache that the attention `layer` keeps; None where no cache is quantized.

        Raises:
            FormatError: others are, and its own is not.
        """
        if not self.kv_scales:
            return None
        # What holds the linears, and what keeps the cache for it.
        found = self.kv_scales.get(layer.rpartition(".")[0], self.kv_scales.get(layer))
        if found is None:
            raise FormatError(f"quantization_config.kv_cache.scales: none for {layer}, needed those of every attention")
        return found

    def _shard(self, name: str, shape: tuple[int, int]) -> Shard:
        entry = self.entries.get(name)
        if entry is not None and entry.shape != shape:
            raise FormatError(f"{name}: vLLM needs {list(shape)}, config.json says {list(entry.shape)}")
        return Shard(name, shape, entry, self.sites.get(name))


class Stash:
    """The stored tensors of a layer's shards, kept as they arrive until all are there."""

    def __init__(self, shards: Sequence[Shard], float_dtype: torch.dtype) -> None:
        """Nothing has arrived; shards that are not quantized are kept as `float_dtype`."""
        self.shards, self._float_dtype = list(shards), float_dtype
        self._stored: list[dict[str, Tensor]] = [{} for _ in shards]

    def part_names(self) -> list[str]:
        """Names of the tensors that any of the shards needs."""
        needed = {part for shard in self.shards for part in _layout(shard, self._float_dtype)}
        return [part for part in (FLOAT_PART, *PART_NAMES) if part in needed]

    def dtype(self, part: str) -> torch.dtype:
        """Type of the tensor `part` of the first shard that has one."""
        return next(found[part][1] for shard in self.shards if part in (found := _layout(shard, self._float_dtype)))

    def put(self, part: str, tensor: Tensor, shard: str | int | None, device: torch.device) -> None:
        """Keep a copy on `device` of the tensor `part` of `shard`, as vLLM calls it: q, k, v, an index, None for all.

        Raises:
            FormatError: no such shard, or the shard has no such tensor, or one of another shape or type.
        """
        index = 0 if shard is None and len(self.shards) == 1 else _QKV.get(str(shard), shard)
        if not isinstance(index, int) or not 0 <= index < len(self.shards):
            names = ", ".join(each.name for each in self.shards)
            raise FormatError(f"{part} of part {shard!r}: vLLM joined {names} in another way; run with transformers")
        found = self.shards[index]
        layout = _layout(found, self._float_dtype)
        if part not in layout:
            raise FormatError(f"{found.name}.{part}: unknown; the tensor does not belong to this quantization_config")
        if part == FLOAT_PART:
            tensor = tensor.to(self._float_dtype)
        check_part(f"{found.name}.{part}", tuple(tensor.shape), tensor.dtype, layout[part])
        self._stored[index][part] = tensor.to(device, copy=True)

    def take(self) -> list[dict[str, Tensor]]:
        """The tensors of each shard by local name; the stash forgets them.

        Raises:
            FormatError: one is missing.
        """
        for shard, stored in zip(self.shards, self._stored, strict=True):
            for part in _layout(shard, self._float_dtype).keys() - stored.keys():
                raise FormatError(f"{shard.name}.{part}: missing; the checkpoint is incomplete or damaged")
        taken, self._stored = self._stored, [{} for _ in self.shards]
        return taken


def _layout(shard: Shard, float_dtype: torch.dtype) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    return {FLOAT_PART: (shard.shape, float_dtype)} if shard.entry is None else parts(shard.entry)
