"""The Triton kernels on one GPU, against bf16 cuBLAS and against peers that are installed: one table.

    python benchmarks/gpu_kernels.py [--quick] [--tiny]

Every figure is the time of one product under CUDA-graph replay, over copies of the weight that together exceed the L2
cache several times. `x bf16` is the time of bf16 cuBLAS over it, measured in turn with it: medians over the rounds.
`of copy` is the weight's bytes over that time, as a share of the bandwidth of a large copy in the same run. `error` is
the SQNR in dB against the decoded weight in float64. `--tiny` runs every code path once with small shapes and without
graphs, on the CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.formats.native import pack
from bitwright.numeric.bilevel import SecondLevel
from bitwright.numeric.grid import Grid
from bitwright.numeric.measure import sqnr_db, squared_error
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.runtime.reference import PackedWeight
from bitwright.runtime.triton.kernel import dequantize, linear
from bitwright.runtime.triton.layout import TritonWeight

SHAPES = ((4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672))  # (in, out)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
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
    """Products by equal copies of one weight."""

    name: str
    bytes: int
    products: list[Product]


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


def copies(weight: TritonWeight, cold_bytes: int) -> list[TritonWeight]:
    """`weight` and as many copies of it as exceed `cold_bytes`."""
    fields = weight.__dict__
    again = range(cold_bytes // weight.bytes)
    return [weight] + [
        TritonWeight(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in fields.items()}) for _ in again
    ]


def ours(name: str, weight: TritonWeight, cold_bytes: int) -> Candidate:
    def product(one: TritonWeight) -> Product:
        return lambda x: linear(x, one)

    return Candidate(name, weight.bytes, [product(one) for one in copies(weight, cold_bytes)])


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
    made = {name: random_weight((shape[1], shape[0]), *kind, device) for name, kind in FORMATS.items()}
    candidates: list[Callable[[], Candidate]] = [lambda n=n, w=w: ours(n, w, cold_bytes) for n, w in made.items()]
    candidates += [lambda c=c: c for c in peers(weight, cold_bytes, failures)]
    for make in candidates:
        candidate = make()
        exact = None if candidate.name not in made else dequantize(made[candidate.name], torch.float32).double()
        for batch in batches:
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
