"""Bits allocated by sensitivity next to the same everywhere, at equal bytes: one table.

    python benchmarks/allocation.py --calibration-text FILE --text FILE [--uniform spqr:w3a16:3.5,gptq:w3a16g64,...]
        [--choices spqr:w3a16:outliers.share=0.02,...] [--measures fisher,hessian_error] [--json FILE]

Every uniform recipe, METHOD:SCHEME[:bits per weight][:key=value], is quantized as it is; then its bytes are dealt out
among the choices by each cheap measure, quantized and measured in the same way: KL to the float model on windows of
another text. Before the table, how the cheap measures agree with the measured KL of single tensors.

Sensitivities are measured once, on the first calibration windows, and kept in the work folder. Bytes are those of the
quantized tensors on disk, outliers as they were kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data_free_quality import Remembered
from quality_vs_peers import add_texts

import bitwright
from bitwright import Recipe
from bitwright.analyze.allocate import allocate, allocated_recipe
from bitwright.analyze.choices import Choice, default_choices, parse_choice
from bitwright.analyze.sensitivity import MEASURES, Cost, Probes, Run, Sensitivity, measure_sensitivity
from bitwright.calibration.overlap import fingerprints, overlap
from bitwright.calibration.text import load_text
from bitwright.calibration.tokens import Calibration, calibration_windows
from bitwright.checkpoint.load import load_model, load_tokenizer
from bitwright.checkpoint.open import open_source
from bitwright.evaluate import Windows, compare, paired_interval, token_windows

WORK = Path(__file__).parents[1] / "build" / "allocation"
UNIFORM = "spqr:w2a16:3.0,gptq:w3a16,spqr:w3a16:3.5,gptq:w3a16g32,spqr:w3a16:4.0,gptq:w4a16g128"
HEADINGS = ("recipe", "bits/weight", "bytes", "predicted KL", "mean KL", "p99 KL", "ln ppl difference", "seconds")


@dataclass(frozen=True)
class Bench:
    """The float model, and what everything is measured with."""

    model: str
    reference: Remembered
    windows: Windows
    base: Recipe


def main() -> None:
    """Print the agreement of the measures, then the table, row by row."""
    arguments = parse_arguments()
    choices = tuple(parse_choice(text) for text in arguments.choices) or default_choices()
    bench, sensitivity = prepare(arguments, choices)
    agreement(sensitivity)
    scales = sensitivity.scales()
    print(f"| {' | '.join(HEADINGS)} |")
    print("|---" * len(HEADINGS) + "|", flush=True)
    found: list[dict[str, Any]] = []
    for asked in arguments.uniform:
        recipe = uniform_recipe(asked, bench.base)
        same = Choice(recipe.method, recipe.scheme)
        predicted = math.fsum(scales[cost.tensor] * cost.fisher for cost in sensitivity.costs if cost.choice == same)
        row = measure(f"uniform {asked}", recipe, bench, predicted or None)
        budget = row["bytes"]
        found.append(row)
        for name in arguments.measures:
            try:
                allocation = allocate(sensitivity.options(name), max_bytes=budget)
            except bitwright.PlanError as error:
                print(f"not measured: {error}", file=sys.stderr)
                continue
            allocated = allocated_recipe(allocation, bench.base)
            found.append(measure(f"allocated, {name}", allocated, bench, allocation.loss))
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    print(f"\n{bench.windows.protocol}")


def parse_arguments() -> argparse.Namespace:
    """The command line; lists are separated by commas."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_texts(parser)
    parser.add_argument("--sensitivity-windows", type=int, default=16, help="of those, the first so many")
    parser.add_argument("--probes", type=int, default=256, help="tensors whose KL is measured by themselves")
    parser.add_argument("--probe-tokens", type=int, default=256, help="of each window for that")
    parser.add_argument("--probe-windows", type=int, default=2, help="of the calibration text, which it does not see")
    parser.add_argument("--choices", type=_list, default=[], help="without it, those of `bitwright quantize`")
    parser.add_argument("--uniform", type=_list, default=_list(UNIFORM))
    parser.add_argument("--measures", type=_list, default=["fisher"], help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--work", type=Path, default=WORK, help="where sensitivities are kept between runs")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def prepare(arguments: argparse.Namespace, choices: tuple[Choice, ...]) -> tuple[Bench, Sensitivity]:
    """The float model and the windows, and the sensitivity of every tensor to every choice.

    Raises:
        SystemExit: the calibration windows are part of the text to measure on.
    """
    source = open_source(arguments.model)
    text = "builtin" if arguments.calibration_text is None else str(arguments.calibration_text.resolve())
    settings = Calibration(text=text, windows=arguments.calibration_windows, window_tokens=arguments.calibration_tokens)
    base = Recipe(method="rtn", scheme="w4a16", seed=arguments.seed, calibration=settings)
    more = settings.model_copy(update={"windows": settings.windows + arguments.probe_windows})
    tokenizer = load_tokenizer(source)
    ids = calibration_windows(more, tokenizer, seed=arguments.seed).ids
    windows = token_windows(tokenizer, load_text(arguments.text), arguments.length, arguments.windows)
    if count := overlap(windows.ids, fingerprints(ids)):
        raise SystemExit(f"{count} calibration windows are part of the text to measure on; give two different texts")
    own = ids[: settings.windows][: arguments.sensitivity_windows]
    held = ids[settings.windows :, : arguments.probe_tokens]
    probes = Probes(held, arguments.probes, arguments.seed) if arguments.probes else None
    labels = [choice.label for choice in choices]
    key = [source.fingerprint(), labels, own.tolist(), held.tolist(), arguments.probes, bitwright.__version__]
    path = arguments.work / f"sensitivity-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.json"
    if path.exists():
        rows = json.loads(path.read_text())
        sensitivity = Sensitivity(tuple(Cost(**row | {"choice": choices[row["choice"]]}) for row in rows))
    else:
        started = time.perf_counter()
        arguments.work.mkdir(parents=True, exist_ok=True)
        run = Run(probes, base, arguments.work, lambda what: print(what, file=sys.stderr, flush=True))
        sensitivity = measure_sensitivity(source, choices, own, run)
        numbers = {choice: number for number, choice in enumerate(choices)}
        path.write_text(json.dumps([vars(cost) | {"choice": numbers[cost.choice]} for cost in sensitivity.costs]))
        print(f"sensitivity: {time.perf_counter() - started:.0f} s")
    return Bench(arguments.model, Remembered(load_model(arguments.model).model), windows, base), sensitivity


def agreement(sensitivity: Sensitivity) -> None:
    """Kendall's tau of every cheap measure against the measured KL, and their ratio."""
    for measure_name in MEASURES:
        tau, within = sensitivity.tau(measure_name), sensitivity.tau_within(measure_name)
        if tau is not None and within is not None:
            print(
                f"{measure_name}: tau {tau:.3f} over all, {within:.3f} within a choice, {len(sensitivity.measured)} "
                f"tensors; measured / {measure_name} {sensitivity.scale(measure_name):.3g} in the median"
            )


def uniform_recipe(asked: str, base: Recipe) -> Recipe:
    """The recipe of `name:scheme[:bits][:key=value]`."""
    method, scheme, *settings = asked.split(":")
    overrides = [value if "=" in value else f"bits_per_weight={float(value)}" for value in settings]
    recipe = bitwright.load_recipe(method, scheme, None, overrides)
    return recipe.model_copy(update={"seed": base.seed, "calibration": base.calibration})


def measure(label: str, recipe: Recipe, bench: Bench, predicted: float | None) -> dict[str, Any]:
    """Quantize, measure, print and return one row."""
    print(label, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        summary = bitwright.quantize(bench.model, out, recipe=recipe)
        with torch.no_grad():
            divergence = compare(load_model(str(out)).model, bench.reference, bench.windows)
    differences = divergence.losses - divergence.reference_losses
    row = {
        "recipe": label,
        "bits_per_weight": summary.bits_per_weight,
        "bytes": sum(record["bytes"] for record in summary.records if record["action"] == "quantize"),
        "predicted_kl": predicted,
        "kl_mean_nats": divergence.kl_mean,
        "kl_mean_interval": paired_interval(divergence.kl.mean(1)),
        "kl_p99_nats": divergence.kl_quantiles((0.99,))[0],
        "delta_ln_ppl": float(differences.mean()),
        "delta_interval": paired_interval(differences),
        "kl_by_window": divergence.kl.mean(1).tolist(),
        "seconds": summary.seconds,
    }
    cells = (
        label,
        f"{row['bits_per_weight']:.3f}",
        str(row["bytes"]),
        "" if predicted is None else f"{predicted:.4f}",
        f"{row['kl_mean_nats']:.4f}{_interval(row['kl_mean_interval'])}",
        f"{row['kl_p99_nats']:.2f}",
        f"{row['delta_ln_ppl']:.4f}{_interval(row['delta_interval'])}",
        f"{row['seconds']:.1f}",
    )
    print(f"| {' | '.join(cells)} |", flush=True)
    return row


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]"


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


if __name__ == "__main__":
    main()
