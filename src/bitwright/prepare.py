"""What happens to a block before its weights are rounded: statistics, transform, clipping, learning.

The float block runs on the inputs that the quantized blocks before it give, once for statistics. A
transform's scales follow in closed form or by search; shares of the groups' ranges too; then learning moves whatever
the recipe declares learnable. What comes out are the block's float tensors, rewritten, and the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.capture import input_moments
from bitwright.calibration.gradients import TokenWeights
from bitwright.calibration.hessians import HessianPass
from bitwright.calibration.statistics import ChannelMoments
from bitwright.calibration.stream import Stream
from bitwright.learning.parameters import Learnables, Start
from bitwright.learning.reconstruct import Task, reconstruct
from bitwright.method import Method
from bitwright.models.adapter import Adapter
from bitwright.models.edges import RotaryEdge
from bitwright.numeric.activation import InputSite, KvSpec
from bitwright.numeric.spec import WeightSpec
from bitwright.ranges import Clipping, Ranging
from bitwright.ranges.clip import search_clipping
from bitwright.runtime.sites import quantized_activations
from bitwright.transforms.awq import Awq, search_scales
from bitwright.transforms.equivalence import Rewrite, apply, midpoint_shifts
from bitwright.transforms.smooth import Smooth, smooth_scales


@dataclass(frozen=True)
class Prepared:
    """A block on the eve of rounding.

    Attributes:
        tensors: float32, by name relative to the block.
        clipping: shares of the groups' ranges, by linear; empty where the range is another.
        report: for the manifest.
    """

    tensors: dict[str, Tensor]
    clipping: dict[str, Clipping] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """One block of the job.

    Attributes:
        index: of the block.
        module: with the float model's weights.
        specs: of the linears that are calibrated, by name relative to the block.
        inputs: what the quantized blocks before it give.
        targets: the float block's outputs on the float model's inputs; None unless something is learned.
        sites: what quantizes the inputs of its linears, by name relative to the block; in force only while the
            quantized block is learned, for statistics are those of what is to be quantized.
        kv_cache: how its keys and values are quantized, then too; None: they stay in float.
    """

    index: int
    module: nn.Module
    specs: Mapping[str, WeightSpec]
    inputs: Stream
    targets: Stream | None
    sites: Mapping[str, InputSite] = field(default_factory=dict)
    kv_cache: KvSpec | None = None


class Preparation:
    """Carries out the steps before rounding of one method, block by block."""

    def __init__(self, runner: BlockRunner, method: Method, seed: int, say: Callable[[str], None]):
        """Nothing is run yet; `say` is told what is being done."""
        self._runner, self._method, self._seed, self._say = runner, method, seed, say

    @property
    def _adapter(self) -> Adapter:
        return self._runner.adapter

    def run(self, block: Block, weights: TokenWeights | None) -> Prepared:
        """The block's tensors and shares, ready to be rounded; the module is left as it was."""
        tensors = {name: value.detach() for name, value in block.module.named_parameters()}
        moments, hessians = self._statistics(block, weights)
        rewrite, report = self._rewrite(block, tensors, moments, hessians)
        rewritten = apply(rewrite, self._adapter, tensors)
        clipping = self._clipping(block, rewritten, rewrite, hessians) if self._method.searches_clipping else {}
        if self._method.learn is None:
            return Prepared(rewritten, clipping, report)
        start = Start(tensors, block.specs, self._method.range, rewrite, clipping)
        return self._learn(block, start, weights, report)

    def _statistics(
        self, block: Block, weights: TokenWeights | None
    ) -> tuple[dict[str, ChannelMoments], dict[str, Tensor]]:
        """Moments and Hessians of every calibrated linear's inputs; none where nothing asks for them."""
        method, linears = self._method, list(block.specs)
        place = (block.index, block.module, block.inputs)
        if isinstance(method.transform, Awq) or method.searches_clipping:
            self._say(f"statistics of block {block.index}")
            found = HessianPass(self._runner, weights).gather(*place, linears, moments=True)
            moments = {name: evidence.moments for name, evidence in found.items() if evidence.moments is not None}
            return moments, {name: evidence.hessian for name, evidence in found.items()}
        if method.transform.name != "none" or (method.learn and method.learn.shifts):
            self._say(f"statistics of block {block.index}")
            return input_moments(self._runner, *place, linears), {}
        return {}, {}

    def _rewrite(
        self,
        block: Block,
        tensors: Mapping[str, Tensor],
        moments: Mapping[str, ChannelMoments],
        hessians: Mapping[str, Tensor],
    ) -> tuple[Rewrite, dict[str, Any]]:
        """Scales and shifts before learning, and what the search for them found."""
        adapter, transform, learn = self._adapter, self._method.transform, self._method.learn
        nothing: tuple[Tensor | None, ...] = (None,) * len(adapter.edges)
        rewrite, report = Rewrite(nothing, nothing), {}
        if isinstance(transform, Smooth):
            rewrite = smooth_scales(transform, adapter, tensors, {name: m.absmax for name, m in moments.items()})
        elif isinstance(transform, Awq):
            mean_abs = {name: m.mean_abs for name, m in moments.items()}
            rewrite, choices = search_scales(
                transform, adapter, tensors, hessians, mean_abs, lambda name, weight: self._nearest(block, name, weight)
            )
            report = {"awq_exponents": [round(choice.exponent, 4) for choice in choices]}
        if learn is not None and learn.query_key:
            scales = tuple(
                torch.ones(edge.width(adapter.shape)) if isinstance(edge, RotaryEdge) and scale is None else scale
                for edge, scale in zip(adapter.edges, rewrite.scales, strict=True)
            )
            rewrite = replace(rewrite, scales=scales)
        if learn is not None and learn.shifts:
            low, high = ({name: getattr(m, side) for name, m in moments.items()} for side in ("low", "high"))
            rewrite = replace(rewrite, shifts=midpoint_shifts(adapter, tensors, low, high))
        return rewrite, report

    def _nearest(self, block: Block, name: str, weight: Tensor) -> Tensor:
        """What a linear's weight becomes on the nearest codes of its range."""
        grid = Ranging(block.specs[name].one_level, self._method.range).fit(weight.float())
        return grid.decode(grid.encode(weight))

    def _clipping(
        self, block: Block, rewritten: Mapping[str, Tensor], rewrite: Rewrite, hessians: Mapping[str, Tensor]
    ) -> dict[str, Clipping]:
        """The best shares of the rewritten weights; `hessians` are of the block as it was before."""
        factors = self._input_factors(rewrite)
        found = {}
        for name, spec in block.specs.items():
            hessian = hessians[name]
            if name in factors:  # inputs are divided by what the columns were multiplied with
                hessian = hessian / factors[name].unsqueeze(0) / factors[name].unsqueeze(1)
            found[name] = search_clipping(rewritten[f"{name}.weight"], hessian, spec)
        return found

    def _input_factors(self, rewrite: Rewrite) -> dict[str, Tensor]:
        """What the columns of each linear are multiplied with, [in]."""
        found = {}
        for edge, scale in zip(self._adapter.edges, rewrite.scales, strict=True):
            if scale is None:
                continue
            for tensor, factor in edge.factors(scale, self._adapter.shape).items():
                if factor.columns is not None:
                    found[tensor.removesuffix(".weight")] = factor.columns
        return found

    def _learn(self, block: Block, start: Start, weights: TokenWeights | None, report: dict[str, Any]) -> Prepared:
        learn = self._method.learn
        assert learn is not None
        assert block.targets is not None
        index, runner = block.index, self._runner
        augmented = None
        if learn.augmented:
            augmented = block.inputs.copy()
            runner.advance(index, block.module, augmented)
        # The last linear writes to the residual stream: its gradient is that of the block's output.
        token_weights = None if weights is None else weights[(index, self._adapter.linears[-1])]
        task = Task(index, block.module, block.inputs, block.targets, augmented, token_weights)
        learnables = Learnables(start, self._adapter, learn.kinds)
        with quantized_activations(block.module, block.sites, block.kv_cache):
            curve = reconstruct(
                runner, task, learnables, learn, self._seed, lambda text: self._say(f"learning block {index}: {text}")
            )
        if augmented is not None:
            augmented.close()
        with torch.no_grad():
            tensors = learnables.fused()
            clipping = {name: found for name in block.specs if (found := learnables.clipping(name)) is not None}
        return Prepared(tensors, clipping, report | curve.to_json())
