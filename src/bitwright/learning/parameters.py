"""What of a block can be learned, and what the block's tensors are for given values of it.

Three kinds of parameters, each optional:

- `clip`: logits of the shares of every group's range (OmniQuant's LWC, Shao et al. 2023, section 3.2);
- scales and shifts of the block's edges (LET, section 3.3). Scales are learned as logarithms of factors, so they stay
  positive without the clamp of the released code, which moves scales below 0.01 to it before every step;
- weights: an offset for every weight, in steps of its group's grid, so that learning may choose the code (AutoRound,
  Cheng et al. 2023, learns offsets within half a step; EfficientQAT, Chen et al. 2024, the weights themselves).

Everything starts at exactly what the transform and the search for shares have found, so that learning which gains
nothing changes nothing. `Learnables.fused` is what is rounded and stored in the end, `Learnables.quantized` what the
block computes with while it learns: the same functions on the same numbers, so the two agree to the last bit when
codes are the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitwright.models.adapter import Adapter
from bitwright.numeric.grid import Grid, expand_groups
from bitwright.numeric.spec import WeightSpec
from bitwright.numeric.straight_through import fake_quantize
from bitwright.ranges import AnyRange, Clip, Clipping, Minmax, Ranging
from bitwright.transforms.equivalence import Rewrite, apply
from bitwright.transforms.sites import LARGEST

FIRST_LOGIT = 4.0
"""Of shares that nothing has found yet: sigmoid(4) = 0.982, as published."""
_LARGEST_SHARE = 0.99
"""Found shares move as the sigmoid does here at most: the logit of 1 is infinite, and has no gradient long before."""
_OFFSET_LIMIT = 0.5
"""In steps: a code moves to a neighbour at most, as in AutoRound."""


@dataclass(frozen=True)
class Start:
    """Where learning begins.

    Attributes:
        tensors: float32 tensors of the block, by name relative to it.
        specs: of the linears that are quantized, by name relative to the block.
        range: of their grids.
        rewrite: scales and shifts to begin with; an edge without a scale is not rescaled, nor learned.
        clipping: shares to begin with, by linear; the rest begin at sigmoid(4).
    """

    tensors: Mapping[str, Tensor]
    specs: Mapping[str, WeightSpec]
    range: AnyRange
    rewrite: Rewrite
    clipping: Mapping[str, Clipping] = field(default_factory=dict)


class Learnables:
    """Parameters of one block and the tensors they make.

    Attributes:
        groups: of the optimiser, by kind ("clip", "scale", "shift", "weight"): leaf tensors.
    """

    def __init__(self, start: Start, adapter: Adapter, kinds: frozenset[str]):
        """Parameters at their first values; `kinds` are those that are learned."""
        self._start, self._adapter = start, adapter
        self.groups: dict[str, dict[str, Tensor]] = {"clip": {}, "scale": {}, "shift": {}, "weight": {}}
        self._beyond: dict[str, Tensor] = {}
        if "clip" in kinds and isinstance(start.range, Clip):
            self._add_clip()
        for index, scale in enumerate(start.rewrite.scales):
            if "scale" in kinds and scale is not None:
                self._add("scale", str(index), torch.zeros_like(scale, dtype=torch.float32))
        for index, shift in enumerate(start.rewrite.shifts):
            if "shift" in kinds and shift is not None:
                self._add("shift", str(index), shift.float())
        self._steps: dict[str, Tensor] = {}
        if "weight" in kinds:
            self._add_weights()

    def _add(self, kind: str, name: str, value: Tensor) -> None:
        self.groups[kind][name] = value.detach().clone().requires_grad_(True)

    def _add_clip(self) -> None:
        for linear, spec in self._start.specs.items():
            weight = self._start.tensors[f"{linear}.weight"]
            shape = (weight.shape[0], spec.groups(weight.shape[1]))
            found = self._start.clipping.get(linear)
            for side in ("upper", "lower"):
                if found is None:
                    logit = torch.full(shape, FIRST_LOGIT)
                else:
                    logit = torch.logit(getattr(found, side).clamp(max=_LARGEST_SHARE))
                    self._beyond[f"{linear}.{side}"] = getattr(found, side) - torch.sigmoid(logit)
                self._add("clip", f"{linear}.{side}", logit)

    @torch.no_grad()
    def _add_weights(self) -> None:
        fused = self.fused()
        for linear, spec in self._start.specs.items():
            weight = fused[f"{linear}.weight"]
            grid = self._grid(linear, weight)
            self._steps[linear] = expand_groups(grid.scale.abs(), spec, weight.shape[1])
            self._add("weight", linear, torch.zeros_like(weight))

    def rewrite(self) -> Rewrite:
        """Scales and shifts as they are now, with gradients."""
        scales, shifts = list(self._start.rewrite.scales), list(self._start.rewrite.shifts)
        for index, logarithm in self.groups["scale"].items():
            begin = scales[int(index)]
            assert begin is not None
            scales[int(index)] = begin * logarithm.exp()
        for index, shift in self.groups["shift"].items():
            shifts[int(index)] = shift
        return Rewrite(tuple(scales), tuple(shifts))

    def clipping(self, linear: str) -> Clipping | None:
        """Shares of one linear as they are now, with gradients."""
        if f"{linear}.upper" not in self.groups["clip"]:
            return self._start.clipping.get(linear)
        return Clipping(self._share(f"{linear}.upper"), self._share(f"{linear}.lower"))

    def _share(self, name: str) -> Tensor:
        share, beyond = torch.sigmoid(self.groups["clip"][name]), self._beyond.get(name)
        return share if beyond is None else share + beyond

    def fused(self) -> dict[str, Tensor]:
        """All float32 tensors of the block, rewritten and moved by their offsets, before they are quantized."""
        tensors = apply(self.rewrite(), self._adapter, self._start.tensors)
        for linear, offset in self.groups["weight"].items():
            tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] + self._steps[linear] * offset
        return tensors

    def quantized(self) -> dict[str, Tensor]:
        """`fused` with the linears on the nearest codes of their grids, with gradients through both."""
        tensors = self.fused()
        for linear, spec in self._start.specs.items():
            weight = tensors[f"{linear}.weight"]
            grid = self._grid(linear, weight)
            tensors[f"{linear}.weight"] = fake_quantize(weight, grid.scale, grid.zero, spec.one_level)
        return tensors

    def _grid(self, linear: str, weight: Tensor) -> Grid:
        """The grid of a linear's weight; with gradients to `weight` and shares for `clip` and `minmax`."""
        settings = self._start.range
        if isinstance(settings, Minmax):
            settings = Clip()  # the same bits, but minmax passes gradients on in the type of stored scales
        elif not isinstance(settings, Clip):
            weight = weight.detach()  # a grid that is searched for counts as fixed while the weight moves
        return Ranging(self._start.specs[linear].one_level, settings, self.clipping(linear)).fit(weight)

    @torch.no_grad()
    def bound(self) -> None:
        """Put offsets of weights back within half a step, and scales within those of transforms.

        Called after every step of the optimiser.
        """
        for offset in self.groups["weight"].values():
            offset.clamp_(-_OFFSET_LIMIT, _OFFSET_LIMIT)
        for index, logarithm in self.groups["scale"].items():
            begin = self._start.rewrite.scales[int(index)]
            assert begin is not None
            logarithm.clamp_(-math.log(LARGEST) - begin.log(), math.log(LARGEST) - begin.log())

    def state(self) -> list[Tensor]:
        """Copies of all parameters."""
        return [value.detach().clone() for group in self.groups.values() for value in group.values()]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Take back what `state` gave."""
        for value, saved in zip((v for group in self.groups.values() for v in group.values()), state, strict=True):
            value.copy_(saved)
