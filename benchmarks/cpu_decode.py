"""A whole small model, decoding and reading prompts: ours, transformers and llama.cpp, in one process, interleaved.

    python benchmarks/cpu_decode.py [--quick] [--threads 1,2] [--rounds 7] [--peers transformers,llama.cpp]
        [--work FOLDER] [--json FILE]

The model is SmolLM2-135M-Instruct. Ours is the off-grid demo model by plain rounding in w4a16g64, with the head (the
tied embedding) in float32 and in 8 bits, on the lean decode path in both modes; transformers runs the float32 model
with its default cache and with a static one; llama.cpp runs the GGUF file of the same model as Q4_0 and Q8_0 (in Q4_0
its own quantizer gives the tied head a type of more bits). One text, greedy: a prompt of random tokens, then so many
steps. Prefill of the prompt and of a long one, and decode, are timed apart, by the wall clock.

Contenders take turns. Ratios are a contender's time over that of ours with the head in 8 bits and `fast`, median
[least, largest] over rounds; above 1 where ours is faster. The greedy text of ours in `exact` is that of transformers
on the same quantized weights (tests/runtime/test_decode.py), so nothing is compared here but speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from cpu_peers import llama
from cpu_peers.contract import UnavailableError
from cpu_peers.timing import SETTLE_SECONDS, interference, ratio_text, read_bandwidth
from torch import Tensor
from transformers import StaticCache

import bitwright
from bitwright.checkpoint.demo import demo_file
from bitwright.checkpoint.load import load_model
from bitwright.runtime.cpu import instruction_sets
from bitwright.runtime.decode import LeanDecoder
from bitwright.words import CpuMode

WORK = Path(__file__).parents[1] / "build" / "cpu-decode"
SCHEME, HEAD_SCHEME = "w4a16g64", "w8a16g64"
REFERENCE = "ours, w8 head, fast"
PHASES = ("decode", "prefill", "long prefill")


class Decoder(Protocol):
    """What is measured: greedy, one sequence."""

    @property
    def weight_bytes(self) -> int:
        """What a step reads."""

    def set_threads(self, threads: int) -> None:
        """For all that follows."""

    def prefill(self, ids: Tensor) -> int:
        """The likeliest token behind `ids` [tokens], which start a new sequence."""

    def step(self, token: int) -> int:
        """The likeliest token behind `token`."""


@dataclass
class Lean:
    """Ours."""

    decoder: LeanDecoder

    @property
    def weight_bytes(self) -> int:
        """What a step reads."""
        return self.decoder.weight_bytes

    def set_threads(self, threads: int) -> None:
        """See `Decoder`."""
        torch.set_num_threads(threads)

    def prefill(self, ids: Tensor) -> int:
        """See `Decoder`."""
        return int(self.decoder.prefill(ids).argmax())

    def step(self, token: int) -> int:
        """See `Decoder`."""
        return int(self.decoder.step(token).argmax())


@dataclass
class Transformers:
    """The ordinary forward pass, with the growing cache that is its default or a static one."""

    model: Any
    static_length: int | None
    _cache: Any = field(init=False, default=None)

    @property
    def weight_bytes(self) -> int:
        """What a step reads; embedding and head are one."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def set_threads(self, threads: int) -> None:
        """See `Decoder`."""
        torch.set_num_threads(threads)

    def prefill(self, ids: Tensor) -> int:
        """See `Decoder`."""
        self._cache = None
        if self.static_length is not None:
            self._cache = StaticCache(config=self.model.config, max_cache_len=self.static_length)
        return self._forward(ids[None])

    def step(self, token: int) -> int:
        """See `Decoder`."""
        return self._forward(torch.tensor([[token]]))

    @torch.inference_mode()
    def _forward(self, ids: Tensor) -> int:
        output = self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        return int(output.logits[0, -1].argmax())


# --- contenders ----------------------------------------------------------------------------------------------------


def quantized(work: Path, head: bool) -> Path:
    """The folder of our quantized model, made if it is not there."""
    rules = (bitwright.Rule.model_validate({"match": "model.embed_tokens", "method": "rtn", "scheme": HEAD_SCHEME}),)
    recipe = bitwright.Recipe.model_validate({"method": "rtn", "scheme": SCHEME, "rules": rules if head else ()})
    out = work / f"rtn-{SCHEME}{'-head-' + HEAD_SCHEME if head else ''}"
    bitwright.quantize("demo", out, recipe=recipe)
    return out


