"""A lean decode path on the CPU for models of Llama's shape: Llama, Mistral, Qwen2 and Qwen3.

transformers spends more time around the products of a small quantized model than in them. `LeanDecoder` computes the
same with a static float32 cache, and each token in one call of the compiled decoder (csrc/cpu/decode.hpp). Linears that
share an input are one matrix for the kernels where their specs agree. It takes the weights as they are when it is made:
later changes go unseen. Prompts go through PyTorch, many tokens at once; without compiled kernels so does each token.

What it does not cover it refuses, with a reason (`supports`); transformers' own loop then serves.
"""

from __future__ import annotations

import importlib
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.runtime import cpu
from bitwright.runtime.decode_support import supports
from bitwright.runtime.decode_weights import Block, Part, Product, plain
from bitwright.words import CpuMode

__all__ = ["LeanDecoder", "supports"]

# Positions of a tile of cached keys, and floats that a cached value is padded to a multiple of (csrc/cpu/decode.hpp).
_KEY_TILE, _VALUE_PAD = 16, 16
# The interface of csrc/cpu/module.cpp that this file speaks.
_INTERFACE = (1, _KEY_TILE, _VALUE_PAD)


class LeanDecoder:
    """One sequence of one model: `prefill` starts it, `step` appends a token.

    Attributes:
        max_length: tokens that the cache has room for.
        length: tokens in the cache.
        weight_bytes: memory of the weights that every step reads, as laid out for the kernels.
    """

    def __init__(self, model: Any, mode: CpuMode = "exact", max_length: int = 2048) -> None:
        """Lay out the weights of `model`, and a cache for `max_length` tokens.

        Raises:
            ValueError: `model` is not supported (see `supports`), there is no such mode, or no room for a token.
        """
        if mode not in get_args(CpuMode):
            raise ValueError(f"mode is {mode!r}, needed one of {', '.join(get_args(CpuMode))}")
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}, needed 1 or more")
        reason = supports(model, max_length)
        if reason is not None:
            raise ValueError(f"the lean decode path does not serve this model: {reason}")
        config, attention = model.config, model.model.layers[0].self_attn
        self.max_length, self.length, self._mode = max_length, 0, mode
        self._eps, self._head_dim, self._scaling = config.rms_norm_eps, attention.head_dim, attention.scaling
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._embedding = model.model.embed_tokens
        self._blocks = [Block.of(layer) for layer in model.model.layers]
        self._final_norm = plain(model.model.norm.weight)
        self._head = Product.of([model.lm_head])
        self.weight_bytes = self._head.bytes + sum(
            product.bytes for block in self._blocks for product in block.products
        )
        self._tables(model.model.rotary_emb)
        self._logits = torch.empty(self._head.out_features)
        self._native = self._compiled()

    def _tables(self, rotary: nn.Module) -> None:
        """The cache, and cos and sin [max_length, head_dim]; sin negated where it multiplies what comes from the second
        half.
        """
        with torch.no_grad():
            cos, sin = rotary(torch.empty(1), position_ids=torch.arange(self.max_length)[None])
        half = self._head_dim // 2
        self._cos, self._sin = plain(cos[0]).clone(), torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        blocks, kv = len(self._blocks), self._kv_heads
        # Tiles of keys are read as one vector for each feature.
        self._keys = torch.zeros(blocks, kv, -(-self.max_length // _KEY_TILE), self._head_dim, _KEY_TILE)
        padded = -(-self._head_dim // _VALUE_PAD) * _VALUE_PAD
        self._values = torch.zeros(blocks, kv, self.max_length, padded)

    def _compiled(self) -> Any:
        """The compiled decoder of these weights; None without compiled kernels.

        Raises:
            ValueError: sizes do not fit each other.
            PlanError: BITWRIGHT_ISA names no instruction set of this machine.
        """
        native = importlib.import_module("bitwright._native") if cpu.available() else None
        if native is None or getattr(native, "DECODE_INTERFACE", None) != _INTERFACE:
            return None
        hidden, table = self._final_norm.numel(), (self.max_length, self._head_dim)
        _check("cos", self._cos, table)
        _check("sin", self._sin, table)
        blocks = []
        for block in self._blocks:
            norms = (block.input_norm, block.post_norm)
            for norm in norms:
                _check("a norm", norm, (hidden,))
            for norm in block.head_norms or ():
                _check("a norm of heads", norm, (self._head_dim,))
            of_heads = [0, 0] if block.head_norms is None else [norm.data_ptr() for norm in block.head_norms]
            products = tuple(product.described() for product in block.products)
            blocks.append((norms[0].data_ptr(), *of_heads, norms[1].data_ptr(), *products))
        intermediate = self._blocks[0].down.parts[0].shape[1]
        # Held for its addresses, as the other tensors are.
        self._table = Part.of(self._embedding)
        return native.Decoder(
            (hidden, self._heads, self._kv_heads, self._head_dim, intermediate, self.max_length),
            (self._eps, self._scaling),
            tuple(t.data_ptr() for t in (self._cos, self._sin, self._final_norm, self._keys, self._values)),
            (self._table.described(), self._head.described()),
            tuple(blocks),
            cpu.instruction_set(),
        )

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [vocabulary] behind the last of `ids` (integers [tokens]), which start a new sequence.

        The next call overwrites the result.

        Raises:
            ValueError: no token, more than `max_length`, or not one axis.
        """
        if ids.dim() != 1 or not 1 <= ids.numel() <= self.max_length:
            raise ValueError(f"ids are {list(ids.shape)}, needed [1..{self.max_length}]")
        hidden = self._forward(ids, 0)
        self.length = ids.numel()
        return self._end(hidden)

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Logits [vocabulary] behind `token`, which the cache receives. The next call overwrites the result.

        Raises:
            ValueError: nothing was prefilled, or the cache is full.
            IndexError: the vocabulary has no such token.
        """
        position = self.length
        if not 0 < position < self.max_length:
            raise ValueError(f"{position} tokens in the cache, needed 1..{self.max_length - 1} to take another")
        if self._native is None:
            self._end(self._forward(torch.tensor([token]), position))
        else:
            fast, threads = self._mode == "fast", torch.get_num_threads()
            self._native.step(int(token), position, self._logits.data_ptr(), fast, threads)
        self.length += 1
        return self._logits

    def _end(self, hidden: Tensor) -> Tensor:
        """Logits of the last hidden state [hidden]."""
        if self._native is None:
            return self._logits.copy_(self._head.many(self._norm(hidden[None], self._final_norm), self._mode)[0])
        fast, threads = self._mode == "fast", torch.get_num_threads()
        hidden = hidden.contiguous()
        self._native.finish(hidden.data_ptr(), self._logits.data_ptr(), fast, threads)
        return self._logits

    # --- many tokens at once ---------------------------------------------------------------------------------------

    def _forward(self, ids: Tensor, first: int) -> Tensor:
        """Hidden state [hidden] behind `ids` [tokens], of which the cache receives keys and values from position
        `first` on: 0, or that of one token alone.
        """
        end = first + ids.numel()
        cos, sin = self._cos[first:end, None], self._sin[first:end, None]
        x = self._embedding(ids)
        for index, block in enumerate(self._blocks):
            qkv = block.qkv.many(self._norm(x, block.input_norm), self._mode).view(ids.numel(), -1, self._head_dim)
            sizes = (self._heads, self._kv_heads, self._kv_heads)
            queries, keys, values = qkv.split(sizes, dim=1)
            if block.head_norms is not None:
                queries, keys = (self._norm(x, norm) for x, norm in zip((queries, keys), block.head_norms, strict=True))
            qk = torch.cat([queries, keys], dim=1)
            qk = qk * cos + qk.roll(self._head_dim // 2, dims=-1) * sin
            queries, keys = qk.split(sizes[:2], dim=1)
            keys, values = self._remember(index, first, keys, values)
            attended = functional.scaled_dot_product_attention(
                queries[None].transpose(1, 2),
                keys[None],
                values[None],
                is_causal=first == 0,
                scale=self._scaling,
                enable_gqa=True,
            )
            x = x + block.output.many(attended[0].transpose(0, 1).reshape(ids.numel(), -1), self._mode)
            gate, up = block.gate_up.many(self._norm(x, block.post_norm), self._mode).chunk(2, dim=-1)
            x = x + block.down.many(functional.silu(gate).mul_(up), self._mode)
        return x[-1]

    def _remember(self, index: int, first: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [tokens, kv heads, head_dim] of block `index` into the cache at `first`.

        Returns:
            All keys and values up to them, [kv heads, positions, head_dim].
        """
        end = first + keys.shape[0]
        place = torch.arange(first, end)
        all_keys, all_values = self._keys[index], self._values[index, :, :, : self._head_dim]
        # Indices on both sides of a slice: tokens come first.
        all_keys[:, place // _KEY_TILE, :, place % _KEY_TILE] = keys
        all_values[:, first:end] = values.transpose(0, 1)
        if first == 0:
            return keys.transpose(0, 1), values.transpose(0, 1)
        return all_keys.transpose(2, 3).flatten(1, 2)[:, :end], all_values[:, :end]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._eps)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """What has an address that the compiled decoder reads is what it takes it for."""
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, needed contiguous float32 {list(shape)}")
