"""Block reconstruction: learn a block's parameters so that, quantized, it does what the float block did.

OmniQuant (Shao et al. 2023, section 3.1 and released code): AdamW on the mean squared error between the float block's
output on the float model's inputs and the quantized block's output on the inputs that the quantized blocks before it
give. `augmented` adds the error against the float block's output on those same inputs.

Departures, each a setting whose published value `omniquant-paper` has: tokens can be weighed by what the model's loss
cares about the block's output (see `calibration.gradients`), rates can fall linearly to zero, and the parameters
that are kept are those of least loss over all windows, the first ones among them: learning never makes a block worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.skeleton import replaced_forward
from bitwright.calibration.stream import Stream
from bitwright.errors import WeightError
from bitwright.execute.memory import available_memory_bytes
from bitwright.learning.parameters import Learnables
from bitwright.numeric.measure import exact_sum
from bitwright.numeric.settings import Settings

Report = Callable[[str], None]
# Activations kept for backward, as a multiple of the widest input of a linear: attention, norms and products.
_ACTIVATIONS_PER_INPUT = 12
_SEEDS = 2**63  # that a generator takes


class Learn(Settings):
    """What is learned and how.

    - `clip`: shares of the groups' ranges, where the range is `clip`; `scales`: of the edges that the transform has
      scaled; `query_key`: among them those of queries and keys, from 1; `shifts`: of edges whose linears and norms
      have biases, from the middle of the channel's range; `weights`: an offset of every weight within half a step.
    - `epochs` over all windows, `batch_windows` at a time in an order drawn from the recipe's seed.
    - `clip_rate`, `scale_rate` (of shifts too), `weight_rate`: of AdamW without decay, for shares' logits, for
      logarithms of scales, and in steps of the grid. `schedule`: `constant`, or `linear` down to zero.
    - `augmented`: the second loss. `checks`: how often on the way, evenly spaced and once at the end, the loss over
      all windows is measured and the parameters are kept if they are the best so far.
    """

    clip: bool = True
    scales: bool = True
    query_key: bool = False
    shifts: bool = False
    weights: bool = False
    epochs: int = Field(default=8, ge=1)
    batch_windows: int = Field(default=2, ge=1)
    clip_rate: float = Field(default=1e-2, gt=0)
    scale_rate: float = Field(default=5e-3, gt=0)
    weight_rate: float = Field(default=5e-3, gt=0)
    schedule: Literal["constant", "linear"] = "linear"
    augmented: bool = False
    checks: int = Field(default=2, ge=1)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of parameters that are learned."""
        chosen = {"clip": self.clip, "scale": self.scales, "shift": self.shifts, "weight": self.weights}
        return frozenset(kind for kind, wanted in chosen.items() if wanted)


@dataclass(frozen=True)
class Task:
    """One block and the streams that it learns from.

    Attributes:
        index: of the block.
        block: module with the float model's weights; its hooks stay in force, so activation quantizers hook it.
        inputs: what the quantized blocks before it give.
        targets: the float block's outputs on the float model's inputs.
        augmented: the float block's outputs on `inputs`; None without the second loss.
        token_weights: float32 [windows, tokens] of the block's output; None: all alike.
    """

    index: int
    block: nn.Module
    inputs: Stream
    targets: Stream
    augmented: Stream | None = None
    token_weights: Tensor | None = None


@dataclass
class Curve:
    """How learning went: losses relative to the mean square of the targets, and why it stopped early if it did."""

    first: float = math.nan
    best: float = math.nan
    epochs: list[float] = field(default_factory=list)
    """Mean over the steps of each epoch, while parameters moved."""
    stopped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "loss_before": self.first if math.isfinite(self.first) else None,
            "loss_after": self.best if math.isfinite(self.best) else None,
            "epoch_losses": self.epochs,
            "stopped": self.stopped,
        }


def reconstruct(
    runner: BlockRunner, task: Task, learnables: Learnables, settings: Learn, seed: int, report: Report
) -> Curve:
    """Leave in `learnables` the parameters of least loss that were met; `report` is told every epoch's loss.

    A loss or gradient that is not finite ends learning; what is kept is finite and no worse than the start.
    """
    session = _Session(runner, task, learnables)
    curve = Curve()
    curve.first = curve.best = session.loss()
    groups = [
        {"params": list(learnables.groups[kind].values()), "lr": rate}
        for kind, rate in (
            ("clip", settings.clip_rate),
            ("scale", settings.scale_rate),
            ("shift", settings.scale_rate),
            ("weight", settings.weight_rate),
        )
        if learnables.groups[kind]
    ]
    if not math.isfinite(curve.first):
        curve.stopped = "loss not finite before the first step"
    if curve.stopped or not groups or not curve.first > 0:
        return curve
    best = learnables.state()
    batches = list(session.batches(settings.batch_windows))
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    total = settings.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 1.0 - step / total if settings.schedule == "linear" else 1.0
    )
    checked = {round(settings.epochs * (number + 1) / settings.checks) for number in range(settings.checks)}
    generator = torch.Generator().manual_seed((seed * 1_000_003 + task.index) % _SEEDS)
    for epoch in range(1, settings.epochs + 1):
        losses = []
        for position in torch.randperm(len(batches), generator=generator).tolist():
            optimiser.zero_grad(set_to_none=True)
            losses.append(session.step(batches[position], curve.first))
            if not math.isfinite(losses[-1]) or not _finite_gradients(optimiser):
                curve.stopped = f"loss or gradient not finite in epoch {epoch}"
                break
            optimiser.step()
            schedule.step()
            learnables.bound()
        if curve.stopped:
            break
        curve.epochs.append(sum(losses) / len(losses))
        report(f"epoch {epoch} of {settings.epochs}, loss {curve.epochs[-1] / curve.first:.3f} of the first")
        if epoch in checked and (loss := session.loss()) < curve.best:
            curve.best, best = loss, learnables.state()
    learnables.restore(best)
    return curve


