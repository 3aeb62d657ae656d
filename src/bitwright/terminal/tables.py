"""What the command line shows: tables of plans, summaries, evaluations, and what is to be said of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.checkpoint.place import write_output
from bitwright.terminal.progress import Told, duration, size
from bitwright.terminal.text import Sheet, Styled, console, error_console, say

if TYPE_CHECKING:
    from bitwright.analyze.model import Report
    from bitwright.analyze.needs import AnalysisNeeds
    from bitwright.analyze.target import TargetResult
    from bitwright.analyze.thresholds import Breach
    from bitwright.bench import Bench
    from bitwright.evaluate import Evaluation
    from bitwright.export.engines import Obstacle
    from bitwright.export.folder import ExportResult, ExportRow
    from bitwright.inspect import Inspection
    from bitwright.machine import Estimate
    from bitwright.pipeline import Summary
    from bitwright.plan import Plan
    from bitwright.rows import Row

# Sizes that differ between tensors of one kind, such as their numbers of outliers.
_NUMBER = re.compile(r"\d+")


@contextmanager
def interruptible(shown: Told) -> Iterator[None]:
    """Ctrl-C within ends with a word on how to go on, and status 130."""
    try:
        yield
    except KeyboardInterrupt:
        shown.stop()
        say("interrupted; run the same command again to continue", on=error_console)
        raise SystemExit(130) from None


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write a command's result to `path`, where one was asked for."""
    if path is not None:
        write_output(path, json.dumps(content, indent=1, default=str) + "\n")


def show_plan(plan: Plan, needs: Estimate, every_row: bool) -> None:
    """One line per kind of tensor (or per tensor), totals, and what the job will need."""
    title = f"{plan.source}: {plan.bits_per_weight:.3f} bits per quantized weight (expected)"
    sheet = Sheet(title, ("tensor", "shape", "rule", "becomes"), ("tensors", "bits", "size"))
    for label, rows in _grouped(plan, every_row).items():
        nbytes, weights = sum(row.bytes for row in rows), sum(row.weights for row in rows)
        shape = "x".join(map(str, rows[0].shape))
        bits = f"{8 * nbytes / weights:.3f}" if weights else ""
        sheet.row(label, shape, rows[0].rule, _becomes(rows[0]), len(rows), bits, size(nbytes))
    sheet.show()
    if plan.kv_cache is not None:
        fixed = " with fixed scales for the keys and the values of each block, from calibration"
        say(f"KV cache: {plan.kv_cache.label()}{fixed if plan.kv_cache.grid == 'fp8' else ''}.")
    show_expectation(plan, needs)


def show_expectation(plan: Plan, needs: Estimate, stderr: bool = False) -> None:
    """One line: what becomes of the bytes, and what the job will need; and what the model has no use for."""
    on = error_console if stderr else console
    if plan.left_out:
        more = f" and {len(plan.left_out) - 1} more" if len(plan.left_out) > 1 else ""
        say(f"Left out, as the model has no use for it: {plan.left_out[0]}{more}.", on=on)
    say(
        f"{size(plan.source_bytes)} become about {size(plan.bytes)}. Expected with {needs.workers} workers: "
        f"{duration(needs.seconds)}, peak memory {size(needs.peak_rss_bytes)}, disk {size(needs.disk_bytes)}.",
        on=on,
    )
    if needs.numeric_class is None:
        return
    from bitwright.rounding import columns

    say(f"Calibrated: equal to the last byte wherever {needs.numeric_class} add up.", on=on)
    if columns.backend() == "reference":
        reason = f"Error feedback runs in the slow PyTorch reference: {columns.backend_reason()}."
        say(Styled(reason, "yellow"), on=on)


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
    measured = [(record["sqnr_db"], record["tensor"]) for record in quantized if record["sqnr_db"] is not None]
    worst = min(measured, default=None)
    weights = sum(record["shape"][0] * record["shape"][1] for record in quantized)
    outliers = sum(record["outliers"] for record in quantized)
    columns = ("tensors", "bits per weight", "size", "worst SQNR", "outliers", "seconds", "peak memory")
    sheet = Sheet(summary.out, (), columns)
    sheet.row(
        f"{len(quantized)} of {len(summary.records)}",
        f"{summary.bits_per_weight:.3f}",
        size(summary.bytes),
        "exact" if worst is None else f"{worst[0]:.2f} dB {worst[1]}",
        f"{outliers} ({100 * outliers / max(weights, 1):.2f} %)",
        f"{summary.seconds:.1f}",
        size(summary.peak_rss_bytes),
    )
    sheet.show()
    if summary.phases:
        say(f"of which {', '.join(f'{name} {seconds:.1f} s' for name, seconds in summary.phases.items())}.")
    fallbacks = [record["tensor"] for record in quantized if record["fallbacks"]]
    if fallbacks:
        say(Styled(f"{len(fallbacks)} fallbacks", "bold red"), f": {', '.join(fallbacks[:5])}")
    if summary.resumed_shards:
        say(f"{summary.resumed_shards} shards were already done.")
    for note in summary.notes:
        say(Styled(note, "yellow"))


