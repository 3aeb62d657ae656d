"""A lean decode path on the CPU for models of Llama's shape: Llama, Mistral, Qwen2 and Qwen3.

transformers spends more time around the products of a small quantized model than in them. `LeanDecoder` computes the
same with a static float32 cache and static buffers: some fifteen calls a block and token. Linears that share an input
are one matrix for the kernels where their specs agree, the residual is added by the product before it, and heads that
share keys are one query of several rows. It takes the weights as they are when it is made: later changes go unseen.

What it does not cover it refuses, with a reason (`supports`); transformers' own loop then serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.execute.local import torch_threads
from bitwright.runtime import cpu, ops
from bitwright.runtime.cpu import CpuMode, CpuWeight
from bitwright.runtime.join import concatenate
from bitwright.runtime.linear import PackedModule, QuantizedEmbedding, QuantizedLinear, TiedLinear

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Kinds of RoPE whose frequencies do not depend on how long the text has become.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ATTENTIONS = ("eager", "sdpa")
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


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
        self.max_length, self.length = max_length, 0
        self._eps, self._head_dim, self._scaling = config.rms_norm_eps, attention.head_dim, attention.scaling
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._embedding = model.model.embed_tokens
        self._blocks = [_block(layer, mode) for layer in model.model.layers]
        self._final_norm = model.model.norm.weight.detach()
        self._head = _Product.of([model.lm_head], mode)
        self.weight_bytes = self._head.bytes + sum(
            product.bytes for block in self._blocks for product in (block.qkv, block.output, block.gate_up, block.down)
        )
        self._tables(model.model.rotary_emb)
        self._buffers(config.hidden_size)

    def _tables(self, rotary: nn.Module) -> None:
        """cos and sin [max_length, head_dim]; sin negated where it multiplies what comes from the second half."""
        with torch.no_grad():
            cos, sin = rotary(torch.empty(1), position_ids=torch.arange(self.max_length)[None])
        half = self._head_dim // 2
        self._cos, self._sin = cos[0].clone(), torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def _buffers(self, hidden_size: int) -> None:
        rotated = self._heads + self._kv_heads
        rows, half = rotated + self._kv_heads, self._head_dim // 2
        self._cache = torch.zeros(len(self._blocks), 2 * self._kv_heads, self.max_length, self._head_dim)
        self._zeros, self._normed = torch.zeros(hidden_size), torch.empty(hidden_size)
        self._hidden, self._between = torch.empty(hidden_size), torch.empty(hidden_size)
        # Values pass through the rotation with cos = 1, so that they reach the cache together with the keys.
        self._factor = torch.ones(rows, self._head_dim)
        self._qkv, self._rotated = torch.empty(rows, self._head_dim), torch.empty(rows, self._head_dim)
        self._unrotated = self._qkv[:rotated]
        self._halves = (
            (self._rotated[:rotated, :half], self._qkv[:rotated, half:]),
            (self._rotated[:rotated, half:], self._qkv[:rotated, :half]),
        )
        self._query = self._rotated[: self._heads].view(self._kv_heads, 1, -1, self._head_dim)
        self._new = self._rotated[self._heads :]
        self._mlp = torch.empty(self._blocks[0].gate_up.out_features)
        self._gate, self._up = self._mlp.chunk(2)
        self._logits = torch.empty(self._head.out_features)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [vocabulary] behind the last of `ids` (integers [tokens]), which start a new sequence.

        The next call overwrites the result.

        Raises:
            ValueError: no token, more than `max_length`, or not one axis.
        """
        if ids.dim() != 1 or not 1 <= ids.numel() <= self.max_length:
            raise ValueError(f"ids are {list(ids.shape)}, needed [1..{self.max_length}]")
        tokens, kv, rotated = ids.numel(), self._kv_heads, self._heads + self._kv_heads
        cos, sin = self._cos[:tokens, None], self._sin[:tokens, None]
        x = self._embedding(ids)
        for block, cache in zip(self._blocks, self._cache[:, :, :tokens].unbind(0), strict=True):
            qkv = block.qkv.many(self._norm_many(x, block.input_norm)).view(tokens, -1, self._head_dim)
            qk = qkv[:, :rotated]
            if block.head_norm is not None:
                qk = functional.rms_norm(qk, (self._head_dim,), None, self._eps) * block.head_norm
            qk = qk * cos + qk.roll(self._head_dim // 2, dims=-1) * sin
            cache[:kv] = qk[:, self._heads :].transpose(0, 1)
            cache[kv:] = qkv[:, rotated:].transpose(0, 1)
            attended = functional.scaled_dot_product_attention(
                qk[None, :, : self._heads].transpose(1, 2),
                cache[None, :kv],
                cache[None, kv:],
                is_causal=True,
                scale=self._scaling,
                enable_gqa=True,
            )
            x = x + block.output.many(attended[0].transpose(0, 1).reshape(tokens, -1))
            gate, up = block.gate_up.many(self._norm_many(x, block.post_norm)).chunk(2, dim=-1)
            x = x + block.down.many(functional.silu(gate).mul_(up))
        self.length = tokens
        self._hidden.copy_(x[-1])
        return self._end()

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Logits [vocabulary] behind `token`, which the cache receives. The next call overwrites the result.

        Raises:
            ValueError: nothing was prefilled, or the cache is full.
        """
        position, kv = self.length, self._kv_heads
        if not 0 < position < self.max_length:
            raise ValueError(f"{position} tokens in the cache, needed 1..{self.max_length - 1} to take another")
        cos, sin, half = self._cos[position], self._sin[position], self._head_dim // 2
        self._factor[: self._heads + kv] = cos
        sines = sin[:half], sin[half:]
        places = self._cache[:, :, position].unbind(0)
        keys = self._cache[:, :kv, None, : position + 1].unbind(0)
        values = self._cache[:, kv:, None, : position + 1].unbind(0)
        x, y = self._hidden, self._between
        x.copy_(self._embedding(torch.tensor(token)))
        threads = torch.get_num_threads()
        # What lies between products is too small to share, and PyTorch's waiting threads would keep processors from
        # those of the kernels.
        with torch_threads(1):
            for block, place, key, value in zip(self._blocks, places, keys, values, strict=True):
                block.qkv.one(self._norm(x, block.input_norm), self._qkv, threads)
                if block.head_norm is not None:
                    mean = self._unrotated.square().mean(-1, keepdim=True)
                    self._unrotated.mul_(mean.add_(self._eps).rsqrt_()).mul_(block.head_norm)
                torch.mul(self._qkv, self._factor, out=self._rotated)
                for (into, other), sine in zip(self._halves, sines, strict=True):
                    into.addcmul_(other, sine)
                place.copy_(self._new)
                attended = functional.scaled_dot_product_attention(self._query, key, value, scale=self._scaling)
                block.output.one(attended.reshape(-1), y, threads, x)
                block.gate_up.one(self._norm(y, block.post_norm), self._mlp, threads)
                functional.silu(self._gate, inplace=True).mul_(self._up)
                block.down.one(self._gate, x, threads, y)
        self.length += 1
        return self._end()

    def _end(self) -> Tensor:
        """Logits of the last hidden state."""
        self._head.one(self._norm(self._hidden, self._final_norm), self._logits, torch.get_num_threads())
        return self._logits

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of one token, in the buffer that all norms share."""
        factor = (torch.dot(x, x).item() / x.numel() + self._eps) ** -0.5
        return torch.addcmul(self._zeros, x, weight, value=factor, out=self._normed)

    def _norm_many(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._eps)


# --- weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """The weights of one block; `head_norm` [heads + kv heads, head_dim] is that of queries and keys."""

    input_norm: Tensor
    qkv: _Product
    head_norm: Tensor | None
    output: _Product
    post_norm: Tensor
    gate_up: _Product
    down: _Product


def _block(layer: Any, mode: CpuMode) -> _Block:
    attention, mlp = layer.self_attn, layer.mlp
    head_norm = None
    if hasattr(attention, "q_norm"):
        heads = [linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj)]
        norms = (attention.q_norm.weight, attention.k_norm.weight)
        head_norm = torch.cat([norm.detach().expand(n, -1) for norm, n in zip(norms, heads, strict=True)])
    return _Block(
        layer.input_layernorm.weight.detach(),
        _Product.of([attention.q_proj, attention.k_proj, attention.v_proj], mode),
        head_norm,
        _Product.of([attention.o_proj], mode),
        layer.post_attention_layernorm.weight.detach(),
        _Product.of([mlp.gate_proj, mlp.up_proj], mode),
        _Product.of([mlp.down_proj], mode),
    )


