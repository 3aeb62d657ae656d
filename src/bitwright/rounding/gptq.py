"""Rounding with error feedback: each column's error is passed to the columns that are still to come.

GPTQ (Frantar et al. 2022, sections 3.2-3.3) with the practice that has grown around it, and the outer loop of
SpQR (Dettmers et al. 2023, algorithm 1) when the policy is `obs`:

- Codes are chosen on the grid that will be read back, second level included, so whatever quantizing the scales
  costs is compensated too.
- An outlier passes no error on. What is stored for it is the *compensated* weight, as a residual over the code
  beneath.
- Groups have static grids (fitted to the original weights) unless `groups="updated"`, which fits a group when
  its first column is reached, and hence needs an order that takes groups in one piece.

Columns go through the compiled kernel in blocks; what lies beyond a block gets its error in one matrix product.
The result does not depend on the size of the blocks beyond float32 rounding (tested).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bitwright.execute.stopwatch import Stopwatch
from bitwright.numeric.grid import Grid
from bitwright.numeric.measure import exact_sum
from bitwright.numeric.outliers import NoOutliers, NSigma, Outliers, outlier_threshold
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.settings import Settings
from bitwright.ranges import Ranging
from bitwright.rounding.columns import ColumnGrid, refine_codes, round_columns
from bitwright.rounding.factor import Factor, Order, factorize
from bitwright.rounding.rescale import refit_scales
from bitwright.rounding.sensitivity import Obs, leave_one_out, loss_limit

NEAREST = "rounded to nearest"
"""How the gravest fallback begins; the run fails above a set share of it."""


class Gptq(Settings):
    """Error feedback over columns.

    `order`: see `factorize`. `damping`: share of the mean diagonal that is added to the Hessian. `importance`:
    what weighs squared errors when a range searches: `hessian` is its diagonal, `inverse` is `1 / U_jj**2`.
    `block`: columns between two matrix products; no matter for the result. `sweeps`: of coordinate descent over the
    finished codes (CDQuant, Nair and Suggala 2024, section 3), which lowers the layer's objective and hardly moved
    the model's (see LOG.md). `refit`: scales are refitted to the finished codes (see `rescale`).
    """

    name: Literal["gptq"] = "gptq"
    order: Order = "activation"
    damping: float = Field(default=0.01, ge=0)
    groups: Literal["static", "updated"] = "static"
    importance: Literal["none", "hessian", "inverse"] = "hessian"
    block: int = Field(default=128, ge=1)
    sweeps: int = Field(default=0, ge=0)
    refit: bool = False

    @model_validator(mode="after")
    def _updated_groups_stay_together(self) -> Gptq:
        if self.groups == "updated" and self.order == "activation":
            raise ValueError("order=activation scatters groups that are updated; use --set rounding.order=natural")
        return self


@dataclass(frozen=True)
class Rounded:
    """A quantized matrix and what its rounding has to report."""

    q: QTensor
    fallbacks: tuple[str, ...] = ()
    """What had to be done instead of what was asked for."""
    details: dict[str, Any] = field(default_factory=dict)
    """More for the manifest."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time went, by phase."""


def quantize_gptq(
    weight: Tensor, hessian: Tensor, ranging: Ranging, policy: NoOutliers | NSigma | Obs, settings: Gptq
) -> Rounded:
    """`weight` [out, in], any float dtype, rounded column by column under `hessian` [in, in].

    A Hessian of zeros, or one that no damping makes positive definite, is reported in `fallbacks`; the result is
    then the nearest codes.
    """
    job = _Job(weight.float(), hessian, ranging, policy, settings)
    with job.watch.phase("columns"):
        codes, target, error, mask = job.run()
        if job.aims_at_a_share:
            codes, target, error, mask = job.run_again(codes, target)
    grid = job.grid()
    if settings.refit:
        with job.watch.phase("scales after rounding"):
            left = torch.where(mask, job.weight - target, job.weight)
            grid = refit_scales(codes, grid, left, job.damped(hessian), mask)
    outliers = None
    if not isinstance(policy, NoOutliers):
        value_bits = policy.value_bits if isinstance(policy, Obs) else 16
        outliers = Outliers.gather(mask, target - grid.decode(codes), value_bits)
    # Without outliers, the damped objective tr(D H D^T) for the change of weights D (GPTQ, and our test 2).
    loss = exact_sum(error.double().square_())
    q = QTensor(codes, grid, outliers)
    if settings.sweeps:
        with job.watch.phase("coordinate descent"):
            q = job.refined(q, hessian, mask)
    if settings.sweeps or settings.refit:
        loss = job.objective(q, hessian)
    details = {"damping": job.factor.damping, "dead_columns": job.factor.dead, "loss": loss}
    return Rounded(q, _fallbacks(job.factor), details, job.watch.seconds)


