"""What the command line shows: tables of plans, summaries, evaluations; progress with time left."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bitwright.checkpoint.place import write_output

if TYPE_CHECKING:
    from bitwright.analyze.model import Report
    from bitwright.analyze.needs import AnalysisNeeds
    from bitwright.analyze.target import TargetResult
    from bitwright.analyze.thresholds import Breach
    from bitwright.bench import Bench
    from bitwright.evaluate import Evaluation
    from bitwright.export.engines import Obstacle
    from bitwright.export.folder import ExportResult
    from bitwright.inspect import Inspection
    from bitwright.machine import Estimate
    from bitwright.pipeline import Summary
    from bitwright.plan import Plan
    from bitwright.rows import Row

# Without a terminal there is no width to ask for; tables in logs should not be folded.
console = Console(width=None if sys.stdout.isatty() else 140)
error_console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


def size(nbytes: float) -> str:
    """Bytes as people read them, decimal units."""
    for unit in ("B", "kB", "MB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A bar with time elapsed and left; silent when the output is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    with Progress(*columns, console=error_console, disable=not error_console.is_terminal) as progress:
        progress.add_task(description, total=None, what="")
        yield progress


@contextmanager
def interruptible(bar: Progress) -> Iterator[None]:
    """Ctrl-C within ends with a word on how to go on, and status 130."""
    try:
        yield
    except KeyboardInterrupt:
        bar.stop()
        error_console.print("interrupted; run the same command again to continue")
        raise SystemExit(130) from None


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write a command's result to `path`, where one was asked for."""
    if path is not None:
        write_output(path, json.dumps(content, indent=1, default=str) + "\n")


def show_plan(plan: Plan, needs: Estimate, every_row: bool) -> None:
    """One line per kind of tensor (or per tensor), totals, and what the job will need."""
    table = Table(title=f"{plan.source}: {plan.bits_per_weight:.3f} bits per quantized weight (expected)")
    for heading in ("tensor", "shape", "rule", "becomes"):
        table.add_column(heading, overflow="fold")
    for heading in ("tensors", "bits", "size"):
        table.add_column(heading, justify="right")
    for label, rows in _grouped(plan, every_row).items():
        nbytes, weights = sum(row.bytes for row in rows), sum(row.weights for row in rows)
        shape = "x".join(map(str, rows[0].shape))
        bits = f"{8 * nbytes / weights:.3f}" if weights else ""
        table.add_row(label, shape, rows[0].rule, _becomes(rows[0]), str(len(rows)), bits, size(nbytes))
    console.print(table)
    if plan.kv_cache is not None:
        fixed = " with fixed scales for the keys and the values of each block, from calibration"
        console.print(
            f"KV cache: {plan.kv_cache.label()}{fixed if plan.kv_cache.grid == 'fp8' else ''}.", highlight=False
        )
    show_expectation(plan, needs, console)


def show_expectation(plan: Plan, needs: Estimate, on: Console) -> None:
    """One line: what becomes of the bytes, and what the job will need."""
    on.print(
        f"{size(plan.source_bytes)} become about {size(plan.bytes)}. Expected with {needs.workers} workers: "
        f"{duration(needs.seconds)}, peak memory {size(needs.peak_rss_bytes)}, disk {size(needs.disk_bytes)}.",
        highlight=False,
    )
    if needs.numeric_class is None:
        return
    from bitwright.rounding import columns

    on.print(f"Calibrated: equal to the last byte wherever {needs.numeric_class} add up.", highlight=False)
    if columns.backend() == "reference":
        on.print(f"[yellow]Error feedback runs in the slow PyTorch reference: {columns.backend_reason()}.[/]")


def _grouped(plan: Plan, every_row: bool) -> dict[str, list[Row]]:
    """Rows by what is shown on one line: equal tensors of all blocks fold into one unless `every_row`."""
    groups: dict[str, list[Row]] = {}
    prefix = plan.adapter.blocks + "."
    counts: dict[tuple[str, ...], str] = {}
    for row in plan.rows():
        label = row.tensor.removesuffix(".weight")
        if not every_row and label.startswith(prefix):
            label = f"every block: {label[len(prefix) :].partition('.')[2]}"
        key = (label, str(row.shape), row.rule, _becomes(row))
        shown = counts.setdefault(key, label if label not in groups else f"{label} ({len(groups)})")
        groups.setdefault(shown, []).append(row)
    return groups


def _becomes(row: Row) -> str:
    if row.action == "quantize" and row.spec is not None and row.method is not None:
        return f"{row.method.name} {row.spec.label()}"
    return "tied" if row.stored_dtype is None else f"kept, {str(row.stored_dtype).removeprefix('torch.')}"


