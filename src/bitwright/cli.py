"""The command line: parse, make one call into the library, show the result.

Exit status: 0 done, 1 a bug, 2 a deliberate refusal (see `bitwright.errors`), 3 damaged files found by
`inspect --verify`, 4 a limit of `analyze --fail-above` or a target of `quantize` not kept, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import bitwright
import bitwright.terminal.tables as show
from bitwright.calibration.layouts import Layout
from bitwright.errors import BitwrightError, EvaluationError, RecipeError
from bitwright.terminal.choice import one_of
from bitwright.terminal.progress import progress
from bitwright.terminal.text import Styled, error_console, say, say_prose
from bitwright.words import BudgetName, ComputeType, CpuMode, Device, Engine, Protocol, Target

if TYPE_CHECKING:
    from bitwright.analyze.promise import Target as Goal
    from bitwright.analyze.target import TargetResult

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"bitwright {bitwright.__version__}")
        raise typer.Exit()


ModelArgument = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, a .gguf file, or 'demo'.")]
MethodOption = Annotated[str | None, typer.Option("--method", "-m", help="A preset; see 'bitwright methods'.")]
SchemeOption = Annotated[str | None, typer.Option("--scheme", "-s", help="Such as w4a16g64 or w3a16g128-sym.")]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="A TOML recipe instead of method and scheme.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a field: key=value. Repeatable.")]
TextOption = Annotated[
    str | None, typer.Option("--calibration", help="Calibration text: a file, 'builtin', 'self', or hf:NAME.")
]
BitsOption = Annotated[
    float | None, typer.Option("--bits-per-weight", help="Keep as many outliers as so many bits leave room for.")
]
AcceptOption = Annotated[bool, typer.Option("--accept-other-machine", help="Continue what another machine began.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="Threads; default: all processors.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Quantize large language models after training, and prove how good the result is."""


@app.command()
def methods() -> None:
    """List the methods that ship with bitwright."""
    from bitwright.recipes.presets import method_names, read_preset

    for name in method_names():
        say(Styled(name, "bold"), f"  {read_preset(name)['summary']}")


