"""What one streaming pass over calibration sets shows: sizes of values at every site of every block.

    for seen in collect(source, adapter, draws):   # block by block; the model is never whole in memory
        ...

All sets run through a block while it is in memory, so each weight is read once. Hooks only look: the block's outputs
are the same to the last bit. What is kept does not grow with the number of windows, and with their length only by
one number for every half octave of positions.

Keys and values are those that attention sees and a cache keeps, keys after RoPE. They are taken by handing each block
a cache that notes what it is given and gives it back; where an architecture does not take one, `note` tells so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitwright.analyze.model import SiteKind
from bitwright.analyze.statistics import SiteStatistics
from bitwright.calibration.blocks import BATCH_TOKENS, BlockRunner
from bitwright.calibration.capture import group_inputs
from bitwright.checkpoint.source import Source
from bitwright.errors import CalibrationError
from bitwright.models import Adapter

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""

_CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")
_EXPERT = ".experts."


class Site(NamedTuple):
    """A place where activations are looked at; `name` is relative to the block."""

    kind: SiteKind
    name: str


RESIDUAL = Site("residual", "residual")
KEYS = Site("keys", "keys")
VALUES = Site("values", "values")


@dataclass(frozen=True)
class Observed:
    """What one batch showed in one block: activations [windows, tokens, features], or [tokens, features] where tokens
    have no known position, and the block's output.
    """

    sites: dict[Site, Tensor]
    output: Tensor


@dataclass(frozen=True)
class BlockStatistics:
    """Statistics of one block, one entry for each draw, in their order.

    `block` is the number of blocks for the last one, which has the residual stream behind all blocks alone.
    """

    block: int
    sites: dict[Site, list[SiteStatistics]] = field(default_factory=dict)


class Collector:
    """One pass of several draws of windows through one model.

    Attributes:
        note: why keys and values cannot be seen; None where they can. Known after the first block.
    """

    def __init__(self, source: Source, adapter: Adapter, draws: Sequence[Tensor]):
        """Prepare a runner for all windows.

        Args:
            source: of the float weights.
            adapter: of the architecture.
            draws: token windows, int64 [windows, tokens], all of the same shape.

        Raises:
            CalibrationError: there are none, or their shapes differ; else those of `BlockRunner`.
        """
        shapes = {tuple(ids.shape) for ids in draws}
        if len(shapes) != 1:
            raise CalibrationError(
                f"calibration sets to analyze have the shapes {sorted(shapes)}; needed sets of one shape "
                "[windows, tokens]; give all the same number of windows and tokens"
            )
        windows, tokens = shapes.pop()
        # a batch holds windows of one draw alone
        at_once = max(1, BATCH_TOKENS // max(tokens, 1))
        batch = max(size for size in range(1, max(windows, 1) + 1) if windows % size == 0 and size <= at_once)
        self.runner = BlockRunner(source, adapter, torch.cat(list(draws)), batch)
        self.note: str | None = None
        self._draws, self._batches_each = len(draws), windows // batch
        self._cache_name: str | None = None

    def blocks(self, progress: Progress | None = None) -> Iterator[BlockStatistics]:
        """Statistics of every block in turn, and of the last block's output.

        Raises:
            CheckpointError: a tensor of a block cannot be read.
            CalibrationError: an activation is not finite.
        """
        runner = self.runner
        with runner.first_inputs() as stream:
            for index in range(runner.blocks):
                if progress is not None:
                    progress(f"block {index}", index, runner.blocks)
                block = runner.block(index)
                if index == 0:
                    self._find_cache(block, stream.read(0))
                found = BlockStatistics(index)
                for number, hidden in enumerate(stream):
                    seen = observe(runner, index, block, hidden, self._cache_name)
                    self._add(found, seen.sites, number)
                    stream.write(number, seen.output)
                yield found
            last = BlockStatistics(runner.blocks)
            for number, hidden in enumerate(stream):
                self._add(last, {RESIDUAL: hidden}, number)
            yield last

    def _add(self, found: BlockStatistics, sites: dict[Site, Tensor], number: int) -> None:
        for site, values in sites.items():
            if site not in found.sites:
                name = f"{site.name} of block {found.block}"
                found.sites[site] = [SiteStatistics(values.shape[-1], name) for _ in range(self._draws)]
            found.sites[site][number // self._batches_each].update(values)

    def _find_cache(self, block: nn.Module, hidden: Tensor) -> None:
        """Find out how `block` takes a cache, and that taking one changes nothing."""
        kind = type(block).__name__
        parameters = inspect.signature(type(block).forward).parameters
        name = next((name for name in _CACHE_NAMES if name in parameters), None)
        if name is None:
            self.note = f"keys and values were not looked at: {kind} takes no cache"
            return
        with torch.no_grad():
            expected = self.runner.run(0, block, hidden)
        try:
            seen = observe(self.runner, 0, block, hidden, name)
        except Exception as error:  # noqa: BLE001 - whatever a foreign block misses in our cache
            self.note = f"keys and values were not looked at: {kind} cannot use a cache that only looks ({error})"
            return
        if KEYS not in seen.sites or not torch.equal(seen.output, expected):
            self.note = f"keys and values were not looked at: {kind} does something else when it has a cache"
            return
        self._cache_name = name


@torch.no_grad()
def observe(runner: BlockRunner, index: int, block: nn.Module, hidden: Tensor, cache_name: str | None) -> Observed:
    """Run `block`, number `index`, on one batch `hidden` [windows, tokens, features] and look at all its sites.

    `cache_name` is the argument by which the block takes a cache; None leaves keys and values out. Hooks are gone
    afterwards, whatever happens.
    """
    adapter = runner.adapter
    leaders = [group[0] for group in adapter.shared_inputs]
    cache = _LookingCache()
    with ExitStack() as hooks:
        if cache_name is not None:

            def hand_over(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                return args, {**kwargs, cache_name: cache}

            hooks.callback(block.register_forward_pre_hook(hand_over, with_kwargs=True).remove)
        captured = group_inputs(runner, index, block, hidden, leaders, whole=True)
    assert captured.output is not None
    windows, tokens = hidden.shape[:2]
    sites = {RESIDUAL: hidden}
    for name, inputs in captured.inputs.items():
        # experts see a choice of tokens, in an order of their own
        ordered = len(inputs) == windows * tokens and _EXPERT not in name
        sites[Site("linear_input", name)] = inputs.reshape(windows, tokens, -1) if ordered else inputs
    for site, several in ((KEYS, cache.keys), (VALUES, cache.values)):
        if len(several) == 1 and several[0].ndim == 4 and several[0].shape[2] == tokens:
            sites[site] = several[0].transpose(1, 2).flatten(2)  # [windows, tokens, heads * head_dim]
    return Observed(sites, captured.output)


class _LookingCache:
    """What attention takes for a cache: it notes keys and values [windows, heads, tokens, head_dim]."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.append(key.detach().clone())
        self.values.append(value.detach().clone())
        return key, value

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Tokens before these: none."""
        return 0