def show_summary(summary: Summary) -> None:
    """What quantizing made."""
    quantized = [record for record in summary.records if record["action"] == "quantize"]
    table = Table(title=f"{summary.out}")
    for heading in ("tensors", "bits per weight", "size", "worst SQNR", "outliers", "seconds", "peak memory"):
        table.add_column(heading, justify="right")
    measured = [(record["sqnr_db"], record["tensor"]) for record in quantized if record["sqnr_db"] is not None]
    worst = min(measured, default=None)
    weights = sum(record["shape"][0] * record["shape"][1] for record in quantized)
    outliers = sum(record["outliers"] for record in quantized)
    table.add_row(
        f"{len(quantized)} of {len(summary.records)}",
        f"{summary.bits_per_weight:.3f}",
        size(summary.bytes),
        "exact" if worst is None else f"{worst[0]:.2f} dB {worst[1]}",
        f"{outliers} ({100 * outliers / max(weights, 1):.2f} %)",
        f"{summary.seconds:.1f}",
        size(summary.peak_rss_bytes),
    )
    console.print(table)
    if summary.phases:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in summary.phases.items())
        console.print(f"of which {phases}.", highlight=False)
    fallbacks = [record["tensor"] for record in quantized if record["fallbacks"]]
    if fallbacks:
        console.print(f"[bold red]{len(fallbacks)} fallbacks[/]: {', '.join(fallbacks[:5])}")
    if summary.resumed_shards:
        console.print(f"{summary.resumed_shards} shards were already done.")
    for note in summary.notes:
        console.print(escape(note), style="yellow", highlight=False)