@dataclass(frozen=True)
class _Product:
    """Linears of one input, one below the other: (weight, bias) pairs and the arithmetic of the packed ones."""

    parts: tuple[tuple[CpuWeight | Tensor, Tensor | None], ...]
    mode: CpuMode

    @staticmethod
    def of(modules: Sequence[nn.Module], mode: CpuMode) -> _Product:
        linears = [module for module in modules if isinstance(module, QuantizedLinear)]
        joined = concatenate(linears) if len(linears) == len(modules) > 1 else None
        if joined is not None:
            return _Product(((CpuWeight.of(joined), _joined_bias(linears)),), mode)
        return _Product(tuple(_part(module) for module in modules), mode)

    @property
    def out_features(self) -> int:
        """Rows of all weights."""
        return sum(_rows(weight) for weight, _ in self.parts)

    @property
    def bytes(self) -> int:
        """Memory of all weights."""
        return sum(w.bytes if isinstance(w, CpuWeight) else w.numel() * w.itemsize for w, _ in self.parts)

    def one(self, x: Tensor, y: Tensor, threads: int, residual: Tensor | None = None) -> None:
        """Write the products with `x` [in], plus `residual` [out], to `y` (contiguous, [out] in any shape)."""
        y, first = y.view(-1), 0
        for weight, bias in self.parts:
            rows = _rows(weight)
            into = y if rows == y.numel() else y[first : first + rows]
            first += rows
            # The kernels add one vector in passing.
            shift = bias if residual is None else residual
            if isinstance(weight, CpuWeight):
                address = 0 if shift is None else shift.data_ptr()
                weight.native.multiply(x.data_ptr(), address, into.data_ptr(), 1, self.mode == "fast", threads)
            else:
                with torch_threads(threads):
                    torch.mv(weight, x, out=into) if shift is None else torch.addmv(shift, weight, x, out=into)
            if residual is not None and bias is not None:
                into.add_(bias)

    def many(self, x: Tensor) -> Tensor:
        """Products with `x` [tokens, in], [tokens, out]."""
        products = [
            weight.linear(x, bias, self.mode) if isinstance(weight, CpuWeight) else functional.linear(x, weight, bias)
            for weight, bias in self.parts
        ]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def _rows(weight: CpuWeight | Tensor) -> int:
    return weight.out_features if isinstance(weight, CpuWeight) else weight.shape[0]