def _finite_gradients(optimiser: torch.optim.Optimizer) -> bool:
    gradients = (p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None)
    return all(bool(torch.isfinite(gradient.sum())) for gradient in gradients)


class _Session:
    """Losses of one task."""

    def __init__(self, runner: BlockRunner, task: Task, learnables: Learnables):
        self.runner, self.task, self.learnables = runner, task, learnables
        with torch.no_grad():
            self.unit = sum(
                exact_sum(self._weights(number) * target.double().square())
                for number, target in enumerate(task.targets)
            )
        self.unit = self.unit or 1.0
        self._step = _Step(runner, task.index, task.block)
        self._checkpointed = self._memory_is_short()

    def batches(self, windows: int) -> Iterator[tuple[int, slice]]:
        """Parts of the streams' batches, `windows` at a time: number of the batch, and windows in it."""
        for number, hidden in enumerate(self.task.inputs):
            for start in range(0, len(hidden), windows):
                yield number, slice(start, min(start + windows, len(hidden)))

    def step(self, part: tuple[int, slice], scale: float) -> float:
        """The loss of one part, as if all windows were like it; gradients are those of the loss over `scale`.

        Infinite, without gradients, where a scale of a grid is too large for its stored type.
        """
        number, windows = part
        share: float = self.task.inputs.shape[0] / (windows.stop - windows.start)
        try:
            tensors = self.learnables.quantized()
        except WeightError:
            return math.inf
        return share * self._run(tensors, number, windows, share / scale)

    @torch.no_grad()
    def loss(self) -> float:
        """Over all windows, relative to the mean square of the targets; infinite where it is not finite."""
        try:
            tensors = self.learnables.quantized()
        except WeightError:
            return math.inf
        whole = slice(None)
        total = sum(self._run(tensors, number, whole, None) for number in range(len(self.task.inputs)))
        return float(total) if math.isfinite(total) else math.inf

    def _run(self, tensors: Mapping[str, Tensor], number: int, windows: slice, scale: float | None) -> float:
        """The part's share of the loss; with `scale`, `loss * scale` is propagated back."""
        task = self.task
        targets = [task.targets.read(number)[windows]]
        if task.augmented is not None:
            targets.append(task.augmented.read(number)[windows])
        arguments = (task.inputs.read(number)[windows], targets, self._weights(number)[windows] / self.unit, scale)
        named = {f"block.{name}": value for name, value in tensors.items()}
        with ExitStack() as stack:
            if self._checkpointed and scale is not None:
                for child in task.block.children():
                    if any(True for _ in child.parameters()):
                        stack.enter_context(replaced_forward(child, _checkpointed(child.forward)))
            # Backward runs inside: what is recomputed there must see the same tensors.
            loss: float = torch.func.functional_call(self._step, named, arguments)
            return loss

    def _weights(self, number: int) -> Tensor:
        """[windows of the batch, tokens, 1]."""
        task, size = self.task, self.task.inputs.batch
        if task.token_weights is None:
            return torch.ones(1, 1, 1).expand(len(task.inputs.read(number)), 1, 1)
        return task.token_weights[number * size :][: len(task.inputs.read(number))].unsqueeze(2)

    def _memory_is_short(self) -> bool:
        """Whether activations of a batch would take more than a quarter of what is free."""
        _, tokens, features = self.task.inputs.shape
        widest = max([features, *(p.shape[-1] for p in self.task.block.parameters())])
        needed = 4 * _ACTIVATIONS_PER_INPUT * self.task.inputs.batch * tokens * widest
        available = available_memory_bytes()
        return available is not None and needed > available // 4


class _Step(nn.Module):
    """One forward pass, its loss, and if asked for the backward pass, all with the same tensors in place."""

    def __init__(self, runner: BlockRunner, index: int, block: nn.Module):
        super().__init__()
        self.block, self._runner, self._index = block, runner, index

    def forward(self, inputs: Tensor, targets: list[Tensor], weights: Tensor, scale: float | None) -> float:
        kind = inputs.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
            output = self._runner.run(self._index, self.block, inputs).float()
        # Row by row first: a sum of everything at once is cut into as many parts as there are threads.
        loss = sum(((output - target).square() * weights).sum(dim=-1).sum() for target in targets)
        assert isinstance(loss, Tensor)
        if scale is not None:
            (loss * scale).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that keeps only its inputs for the backward pass, and runs again there."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
