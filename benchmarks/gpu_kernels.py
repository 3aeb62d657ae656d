"""The Triton kernels on one GPU, against bf16 cuBLAS and against peers that are installed: one table.

    python benchmarks/gpu_kernels.py [--quick] [--tiny]

Every figure is the time of one product under CUDA-graph replay, over copies of the weight that together exceed the L2
cache several times. `x bf16` is the time of bf16 cuBLAS over it, measured in turn with it: medians over the rounds.
`of copy` is the weight's bytes over that time, as a share of the bandwidth of a large copy in the same run. `error` is
the SQNR in dB against the decoded weight in float64; the rows `w8a8` quantize their inputs to 8 bits, within the time
and within the error. `--tiny` runs every code path once with small shapes and without
graphs, on the CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.formats.native import pack
from bitwright.numeric.activation import ActivationSpec
from bitwright.numeric.bilevel import SecondLevel
from bitwright.numeric.grid import Grid
from bitwright.numeric.measure import sqnr_db, squared_error
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.runtime.reference import PackedWeight
from bitwright.runtime.triton.kernel import dequantize, linear
from bitwright.runtime.triton.layout import TritonWeight
from bitwright.runtime.triton.w8a8 import Weight8, e4m3_linear, int8_linear, quantize_e4m3

SHAPES = ((4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672))  # (in, out)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
# Of products of 8 bits, which are meant for prefill too.
LARGE_BATCHES = (256, 1024, 4096)
INT8 = {"w8a8": ActivationSpec(bits=8), "w8a8 symmetric": ActivationSpec(bits=8, symmetric=True)}
SPQR = WeightSpec(bits=3, group_size=16, zero="float", bilevel=Bilevel(axis="row", size=16, scale_bits=3, zero_bits=3))
FORMATS = {
    "w4g128": (WeightSpec(bits=4, group_size=128), 0.0),
    "w3g128": (WeightSpec(bits=3, group_size=128), 0.0),
    "spqr 0.2 %": (SPQR, 0.002),
    "spqr 1 %": (SPQR, 0.01),
}
# Copies of a weight are made until they take this much: five times the L2 cache of an H100.
COLD_BYTES = 256 << 20
ROUNDS = 5

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """Products by equal copies of one weight; `decoded` [out, in] of ours is what errors are measured against."""

    name: str
    bytes: int
    products: list[Product]
    decoded: Callable[[], Tensor] | None = None


def random_weight(shape: tuple[int, int], spec: WeightSpec, share: float, device: torch.device) -> TritonWeight:
    """Random codes on a random grid, with a share of outliers."""
    out, groups = shape[0], spec.groups(shape[1])
    codes = torch.randint(0, spec.max_code + 1, shape, dtype=torch.uint8, device=device)
    if spec.bilevel is None:
        scale = (torch.rand(out, groups, device=device) * 0.01 + 0.01).half().float()
        zero = torch.randint(0, spec.max_code + 1, (out, groups), device=device).float()
        grid = Grid(scale, zero, spec)
    else:
        blocks = spec.bilevel.superblocks(out, groups)
        statistics_ = (torch.rand(*blocks, spec.bilevel.statistics, device=device) * 0.01 + 0.01).half().float()
        level_codes = [torch.randint(0, 8, (out, groups), dtype=torch.uint8, device=device) for _ in range(2)]
        grid = Grid.of_levels(SecondLevel(level_codes[0], level_codes[1], statistics_), None, spec)
    outliers = None
    if share:
        outliers = Outliers.gather(torch.rand(shape, device=device) < share, torch.randn(shape, device=device), 16)
    q = QTensor(codes, grid, outliers)
    return TritonWeight.of(PackedWeight.of(pack(q), spec, shape[1]))


def random_weight8(shape: tuple[int, int], device: torch.device, symmetric: bool = False) -> Weight8:
    """Random int8 codes with a scale, and unless `symmetric` a zero, for each output."""
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
    codes = functional.pad(codes, (0, -shape[1] % 64)).contiguous()
    scale = torch.rand(shape[0], device=device) * 1e-3 + 1e-3
    zero = None if symmetric else torch.randint(-9, 10, (shape[0],), dtype=torch.int32, device=device)
    return Weight8(shape[1], codes, scale, zero, codes.sum(1, dtype=torch.int32))


def copies(weight: Any, cold_bytes: int) -> list[Any]:
    """`weight`, a TritonWeight or Weight8, and as many copies of it as exceed `cold_bytes`."""
    tensors = {name: value for name, value in weight.__dict__.items() if isinstance(value, Tensor)}
    again = range(cold_bytes // weight.bytes)
    return [weight] + [replace(weight, **{name: value.clone() for name, value in tensors.items()}) for _ in again]


def ours(name: str, weight: TritonWeight, cold_bytes: int) -> Candidate:
    def product(one: TritonWeight) -> Product:
        return lambda x: linear(x, one)

    products = [product(one) for one in copies(weight, cold_bytes)]
    return Candidate(name, weight.bytes, products, lambda: dequantize(weight, torch.float32))


def eight_bits(shape: tuple[int, int], cold_bytes: int, device: torch.device) -> Iterator[Candidate]:
    """Inputs quantized to int8, or e4m3, token by token, and multiplied as that; and PyTorch's product of e4m3."""

    def int8(one: Weight8, spec: ActivationSpec) -> Product:
        return lambda x: int8_linear(x, one, None, spec, None)

    def e4m3(one: Weight8) -> Product:
        return lambda x: e4m3_linear(x, one)

    def scaled_mm(one: Weight8) -> Product:
        def product(x: Tensor) -> Tensor:
            tokens = quantize_e4m3(x, None, one.padded)
            scales = tokens.scale[:, None], one.scale[None]
            return torch._scaled_mm(tokens.codes, one.codes.t(), *scales, out_dtype=torch.bfloat16)

        return product

    for name, spec in INT8.items():
        weight = random_weight8(shape, device, spec.symmetric)
        products = [int8(one, spec) for one in copies(weight, cold_bytes)]
        yield Candidate(f"{name} int8", weight.bytes, products, weight.dequantize)
    weight = Weight8.e4m3(torch.randn(shape, device=device))
    yield Candidate("w8a8 e4m3", weight.bytes, [e4m3(one) for one in copies(weight, cold_bytes)], weight.dequantize)
    if device.type == "cuda":
        again = [scaled_mm(one) for one in copies(weight, cold_bytes)]
        yield Candidate("w8a8 e4m3 scaled_mm", weight.bytes, again)


