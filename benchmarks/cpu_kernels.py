"""The compiled CPU kernels beside other libraries' kernels, in one process, interleaved.

    python benchmarks/cpu_kernels.py [--quick] [--threads 1,2] [--rows 1,4,16,64,512] [--shapes 4096x4096,...]
        [--families 4-bit,3-bit,2-bit,spqr,8-bit] [--peers torch,torch-int,onnxruntime,llama.cpp]
        [--llama-cpp-lib DIR] [--rotate-mb N] [--json FILE]

Contenders take turns, A-B-C-A-B-C, and what counts are the ratios of neighbouring turns, shown as median [least,
largest]: on a shared machine absolute times drift by a third, ratios less. One thread is timed by its own processor
time, several by the wall clock. Each call takes other weights, a rotation over 256 MB or twice the last-level cache,
so that weights come from memory. Every library gets the cheapest call that it has (`cpu_peers/contract.py`), and every
contender's output is checked against float64 products with the weights that its own codes mean.

Shapes are out features x in features. Bits per weight count the bytes of the layout: codes, scales, zeros, outliers;
`bandwidth` is those bytes in the time of `fast`, over what a plain product of a matrix with a vector reads in the same
run. Ratios are a peer's time over ours, above 1 where ours is faster: over `exact` if the peer keeps inputs in floats
(as bfloat16 in torch's kernels), over `fast` if it rounds them to int8. Outliers' cost is our time over that of the
same weights without outliers.

Peers beyond torch are optional; each that is missing is left out with a sentence that says how to get it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_peers import ggml, onnx_runtime, torch_ops
from cpu_peers.contract import Case, Contender, Inputs, Run, UnavailableError, one_by_one, relative_error
from cpu_peers.timing import interference, interleaved, last_level_cache_bytes, ratio_text, read_bandwidth
from torch import Tensor

from bitwright.formats.native import pack
from bitwright.numeric.bilevel import SecondLevel
from bitwright.numeric.grid import Grid
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.runtime.cpu import CpuWeight, instruction_sets
from bitwright.runtime.reference import PackedWeight
from bitwright.words import CpuMode

Weights = dict[str, tuple[WeightSpec, float]]
Maker = Callable[[Case, str | None], Contender]

SPQR = WeightSpec(bits=3, group_size=16, zero="float", bilevel=Bilevel(axis="row", size=16, scale_bits=3, zero_bits=3))
PLAIN = "spqr 0%"
SHAPES = "4096x4096,14336x4096,4096x14336,576x576,1536x576,576x1536,49152x576"
ROUNDS, SAMPLE_SECONDS = 9, 20e-3
MODES: tuple[CpuMode, ...] = ("exact", "fast")
MATCHING: dict[Inputs, CpuMode] = {"float": "exact", "int8": "fast"}


@dataclass(frozen=True)
class Family:
    """Weights of ours, by name: spec and share of outliers; and the peers that they are compared with."""

    weights: Weights
    peers: tuple[str, ...]


def _grouped(bits: int, *group_sizes: int) -> Weights:
    return {f"w{bits} g{size}": (WeightSpec(bits=bits, group_size=size), 0.0) for size in group_sizes}


FLOATS = ("float32", "bfloat16")
FAMILIES = {
    "4-bit": Family(_grouped(4, 128, 32), (*FLOATS, "int4", "ort4 float", "ort4", "Q4_0", "Q4_K")),
    "3-bit": Family(_grouped(3, 128), (*FLOATS, "Q3_K")),
    "2-bit": Family(_grouped(2, 128), (*FLOATS, "ort2", "Q2_K")),
    "spqr": Family({PLAIN: (SPQR, 0.0), "spqr 0.2%": (SPQR, 0.002), "spqr 1%": (SPQR, 0.01)}, (*FLOATS, "Q3_K")),
    "8-bit": Family(_grouped(8, 128), (*FLOATS, "int8", "ort8", "Q8_0")),
}


def _llama(kind: str) -> Maker:
    return lambda case, folder: ggml.MulMat(case, ggml.load(folder), kind)


def _onnx(bits: int, block_size: int, inputs: Inputs) -> Maker:
    return lambda case, _: onnx_runtime.MatMulNBits(case, bits, block_size, inputs)


# Name: the library that --peers chooses, and how the contender is made. onnxruntime's float kernel is fast in blocks of
# 32 alone, and there is none for 2 and 8 bits.
PEERS: dict[str, tuple[str, Maker]] = {
    "float32": ("torch", lambda case, _: torch_ops.Plain.of(case, torch.float32)),
    "bfloat16": ("torch", lambda case, _: torch_ops.Plain.of(case, torch.bfloat16)),
    "int4": ("torch-int", lambda case, _: torch_ops.Int4(case)),
    "int8": ("torch-int", lambda case, _: torch_ops.Int8(case)),
    "ort4 float": ("onnxruntime", _onnx(4, 32, "float")),
    **{f"ort{bits}": ("onnxruntime", _onnx(bits, 128, "int8")) for bits in onnx_runtime.BITS},
    **{kind: ("llama.cpp", _llama(kind)) for kind in ("Q4_0", "Q4_K", "Q3_K", "Q2_K", "Q8_0")},
}
LIBRARIES = list(dict.fromkeys(library for library, _ in PEERS.values()))


# --- ours ----------------------------------------------------------------------------------------------------------


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


@dataclass
class Ours:
    """The compiled kernels in one mode, called as the lean decode path calls them."""

    name: str
    inputs: Inputs
    weight_bytes: int
    decoded: Tensor
    copies: list[CpuWeight]
    detail: str = ""

    @staticmethod
    def of(case: Case, name: str, weights: tuple[WeightSpec, float]) -> Iterator[Ours]:
        """Both modes, over the same copies."""
        q = random_qtensor((case.out_features, case.in_features), *weights)
        packed = PackedWeight.of(pack(q), q.spec, case.in_features)
        copies = [CpuWeight.of(packed)]
        copies += [CpuWeight.of(packed) for _ in range(case.copies(copies[0].bytes) - 1)]
        decoded = q.dequantize()[: len(case.tile)].clone()
        for inputs, mode in MATCHING.items():
            yield Ours(f"{name} {mode}", inputs, copies[0].bytes, decoded, copies)

    def bind(self, x: Tensor, threads: int) -> Run:
        """See `Contender`."""
        inputs, result = x.contiguous(), torch.empty(len(x), self.copies[0].out_features)
        arguments = (inputs.data_ptr(), 0, result.data_ptr(), len(x), MATCHING[self.inputs] == "fast", threads)

        def call(weight: Any) -> Tensor:
            weight.native.multiply(*arguments)
            return result

        # `inputs` lives as long as `output` does
        return Run(one_by_one(call, self.copies).linears, lambda: (inputs, result)[1])


# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    threads: list[int]
    rows: list[int]
    libraries: list[str]
    llama_cpp: str | None
    rounds: int
    sample_seconds: float

    def records(self, case: Case, name: str, reads: dict[int, float]) -> Iterator[dict[str, Any]]:
        """One record for every number of threads and rows."""
        contenders = list(self._contenders(case, FAMILIES[name]))
        for threads in self.threads:
            torch.set_num_threads(threads)
            for rows in self.rows:
                x = torch.randn(rows, case.in_features)
                runs = {contender.name: contender.bind(x, threads) for contender in contenders}
                errors = {c.name: relative_error(c, runs[c.name], x) for c in contenders}
                linears = {key: run.linears for key, run in runs.items()}
                times = interleaved(linears, threads, self.rounds, self.sample_seconds)
                yield {
                    "family": name,
                    "shape": f"{case.out_features}x{case.in_features}",
                    "rows": rows,
                    "threads": threads,
                    "read_bandwidth_bytes_per_second": reads[threads],
                    "contenders": {
                        c.name: {
                            "inputs": c.inputs,
                            "detail": c.detail,
                            "bits_per_weight": 8 * c.weight_bytes / case.weights,
                            "relative_error": errors[c.name],
                            "seconds": times[c.name],
                        }
                        for c in contenders
                    },
                }

    def _contenders(self, case: Case, family: Family) -> Iterator[Contender]:
        for weights_name, weights in family.weights.items():
            yield from Ours.of(case, weights_name, weights)
        for name in family.peers:
            library, make = PEERS[name]
            if library in self.libraries:
                try:
                    yield make(case, self.llama_cpp)
                except UnavailableError as error:
                    print(f"{case.out_features}x{case.in_features}: {error}", flush=True)


def available(libraries: list[str], llama_cpp: str | None) -> Iterator[str]:
    """Those of `libraries` that are there; says of the others how to get them."""
    checks: dict[str, Callable[[], object]] = {
        "onnxruntime": onnx_runtime.libraries,
        "llama.cpp": lambda: ggml.load(llama_cpp),
    }
    for library in libraries:
        try:
            checks.get(library, lambda: None)()
        except UnavailableError as error:
            print(error)
        else:
            yield library


# --- tables --------------------------------------------------------------------------------------------------------


def ratios(record: dict[str, Any], ours: str, peers: list[str]) -> Iterator[str]:
    """One cell for every column of `headings`."""
    contenders = record["contenders"]
    exact, fast = (contenders[f"{ours} {mode}"]["seconds"] for mode in MODES)
    for peer in peers:
        found = contenders.get(peer)
        if found is None:
            yield "-"
            continue
        matching = exact if found["inputs"] == "float" else fast
        note = f" {found['detail'].split()[0]}" if len(found["detail"].split()) == 2 else ""
        yield ratio_text(found["seconds"], matching) + note
        if peer == "float32":
            yield ratio_text(found["seconds"], fast)
    if f"{PLAIN} exact" in contenders:
        for mode, times in (("exact", exact), ("fast", fast)):
            yield ratio_text(times, contenders[f"{PLAIN} {mode}"]["seconds"])


def headings(records: list[dict[str, Any]], family: Family) -> tuple[list[str], list[str]]:
    """The peers that were measured, and the columns of their ratios."""
    found = {name: about["inputs"] for record in records for name, about in record["contenders"].items()}
    ours = {f"{name} {mode}" for name in family.weights for mode in MODES}
    peers = [name for name in found if name not in ours]
    columns = []
    for name in peers:
        columns.append(f"{name} / {MATCHING[found[name]]}")
        if name == "float32":
            columns.append(f"{name} / fast")
    if PLAIN in family.weights:
        columns += [f"{mode} / no outliers" for mode in MODES]
    return peers, columns


def table(records: list[dict[str, Any]], family: Family) -> str:
    """One line for every shape, number of rows and weights of ours; all records have the same number of threads."""
    peers, columns = headings(records, family)
    lines = [["shape", "weights", "rows", "bits", "bandwidth", "exact ms", "fast ms", *columns]]
    for record in records:
        for ours in family.weights:
            exact, fast = (record["contenders"][f"{ours} {mode}"] for mode in MODES)
            milliseconds = [1e3 * statistics.median(mode["seconds"]) for mode in (exact, fast)]
            weights = int.__mul__(*(int(size) for size in record["shape"].split("x")))
            read = exact["bits_per_weight"] / 8 * weights / (milliseconds[1] / 1e3)
            lines.append(
                [
                    record["shape"],
                    ours,
                    str(record["rows"]),
                    f"{exact['bits_per_weight']:.2f}",
                    f"{read / record['read_bandwidth_bytes_per_second']:.0%}",
                    *(f"{number:.3f}" for number in milliseconds),
                    *ratios(record, ours, peers),
                ]
            )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def show(records: list[dict[str, Any]], threads: list[int]) -> None:
    """All tables."""
    for count in threads:
        for name, family in FAMILIES.items():
            chosen = [record for record in records if record["threads"] == count and record["family"] == name]
            if chosen:
                print(f"\n{count} thread{'s' * (count > 1)}, {name}; peer / ours, median [least, largest]")
                print(table(chosen, family))


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    rotate_bytes = arguments.rotate_mb << 20 or max(256 << 20, min(1 << 30, 2 * last_level_cache_bytes()))
    libraries = list(available(arguments.peers, arguments.llama_cpp_lib))
    reads = {threads: read_bandwidth(threads, max(1 << 29, rotate_bytes)) for threads in arguments.threads}
    about: dict[str, Any] = {
        "instruction_set": instruction_sets()[-1],
        "torch": torch.__version__,
        "rotate_bytes": rotate_bytes,
        "rounds": arguments.rounds,
        "read_bandwidth_bytes_per_second": reads,
        "before": interference(),
    }
    print(f"instruction set {about['instruction_set']}, torch {torch.__version__}, rotation {rotate_bytes >> 20} MB")
    print("read bandwidth " + ", ".join(f"{n} threads {value / 1e9:.1f} GB/s" for n, value in reads.items()))
    sizes = (arguments.rounds, arguments.sample_seconds)
    bench = Bench(arguments.threads, arguments.rows, libraries, arguments.llama_cpp_lib, *sizes)
    records: list[dict[str, Any]] = []
    started = time.perf_counter()
    with torch.inference_mode():
        for shape in arguments.shapes:
            out_features, in_features = (int(size) for size in shape.split("x"))
            case = Case.of(out_features, in_features, rotate_bytes)
            for name in arguments.families:
                records += bench.records(case, name, reads)
                # Copies of weights take gigabytes, and ours and torch's lie in cycles of references.
                gc.collect()
                print(f"{time.perf_counter() - started:6.0f} s: {shape} {name}", flush=True)
                if arguments.json:
                    about["after"] = interference()
                    arguments.json.write_text(json.dumps({"about": about, "records": records}))
    show(records, arguments.threads)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = partial(str.split, sep=",")
    parser.add_argument(
        "--quick", action="store_true", help="two shapes, few rows and rounds, little rotation: a minute"
    )
    parser.add_argument("--threads", type=lambda text: [int(n) for n in numbers(text)])
    parser.add_argument("--rows", type=lambda text: [int(n) for n in numbers(text)])
    parser.add_argument("--shapes", type=numbers)
    parser.add_argument("--families", type=numbers)
    parser.add_argument("--peers", type=numbers, default=LIBRARIES, help="of " + ",".join(LIBRARIES))
    parser.add_argument("--llama-cpp-lib", metavar="DIR", help="folder of libggml-base and libggml-cpu")
    parser.add_argument("--rotate-mb", type=int, help="default: 256, or twice the last-level cache, 1024 at most")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--sample-seconds", type=float)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.threads = arguments.threads or ([1] if quick else [1, 2])
    arguments.rows = arguments.rows or ([1, 16] if quick else [1, 4, 16, 64, 512])
    arguments.shapes = arguments.shapes or ("4096x4096,576x1536" if quick else SHAPES).split(",")
    arguments.families = arguments.families or ["4-bit", "3-bit", "2-bit", "spqr"]
    arguments.rotate_mb = arguments.rotate_mb or (64 if quick else 0)
    arguments.rounds = arguments.rounds or (3 if quick else ROUNDS)
    arguments.sample_seconds = arguments.sample_seconds or (5e-3 if quick else SAMPLE_SECONDS)
    for option, known in (("peers", LIBRARIES), ("families", list(FAMILIES))):
        if odd := [name for name in getattr(arguments, option) if name not in known]:
            parser.error(f"--{option}: {', '.join(odd)} is not among {', '.join(known)}")
    return arguments


if __name__ == "__main__":
    main()