def show_evaluation(model: str, evaluation: Evaluation) -> None:
    """The quality of a model, one measure per line."""
    table = Table(title=model, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, text in evaluation_lines(evaluation):
        table.add_row(label, text)
    console.print(table)


def evaluation_lines(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(measure, value) pairs of what was measured."""
    values = evaluation.to_json()
    low, high = values["delta_ln_ppl_low"], values["delta_ln_ppl_high"]
    interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
    shown: list[tuple[str, str, Callable[[Any], str]]] = [
        ("size on disk", "bytes", size),
        ("bits per weight", "bits_per_weight", "{:.3f}".format),
        ("perplexity", "perplexity", "{:.4f}".format),
        ("float perplexity", "float_perplexity", "{:.4f}".format),
        ("ln perplexity difference [95 %]", "delta_ln_ppl", lambda value: f"{value:.4f}{interval}"),
        ("mean KL (nats)", "kl_mean_nats", "{:.5f}".format),
        ("p99 KL (nats)", "kl_p99_nats", "{:.4f}".format),
        ("top-1 agreement", "top1_agreement", "{:.2%}".format),
        ("protocol", "protocol", str),
        ("windows", "windows", str),
        ("seconds", "seconds", "{:.1f}".format),
    ]
    return [(label, show(values[key])) for label, key, show in shown if values[key] is not None]


def show_inspection(inspection: Inspection) -> None:
    """What a quantized folder holds."""
    if inspection.complaints:
        for complaint in inspection.complaints:
            console.print(f"[bold red]damaged[/] {complaint}")
        return
    manifest = inspection.manifest
    table = Table(title=f"{inspection.folder}: made from {manifest['source_label']}")
    for heading in ("tensor", "spec"):
        table.add_column(heading, overflow="fold")
    for heading in ("bits", "outliers", "SQNR dB"):
        table.add_column(heading, justify="right")
    for record in manifest["tensors"]:
        if record["action"] != "quantize":
            continue
        weights = record["shape"][0] * record["shape"][1]
        sqnr = "exact" if record["sqnr_db"] is None else f"{record['sqnr_db']:.2f}"
        module = record["tensor"].removesuffix(".weight")
        spec = inspection.entries[module].spec.label()
        table.add_row(module, spec, f"{8 * record['bytes'] / weights:.3f}", str(record["outliers"]), sqnr)
    console.print(table)
    console.print(f"{size(inspection.bytes)} of weights, {inspection.bits_per_weight:.3f} bits per quantized weight.")


def show_reached(reached: TargetResult) -> None:
    """What became of a target: how many tensors got which choice, every round, and the verdict."""
    table = Table(title=f"{reached.target}: {reached.out}")
    table.add_column("choice")
    for heading in ("tensors", "bytes"):
        table.add_column(heading, justify="right")
    picks = list(reached.chosen.allocation.picks.values())
    for label in dict.fromkeys(option.choice.label for option in picks):
        some = [option.bytes for option in picks if option.choice.label == label]
        table.add_row(escape(label), str(len(some)), size(sum(some)))
    console.print(table)
    for number, one in enumerate(reached.rounds, start=1):
        said = f"KL {one.predicted_kl:.4g} predicted, {one.kl:.4g} measured, ln perplexity {one.delta_ln_ppl:+.4f}"
        console.print(f"round {number}: {one.bits_per_weight:.3f} bits per weight, {said}", highlight=False)
    for line in (reached.verdict, *reached.notes):
        console.print(escape(line), highlight=False)


def show_needs(needs: AnalysisNeeds) -> None:
    """One line before an analysis: what it does, and what that will take."""
    took = f"{duration(needs.seconds)}, peak memory {size(needs.peak_rss_bytes)}"
    console.print(f"{', '.join(needs.parts)}. Expected: {took}.", highlight=False)


def show_analysis(report: Report, out: Path, broken: Sequence[Breach]) -> None:
    """The advice of a report with its evidence, where the report is, and limits that it does not keep."""
    for note in report.notes:
        console.print(escape(note), highlight=False)
    for advice in report.advice:
        style = "dim" if advice.withheld else "bold"
        console.print(f"[{style}]{escape(advice.rule)}[/]: {escape(advice.verdict)}", highlight=False)
        for line in advice.evidence:
            console.print(f"  {escape(line)}", style="dim", highlight=False)
    for breach in broken:
        console.print(f"[bold red]limit not kept[/]: {escape(str(breach))}", highlight=False)
    console.print(f"{out / 'report.html'}, report.json, recipe.toml; {duration(report.run.seconds)}", highlight=False)


def show_export(result: ExportResult) -> None:
    """What an export or import made: tensors and bytes by what became of them, and what was lost."""
    table = Table(title=f"{result.target}: {result.out}")
    table.add_column("tensors")
    for heading in ("number", "from", "to"):
        table.add_column(heading, justify="right")
    for action, meaning in (
        ("exact", "codes as they are"),
        ("kept", "floats as they are"),
        ("float", "rounded"),
    ):
        rows = [row for row in result.rows if row.action == action]
        if rows:
            before, after = sum(row.source_bytes for row in rows), sum(row.bytes for row in rows)
            table.add_row(meaning, str(len(rows)), size(before), size(after))
    console.print(table)
    for line in (*result.notes, *(row.line() for row in result.lossy)):
        console.print(f"[yellow]lossy[/] {escape(line)}" if line not in result.notes else escape(line), highlight=False)


def show_obstacles(engine: str, obstacles: list[Obstacle]) -> None:
    """What stands in an engine's way, modules of the same trouble folded."""
    if not obstacles:
        console.print(f"{engine} can load the result.")
        return
    folded: dict[tuple[str, str, bool], list[str]] = {}
    for found in obstacles:
        folded.setdefault((found.reason, found.remedy, found.certain), []).append(found.module)
    for (reason, remedy, certain), modules in folded.items():
        verdict = f"[bold red]{engine} refuses[/]" if certain else f"[yellow]{engine} may refuse[/]"
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        console.print(f"{verdict} {escape(modules[0])}{more}: {escape(reason)}; {escape(remedy)}", highlight=False)


def show_bench(result: Bench) -> None:
    """The speed of a model, one measure per line; what slowed it down."""
    table = Table(title=result.model, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    share, weights = result.read_bandwidth_share, result.weight_bytes_per_token
    for label, text in (
        (f"decode, {result.new_tokens} tokens", f"{result.decode_tokens_per_second:.1f} tokens/s"),
        (f"prefill, {result.prompt_tokens} tokens", f"{result.prefill_tokens_per_second:.1f} tokens/s"),
        ("weights read per token", "unknown" if weights is None else size(weights)),
        ("memory read at", f"{size(result.read_bandwidth_bytes_per_second)}/s"),
        ("share of that in decode", "unknown" if share is None else f"{share:.0%}"),
        ("peak memory", size(result.peak_rss_bytes)),
        ("path, kernels, mode", f"{result.path}, {result.kernels}, {result.mode}"),
        ("threads", str(result.threads)),
    ):
        table.add_row(label, text)
    console.print(table)
    if result.kernels_reason is not None:
        console.print(f"[yellow]Products run in the slow PyTorch reference: {result.kernels_reason}.[/]")
    elif result.path_reason is not None:
        console.print(f"Not on the lean path: {result.path_reason}.", highlight=False, markup=False)