def dense(weight: Tensor, cold_bytes: int, name: str = "bf16 cuBLAS") -> Candidate:
    def product(one: Tensor) -> Product:
        return lambda x: functional.linear(x, one)

    size = weight.numel() * weight.itemsize
    return Candidate(name, size, [product(weight.clone()) for _ in range(1 + cold_bytes // size)])


def tinygemm(weight: Tensor, cold_bytes: int) -> Candidate:
    """torch's int4 product, asymmetric in groups of 128."""
    out, columns = weight.shape
    codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=weight.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    grid = torch.rand(columns // 128, out, 2, dtype=torch.bfloat16, device=weight.device)

    def product(one: Tensor) -> Product:
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, one, 128, grid)

    size = out * columns // 2 + grid.numel() * 2
    return Candidate("torch tinygemm w4g128", size, [product(packed.clone()) for _ in range(1 + cold_bytes // size)])


def gemlite(weight: Tensor, cold_bytes: int) -> Candidate:
    core = importlib.import_module("gemlite.core")
    out, columns = weight.shape
    layer = core.GemLiteLinear(
        4, 128, columns, out, input_dtype=core.DType.BF16, output_dtype=core.DType.BF16, scaled_activations=False
    )
    codes = torch.randint(0, 16, weight.shape, dtype=torch.uint8, device=weight.device)
    grid = torch.rand(out * columns // 128, 1, dtype=torch.bfloat16, device=weight.device)
    layer.pack(codes, grid, grid * 8, None)
    # Its layers share no state, but a copy of one is not public: this peer stays in L2 where the weight fits.
    return Candidate("gemlite w4g128 (warm)", out * columns // 2 + grid.numel() * 4, [layer.forward])


def bitsandbytes(weight: Tensor, cold_bytes: int) -> Candidate:
    bnb = importlib.import_module("bitsandbytes")
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")

    def product(one: Tensor) -> Product:
        return lambda x: bnb.matmul_4bit(x, one.t(), state)

    size = packed.numel() + state.absmax.numel() * 4
    return Candidate("bitsandbytes nf4 g64", size, [product(packed.clone()) for _ in range(1 + cold_bytes // size)])


def torchao(weight: Tensor, cold_bytes: int) -> Candidate:
    quantization = importlib.import_module("torchao.quantization")
    layers = []
    for _ in range(1 + cold_bytes // (weight.numel() // 2)):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
        quantization.quantize_(layer, quantization.Int4WeightOnlyConfig(group_size=128))
        layers.append(layer)
    return Candidate("torchao int4 g128", weight.numel() * 17 // 32, layers)


PEERS = (tinygemm, gemlite, bitsandbytes, torchao)


def peers(weight: Tensor, cold_bytes: int, failures: set[str]) -> Iterator[Candidate]:
    """Those that are installed and take the shape; reasons of the others go to `failures`."""
    for make in PEERS:
        try:
            yield make(weight, cold_bytes)
        except Exception as error:  # noqa: BLE001  a peer may fail in any way
            failures.add(f"{make.__name__}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")


class Timer:
    """Seconds of one product: all copies in one CUDA graph, replayed."""

    def __init__(self, candidate: Candidate, x: Tensor) -> None:
        """Warms up, then captures; without a GPU, or where a peer cannot be captured, calls stay eager."""
        self.calls = len(candidate.products)
        self.products, self.x, self.graph = candidate.products, x, None
        self._all()
        if x.is_cuda:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._all()

    def _all(self) -> None:
        for product in self.products:
            product(self.x)

    def seconds(self) -> float:
        """Once through all copies, over their number."""
        if self.graph is None:
            begun = time.perf_counter()
            self._all()
            return (time.perf_counter() - begun) / self.calls
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.calls


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    copy = Candidate("copy", size, [lambda x: x.copy_(source)])
    timer = Timer(copy, torch.empty_like(source))
    return 2 * size / statistics.median(timer.seconds() for _ in range(10))


def measured(candidate: Candidate, baseline: Candidate, x: Tensor, rounds: int) -> tuple[float, float]:
    """Median seconds of `candidate`, and median over the rounds of the baseline's over its."""
    timers = Timer(baseline, x), Timer(candidate, x)
    times = [(timers[0].seconds(), timers[1].seconds()) for _ in range(rounds + 1)][1:]
    return statistics.median(t for _, t in times), statistics.median(b / t for b, t in times)


def report(
    shape: tuple[int, int], batches: tuple[int, ...], cold_bytes: int, bandwidth: float, rounds: int
) -> set[str]:
    """Rows of the table for one shape (in, out); returns why peers are missing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, failures = torch.bfloat16 if device.type == "cuda" else torch.float16, set[str]()
    weight = torch.randn(shape[1], shape[0], dtype=dtype, device=device)
    baseline = dense(weight, cold_bytes)
    sizes = (shape[1], shape[0])
    packed = (ours(name, random_weight(sizes, *kind, device), cold_bytes) for name, kind in FORMATS.items())
    # One after the other: the copies of all would not fit.
    for candidate in chain(packed, eight_bits(sizes, cold_bytes, device), peers(weight, cold_bytes, failures)):
        exact = None if candidate.decoded is None else candidate.decoded().double()
        large = LARGE_BATCHES if candidate.name.startswith("w8a8") and len(batches) > 2 else ()
        for batch in (*batches, *large):
            x = torch.randn(batch, shape[0], dtype=dtype, device=device)
            try:
                found = candidate.products[0](x)
                seconds, ratio = measured(candidate, baseline, x, rounds)
            except Exception as error:
                # A peer may fail in any way.
                if exact is not None:
                    raise
                failures.add(f"{candidate.name}, batch {batch}: {type(error).__name__}: {str(error)[:80]}")
                continue
            error_db = "" if exact is None else f"{sqnr_db(*squared_error(x.double() @ exact.T, found)):.0f}"
            share = candidate.bytes / seconds / bandwidth
            name = f"{shape[0]}x{shape[1]}"
            print(
                f"{name:>11} {candidate.name:24} {batch:5} {seconds * 1e6:9.1f} {ratio:7.2f} {share:8.0%} {error_db:>6}"
            )
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batches 1 and 16 of two shapes")
    parser.add_argument("--tiny", action="store_true", help="every code path once, small")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shapes, batches, cold, rounds = SHAPES, BATCHES, COLD_BYTES, ROUNDS
    if arguments.quick:
        shapes, batches = (SHAPES[0], SHAPES[2]), (1, 16)
    if arguments.tiny:
        shapes, batches, cold, rounds = ((256, 48),), (1, 2), 1, 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_bandwidth(device, 1 << 20 if arguments.tiny else 1 << 30)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    print(f"{'in x out':>11} {'kernel':24} batch {'us':>9} {'x bf16':>7} {'of copy':>8} {'error':>6}")
    failures: set[str] = set()
    for shape in shapes:
        failures |= report(shape, batches, cold, bandwidth, rounds)
    for failure in sorted(failures):
        print(f"left out: {failure}")


if __name__ == "__main__":
    main()
