"""The matrices of a layer: one input, products side by side. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.numeric.activation import InputSite
from bitwright.runtime.join import joined_parts
from bitwright.runtime.linear import PackedModule, at_site
from bitwright.runtime.vllm.routing import FLOAT_PART, Shard
from bitwright.words import CpuMode


class FloatMatrix(nn.Module):
    """A matrix [out, in] that is not quantized, with the interface of `PackedModule` that `Matrices` needs."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        """Hold `weight`."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.out_features = weight.shape[0]

    def product(self, x: Tensor, bias: Tensor | None, mode: CpuMode, site: None = None) -> Tensor:
        """`x` [..., in] times the transposed weight, plus `bias` [out]; `mode` does not matter, and it has no site."""
        return functional.linear(x, self.weight, bias)


class Matrices(nn.Module):
    """Matrices of the same inputs, one below the other; those that agree in layout and site are one for the kernels.

    Attributes:
        mode: arithmetic of the compiled kernels; see `runtime.cpu`.
    """

    def __init__(self, shards: Sequence[Shard], stored: Sequence[Mapping[str, Tensor]], mode: CpuMode = "exact"):
        """Check and take over the tensors of `shards`.

        Raises:
            FormatError: those of a shard break any rule of the native format.
        """
        super().__init__()
        self.mode = mode
        self.sites: list[InputSite | None] = []
        self.groups = nn.ModuleList()
        pairs = zip(shards, stored, strict=True)
        for site, of_site in groupby(pairs, key=lambda pair: pair[0].site):
            self.sites.append(site)
            self.groups.append(nn.ModuleList(_matrices(list(of_site))))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Products [..., rows of all] with `x` [..., in], plus `bias` [at least as many]."""
        products: list[Tensor] = []
        first = 0
        for site, group in zip(self.sites, self.groups, strict=True):
            inputs, left = at_site(x, site)
            matrices: Any = group
            for matrix in matrices:
                shift = None if bias is None else bias[first : first + matrix.out_features]
                first += matrix.out_features
                products.append(matrix.product(inputs, shift, self.mode, left))
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def _matrices(pairs: list[tuple[Shard, Mapping[str, Tensor]]]) -> Iterator[nn.Module]:
    """The modules of neighbours that share a site, joined where their layouts agree."""
    for spec, neighbours in groupby(pairs, key=lambda pair: pair[0].entry and pair[0].entry.spec):
        if spec is None:
            yield from (FloatMatrix(stored[FLOAT_PART]) for _, stored in neighbours)
        else:
            yield from _joined([packed(shard, stored) for shard, stored in neighbours])


def packed(shard: Shard, stored: Mapping[str, Tensor]) -> PackedModule:
    """The module of one quantized shard.

    Raises:
        FormatError: `stored` breaks any rule of the native format.
    """
    assert shard.entry is not None
    module = PackedModule(shard.entry, device="meta")
    module.load_parts(shard.name, stored)
    return module


def _joined(modules: list[PackedModule]) -> list[PackedModule]:
    joined = joined_parts(modules) if len(modules) > 1 else None
    if joined is None:
        return modules
    entry, parts = joined
    whole = PackedModule(entry, device="meta")
    whole.load_parts("joined", parts)
    return [whole]
