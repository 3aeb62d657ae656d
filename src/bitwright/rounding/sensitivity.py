"""Sensitivity outliers: weights whose rounding error costs more than the bits that would keep them.

SpQR (Dettmers et al. 2023, section 4.1, algorithm 1) asks of every weight what the loss of its group would gain
if the weight were kept in full and the group's grid were fitted to the others: leave one out. With the
second-order loss of GPTQ, an error e of column j costs `e**2 / U_jj**2`.

Only the smallest and the largest weight of a group shape its min-max grid, so three fits tell every weight's
gain: none left out, the smallest, the largest. The naive loop over all weights gives the same (tested).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bitwright.numeric.grid import decode, encode, group_rows
from bitwright.numeric.settings import Settings
from bitwright.numeric.spec import WeightSpec
from bitwright.ranges import minmax

_MINMAX = minmax.Minmax()


class Obs(Settings):
    """Keep the weights that gain most by it, as SpQR does.

    What is kept, the first that is given:

    - `threshold`: SpQR's relative threshold; a weight is kept when its gain is above `threshold` times the mean
      over columns of `variance(weights of the column) / U_jj**2`. The paper uses 0.1 to 0.45.
    - `loss`: an absolute gain, the same for all tensors.
    - `share`: this share of each tensor's weights. A recipe's `bits_per_weight` takes its place.

    Weights of large gain do not shape their group's grid. Which are kept is decided once more when their column
    is reached, by their own error after compensation, as in the paper. `simplified`: all weights shape the grid,
    and only the second test is made (the paper's ablation). `value_bits`: 16 stores residuals in float16, 8 as
    multiples of a step per row. `scope="model"`: the share is of all tensors together, and each keeps what one
    limit for all of them makes worth it (see `shares`); takes another pass over the model.
    """

    name: Literal["obs"] = "obs"
    threshold: float | None = Field(default=None, ge=0)
    loss: float | None = Field(default=None, ge=0)
    share: float = Field(default=0.005, ge=0, le=1)
    simplified: bool = False
    value_bits: Literal[8, 16] = 16
    scope: Literal["tensor", "model"] = "tensor"

    @model_validator(mode="after")
    def _scope_is_of_a_share(self) -> Obs:
        if self.scope == "model" and not self.keeps_a_share:
            raise ValueError(
                "scope=model spreads a share over tensors; use --set outliers.threshold=none --set outliers.loss=none, "
                "or --set outliers.scope=tensor"
            )
        return self

    @property
    def keeps_a_share(self) -> bool:
        """Whether the limit is whatever keeps a given share of the weights."""
        return self.threshold is None and self.loss is None


def leave_one_out(weight: Tensor, importance: Tensor, spec: WeightSpec) -> Tensor:
    """What the loss of its group gains when a weight is kept apart, float32 [out, in].

    `weight` float32 [out, in]; `importance` [in], the loss of a squared error in each column. The gain counts
    the weight's own error and what a grid fitted to the others saves or costs them; it can be negative.
    """
    one_level = spec.model_copy(update={"bilevel": None})
    gains = [
        _group_gains(part, part_importance, one_level)
        for part, part_importance in zip(
            group_rows(weight, spec), group_rows(importance.expand_as(weight), spec), strict=True
        )
    ]
    out_features = weight.shape[0]
    return torch.cat([gain.reshape(out_features, -1) for gain in gains], dim=1)


def _group_gains(weights: Tensor, importance: Tensor, spec: WeightSpec) -> Tensor:
    """`leave_one_out` for weights [n, width] of which each row is one group."""
    everything = _losses(weights, importance, spec, None)
    total = everything.sum(dim=1)
    gains = everything.clone()
    for extreme in (weights.argmin(dim=1, keepdim=True), weights.argmax(dim=1, keepdim=True)):
        others = torch.ones_like(weights, dtype=torch.bool).scatter_(1, extreme, False)
        remaining = _losses(weights, importance, spec, others).masked_fill_(~others, 0.0).sum(dim=1)
        gains.scatter_(1, extreme, (total - remaining).unsqueeze(1))
    return gains


def _losses(weights: Tensor, importance: Tensor, spec: WeightSpec, inliers: Tensor | None) -> Tensor:
    scale, zero = (t.unsqueeze(1) for t in minmax.fit(weights, inliers, None, spec, _MINMAX))
    error = decode(encode(weights, scale, zero, spec), scale, zero) - weights
    return error.square_().mul_(importance)


def loss_limit(losses: Tensor, weight: Tensor, importance: Tensor, policy: Obs) -> float:
    """The loss above which `policy` keeps a weight; infinite when it keeps none.

    `losses` [out, in] are gains or squared errors over `U_jj**2`; `importance` [in] is `1 / U_jj**2`.
    """
    if policy.threshold is not None:
        # SpQR: relative to the loss of replacing a typical weight by its column's mean.
        variance = weight.var(dim=0) if weight.shape[0] > 1 else torch.zeros_like(importance)
        return policy.threshold * float((variance * importance).mean())
    if policy.loss is not None:
        return policy.loss
    keep = round(policy.share * losses.numel())
    if keep == 0:
        return torch.inf
    if keep == losses.numel():
        return -torch.inf
    # "Greater than" keeps exactly `keep` weights, unless losses are tied there.
    return float(losses.flatten().kthvalue(losses.numel() - keep).values)