@app.command()
def plan(
    model: ModelArgument,
    method: MethodOption = None,
    scheme: SchemeOption = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    calibration: TextOption = None,
    bits_per_weight: BitsOption = None,
    workers: WorkersOption = None,
    rows: Annotated[bool, typer.Option("--rows", help="One line per tensor, blocks not folded.")] = False,
    engine: Annotated[
        Engine | None, one_of(Engine, "--for", help="Say whether this engine can load the result.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Show what quantizing would do, without reading any weight."""
    from bitwright.export.targets import obstacles
    from bitwright.machine import estimate

    settings = _overrides(overrides, calibration, bits_per_weight)
    made = bitwright.plan(model, recipe=bitwright.load_recipe(method, scheme, recipe, settings))
    needs = estimate(made, workers)
    show.show_plan(made, needs, rows)
    found = [] if engine is None else obstacles(made, engine)
    if engine is not None:
        show.show_obstacles(engine, found)
    show.write_json(json_file, made.to_json() | {"estimate": vars(needs), "obstacles": [vars(one) for one in found]})
    if any(one.certain for one in found):
        raise typer.Exit(2)


@app.command()
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make; must not exist.")],
    method: MethodOption = None,
    scheme: SchemeOption = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    calibration: TextOption = None,
    bits_per_weight: BitsOption = None,
    workers: WorkersOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished run in this folder.")] = False,
    accept_other_machine: AcceptOption = False,
    max_fallbacks: Annotated[
        float, typer.Option(min=0, max=1, help="Share of calibrated tensors that may be rounded to nearest instead.")
    ] = 0.0,
    to: Annotated[
        Target | None, one_of(Target, "--format", help="Export as well, to OUT-FORMAT or OUT.gguf; see export.")
    ] = None,
    target_loss: Annotated[
        str | None, typer.Option(help="Choose bits and method of every layer: at most so much worse, 1% or 0.02nats.")
    ] = None,
    target_bits: Annotated[float | None, typer.Option(help="The same for so many bits per weight.")] = None,
    target_size: Annotated[str | None, typer.Option(help="The same for so large weight files, such as 4GB.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="With a target: folder for a report, as analyze writes it.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Quantize a model; a run that was stopped continues when started again."""
    settings = _overrides(overrides, calibration, bits_per_weight)
    goal = _goal(target_loss, target_bits, target_size)
    if goal is not None and (scheme, recipe, to) != (None, None, None):
        raise RecipeError("a target chooses schemes itself; leave --scheme, --recipe and --format out")
    if goal is None and report is not None:
        raise RecipeError("--report tells how a target was kept; give one, or run analyze")
    # Of a target's recipe only what is not chosen counts: calibration, seed, stored types.
    named = (method, scheme) if goal is None else ("gptq", "w4a16g64")
    wanted = bitwright.load_recipe(*named, recipe, settings)
    if to is not None:
        from bitwright.export.targets import export_model, refuse_early

        refuse_early(bitwright.plan(model, recipe=wanted), to)
    with progress("quantizing") as told, show.interruptible(told):
        options = bitwright.RunOptions(
            workers=workers,
            restart=restart,
            accept_other_machine=accept_other_machine,
            max_fallbacks=max_fallbacks,
            announce=lambda plan, needs: show.show_expectation(plan, needs, stderr=True),
            progress=told,
        )
        if goal is not None:
            reached = _reach(goal, model, out, options, method=method, base=wanted)
        else:
            summary = bitwright.quantize(model, out, recipe=wanted, options=options)
    if goal is not None:
        _end_target(model, reached, report, json_file)
    show.show_summary(summary)
    if to is not None:
        place = out.with_name(out.name + (".gguf" if to == "gguf" else f"-{to}"))
        show.show_export(export_model(out, place, to))
    show.write_json(json_file, summary.to_json())


@app.command("eval")
def evaluate(
    model: ModelArgument,
    against: Annotated[str | None, typer.Option(help="The float model to compare with.")] = None,
    text: Annotated[Path | None, typer.Option(help="Evaluation text; default: built in.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="At most so many windows.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    protocol: Annotated[Protocol, one_of(Protocol, "--protocol", help="How windows are cut from the text.")] = "gptq",
    layout: Annotated[Layout, one_of(Layout, "--layout", help="How a text file becomes one text.")] = "auto",
    field: Annotated[str | None, typer.Option(help="The column of a data set that is its text.")] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Evaluate on text that the model was calibrated on.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Measure perplexity and, with --against, the distance to the float model."""
    options = bitwright.EvalOptions(windows, length, protocol, allow_overlap, field)
    with progress("evaluating") as told:
        evaluation = bitwright.eval(
            model,
            against=against,
            text=text,
            layout=layout,
            options=options,
            progress=lambda done, total: told("", done, total),
        )
    show.show_evaluation(model, evaluation)
    show.write_json(json_file, evaluation.to_json())


@app.command()
def analyze(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report; an earlier one is replaced.")],
    budget: Annotated[BudgetName, one_of(BudgetName, "--budget", help="How much is looked at.")] = "quick",
    sets: Annotated[
        list[str] | None,
        typer.Option("--calibration-set", help="Such as text, task, code, nonsense, random, self, a file. Repeatable."),
    ] = None,
    recipe: RecipeOption = None,
    matrix: Annotated[
        list[str] | None,
        typer.Option("--matrix", help="METHOD:SCHEME[:KEY=VALUE] to quantize with by every set and seed. Repeatable."),
    ] = None,
    evaluations: Annotated[
        list[str] | None, typer.Option("--evaluation-set", help="What the matrix is measured on. Repeatable.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Draws of each set.")] = None,
    fail_above: Annotated[
        list[str] | None, typer.Option("--fail-above", help="METRIC=NUMBER: exit status 4 above it. Repeatable.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure outliers and what calibration sets change, and write a report and a recipe."""
    from bitwright.analyze.needs import analysis_needs
    from bitwright.analyze.run import analyze as analyze_model
    from bitwright.analyze.run import named_budget
    from bitwright.analyze.thresholds import breaches, parse_limit

    limits = [parse_limit(text) for text in fail_above or ()]
    wanted = None if recipe is None else bitwright.load_recipe(file=recipe)
    chosen = named_budget(budget)
    chosen = replace(
        chosen,
        matrix=tuple(matrix or chosen.matrix),
        evaluations=tuple(evaluations or ()),
        seeds=chosen.seeds if seeds is None else tuple(range(seeds)),
    )
    needs = analysis_needs(model, chosen, sets)
    show.show_needs(needs)
    needs.check()
    with progress("analyzing") as told:
        report = analyze_model(model, out, budget=chosen, sets=sets, recipe=wanted, progress=told)
    broken = breaches(report, limits)
    show.show_analysis(report, out, broken)
    show.write_json(json_file, report.model_dump(mode="json"))
    if broken:
        raise typer.Exit(4)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that quantize made.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file against the manifest.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Show what a quantized folder holds."""
    found = bitwright.inspect(folder, verify=verify)
    show.show_inspection(found)
    show.write_json(json_file, found.to_json())
    if found.complaints:
        raise typer.Exit(3)
    if verify:
        say(f"{len(found.manifest['files'])} files agree with the manifest.")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder that quantize made.")],
    to: Annotated[Target, one_of(Target, "--to", help="The format.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder, or .gguf file, to make; must not exist.")],
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Store what the format cannot hold as floats instead of refusing.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Write a quantized folder in another engine's format; codes, scales and zeros move as they are."""
    from bitwright.export.targets import export_model

    with progress("exporting") as told:
        result = export_model(folder, out, to, allow_lossy=allow_lossy, progress=told)
    show.show_export(result)
    show.write_json(json_file, result.to_json())


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="A compressed-tensors, GPTQ or AWQ folder, or a .gguf file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make; must not exist.")],
    json_file: JsonOption = None,
) -> None:
    """Read what another tool quantized, code for code; the result runs, evaluates and exports like our own."""
    from bitwright.export.targets import import_model

    with progress("importing") as told:
        result = import_model(path, out, progress=told)
    show.show_export(result)
    show.write_json(json_file, result.to_json())


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 32,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
) -> None:
    """Continue a prompt, greedily."""
    result = bitwright.generate(model, prompt, tokens=tokens, chat=chat)
    say_prose(result.text)
    told = ", ".join((f"{result.tokens} tokens in {result.seconds:.1f} s", *result.remarks))
    say(Styled(told, "dim"), on=error_console)


@app.command()
def bench(
    model: ModelArgument,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all processors.")] = None,
    mode: Annotated[CpuMode, one_of(CpuMode, "--mode", help="Arithmetic of the compiled kernels.")] = "exact",
    device: Annotated[Device, one_of(Device, "--device", help="cuda: one GPU, and its memory.")] = "cpu",
    dtype: Annotated[
        ComputeType | None, one_of(ComputeType, "--dtype", help="Of floats on cuda; default: bfloat16.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure the speed of decoding and of prefill on this machine."""
    if device == "cuda":
        if threads is not None or mode != "exact":
            raise EvaluationError("--threads and --mode are of the CPU; leave them out with --device cuda")
        from bitwright.bench_cuda import bench_cuda

        wanted: ComputeType = "bfloat16" if dtype is None else dtype
        measured = bench_cuda(model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, dtype=wanted)
        for label, text in measured.lines():
            say(f"{label:36} {text}")
        show.write_json(json_file, measured.to_json())
        return
    if dtype is not None:
        raise EvaluationError("--dtype is of the GPU, the CPU computes in float32; leave it out")
    from bitwright.bench import bench as measure_speed

    result = measure_speed(model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, threads=threads, mode=mode)
    show.show_bench(result)
    show.write_json(json_file, result.to_json())


def _reach(
    goal: Goal, model: str, out: Path, options: bitwright.RunOptions, *, method: str | None, base: bitwright.Recipe
) -> TargetResult:
    """What the target `goal` gave, with `method` alone or else all that are mixed by default."""
    from bitwright.analyze.choices import choices_of, default_choices
    from bitwright.analyze.target import TargetOptions, quantize_to_target

    mixed = default_choices() if method is None else choices_of([method])
    return quantize_to_target(model, out, goal, TargetOptions(choices=mixed, base=base), options)


def _end_target(model: str, reached: TargetResult, report: Path | None, json_file: Path | None) -> NoReturn:
    """Show and write what became of a target; exit."""
    from bitwright.analyze.run import report_on_target
    from bitwright.analyze.sections import allocation_section

    show.show_reached(reached)
    show.write_json(json_file, allocation_section(reached).model_dump(mode="json"))
    if report is not None:
        report_on_target(model, reached, report)
        say(f"{report / 'report.html'}, report.json, recipe.toml")
    raise typer.Exit(0 if reached.met else 4)


def _goal(loss: str | None, bits: float | None, size: str | None) -> Goal | None:
    """The target that the options name; None without one."""
    if (loss, bits, size) == (None, None, None):
        return None
    from bitwright.analyze.promise import Target

    return Target.of(loss=loss, bits=bits, size=size)


def _overrides(given: list[str] | None, calibration: str | None, bits_per_weight: float | None) -> list[str]:
    """`--set` and the options that are short for one."""
    short = {"calibration.text": calibration and json.dumps(calibration), "bits_per_weight": bits_per_weight}
    return [*(given or ()), *(f"{key}={value}" for key, value in short.items() if value is not None)]


def main() -> None:
    """Entry point of the `bitwright` command."""
    try:
        app()
    except BitwrightError as error:
        _refuse(error)
    except OSError as error:
        _refuse(error, "; what was finished is kept: mend this and run the same command again")


def _refuse(error: Exception, remedy: str = "") -> NoReturn:
    """One message, and status 2."""
    say(Styled(type(error).__name__, "bold red"), f": {error}{remedy}", on=error_console)
    sys.exit(2)
