"""One block of a tiny model of each kind, ready to be learned."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    # packages that transformers imports where they are installed may warn of their own deprecations
    warnings.simplefilter("ignore")
    from transformers import OPTConfig, OPTForCausalLM

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.stream import Stream
from bitwright.checkpoint.open import open_source
from bitwright.learning.parameters import Learnables, Start
from bitwright.learning.reconstruct import Task
from bitwright.models import adapter_for
from bitwright.numeric.spec import WeightSpec
from bitwright.ranges import Clip
from bitwright.transforms.equivalence import identity, shiftable

EVERY = frozenset({"clip", "scale", "shift", "weight"})


@dataclass
class Job:
    """Everything that `reconstruct` takes; `learnables` makes new ones at the start."""

    runner: BlockRunner
    task: Task
    start: Start

    def learnables(self, kinds: frozenset[str] = EVERY) -> Learnables:
        return Learnables(self.start, self.runner.adapter, kinds)


@pytest.fixture(scope="session")
def tiny_opt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random OPT, 2 blocks, hidden 32, with norms and biases away from one and zero."""
    folder = tmp_path_factory.mktemp("tiny-opt")
    config = OPTConfig(
        vocab_size=320,
        hidden_size=32,
        ffn_dim=48,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OPTForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_runner(tiny_llama_folder: Path, tiny_opt_folder: Path) -> Callable[[str], BlockRunner]:
    """The name llama or opt -> its blocks on 7 windows of 16 tokens, 3 at a time."""
    folders = {"llama": tiny_llama_folder, "opt": tiny_opt_folder}

    def make(name: str) -> BlockRunner:
        source = open_source(str(folders[name]))
        ids = torch.randint(3, 320, (7, 16), generator=torch.Generator().manual_seed(1))
        return BlockRunner(source, adapter_for(source.config), ids, batch=3)

    return make


@pytest.fixture
def make_job(make_runner: Callable[[str], BlockRunner]) -> Callable[..., Job]:
    """Name of a model, and its bits -> block 1, whose inputs are somewhat off those of the float model."""

    def make(name: str, bits: int = 2, augmented: bool = False, token_weights: Tensor | None = None) -> Job:
        runner = make_runner(name)
        adapter, block = runner.adapter, runner.block(1)
        targets = runner.first_inputs()
        runner.advance(0, runner.block(0), targets)
        inputs = perturbed(targets)
        second = None
        if augmented:
            second = inputs.copy()
            runner.advance(1, block, second)
        runner.advance(1, block, targets)
        tensors = {key: value.detach() for key, value in block.named_parameters()}
        shifts = tuple(
            torch.zeros(edge.width(adapter.shape)) if shiftable(index, adapter, tensors) else None
            for index, edge in enumerate(adapter.edges)
        )
        rewrite = identity(adapter)
        rewrite = type(rewrite)(rewrite.scales, shifts)
        specs = dict.fromkeys(adapter.linears, WeightSpec(bits=bits, group_size=16))
        return Job(
            runner, Task(1, block, inputs, targets, second, token_weights), Start(tensors, specs, Clip(), rewrite)
        )

    return make


def perturbed(stream: Stream) -> Stream:
    """A copy with noise of a tenth of its size."""
    other, generator = stream.copy(), torch.Generator().manual_seed(2)
    for number, batch in enumerate(stream):
        noise = torch.randn(batch.shape, generator=generator)
        other.write(number, batch + 0.1 * batch.square().mean().sqrt() * noise)
    return other