def show_evaluation(model: str, evaluation: Evaluation) -> None:
    """The quality of a model, one measure per line."""
    sheet = Sheet(model, ("measure",), ("value",), header=False)
    for label, text in evaluation_lines(evaluation):
        sheet.row(label, text)
    sheet.show()


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
            say(Styled("damaged", "bold red"), f" {complaint}")
        return
    manifest = inspection.manifest
    title = f"{inspection.folder}: made from {manifest['source_label']}"
    sheet = Sheet(title, ("tensor", "spec"), ("bits", "outliers", "SQNR dB"))
    for record in manifest["tensors"]:
        if record["action"] != "quantize":
            continue
        weights = record["shape"][0] * record["shape"][1]
        sqnr = "exact" if record["sqnr_db"] is None else f"{record['sqnr_db']:.2f}"
        module = record["tensor"].removesuffix(".weight")
        spec = inspection.entries[module].spec.label()
        sheet.row(module, spec, f"{8 * record['bytes'] / weights:.3f}", record["outliers"], sqnr)
    sheet.show()
    say(f"{size(inspection.bytes)} of weights, {inspection.bits_per_weight:.3f} bits per quantized weight.")


def show_reached(reached: TargetResult) -> None:
    """What became of a target: how many tensors got which choice, every round, and the verdict."""
    sheet = Sheet(f"{reached.target}: {reached.out}", ("choice",), ("tensors", "bytes"))
    picks = list(reached.chosen.allocation.picks.values())
    for label in dict.fromkeys(option.choice.label for option in picks):
        some = [option.bytes for option in picks if option.choice.label == label]
        sheet.row(label, len(some), size(sum(some)))
    sheet.show()
    for number, one in enumerate(reached.rounds, start=1):
        said = f"KL {one.predicted_kl:.4g} predicted, {one.kl:.4g} measured, ln perplexity {one.delta_ln_ppl:+.4f}"
        say(f"round {number}: {one.bits_per_weight:.3f} bits per weight, {said}")
    for line in (reached.verdict, *reached.notes):
        say(line)


def show_needs(needs: AnalysisNeeds) -> None:
    """One line before an analysis: what it does, and what that will take."""
    took = f"{duration(needs.seconds)}, peak memory {size(needs.peak_rss_bytes)}"
    say(f"{', '.join(needs.parts)}. Expected: {took}.")


def show_analysis(report: Report, out: Path, broken: Sequence[Breach]) -> None:
    """The advice of a report with its evidence, where the report is, and limits that it does not keep."""
    for note in report.notes:
        say(note)
    for advice in report.advice:
        say(Styled(advice.rule, "dim" if advice.withheld else "bold"), f": {advice.verdict}")
        for line in advice.evidence:
            say(Styled(f"  {line}", "dim"))
    for breach in broken:
        say(Styled("limit not kept", "bold red"), f": {breach}")
    say(f"{out / 'report.html'}, report.json, recipe.toml; {duration(report.run.seconds)}")


def show_export(result: ExportResult) -> None:
    """What an export or import made: tensors and bytes by what became of them, and what was lost."""
    sheet = Sheet(f"{result.target}: {result.out}", ("tensors",), ("number", "from", "to"))
    for action, meaning in (
        ("exact", "codes as they are"),
        ("kept", "floats as they are"),
        ("float", "rounded"),
    ):
        rows = [row for row in result.rows if row.action == action]
        if rows:
            before, after = sum(row.source_bytes for row in rows), sum(row.bytes for row in rows)
            sheet.row(meaning, len(rows), size(before), size(after))
    sheet.show()
    for note in result.notes:
        say(note)
    folded: dict[str, list[ExportRow]] = {}
    for row in result.lossy:
        folded.setdefault(_NUMBER.sub("N", row.note), []).append(row)
    for rows in folded.values():
        more = f" ({len(rows)} such; --json FILE has all)" if len(rows) > 1 else ""
        say(Styled("lossy", "yellow"), f" {rows[0].line()}{more}")


def show_obstacles(engine: str, obstacles: list[Obstacle]) -> None:
    """What stands in an engine's way, modules of the same trouble folded."""
    if not obstacles:
        say(f"{engine} can load the result.")
        return
    folded: dict[tuple[str, bool], list[Obstacle]] = {}
    for found in obstacles:
        folded.setdefault((found.reason, found.certain), []).append(found)
    for (reason, certain), alike in folded.items():
        verdict = Styled(f"{engine} refuses", "bold red") if certain else Styled(f"{engine} may refuse", "yellow")
        more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        say(verdict, f" {alike[0].module}{more}: {reason}; {alike[0].remedy}")


def show_bench(result: Bench) -> None:
    """The speed of a model, one measure per line; what slowed it down."""
    sheet = Sheet(result.model, ("measure",), ("value",), header=False)
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
        sheet.row(label, text)
    sheet.show()
    if result.kernels_reason is not None:
        say(Styled(f"Products run in the slow PyTorch reference: {result.kernels_reason}.", "yellow"))
    elif result.path_reason is not None:
        say(f"Not on the lean path: {result.path_reason}.")