def _part(module: nn.Module) -> tuple[CpuWeight | Tensor, Tensor | None]:
    """Weight and bias of one linear or head."""
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach()
    if isinstance(module, nn.Linear):
        return module.weight.detach(), bias
    owner = module.embedding if isinstance(module, TiedLinear) else module
    kernel = ops.cpu_kernel()
    assert isinstance(owner, PackedModule)
    assert kernel is not None
    # Not the module's own: that may remember that there were no kernels.
    weight = kernel.prepared(owner.packed())
    assert weight is not None
    return weight, bias


def _joined_bias(linears: Sequence[QuantizedLinear]) -> Tensor | None:
    """The biases one below the other, zeros where there is none."""
    if all(linear.bias is None for linear in linears):
        return None
    biases = [torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach() for linear in linears]
    return torch.cat(biases)


# --- what it covers ------------------------------------------------------------------------------------------------


def supports(model: Any, max_length: int | None = None) -> str | None:
    """Why `LeanDecoder` does not serve `model` for texts of `max_length` tokens (default: any); None where it does."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if type(model).__name__ != _CLASSES.get(str(kind)):
        return f"it is a {type(model).__name__} of type {kind}, needed one of {', '.join(_CLASSES.values())}"
    return _unlike(model) or _window(model.config, max_length) or _unpacked(model)


def _unlike(model: Any) -> str | None:
    """What else than its family's plain forward pass `model` computes."""
    attentions = [model.config._attn_implementation]
    attentions += [layer.self_attn.config._attn_implementation for layer in model.model.layers]
    if odd := [name for name in attentions if name not in _ATTENTIONS]:
        quantized = " (a quantized KV cache)" if str(odd[0]).startswith("bitwright_kv") else ""
        return f"its attention is {odd[0]}{quantized}, needed one of {', '.join(_ATTENTIONS)}"
    rotary = model.model.rotary_emb
    if rotary.rope_type not in _ROPE_TYPES:
        return f"its RoPE is of type {rotary.rope_type}, needed one of {', '.join(_ROPE_TYPES)}"
    attention = model.model.layers[0].self_attn
    if 2 * rotary.inv_freq.numel() != attention.head_dim:
        return f"RoPE turns {2 * rotary.inv_freq.numel()} of {attention.head_dim} features of a head, needed all"
    if model.config.hidden_act != "silu":
        return f"its activation function is {model.config.hidden_act}, needed silu"
    if model.training:
        return "it is in training mode, needed model.eval()"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"{name or 'the model'} has a hook or a forward of its own"
    return None