def _fallbacks(factor: Factor) -> tuple[str, ...]:
    found = list(factor.attempts)
    if factor.failed:
        found.append(f"{NEAREST}: the Hessian cannot be factorized")
    if factor.dead == factor.order.numel():
        found.append(f"{NEAREST}: all inputs that calibration gave this linear are zero")
    return tuple(found)


class _Job:
    """One matrix on its way through the columns."""

    def __init__(
        self, weight: Tensor, hessian: Tensor, ranging: Ranging, policy: NoOutliers | NSigma | Obs, settings: Gptq
    ):
        self.weight, self.ranging, self.policy, self.settings = weight, ranging, policy, settings
        self.spec = spec = ranging.spec
        self.width = spec.group_width(weight.shape[1])
        self.limit: Tensor | None = None
        self.keep: Tensor | None = None
        self.inliers: Tensor | None = None
        self.grids: list[Grid | None] = [None] * spec.groups(weight.shape[1])
        self.watch = Stopwatch()
        with self.watch.phase("factorization"):
            self.factor = factorize(hessian, settings.damping, settings.order, spec)
        with self.watch.phase("ranges and outliers"):
            self.importance = self._importance(hessian)
            self._choose_outliers()
            if settings.groups == "static":
                self._fit(0, len(self.grids), weight)

    def _importance(self, hessian: Tensor) -> Tensor | None:
        kind = self.settings.importance
        if kind == "none":
            return None
        values = hessian.diagonal().float() if kind == "hessian" else self.factor.inverse_diagonal()
        # Never zero: a group of unseen columns would fit any grid.
        mean = values.mean()
        return (values + self.settings.damping * mean if mean > 0 else torch.ones_like(values)).unsqueeze(0)

    def _choose_outliers(self) -> None:
        """Which weights shape their grid (`inliers`), and which are kept: a mask, or a limit of their loss."""
        if isinstance(self.policy, NSigma):
            whole = slice(0, self.weight.shape[0])
            threshold = outlier_threshold(self.weight, self.policy, [whole])
            if threshold is not None:
                self.keep = threshold.select(whole, self.weight)
                self.inliers = ~self.keep
        elif isinstance(self.policy, Obs):
            loss = self.factor.inverse_diagonal()
            gains = leave_one_out(self.weight, loss, self.spec)
            limit = loss_limit(gains, self.weight, loss, self.policy)
            self.limit = torch.full((self.weight.shape[0],), limit)
            if not self.policy.simplified:
                self.inliers = gains <= limit

    @property
    def aims_at_a_share(self) -> bool:
        """Whether the limit is whatever keeps a given share."""
        return isinstance(self.policy, Obs) and self.policy.keeps_a_share

    def run_again(self, codes: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`run` with the limit that would have kept the share that was asked for.

        Gains only foretell what compensation makes of the errors: with the limit that they suggest, twice or half
        as many weights may be kept. The errors of that first run tell it within a few percent.
        """
        assert isinstance(self.policy, Obs)
        importance = self.factor.inverse_diagonal()
        losses = (target - self.grid().decode(codes)).square_().mul_(importance)
        self.limit = torch.full((self.weight.shape[0],), loss_limit(losses, self.weight, importance, self.policy))
        return self.run()

    def _fit(self, first: int, last: int, weight: Tensor) -> None:
        """Fit groups `first` to `last` to their columns of `weight`, which has them in natural order."""
        columns = slice(first * self.width, min(last * self.width, self.weight.shape[1]))
        inliers = None if self.inliers is None else self.inliers[:, columns]
        importance = None if self.importance is None else self.importance[:, columns]
        grid = self.ranging.groups(slice(first, last)).fit(weight, inliers, importance)
        self.grids[first:last] = [grid] + [None] * (last - first - 1)

    def grid(self) -> Grid:
        """The grid of all groups."""
        return Grid.concatenate_groups([grid for grid in self.grids if grid is not None])

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, targets and outliers [out, in] by natural column; errors in processing order."""
        order, upper = self.factor.order, self.factor.upper
        work = self.weight[:, order]
        keep = None if self.keep is None else self.keep[:, order]
        codes = torch.empty(work.shape, dtype=torch.uint8)
        error = torch.empty_like(work)
        outlier = torch.zeros(work.shape, dtype=torch.bool)
        for columns in self._blocks():
            part = work[:, columns]
            found = round_columns(
                part,
                upper[columns, columns],
                self._column_grid(order[columns], part),
                self.limit,
                None if keep is None else keep[:, columns],
            )
            codes[:, columns], error[:, columns] = found.codes, found.error
            work[:, columns], outlier[:, columns] = found.target, found.outlier
            work[:, columns.stop :] -= found.error @ upper[columns, columns.stop :]
        natural = torch.argsort(order)
        return codes[:, natural], work[:, natural], error, outlier[:, natural]

    def damped(self, hessian: Tensor) -> Tensor:
        """The Hessian of the objective, float32 [in, in] by natural column."""
        damped = hessian.float().clone()
        damped.diagonal().add_(self.factor.damping * damped.diagonal().mean())
        return damped

    def objective(self, q: QTensor, hessian: Tensor) -> float:
        """tr(D H D^T) for the damped Hessian and the change D of weights that `q` makes."""
        left = (self.weight - q.dequantize()).double()
        return exact_sum(left @ self.damped(hessian).double() * left)

    def refined(self, q: QTensor, hessian: Tensor, frozen: Tensor) -> QTensor:
        """`q` after coordinate descent on its codes, all but the `frozen` ones."""
        damped = self.damped(hessian)
        group = torch.arange(self.weight.shape[1], dtype=torch.int32) // self.width
        columns = ColumnGrid(q.grid.scale, q.grid.zero, group, self.spec.max_code)
        residual = self.weight - q.dequantize()
        codes = refine_codes(q.codes, residual, damped, columns, frozen, self.settings.sweeps)
        return QTensor(codes, q.grid, q.outliers)

    def _blocks(self) -> list[slice]:
        """Slices of the processing order; one group each when grids are fitted on the way."""
        total = self.weight.shape[1]
        if self.settings.groups == "static":
            return [slice(a, min(a + self.settings.block, total)) for a in range(0, total, self.settings.block)]
        group = self.factor.order // self.width
        starts = [0, *(torch.nonzero(group.diff())[:, 0] + 1).tolist(), total]
        return [slice(a, b) for a, b in pairwise(starts)]

    def _column_grid(self, columns: Tensor, part: Tensor) -> ColumnGrid:
        """The grid of a block: `columns` are their natural indices, `part` [out, width] their current weights."""
        group = columns // self.width
        if self.settings.groups == "static":
            whole = self.grids[0]
            assert whole is not None
            return ColumnGrid(whole.scale, whole.zero, group.to(torch.int32), self.spec.max_code)
        first = int(group[0])
        self._fit(first, first + 1, part[:, torch.argsort(columns)])
        fitted = self.grids[first]
        assert fitted is not None
        return ColumnGrid(fitted.scale, fitted.zero, torch.zeros_like(group, dtype=torch.int32), self.spec.max_code)
