"""The compiled CPU kernels beside torch float32 and torch's int4 kernel, in one process, interleaved.

    python benchmarks/cpu_kernels.py [--quick] [--threads 1 2] [--rows 1 4 16 64 512] [--shapes 4096x4096 ...]

Contenders take turns, A-B-C-A-B-C, and every figure is the median of the ratios of neighbouring turns, with its
quartiles: on a shared machine absolute times drift by a third, ratios less. One thread is timed by its own processor
time, several by the wall clock. Each call takes other weights, a rotation over 256 MB or more, so that weights come
from memory (or from the last-level cache, where that is larger: --rotate-mb). The share of the read bandwidth, measured
in the same run by summing a large tensor, counts the bytes of the kernels' layout: codes, scales, zeros and outliers.

Columns: rows of x; milliseconds of `exact` and `fast`; time of torch float32 over ours, of torch's
`_weight_int4pack_mm_for_cpu` (bfloat16 inputs, groups of 128 or 64) over ours; share of the bandwidth in `fast`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bitwright.formats.native import pack
from bitwright.numeric.bilevel import SecondLevel
from bitwright.numeric.grid import Grid
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.runtime.cpu import CpuWeight, instruction_sets
from bitwright.runtime.reference import PackedWeight

G128 = partial(WeightSpec, group_size=128)
SPQR = WeightSpec(bits=3, group_size=16, zero="float", bilevel=Bilevel(axis="row", size=16, scale_bits=3, zero_bits=3))
WEIGHTS = {
    "w4 g128": (G128(bits=4), 0.0),
    "w3 g128": (G128(bits=3), 0.0),
    "w2 g128": (G128(bits=2), 0.0),
    "spqr 0.2%": (SPQR, 0.002),
    "spqr 1%": (SPQR, 0.01),
}
SHAPES = ["4096x4096", "14336x4096", "4096x14336", "576x576", "1536x576", "576x1536", "49152x576"]  # out x in
ROUNDS, SAMPLE_SECONDS = 9, 4e-3

Call = Callable[[], object]


def random_qtensor(shape: tuple[int, int], spec: WeightSpec, share: float) -> QTensor:
    """Random codes, scales, zeros and outliers: speed depends on none of their values."""
    codes = torch.randint(0, spec.max_code + 1, shape, dtype=torch.uint8)
    groups = (shape[0], spec.groups(shape[1]))
    if spec.bilevel is None:
        scale = (torch.rand(groups) * 0.02 + 0.001).half().float()
        grid = Grid(scale, torch.randint(0, spec.max_code + 1, groups).float(), spec)
    else:
        size = (*spec.bilevel.superblocks(*groups), spec.bilevel.statistics)
        statistics_ = (torch.rand(size) * 0.02 + 0.001).half().float()
        second = [torch.randint(0, 1 << bits, groups, dtype=torch.uint8) for bits in (3, 3)]
        grid = Grid.of_levels(SecondLevel(second[0], second[1], statistics_), None, spec)
    if not share:
        return QTensor(codes, grid)
    return QTensor(codes, grid, Outliers.gather(torch.rand(shape) < share, torch.randn(shape), 16))


def rotation(make: Callable[[], object], size_bytes: int, total_bytes: int) -> Iterator[object]:
    """As many of what `make` makes as take `total_bytes`, for ever in turn."""
    made = [make() for _ in range(max(2, -(-total_bytes // size_bytes)))]
    while True:
        yield from made


def seconds(call: Call, calls: int, threads: int) -> float:
    """Time of one of `calls` calls."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    started = clock()
    for _ in range(calls):
        call()
    return (clock() - started) / calls