def contenders(work: Path, peers: list[str], max_length: int) -> Iterator[tuple[str, Decoder]]:
    """Everything by name; says what is left out."""
    modes: tuple[CpuMode, ...] = ("exact", "fast")
    for head, label in ((False, "float head"), (True, "w8 head")):
        model = load_model(str(quantized(work, head))).model
        for mode in modes:
            yield f"ours, {label}, {mode}", Lean(LeanDecoder(model, mode, max_length))
    if "transformers" in peers:
        model = load_model("demo").model
        yield "transformers float32", Transformers(model, None)
        yield "transformers float32, static cache", Transformers(model, max_length)
    if "llama.cpp" in peers:
        try:
            for kind in ("Q4_0", "Q8_0"):
                path = llama.quantize(demo_file(), kind, work / f"{kind}.gguf")
                yield f"llama.cpp {kind}", llama.Llama(path, max_length)
        except UnavailableError as error:
            print(error)


# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompt, of the steps after it, and of the long prompt."""

    prompt: int
    new: int
    long: int

    def of(self, phase: str) -> int:
        """Tokens of a phase."""
        return {"decode": self.new, "prefill": self.prompt, "long prefill": self.long}[phase]


def turn(decoder: Decoder, ids: Tensor, lengths: Lengths) -> dict[str, float]:
    """Seconds of every phase."""
    times = [time.perf_counter()]
    decoder.prefill(ids)
    times.append(time.perf_counter())
    token = decoder.prefill(ids[: lengths.prompt])
    times.append(time.perf_counter())
    for _ in range(lengths.new):
        token = decoder.step(token)
    times.append(time.perf_counter())
    return dict(zip(("long prefill", "prefill", "decode"), (b - a for a, b in pairwise(times)), strict=True))


def measure(decoders: dict[str, Decoder], threads: int, rounds: int, lengths: Lengths) -> dict[str, Any]:
    """Seconds of every phase of every contender, round by round after one that warms up."""
    vocabulary = 49152
    ids = torch.randint(vocabulary, (lengths.long,), generator=torch.Generator().manual_seed(0))
    times: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in decoders}
    for index in range(rounds + 1):
        for name, decoder in decoders.items():
            decoder.set_threads(threads)
            time.sleep(SETTLE_SECONDS)
            for phase, seconds in turn(decoder, ids, lengths).items():
                if index:
                    times[name][phase].append(seconds)
    return times


def table(times: dict[str, Any], decoders: dict[str, Decoder], lengths: Lengths) -> str:
    """One line for every contender."""
    heads = [f"{phase}, tokens/s" for phase in PHASES] + [f"{phase} / reference" for phase in PHASES]
    lines = [["contender", "weights MB", *heads]]
    for name, phases in times.items():
        speeds = [f"{lengths.of(phase) / statistics.median(phases[phase]):.1f}" for phase in PHASES]
        ratios = [ratio_text(phases[phase], times[REFERENCE][phase]) for phase in PHASES]
        lines.append([name, f"{decoders[name].weight_bytes / 1e6:.0f}", *speeds, *ratios])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one thread, two rounds, few tokens")
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--peers", type=lambda text: text.split(","), default=["transformers", "llama.cpp"])
    parser.add_argument("--work", type=Path, default=WORK, help="where quantized models are kept")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    quick = arguments.quick
    lengths = Lengths(16, 8, 32) if quick else Lengths(64, 64, 512)
    rounds = arguments.rounds or (2 if quick else 7)
    arguments.work.mkdir(parents=True, exist_ok=True)
    decoders = dict(contenders(arguments.work, arguments.peers, max(lengths.long, lengths.prompt + lengths.new)))
    about: dict[str, Any] = {"instruction_set": instruction_sets()[-1], "before": interference(), "rounds": rounds}
    about |= {"lengths": vars(lengths), "weight_bytes": {name: d.weight_bytes for name, d in decoders.items()}}
    print(f"{lengths.prompt} + {lengths.new} tokens, long prompt {lengths.long}, reference: {REFERENCE}")
    results: dict[int, dict[str, Any]] = {}
    for threads in arguments.threads or ([1] if quick else [1, 2]):
        bandwidth = read_bandwidth(threads, 1 << 30)
        results[threads] = {"read_bandwidth_bytes_per_second": bandwidth}
        results[threads] |= {"seconds": measure(decoders, threads, rounds, lengths)}
        print(f"\n{threads} thread{'s' * (threads > 1)}, read bandwidth {bandwidth / 1e9:.1f} GB/s")
        print(table(results[threads]["seconds"], decoders, lengths), flush=True)
        if arguments.json:
            about["after"] = interference()
            arguments.json.write_text(json.dumps({"about": about, "threads": results}))


if __name__ == "__main__":
    main()
