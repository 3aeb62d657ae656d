"""Outlier shares by one limit for the whole model: every tensor keeps as many outliers as are worth it there.

A budget of outliers is spent where it saves most of the model's loss: the gain of keeping a weight (see
`rounding.sensitivity`), under Hessians that count in units of the loss, is compared over all tensors at once. This
takes a pass over the float model before the first block is rounded. Gains are counted in narrow bins of their
logarithm, so nothing larger than one tensor is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.gradients import TokenWeights
from bitwright.calibration.hessians import HessianPass
from bitwright.plan import Plan
from bitwright.rounding.factor import factorize
from bitwright.rounding.gptq import Gptq
from bitwright.rounding.sensitivity import Obs, leave_one_out
from bitwright.rows import Row

# Bins of the logarithm of gains: 1/16 octave wide, from 2^-160, above all that float32 products can be.
_PER_OCTAVE, _LOWEST, _BINS = 16, -160, 320 * 16


@dataclass(frozen=True)
class Gains:
    """How many weights of one tensor gain how much: counts [bins], and its number of weights."""

    counts: Tensor
    weights: int


def spends_model_wide(row: Row) -> bool:
    """Whether the row's share of outliers is decided over the whole model."""
    return row.keeps_a_share and _policy(row).scope == "model"


def model_wide_shares(
    runner: BlockRunner, plan: Plan, weights: TokenWeights | None, folder: Path, say: Callable[[str], None]
) -> dict[str, float]:
    """Tensor name -> share of its weights to keep, together as many as the rows' own shares ask for.

    `runner` is of the float model; `folder` takes streams too large for memory.
    """
    rows = {row.tensor: row for row in plan.rows() if spends_model_wide(row)}
    gathering, gains = HessianPass(runner, weights), {}
    with ExitStack() as stack:
        stream = stack.enter_context(runner.first_inputs(folder=folder))
        for index in range(runner.blocks):
            say(f"outliers of the whole model: block {index}")
            block = runner.block(index)
            prefix = plan.adapter.block_prefix(index)
            linears = [name for name in plan.adapter.linears if f"{prefix}{name}.weight" in rows]
            for name, evidence in gathering.gather(index, block, stream, linears).items():
                row = rows[f"{prefix}{name}.weight"]
                loss = _units(weights, index, name) * block.get_parameter(f"{name}.weight").detach()
                gains[row.tensor] = _count(row, loss, evidence.hessian)
            runner.advance(index, block, stream)
    kept = sum(_policy(row).share * row.weights for row in rows.values())
    return spend(gains, kept)


def spend(gains: Mapping[str, Gains], kept: float) -> dict[str, float]:
    """Tensor name -> share, so that the `kept` weights of largest gain are kept over all tensors.

    The last bin is kept in part, the same part of every tensor.
    """
    total = torch.stack([gain.counts for gain in gains.values()]).sum(dim=0)
    above = total.flip(0).cumsum(0).flip(0)  # weights in this bin or a higher one
    last = int((above >= kept).sum()) - 1
    if last < 0:
        return {name: float(gain.counts.sum()) / gain.weights for name, gain in gains.items()}
    higher = int(above[last] - total[last])
    part = (kept - higher) / int(total[last])
    return {
        name: (float(gain.counts[last + 1 :].sum()) + part * float(gain.counts[last])) / gain.weights
        for name, gain in gains.items()
    }


def _policy(row: Row) -> Obs:
    assert row.method is not None
    assert isinstance(row.method.outliers, Obs)
    return row.method.outliers


def _units(weights: TokenWeights | None, index: int, name: str) -> float:
    """Square root of the mean weight of a token: mean Hessians times its square count in units of the loss."""
    return 1.0 if weights is None else float(weights[(index, name)].double().mean().sqrt())


def _count(row: Row, weight: Tensor, hessian: Tensor) -> Gains:
    """The gains of one tensor, in bins."""
    assert row.spec is not None
    assert row.method is not None
    assert isinstance(row.method.rounding, Gptq)
    factor = factorize(hessian, row.method.rounding.damping, row.method.rounding.order, row.spec)
    gains = leave_one_out(weight, factor.inverse_diagonal(), row.spec).flatten()
    positive = gains[gains > 0].double()
    bins = ((positive.log2() - _LOWEST) * _PER_OCTAVE).long().clamp_(0, _BINS - 1)
    return Gains(torch.bincount(bins, minlength=_BINS), row.weights)
