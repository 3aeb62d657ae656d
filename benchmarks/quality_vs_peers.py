"""bitwright's calibrated methods next to llm-compressor's GPTQ and SmoothQuant, AutoRound and HQQ: quality against
bits, one table.

    python benchmarks/quality_vs_peers.py --calibration-text FILE --text FILE [--schemes w4a16g64,w3a16g64]
        [--peers llmcompressor,autoround,hqq] [--methods rtn:w4a16g64,spqr:w3a16g64:3.5,...] [--json FILE]

A method is followed by its scheme, and then perhaps by bits per weight and settings, colons between them:
`omniquant:w3a16g64:learn.epochs=8`. SmoothQuant is a peer for schemes with quantized activations and symmetric weights
per channel, w8a8-sym; its activations are quantized as ours are, each token on its own range.

The model is the off-grid demo model in float32. Every method that wants data is shown the same tokens, drawn by
bitwright's own rule; every result is measured on the same windows of another text, against the same float model.
Each peer works in an environment of its own, made here (see `peers/environments.py`); its results are kept in the
work folder, so only what is missing is run. Bits per weight count codes, scales, zeros, outliers and their
indices: of ours from the bytes on disk, of a peer's as `peers/contract.py` says.

`seconds` is the time to quantize, of ours with reading and writing, of a peer's without. `processor` is the time that
all processors spent on it: what remains comparable where the machine had other work to do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data_free_quality import Remembered
from peers import environments
from peers.environments import PEERS, Inputs, PeerError
from safetensors.torch import save_file
from torch import Tensor, nn

import bitwright
from bitwright import Scheme
from bitwright.calibration.overlap import fingerprints, overlap
from bitwright.calibration.text import load_text
from bitwright.calibration.tokens import Calibration, TokenWindows, calibration_windows
from bitwright.checkpoint.load import load_model
from bitwright.checkpoint.open import open_source
from bitwright.checkpoint.quiet import quiet_transformers
from bitwright.evaluate import Divergence, Windows, compare, paired_interval, perplexity_of, token_windows
from bitwright.numeric.activation import ActivationSpec, InputSite

WORK = Path(__file__).parents[1] / "build" / "peers"
METHODS = "rtn:w4a16g64,easyquant:w4a16g64,gptq:w4a16g64,spqr:w4a16g64,spqr-near-lossless:w4a16g64"
HEADINGS = (
    "method",
    "scheme",
    "bits/weight",
    "perplexity",
    "to float",
    "mean KL",
    "p99 KL",
    "top-1",
    "seconds",
    "processor",
)


@dataclass(frozen=True)
class Result:
    """One row before it is measured: the model, what it takes and what it took."""

    method: str
    scheme: str
    model: nn.Module
    bits_per_weight: float
    seconds: float
    processor_seconds: float
    notes: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """The float model and the tokens that everything is measured with."""

    reference: Callable[[Tensor], Any]
    windows: Windows
    inputs: Inputs
    calibration: TokenWindows


def main() -> None:
    """Print the table, row by row, and then what could not be measured."""
    arguments = parse_arguments()
    # told to end, end the peer too: in the background it has a session of its own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench = prepare(arguments)
    results, refusals = [], []
    print(f"| {' | '.join(HEADINGS)} |")
    print("|---" * len(HEADINGS) + "|", flush=True)
    for label, make in rows(arguments, bench):
        try:
            result = make()
            divergence = compare(result.model, bench.reference, bench.windows)
        except (PeerError, bitwright.BitwrightError) as error:
            refusals.append(f"{label}: {error}")
            continue
        print(line(result, divergence), flush=True)
        results.append(as_json(result, divergence, bench))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    if results:
        print(f"\nfloat perplexity {results[0]['float_perplexity']:.3f}; {bench.windows.protocol}")
    print(
        f"calibration {bench.calibration.label}, {list(bench.calibration.ids.shape)}, {bench.calibration.sha256[:12]}"
    )
    for refusal in refusals:
        print(f"not measured: {refusal}")


def parse_arguments() -> argparse.Namespace:
    """The command line; lists are separated by commas."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_texts(parser)
    parser.add_argument("--peers", type=_list, default=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--schemes", type=_list, default=["w4a16g64"], help="of the peers")
    parser.add_argument("--methods", type=_list, default=_list(METHODS), help="ours, as name:scheme[:bits][:key=value]")
    parser.add_argument("--iterations", type=int, default=30, help="of AutoRound, per block")
    parser.add_argument("--work", type=Path, default=WORK, help="what is kept between runs")
    parser.add_argument("--background", action="store_true", help="peers give way to all else on the machine")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.peers) - set(PEERS):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    return arguments


