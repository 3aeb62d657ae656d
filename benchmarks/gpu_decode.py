"""Decoding with a Llama of 7B's shape and random weights on one GPU: tokens a second, packed against bf16.

    python benchmarks/gpu_decode.py [--tiny]

One step decodes one token for each sequence of the batch: norms, attention over a cache of fixed length (one for all
blocks, and without rotary positions), the feed-forward part and the head, written out below so that one CUDA graph
holds all of it. Both models run the same step and differ in their products alone; QKV and gate/up are single products
in both. Rounds alternate between the models; the figure is the median of their ratios. `--tiny` runs the code once,
small, without graphs, on the CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_kernels import FORMATS, Candidate, Timer, random_weight
from torch import Tensor
from torch.nn import functional

from bitwright.runtime.triton.kernel import linear

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the defaults are Llama 2 7B's."""

    blocks: int = 32
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    context: int = 512

    def products(self) -> list[tuple[int, int]]:
        """(out, in) of all linears in the order of a step: four a block, and the head."""
        block = [
            (3 * self.hidden, self.hidden),
            (self.hidden, self.hidden),
            (2 * self.inner, self.hidden),
            (self.hidden, self.inner),
        ]
        return block * self.blocks + [(self.vocabulary, self.hidden)]


def step(shape: Shape, products: list[Product], cache: Tensor, x: Tensor) -> Tensor:
    """Logits for hidden states `x` [batch, hidden]; `cache` [2, batch, heads, context, head width] of every block."""
    batch, width = x.shape[0], shape.hidden // shape.heads
    for block in range(shape.blocks):
        qkv, o, gate_up, down = products[4 * block : 4 * block + 4]
        query, key, value = qkv(functional.rms_norm(x, (shape.hidden,))).view(batch, 3, shape.heads, 1, width).unbind(1)
        cache[0, :, :, -1:] = key
        cache[1, :, :, -1:] = value
        mixed = functional.scaled_dot_product_attention(query, cache[0], cache[1])
        x = x + o(mixed.reshape(batch, shape.hidden))
        gate, up = gate_up(functional.rms_norm(x, (shape.hidden,))).chunk(2, dim=-1)
        x = x + down(functional.silu(gate) * up)
    return products[-1](functional.rms_norm(x, (shape.hidden,)))


def timer(shape: Shape, products: list[Product], cache: Tensor, x: Tensor) -> Timer:
    return Timer(Candidate("step", 0, [lambda x: step(shape, products, cache, x)]), x)


def dense(size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> tuple[int, Product]:
    weight = torch.randn(size, dtype=dtype, device=device) * size[1] ** -0.5
    return weight.numel() * weight.itemsize, lambda x: functional.linear(x, weight)


def packed(size: tuple[int, int], name: str, device: torch.device) -> tuple[int, Product]:
    weight = random_weight(size, *FORMATS[name], device)
    return weight.bytes, lambda x: linear(x, weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the code path once, small")
    tiny = parser.parse_args().tiny
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    shape = Shape(1, 64, 96, 2, 48, 16) if tiny else Shape()
    batches, rounds = ((1,), 1) if tiny else ((1, 4, 16), 20)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, {shape}")
    print(f"{'weights':12} {'GB':>6} batch {'tokens/s':>9} {'bf16':>9} {'ratio':>6}")
    floats = [dense(size, device, dtype) for size in shape.products()]
    for name in FORMATS:
        quantized = [packed(size, name, device) for size in shape.products()]
        for batch in batches:
            x = torch.randn(batch, shape.hidden, dtype=dtype, device=device)
            sizes = (2, batch, shape.heads, shape.context, shape.hidden // shape.heads)
            cache = torch.randn(sizes, dtype=dtype, device=device)
            baseline, ours = (timer(shape, [p for _, p in model], cache, x) for model in (floats, quantized))
            times = [(baseline.seconds(), ours.seconds()) for _ in range(rounds + 1)][1:]
            taken = [statistics.median(column) for column in zip(*times, strict=True)]
            ratio = statistics.median(b / o for b, o in times)
            size = sum(count for count, _ in quantized) / 1e9
            print(f"{name:12} {size:6.2f} {batch:5} {batch / taken[1]:9.1f} {batch / taken[0]:9.1f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