def _window(config: Any, max_length: int | None) -> str | None:
    """A sliding window is no matter to texts that fit into it."""
    window = getattr(config, "sliding_window", None)
    if window is None or (max_length is not None and max_length <= window):
        return None
    return f"attention slides over a window of {window} tokens, needed texts no longer than that"


def _unpacked(model: Any) -> str | None:
    """A weight that is not as the products need it."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            return f"{name} is {parameter.dtype} on {parameter.device}, needed torch.float32 on cpu"
    modules = {"lm_head": model.lm_head}
    for index, layer in enumerate(model.model.layers):
        modules |= {f"layers.{index}.{name}": getattr(layer.self_attn, name) for name in _ATTENTION_LINEARS}
        modules |= {f"layers.{index}.{name}": getattr(layer.mlp, name) for name in _MLP_LINEARS}
    for name, module in modules.items():
        if type(module) not in (nn.Linear, QuantizedLinear, TiedLinear):
            return f"{name} is a {type(module).__name__}, needed nn.Linear or QuantizedLinear"
        if isinstance(module, QuantizedLinear) and module.site is not None:
            return f"{name} quantizes or transforms its inputs ({module.site.label()})"
        owner = module.embedding if isinstance(module, TiedLinear) else module
        if isinstance(owner, PackedModule) and (ops.cpu_kernel() is None or not cpu.available()):
            return "the compiled CPU kernels are missing or turned off, the slow reference serves"
        if isinstance(owner, PackedModule) and not cpu.supports(owner.packed()):
            return f"{name} is packed in groups or on a device that the CPU kernels do not take"
    embedding = model.model.embed_tokens
    if type(embedding) not in (nn.Embedding, QuantizedEmbedding):
        return f"the embedding is a {type(embedding).__name__}, needed nn.Embedding or QuantizedEmbedding"
    if isinstance(embedding, QuantizedEmbedding) and embedding.output_dtype != torch.float32:
        return f"the embedding gives {embedding.output_dtype}, needed torch.float32"
    return None