def add_texts(parser: argparse.ArgumentParser, calibration_windows: int = 32) -> None:
    """The options of what is calibrated and what is measured on."""
    parser.add_argument("--model", default="demo", help="as `bitwright quantize` takes it")
    parser.add_argument("--calibration-text", type=Path, help="without it, the built-in calibration text")
    parser.add_argument("--calibration-windows", type=int, default=calibration_windows)
    parser.add_argument("--calibration-tokens", type=int, default=512, help="in each window")
    parser.add_argument("--text", type=Path, help="to measure on; without it, the built-in evaluation text")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)


def prepare(arguments: argparse.Namespace) -> Bench:
    """Write the float model and the calibration windows where peers find them.

    Raises:
        SystemExit: the calibration windows are part of the text to measure on.
    """
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    base = load_model(arguments.model)
    settings = Calibration(
        text="builtin" if arguments.calibration_text is None else str(arguments.calibration_text),
        windows=arguments.calibration_windows,
        window_tokens=arguments.calibration_tokens,
    )
    calibration = calibration_windows(settings, base.tokenizer, seed=arguments.seed)
    windows = token_windows(base.tokenizer, load_text(arguments.text), arguments.length, arguments.windows)
    if count := overlap(windows.ids, fingerprints(calibration.ids)):
        raise SystemExit(f"{count} calibration windows are part of the text to measure on; give two different texts")

    fingerprint = open_source(arguments.model).fingerprint()
    folder = work / f"model-{fingerprint[:12]}"
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        with quiet_transformers():
            base.model.save_pretrained(partial, max_shard_size="1TB")  # one file: peers read it by name
            base.tokenizer.save_pretrained(partial)
        partial.rename(folder)
    file = work / f"windows-{calibration.sha256[:12]}.safetensors"
    save_file({"ids": calibration.ids.contiguous()}, file)
    sha256 = hashlib.sha256(f"{fingerprint} {calibration.sha256}".encode()).hexdigest()
    return Bench(Remembered(base.model), windows, Inputs(folder, file, sha256), calibration)


def rows(arguments: argparse.Namespace, bench: Bench) -> Iterator[tuple[str, Callable[[], Result]]]:
    """(what it is, how to make it), peers first: they take longest to fail."""
    for scheme in arguments.schemes:
        for name in arguments.peers:
            yield f"{PEERS[name].label} {scheme}", partial(theirs, name, scheme, arguments, bench.inputs)
    for asked in arguments.methods:
        yield f"bitwright {asked}", partial(ours, asked, arguments, bench.inputs)


def theirs(name: str, scheme: str, arguments: argparse.Namespace, inputs: Inputs) -> Result:
    """What a peer makes of the model, or made of it in an earlier run."""
    peer, parsed = PEERS[name], Scheme.parse(scheme)
    if parsed.kv_bits != 16 or not _suits(parsed, peer.activations):
        raise PeerError(f"needs a scheme such as {'w8a8-sym' if peer.activations else 'w4a16g64'}")
    work = arguments.work.resolve()
    options = {"iterations": arguments.iterations, "seed": arguments.seed}
    out = environments.result_folder(name, scheme, inputs, options, work)
    job = [str(inputs.model), str(inputs.windows), str(out)]
    job += ["--bits", str(parsed.weight_bits), "--group-size", str(parsed.group_size or 0)]
    for option, value in options.items():
        job += [f"--{option}", str(value)]
    print(f"{peer.label} {scheme}: {out}", file=sys.stderr)
    found = environments.run(name, environments.install(peer.environment or name, work), out, job, arguments.background)
    model = load_model(str(out)).model
    if parsed.activation_bits != 16:
        quantize_inputs(model, parsed.activation_bits)
    label = f"{peer.label}, {arguments.iterations} iterations" if "iterations" in peer.options else peer.label
    return Result(
        method=label,
        scheme=scheme,
        model=model,
        bits_per_weight=found["bits_per_weight"],
        seconds=found["seconds"],
        processor_seconds=found["processor_seconds"],
        notes={"versions": found["versions"], "deviation_steps": found["deviation_steps"]},
    )


