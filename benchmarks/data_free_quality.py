"""Data-free methods on off-grid SmolLM2: quality against bits on disk, next to the hqq package's own result.

    python benchmarks/data_free_quality.py [--text FILE] [--windows 8] [--length 2048] [--only NAME ...]

Every row of ours is the whole journey: quantize to disk, read back, evaluate the packed model against the float
model on the same tokens. The `hqq` rows (install the package to see them) quantize the same float weights with
the released code, `axis=1`, and count the bytes of its packed codes and of scales and zeros in float16.
Evaluation text must not be used for anything else; the methods here see no text at all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitwright
from bitwright.calibration.text import load_text
from bitwright.checkpoint.load import load_model
from bitwright.evaluate import EvalOptions, Evaluation, evaluate_model

SCHEMES = ("w4a16g64", "w4a16", "w3a16g64")
METHODS = ("rtn", "easyquant", "hqq", "easyquant-paper")
# What the same bits buy: round-to-nearest in smaller groups against outliers in larger ones.
EQUAL_BITS = (
    ("rtn", "w4a16g128", ()),
    ("rtn", "w4a16g32", ()),
    ("easyquant", "w4a16g64", ("outliers.n=2.85",)),
    ("rtn", "w3a16g32", ()),
    ("easyquant", "w3a16g64", ("outliers.n=2.88",)),
)


class Remembered:
    """The float model, run once per window."""

    def __init__(self, model: Callable[[Tensor], Any]):
        """Nothing is run yet."""
        self.model, self.logits = model, {}

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of one window."""
        key = tuple(ids[0, :32].tolist())
        if key not in self.logits:
            self.logits[key] = self.model(ids).logits
        return self.logits[key]


def ours(method: str, scheme: str, overrides: Sequence[str] = ()) -> tuple[nn.Module, float, float, float]:
    """(packed model, bits per weight, bytes, seconds) of the whole journey."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        summary = bitwright.quantize("demo", out, recipe=bitwright.load_recipe(method, scheme, overrides=overrides))
        return load_model(str(out)).model, summary.bits_per_weight, summary.bytes, summary.seconds


def released_hqq(scheme: str) -> tuple[nn.Module, float, float, float]:
    """The same for the hqq package: the float model with its weights replaced by HQQ's."""
    from hqq.core.quantize import Quantizer

    parsed = bitwright.Scheme.parse(scheme)
    model = load_model("demo").model
    nbytes = weights = 0
    started = time.perf_counter()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        weight = module.weight.data
        codes, meta = Quantizer.quantize(
            weight, nbits=parsed.weight_bits, group_size=parsed.group_size, axis=1, optimize=True,
            round_zero=False, device="cpu", compute_dtype=torch.float32,
        )  # fmt: skip
        # 3-bit codes are counted densely, although the package pads ten of them to a word.
        nbytes += weight.numel() * parsed.weight_bits / 8 + 2 * (meta["scale"].numel() + meta["zero"].numel())
        weights += weight.numel()
        module.weight.data = Quantizer.dequantize(codes, meta).float()
    return model, 8 * nbytes / weights, nbytes, time.perf_counter() - started


def rows() -> Iterator[tuple[str, str, Callable[[], tuple[nn.Module, float, float, float]]]]:
    """(method, scheme, how to make it)."""
    for scheme in SCHEMES:
        for method in METHODS:
            if method != "easyquant-paper" or scheme == "w4a16":
                yield method, scheme, partial(ours, method, scheme)
        yield "hqq package", scheme, partial(released_hqq, scheme)
    for method, scheme, overrides in EQUAL_BITS:
        yield " ".join((method, *overrides)), scheme, partial(ours, method, scheme, overrides)


def line(method: str, scheme: str, bits: float, seconds: float, found: Evaluation) -> str:
    """One table row."""
    interval = f"[{found.delta_ln_ppl_low or float('nan'):.4f}, {found.delta_ln_ppl_high or float('nan'):.4f}]"
    return (
        f"| {method} | {scheme} | {bits:.3f} | {found.perplexity:.3f} | {found.kl_mean_nats:.4f} | "
        f"{found.kl_p99_nats:.2f} | {found.top1_agreement:.2%} | {found.delta_ln_ppl:.4f} {interval} | {seconds:.1f} |"
    )


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--only", nargs="*", help="'method scheme' pairs, such as 'rtn w4a16'")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text, options = load_text(arguments.text), EvalOptions(windows=arguments.windows, length=arguments.length)
    base = load_model("demo")
    reference, results = Remembered(base.model), []
    print("| method | scheme | bits/weight | perplexity | mean KL | p99 KL | top-1 | ln ppl difference | seconds |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for method, scheme, make in rows():
        if arguments.only and f"{method} {scheme}" not in arguments.only:
            continue
        try:
            model, bits, nbytes, seconds = make()
        except ImportError:
            print(f"| {method} | {scheme} | not installed |")
            continue
        found = evaluate_model(model, base.tokenizer, text, reference=reference, options=options)
        print(line(method, scheme, bits, seconds, found), flush=True)
        results.append(
            {"method": method, "scheme": scheme, **found.to_json(), "bits_per_weight": bits, "bytes": nbytes}
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    print(f"float perplexity {results[0]['float_perplexity']:.3f}; {results[0]['protocol']}")


if __name__ == "__main__":
    main()
