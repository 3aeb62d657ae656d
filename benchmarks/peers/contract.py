"""What every peer does, inside its own environment: read the job, quantize, write the result.

    python -m peers.hqq MODEL WINDOWS OUT --bits 4 --group-size 64

MODEL is a Hugging Face folder in float32, WINDOWS a safetensors file whose tensor `ids` is int64 [windows, tokens].
OUT becomes a folder like MODEL in which every linear of the blocks is decoded from its codes, and `result.json`.

Whatever a peer keeps in memory, its result is brought to one form: codes of `bits` bits, one float16 scale and one
zero per group. Weights are decoded from that form, and its bytes are the ones that are counted, each tensor packed
densely. So a peer that would pad its codes, or would store scales in float32 because the model is, pays no
more than it has to. That the form holds what the peer computed is checked against the peer's own weights.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

WEIGHTS = "model.safetensors"
RESULT = "result.json"
LARGEST_DEVIATION = 0.05
"""Of a decoded weight from the peer's own, in steps of its grid, besides what a scale in float16 causes."""


@dataclass(frozen=True)
class Job:
    """What to do; `iterations` is for peers that learn, `seed` for those that draw. `group_size` 0: per channel."""

    model: Path
    windows: Path
    out: Path
    bits: int
    group_size: int
    iterations: int
    seed: int


@dataclass(frozen=True)
class Coded:
    """One quantized weight: `codes` [out, in], `scale` and `zero` [out, groups]; weight = (code - zero) * scale.

    Zeros are whole numbers of `bits` bits, float16 where `float_zero`, or the same everywhere and not stored where
    `symmetric`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    float_zero: bool = False
    symmetric: bool = False

    def decoded(self) -> Tensor:
        """The weight [out, in] in float32, from what is stored."""
        rows, columns = self.codes.shape
        zero = self.zero.half() if self.float_zero else self.zero
        codes = self.codes.float().reshape(rows, self.scale.shape[1], -1)
        steps = codes - zero.float()[..., None]
        return (steps * self.scale.half().float()[..., None]).reshape(rows, columns)

    def stored_bytes(self, bits: int) -> int:
        """Bytes of codes, scales and zeros, each packed densely."""
        codes = self.codes.round().int()
        assert bool((codes == self.codes).all()), "codes are not whole numbers"
        assert 0 <= int(codes.min()) <= int(codes.max()) < 2**bits, f"codes do not fit {bits} bits"
        if not self.float_zero:
            zero = self.zero.round()
            assert bool((zero == self.zero).all()), "zeros are not whole numbers"
            assert 0 <= int(zero.min()) <= int(zero.max()) < 2**bits, f"zeros do not fit {bits} bits"
        zero_bits = 0 if self.symmetric else 16 if self.float_zero else bits
        parts = ((self.codes, bits), (self.scale, 16), (self.zero, zero_bits))
        return sum(math.ceil(part.numel() * width / 8) for part, width in parts)

    def deviation(self, weight: Tensor) -> float:
        """Largest distance of the decoded weight from `weight`, in steps of the grid."""
        distance = (self.decoded() - weight.float()).abs().reshape(*self.scale.shape, -1)
        return float((distance / self.scale.float().abs()[..., None]).max())


#: Quantizes the model on ids [windows, tokens]; returns it, or another one whose modules have the same names.
Quantize = Callable[[Any, Tensor, Job], Any]
#: What the peer left in one linear of it.
Extract = Callable[[nn.Module, Job], Coded]


def main(peer: str, package: str, quantize: Quantize, extract: Extract) -> None:
    """Do the job of the command line for `peer`, which the distribution `package` implements."""
    job = parse_arguments(peer)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, local_files_only=True).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    ids = load_file(job.windows)["ids"]
    started, processor_started = time.perf_counter(), time.process_time()
    quantized = quantize(model, ids, job)
    seconds, processor_seconds = time.perf_counter() - started, time.process_time() - processor_started

    weights = load_file(job.model / WEIGHTS)
    # what else it changed: norms that took up scales
    now = quantized.state_dict()
    weights = {name: now.get(name, value).detach().float().contiguous() for name, value in weights.items()}
    stored = count = 0
    deviation = 0.0
    for name in names:
        module = quantized.get_submodule(name)
        coded = extract(module, job)
        deviation = max(deviation, coded.deviation(module.weight.detach()))
        stored += coded.stored_bytes(job.bits)
        count += coded.codes.numel()
        weights[f"{name}.weight"] = coded.decoded().contiguous()
    # a scale in float16 is off by 2**-11 of itself, and moves a code as many times as that code counts
    if not deviation <= LARGEST_DEVIATION + 2.0 ** (job.bits - 1 - 11):
        raise SystemExit(f"{peer}: codes decode to weights {deviation:.3f} steps away from its own: misread codes")
    result = {
        "peer": peer,
        "versions": {name: version(name) for name in (package, "torch", "transformers")},
        "bits_per_weight": 8 * stored / count,
        "bytes": stored,
        "quantized_weights": count,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "threads": torch.get_num_threads(),
        "deviation_steps": deviation,
    }
    publish(job, weights, result)


def parse_arguments(peer: str) -> Job:
    """The job that the command line asks for."""
    parser = argparse.ArgumentParser(prog=f"peers.{peer}", description=__doc__.splitlines()[0])
    for name in ("model", "windows", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    return Job(**vars(parser.parse_args()))


def publish(job: Job, weights: dict[str, Tensor], result: dict[str, Any]) -> None:
    """Write the folder under another name and rename it, so that a folder of the right name is complete."""
    partial = Path(tempfile.mkdtemp(prefix=f"{job.out.name}-", dir=job.out.parent))
    shutil.copytree(job.model, partial, ignore=shutil.ignore_patterns(WEIGHTS), dirs_exist_ok=True)
    save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
    (partial / RESULT).write_text(json.dumps(result, indent=1))
    shutil.rmtree(job.out, ignore_errors=True)
    partial.rename(job.out)
    print(json.dumps(result))