def _suits(scheme: Scheme, activations: bool) -> bool:
    """Whether a peer of weights alone, or of activations too, is measured with `scheme`."""
    if activations:
        return scheme.activation_bits != 16 and scheme.group_size is None and scheme.symmetric is True
    return scheme.activation_bits == 16 and scheme.group_size is not None and not scheme.symmetric


def quantize_inputs(model: nn.Module, bits: int) -> None:
    """From now on the inputs of all linears but the head are rounded to `bits` bits, symmetrically for each token."""
    site = InputSite(activation=ActivationSpec(bits=bits, granularity="token", symmetric=True))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, args: (site.apply(args[0]), *args[1:]))


def ours(asked: str, arguments: argparse.Namespace, inputs: Inputs) -> Result:
    """The whole journey of `name:scheme[:bits][:key=value]`: quantize to disk, read back."""
    method, scheme, *settings = asked.split(":")
    overrides = [
        f"seed={arguments.seed}",
        f"calibration.windows={arguments.calibration_windows}",
        f"calibration.window_tokens={arguments.calibration_tokens}",
        *(value if "=" in value else f"bits_per_weight={float(value)}" for value in settings),
    ]
    if arguments.calibration_text is not None:
        overrides.append(f"calibration.text={json.dumps(str(arguments.calibration_text.resolve()))}")
    recipe = bitwright.load_recipe(method, scheme, None, overrides)
    print(f"bitwright {asked}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=arguments.work) as place:
        out = Path(place) / "out"
        processor_started = time.process_time()
        summary = bitwright.quantize(str(inputs.model), out, recipe=recipe)
        processor_seconds = time.process_time() - processor_started
        model = load_model(str(out)).model
    return Result(
        method=" ".join((f"**bitwright {method}**", *settings)),
        scheme=scheme,
        model=model,
        bits_per_weight=summary.bits_per_weight,
        seconds=summary.seconds,
        processor_seconds=processor_seconds,
        notes={"recipe": recipe.model_dump(mode="json"), "bytes": summary.bytes},
    )


def line(result: Result, divergence: Divergence) -> str:
    """One row of the table."""
    perplexity, reference = perplexity_of(divergence.losses), perplexity_of(divergence.reference_losses)
    interval = paired_interval(divergence.kl.mean(1))
    kl = f"{divergence.kl_mean:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
    cells = (
        result.method,
        result.scheme,
        f"{result.bits_per_weight:.3f}",
        f"{perplexity:.3f}",
        f"{perplexity / reference:.4f}",
        kl,
        f"{divergence.kl_quantiles((0.99,))[0]:.2f}",
        f"{divergence.top1_agreement:.2%}",
        f"{result.seconds:.1f}",
        f"{result.processor_seconds:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def as_json(result: Result, divergence: Divergence, bench: Bench) -> dict[str, Any]:
    """One row for `--json`, with its numbers per window, so that any two rows can be compared in pairs."""
    interval = paired_interval(divergence.kl.mean(1))
    return {
        "method": result.method.replace("**", ""),
        "scheme": result.scheme,
        "bits_per_weight": result.bits_per_weight,
        "perplexity": perplexity_of(divergence.losses),
        "float_perplexity": perplexity_of(divergence.reference_losses),
        "kl_mean_nats": divergence.kl_mean,
        "kl_mean_interval": interval,
        "kl_p99_nats": divergence.kl_quantiles((0.99,))[0],
        "top1_agreement": divergence.top1_agreement,
        "seconds": result.seconds,
        "processor_seconds": result.processor_seconds,
        "kl_by_window": divergence.kl.mean(1).tolist(),
        "loss_by_window": divergence.losses.tolist(),
        "protocol": bench.windows.protocol,
        "calibration": {
            "text": bench.calibration.label,
            "windows": list(bench.calibration.ids.shape),
            "sha256": bench.calibration.sha256,
        },
        "threads": torch.get_num_threads(),
        **result.notes,
    }


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


if __name__ == "__main__":
    main()
