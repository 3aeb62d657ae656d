"""The weights of a model as the lean decode path takes them: linears of one input side by side, joined where they can
be, and what the compiled decoder is told of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.runtime import ops
from bitwright.runtime.cpu import CpuWeight
from bitwright.runtime.join import concatenate, joined_bias
from bitwright.runtime.linear import PackedModule, QuantizedLinear, TiedLinear
from bitwright.words import CpuMode


@dataclass(frozen=True)
class Block:
    """The weights of one block; `head_norms` are those of queries and of keys, [head_dim] each."""

    input_norm: Tensor
    qkv: Product
    head_norms: tuple[Tensor, Tensor] | None
    output: Product
    post_norm: Tensor
    gate_up: Product
    down: Product

    @staticmethod
    def of(layer: Any) -> Block:
        """The weights of a transformers block of Llama's shape."""
        attention, mlp = layer.self_attn, layer.mlp
        head_norms = None
        if hasattr(attention, "q_norm"):
            head_norms = plain(attention.q_norm.weight), plain(attention.k_norm.weight)
        return Block(
            plain(layer.input_layernorm.weight),
            Product.of([attention.q_proj, attention.k_proj, attention.v_proj]),
            head_norms,
            Product.of([attention.o_proj]),
            plain(layer.post_attention_layernorm.weight),
            Product.of([mlp.gate_proj, mlp.up_proj]),
            Product.of([mlp.down_proj]),
        )

    @property
    def products(self) -> tuple[Product, Product, Product, Product]:
        """In order of use."""
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True)
class Part:
    """One linear, or several joined: its weight [out, in], packed or float32, and its bias [out]."""

    weight: CpuWeight | Tensor
    bias: Tensor | None

    @staticmethod
    def of(module: nn.Module) -> Part:
        """Weight and bias of one linear, head or embedding."""
        bias = getattr(module, "bias", None)
        owner = module.embedding if isinstance(module, TiedLinear) else module
        if not isinstance(owner, PackedModule):
            return Part(plain(owner.weight), None if bias is None else plain(bias))  # type: ignore[arg-type]
        kernel = ops.cpu_kernel()
        assert kernel is not None
        # Not the module's own: that may remember that there were no kernels.
        weight = kernel.prepared(owner.packed())
        assert weight is not None
        return Part(weight, None if bias is None else plain(bias))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        if isinstance(self.weight, CpuWeight):
            return self.weight.out_features, self.weight.in_features
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def bytes(self) -> int:
        """Memory of the weight."""
        return self.weight.bytes if isinstance(self.weight, CpuWeight) else self.weight.numel() * self.weight.itemsize

    def described(self) -> tuple[Any, ...]:
        """As the compiled decoder takes it; the addresses hold while this lives.

        Raises:
            ValueError: the bias does not fit the weight.
        """
        if self.bias is not None and self.bias.shape != self.shape[:1]:
            raise ValueError(f"a bias is {list(self.bias.shape)}, needed [{self.shape[0]}]")
        bias = 0 if self.bias is None else self.bias.data_ptr()
        if isinstance(self.weight, CpuWeight):
            return self.weight.native, 0, bias, *self.shape
        return None, self.weight.data_ptr(), bias, *self.shape

    def many(self, x: Tensor, mode: CpuMode) -> Tensor:
        """Products with `x` [tokens, in], [tokens, out]."""
        if isinstance(self.weight, CpuWeight):
            return self.weight.linear(x, self.bias, mode)
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Product:
    """Linears of one input, one below the other."""

    parts: tuple[Part, ...]

    @staticmethod
    def of(modules: Sequence[nn.Module]) -> Product:
        """Joined into one part where all are packed alike."""
        linears = [module for module in modules if isinstance(module, QuantizedLinear)]
        joined = concatenate(linears) if len(linears) == len(modules) > 1 else None
        if joined is not None:
            bias = joined_bias(linears)
            return Product((Part(CpuWeight.of(joined), None if bias is None else plain(bias)),))
        return Product(tuple(Part.of(module) for module in modules))

    @property
    def out_features(self) -> int:
        """Rows of all weights."""
        return sum(part.shape[0] for part in self.parts)

    @property
    def bytes(self) -> int:
        """Memory of all weights."""
        return sum(part.bytes for part in self.parts)

    def described(self) -> tuple[Any, ...]:
        """See `Part.described`."""
        return tuple(part.described() for part in self.parts)

    def many(self, x: Tensor, mode: CpuMode) -> Tensor:
        """Products with `x` [tokens, in], [tokens, out]."""
        products = [part.many(x, mode) for part in self.parts]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def plain(tensor: Tensor) -> Tensor:
    """`tensor` as the kernels read it: float32, contiguous, without a gradient; itself where it is that already."""
    return tensor.detach().to("cpu", torch.float32).contiguous()