def interleaved(contenders: dict[str, Call], threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round, after one call to warm up."""
    calls = {
        name: max(1, int(SAMPLE_SECONDS / max(seconds(call, 2, threads), 1e-7))) for name, call in contenders.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(seconds(call, calls[name], threads))
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> str:
    """Median of the paired ratios, and its quartiles."""
    if slow not in times:
        return "-"
    ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def bandwidth(threads: int) -> float:
    """Bytes read in a second, the best of several sums over 512 MB."""
    torch.set_num_threads(threads)
    large = torch.ones(1 << 27)
    return large.numel() * 4 / min(seconds(large.sum, 1, threads) for _ in range(6))


@dataclass
class Bench:
    """What all rows of the table share."""

    rotate_bytes: int
    rounds: int
    reads: dict[int, float]

    def shape(self, shape: tuple[int, int], names: list[str], rows: list[int]) -> None:
        """Print the rows of one shape."""
        size = shape[0] * shape[1]
        plain = rotation(lambda: torch.randn(shape), 4 * size, self.rotate_bytes)
        group = next(g for g in (128, 64, 32) if shape[1] % g == 0)
        words = torch.randint(0, 15, shape, dtype=torch.int32)
        int4 = rotation(
            lambda: torch.ops.aten._convert_weight_to_int4pack_for_cpu(words, 1), size // 2, self.rotate_bytes
        )
        grids = torch.rand(shape[1] // group, shape[0], 2).bfloat16()

        def run_int4(x: Tensor) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, next(int4), group, grids)

        for name in names:
            q = random_qtensor(shape, *WEIGHTS[name])
            packed = PackedWeight.of(pack(q), q.spec, shape[1])
            once = CpuWeight.of(packed)
            ours = rotation(lambda packed=packed: CpuWeight.of(packed), once.bytes, self.rotate_bytes)
            print(f"\n{shape[0]}x{shape[1]} {name}: {8 * once.bytes / size:.2f} bits per weight")
            for threads in self.reads:
                torch.set_num_threads(threads)
                for count in rows:
                    x = torch.randn(count, shape[1])
                    half = x.bfloat16()
                    contenders: dict[str, Call] = {
                        "float32": lambda x=x: torch.nn.functional.linear(x, next(plain)),
                        "exact": lambda x=x, ours=ours: next(ours).linear(x, None, "exact"),
                        "fast": lambda x=x, ours=ours: next(ours).linear(x, None, "fast"),
                    }
                    if name.startswith("w4"):
                        contenders["int4"] = lambda half=half: run_int4(half)
                    self.row(interleaved(contenders, threads, self.rounds), threads, count, once.bytes)

    def row(self, times: dict[str, list[float]], threads: int, rows: int, layout_bytes: int) -> None:
        """Print one row."""
        exact, fast = (1e3 * statistics.median(times[name]) for name in ("exact", "fast"))
        share = layout_bytes / (fast / 1e3) / self.reads[threads]
        print(
            f"{threads} threads {rows:4d} rows | {exact:9.3f} {fast:9.3f} ms | float32/exact "
            f"{ratio(times, 'float32', 'exact'):>20} /fast {ratio(times, 'float32', 'fast'):>22} | "
            f"int4/fast {ratio(times, 'int4', 'fast'):>20} | {share:4.0%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, fewer rows and rounds, smaller rotation")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--rotate-mb", type=int)
    arguments = parser.parse_args()
    quick = arguments.quick
    rotate_mb = arguments.rotate_mb or (64 if quick else 256)
    shapes = arguments.shapes or (["4096x4096", "576x1536"] if quick else SHAPES)
    rows = arguments.rows or ([1, 16, 64] if quick else [1, 4, 16, 64, 512])
    torch.manual_seed(0)
    reads = {threads: bandwidth(threads) for threads in arguments.threads}
    print(f"instruction set {instruction_sets()[-1]}, torch {torch.__version__}, rotation over {rotate_mb} MB")
    print("read bandwidth " + ", ".join(f"{n} threads {value / 1e9:.1f} GB/s" for n, value in reads.items()))
    bench = Bench(rotate_mb << 20, 5 if quick else ROUNDS, reads)
    with torch.inference_mode():
        for shape in shapes:
            out_features, in_features = (int(size) for size in shape.split("x"))
            bench.shape((out_features, in_features), arguments.weights, rows)


if __name__ == "__main__":
    main()
