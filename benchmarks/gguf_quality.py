"""GGUF's types filled by bitwright and by llama.cpp's own quantizer: quality at equal bytes, one table.

    python benchmarks/gguf_quality.py --calibration-text FILE --text FILE [--bits 2,3,4,6] [--methods rtn,gptq]

Every linear of the blocks takes the type that `--set grid=gguf` has for the number of bits; theirs are rounded to
the same types by ggml (`ggml_quantize_chunk`), plainly and with an importance matrix: the mean squares of the inputs on
the very windows that bitwright calibrates on. Where rows are no superblocks, llama.cpp's quantizer itself would take
IQ4_NL for 2 and 3 bits, of the same size as Q4_0: it has rows of its own. Embeddings and head stay in float. What the
file decodes to is measured, in float32, on windows of another text. Needs llama-cpp-python (see `cpu_peers/ggml.py`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from ctypes import c_float, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from cpu_peers import ggml
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from quality_vs_peers import HEADINGS, WORK, Bench, Result, add_texts, line, ours, prepare
from torch import Tensor, nn

from bitwright.checkpoint.load import load_model
from bitwright.evaluate import compare
from bitwright.formats.gguf import gguf_grid, gguf_type

# llama.cpp's own stand-in for 2 and 3 bits where rows are no superblocks; 4.5 bits, as Q4_0.
STAND_IN = "IQ4_NL"


def main() -> None:
    """Print the table, row by row."""
    arguments = parse_arguments()
    bench = prepare(arguments)
    squares = mean_squares(load_model(str(bench.inputs.model)).model, bench.calibration.ids)
    print(f"| {' | '.join(HEADINGS)} |")
    print("|---" * len(HEADINGS) + "|", flush=True)
    for bits in arguments.bits:
        for stand_in in (None, STAND_IN) if bits in (2, 3) else (None,):
            for importance in (None, squares):
                show(theirs(bench, bits, stand_in, importance), bench)
        for method in arguments.methods:
            show(ours(f"{method}:w{bits}a16:grid=gguf", arguments, bench.inputs), bench)
    print(f"\n{bench.windows.protocol}")


def parse_arguments() -> argparse.Namespace:
    """The command line; lists are separated by commas."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_texts(parser, calibration_windows=16)
    parser.add_argument("--bits", type=lambda text: [int(part) for part in text.split(",")], default=[2, 3, 4, 6])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["rtn", "gptq"])
    parser.add_argument("--work", type=Path, default=WORK, help="what is kept between runs")
    return parser.parse_args()


def show(result: Result, bench: Bench) -> None:
    """Measure and print one row."""
    print(line(result, compare(result.model, bench.reference, bench.windows)), flush=True)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Those of the blocks, by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head")


def mean_squares(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Mean of x^2 for every column of every linear of the blocks over `windows` [windows, tokens], float32 [in]."""
    found: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found[name] = found.get(name, 0) + arguments[0].flatten(0, -2).square().sum(0, dtype=torch.float64)

    for name, module in linears(model):
        module.register_forward_pre_hook(partial(look, name))
    with torch.no_grad():
        for ids in windows:
            model(ids[None])
    return {name: (total / windows.numel()).float() for name, total in found.items()}


def theirs(bench: Bench, bits: int, stand_in: str | None, importance: dict[str, Tensor] | None) -> Result:
    """The float model with every linear rounded by ggml."""
    print(f"llama.cpp, {bits} bits", file=sys.stderr)
    library, model = ggml.load(None), load_model(str(bench.inputs.model)).model
    started, cpu_started = time.perf_counter(), time.process_time()
    total = nbytes = 0
    kinds = []
    for name, module in linears(model):
        weight = module.weight.detach()
        columns = weight.shape[1]
        kind = stand_in if stand_in and columns % 256 else gguf_type(gguf_grid(bits, columns), columns)
        raw = rounded(library, kind, weight, None if importance is None else importance[name])
        module.weight.data = torch.from_numpy(gguf.quants.dequantize(raw, GGMLQuantizationType[kind]).copy())
        total, nbytes = total + weight.numel(), nbytes + raw.nbytes
        if kind not in kinds:
            kinds.append(kind)
    return Result(
        method="llama.cpp" + ("" if importance is None else ", importance matrix"),
        scheme=" + ".join(kinds),
        model=model,
        bits_per_weight=8 * nbytes / total,
        seconds=time.perf_counter() - started,
        processor_seconds=time.process_time() - cpu_started,
        notes={},
    )


def rounded(library: Any, kind: str, weight: Tensor, importance: Tensor | None) -> np.ndarray:
    """Rows of `weight` [out, in] as blocks of `kind`, uint8 [out, bytes of a row]."""
    values = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
    number = GGMLQuantizationType[kind]
    block, block_bytes = GGML_QUANT_SIZES[number]
    raw = np.empty((values.shape[0], values.shape[1] // block * block_bytes), dtype=np.uint8)
    weighing = None
    if importance is not None:
        weighing = (c_float * values.shape[1]).from_buffer(np.ascontiguousarray(importance.numpy()))
    places = values.ctypes.data_as(c_void_p), raw.ctypes.data_as(c_void_p)
    library.quantize_chunk(int(number), *places, 0, *values.shape, weighing)
    return raw


if __name__ == "__main__":
    main()
