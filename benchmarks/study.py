"""Paglieri et al. (arXiv 2405.20835) in miniature: outliers and calibration sets, on a model and its outlier twin.

    python benchmarks/study.py [--set wiki=FILE ...] [--evaluation-set wiki=OTHER_FILE ...] [--json FILE]

The twin computes the same: behind every norm a few channels are scaled up and the columns of the linears that read
them scaled down, as OPT has them by training. Both models are quantized by every recipe, with every calibration set
and seed, and measured against their own float model. The study's claim is that the old kind of model degrades and
swings with the set, and the modern kind does not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import nn

from bitwright.analyze.choices import parse_recipe
from bitwright.analyze.matrix import MatrixOptions, measure_matrix
from bitwright.analyze.model import MatrixRow, MatrixSection
from bitwright.analyze.run import MATRIX
from bitwright.analyze.sets import SetMaker, parse_set
from bitwright.checkpoint.load import load_model
from bitwright.checkpoint.open import open_source
from bitwright.checkpoint.quiet import quiet_transformers

WORK = Path(__file__).parents[1] / "build" / "study"
SETS = ("text", "code", "nonsense", "random")
# Behind each norm, these channels times this. OPT-6.7B has some six channels about 50 times the others.
CHANNELS = (5, 77, 190, 301, 402, 513)
FACTOR = 50.0


def main() -> None:
    """Print a table for each model, and what the twin loses beside the model."""
    arguments = parse_arguments()
    twin = plant(arguments.model, arguments.work / f"twin-{open_source(arguments.model).fingerprint()[:12]}")
    sections = {}
    for label, model in (("model", arguments.model), ("outlier twin", str(twin))):
        sections[label] = measured(label, model, arguments)
        print(f"\n{label}: {model}\n")
        print_table(sections[label])
    if arguments.json:
        found = {label: section.model_dump(mode="json") for label, section in sections.items()}
        arguments.json.write_text(json.dumps(found, indent=1))


def parse_arguments() -> argparse.Namespace:
    """The command line; sets and recipes are spelled as `bitwright analyze` takes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="of Llama's shape")
    parser.add_argument("--set", action="append", dest="sets", help=f"to calibrate on; default: {', '.join(SETS)}")
    parser.add_argument("--evaluation-set", action="append", dest="evaluations", help="default: text")
    parser.add_argument("--recipe", action="append", dest="recipes", help=f"default: {', '.join(MATRIX)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=8, help="of each draw")
    parser.add_argument("--evaluation-windows", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="in each window")
    parser.add_argument("--work", type=Path, default=WORK, help="what is kept between runs")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def plant(model: str, folder: Path, channels: Sequence[int] = CHANNELS, factor: float = FACTOR) -> Path:
    """The twin of a model of Llama's shape, saved to `folder` unless it is there."""
    if folder.is_dir():
        return folder
    loaded = load_model(model)
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            scale(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), channels, factor)
            scale(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), channels, factor)
    partial = folder.with_name(folder.name + ".partial")
    with quiet_transformers():
        loaded.model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def scale(norm: nn.Module, linears: Sequence[nn.Module], channels: Sequence[int], factor: float) -> None:
    """Channels behind `norm` times `factor`, what `linears` make of them as before."""
    places = [channel % len(norm.weight) for channel in channels]
    norm.weight[places] *= factor
    for linear in linears:
        linear.weight[:, places] /= factor


def measured(label: str, model: str, arguments: argparse.Namespace) -> MatrixSection:
    """The matrix of one model."""
    source = open_source(model)
    maker = SetMaker(source, arguments.windows, arguments.tokens, arguments.work / "samples")
    draws = [maker.draw(parse_set(one), seed) for one in arguments.sets or SETS for seed in range(arguments.seeds)]
    maker = SetMaker(source, arguments.evaluation_windows, arguments.tokens)
    evaluations = [maker.draw(parse_set(one), 0, "evaluation") for one in arguments.evaluations or ["text"]]
    recipes = {text.replace(":", " "): parse_recipe(text) for text in arguments.recipes or MATRIX}
    folder = arguments.work / label.replace(" ", "-")

    def say(what: str, done: int, total: int) -> None:
        print(f"{label}: {done} of {total}: {what}", flush=True)

    return measure_matrix(model, draws, MatrixOptions(recipes, evaluations, folder, say))


def print_table(section: MatrixSection) -> None:
    """Mean KL by recipe, evaluation set and calibration set, with the spread of seeds, and the ratio of variances."""
    sets = list(dict.fromkeys(row.calibration for row in section.rows))
    print(f"| recipe | measured on | {' | '.join(sets)} | sets / seeds [95 %] |")
    print("|---" * (len(sets) + 3) + "|")
    for ratio in section.variance_ratio:
        if ratio.measure != "kl":
            continue
        rows = [r for r in section.rows if (r.recipe, r.evaluation) == (ratio.recipe, ratio.evaluation)]
        cells = [cell([row for row in rows if row.calibration == name]) for name in sets]
        told = "constant" if ratio.constant else "not known"
        if ratio.ratio is not None and ratio.interval is not None:
            told = f"{ratio.ratio:.1f} [{ratio.interval.low:.1f}, {ratio.interval.high:.1f}]"
        print(f"| {ratio.recipe} | {ratio.evaluation} | {' | '.join(cells)} | {told} |")
    for note in section.notes:
        print(note)


def cell(rows: Sequence[MatrixRow]) -> str:
    """Mean over seeds, and their standard deviation."""
    values = [row.kl for row in rows]
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
