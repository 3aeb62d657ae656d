"""Allocation: which choice of bits, group, method and outlier share each tensor gets.

A multiple-choice knapsack. Every tensor has options, each of so many bytes and so much expected loss; exactly one
is taken, so that the loss is least within a number of bytes, or the bytes are fewest within a loss. Losses of
tensors add, as second-order estimates of KL do where tensors are disturbed independently.

Solved by dynamic programming over the states that no other state beats in both cost and value, of which only
those are kept that the Lagrangian bound of what is left allows to beat the best solution known (Pisinger 1995,
"A minimal algorithm for the multiple-choice knapsack problem", keeps its states small in the same way). The result is
exact unless more than `MAX_STATES` states survive; `Solution.bound` tells how far from the best it can be at most.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.analyze.choices import Choice
from bitwright.errors import PlanError
from bitwright.method import load_method
from bitwright.recipe import Recipe, Rule
from bitwright.recipes.presets import method_names

Array = NDArray[np.float64]

MAX_STATES = 20_000
"""States kept after each tensor; 6 bytes each are remembered to find the way back."""
_BISECTIONS = 200
_SLACK = 1e-9  # of limits that are sums of floats


@dataclass(frozen=True)
class Option:
    """One way to store a tensor.

    Attributes:
        choice: bits, group, method and share.
        bytes: on disk.
        loss: expected of the model, in nats per token.
    """

    choice: Choice
    bytes: int
    loss: float


@dataclass(frozen=True)
class Solution:
    """One option of each item.

    Attributes:
        picks: index of the option, for each item.
        cost, value: their sums.
        bound: no solution within the limit has a smaller value.
    """

    picks: tuple[int, ...]
    cost: float
    value: float
    bound: float


@dataclass(frozen=True)
class Allocation:
    """What every tensor gets.

    Attributes:
        picks: tensor name -> option, in the order of the names.
        bound: the least loss, or the fewest bytes, that any allocation could have.
    """

    picks: dict[str, Option]
    bound: float

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(option.bytes for option in self.picks.values())

    @property
    def loss(self) -> float:
        """Expected loss in nats per token."""
        return sum(option.loss for option in self.picks.values())


def allocate(
    options: Mapping[str, Sequence[Option]],
    *,
    max_bytes: float | None = None,
    max_loss: float | None = None,
    together: Sequence[Sequence[str]] = (),
) -> Allocation:
    """The least loss within `max_bytes`, or the fewest bytes within `max_loss`; give exactly one of them.

    Args:
        options: tensor name -> its options.
        max_bytes: of all tensors in `options`.
        max_loss: in nats per token.
        together: tensors that must take the same choice, such as those that the runtime joins to one matrix.
            Names that are not in `options` are passed over.

    Raises:
        PlanError: no allocation stays within the limit; the message names the least there is.
        ValueError: both limits or none are given, a tensor has no options, or tensors that go together share no choice.
    """
    if (max_bytes is None) == (max_loss is None):
        raise ValueError("give exactly one of max_bytes and max_loss")
    items = _items(options, together)
    nbytes = [np.array([sum(o.bytes for o in row) for row in rows], dtype=np.float64) for _, rows in items]
    losses = [np.array([sum(o.loss for o in row) for row in rows], dtype=np.float64) for _, rows in items]
    costs, values, limit = (nbytes, losses, max_bytes) if max_loss is None else (losses, nbytes, max_loss)
    assert limit is not None
    least = sum(float(cost.min()) for cost in costs)
    if least > limit * (1 + _SLACK):
        unit = "bytes" if max_loss is None else "nats"
        raise PlanError(
            f"allocation: the choices need at least {least:.6g} {unit}, and {limit:.6g} are allowed; "
            f"add choices of {'fewer' if max_loss is None else 'more'} bits, or allow more"
        )
    solution = knapsack(costs, values, limit)
    picks = {
        name: option
        for (names, rows), pick in zip(items, solution.picks, strict=True)
        for name, option in zip(names, rows[pick], strict=True)
    }
    return Allocation({name: picks[name] for name in sorted(picks)}, solution.bound)


def _items(
    options: Mapping[str, Sequence[Option]], together: Sequence[Sequence[str]]
) -> list[tuple[list[str], list[tuple[Option, ...]]]]:
    """(names, the options of all of them at once) of every item, in an order that only the names decide."""
    groups = [sorted(name for name in group if name in options) for group in together]
    grouped = {name for group in groups for name in group}
    groups = [group for group in groups if group] + [[name] for name in options if name not in grouped]
    items = []
    for names in sorted(groups):
        by_choice = [{option.choice: option for option in options[name]} for name in names]
        shared = [choice for choice in by_choice[0] if all(choice in found for found in by_choice)]
        if not shared:
            raise ValueError(f"{', '.join(names)}: no option for all of them")
        items.append((names, [tuple(found[choice] for found in by_choice) for choice in shared]))
    return items


def knapsack(costs: Sequence[Array], values: Sequence[Array], limit: float) -> Solution:
    """One option of each item with the least sum of `values` whose `costs` sum to at most `limit`.

    `costs` and `values` hold, for each item, those of its options, not negative.

    Raises:
        ValueError: even the cheapest options cost more than `limit`.
    """
    limit = limit * (1 + _SLACK)
    price, bound = _price(costs, values, limit)
    best = _improved(costs, values, limit, _relaxed(costs, values, price))
    best_value = _total(values, best)
    rest_cost = np.append(np.cumsum([cost.min() for cost in costs][::-1])[::-1], 0.0)
    rest_bound = np.append(
        np.cumsum([(v + price * c).min() for c, v in zip(costs, values, strict=True)][::-1])[::-1], 0.0
    )
    state_cost, state_value = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    for number, (cost, value) in enumerate(zip(costs, values, strict=True), start=1):
        new_cost = (state_cost[:, None] + cost).ravel()
        new_value = (state_value[:, None] + value).ravel()
        hope = new_value + price * (new_cost - limit) + rest_bound[number]
        alive = (new_cost + rest_cost[number] <= limit) & (hope <= best_value * (1 + _SLACK))
        kept = _efficient(new_cost, new_value, np.flatnonzero(alive))
        if len(kept) > MAX_STATES:
            kept = np.sort(kept[np.argsort(hope[kept], kind="stable")[:MAX_STATES]])
        trail.append(((kept // len(cost)).astype(np.int32), (kept % len(cost)).astype(np.int16)))
        state_cost, state_value = new_cost[kept], new_value[kept]
    if len(state_value) and state_value.min() <= best_value:
        best = _way_back(trail, int(state_value.argmin()))
    picks = tuple(best)
    return Solution(picks, _total(costs, picks), _total(values, picks), bound)


def _total(of: Sequence[Array], picks: Sequence[int]) -> float:
    return sum(float(each[pick]) for each, pick in zip(of, picks, strict=True))


def _relaxed(costs: Sequence[Array], values: Sequence[Array], price: float) -> list[int]:
    """What each item takes where a unit of cost counts `price`; of equals the cheapest."""
    return [int(np.lexsort((c, v + price * c))[0]) for c, v in zip(costs, values, strict=True)]


def _price(costs: Sequence[Array], values: Sequence[Array], limit: float) -> tuple[float, float]:
    """The least price of cost at which items keep within `limit` by themselves, and the largest bound met."""
    if sum(float(cost.min()) for cost in costs) > limit:
        raise ValueError("even the cheapest options are beyond the limit")

    def bound(price: float) -> float:
        return sum(float((v + price * c).min()) for c, v in zip(costs, values, strict=True)) - price * limit

    if _total(costs, _relaxed(costs, values, 0.0)) <= limit:
        return 0.0, bound(0.0)
    low, high = 0.0, 1e-12
    while _total(costs, _relaxed(costs, values, high)) > limit:
        low, high = high, high * 16
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if _total(costs, _relaxed(costs, values, middle)) > limit else (low, middle)
    return high, max(bound(high), bound(low))


def _improved(costs: Sequence[Array], values: Sequence[Array], limit: float, picks: list[int]) -> list[int]:
    """`picks` after single changes, the best first, for as long as one saves value within `limit`."""
    picks = list(picks)
    room = limit - _total(costs, picks)
    while True:
        best, best_gain = None, 0.0
        for item, (cost, value) in enumerate(zip(costs, values, strict=True)):
            gains = np.where(cost - cost[picks[item]] <= room, value[picks[item]] - value, 0.0)
            pick = int(gains.argmax())
            if gains[pick] > best_gain:
                best, best_gain = (item, pick), float(gains[pick])
        if best is None:
            return picks
        item, pick = best
        room -= float(costs[item][pick] - costs[item][picks[item]])
        picks[item] = pick


def _efficient(cost: Array, value: Array, among: NDArray[np.intp]) -> NDArray[np.intp]:
    """Those of the states `among` that no other one of them beats in both cost and value, by rising cost."""
    ordered = among[np.lexsort((value[among], cost[among]))]
    if not len(ordered):
        return ordered
    sinking = np.minimum.accumulate(value[ordered])
    better = np.append(True, sinking[1:] < sinking[:-1])
    efficient: NDArray[np.intp] = ordered[better]
    return efficient


def _way_back(trail: Sequence[tuple[NDArray[np.int32], NDArray[np.int16]]], state: int) -> list[int]:
    picks = []
    for parents, chosen in reversed(trail):
        picks.append(int(chosen[state]))
        state = int(parents[state])
    return picks[::-1]


def allocated_recipe(allocation: Allocation, base: Recipe | None = None) -> Recipe:
    """The recipe that carries out `allocation`: the commonest choice by default, a rule for every other module.

    `base` gives what choices do not decide: seed, calibration, types of scales and kept tensors.
    """
    picks = {name.rpartition(".")[0]: option.choice for name, option in allocation.picks.items()}
    counts = Counter(picks.values())
    default = min(counts, key=lambda choice: (-counts[choice], choice.label))
    rules = tuple(
        Rule(match=glob.escape(module), method=choice.method, scheme=choice.scheme)
        for module, choice in sorted(picks.items())
        if choice != default
    )
    kept = {} if base is None else base.model_dump(include={"seed", "calibration", "scale_dtype", "kept_dtype"})
    return Recipe(method=default.method, scheme=default.scheme, rules=rules, **kept)


def recipe_toml(recipe: Recipe) -> str:
    """`recipe` as the TOML text that `load_recipe(file=...)` reads to the same recipe.

    Methods that are presets are written by name.
    """
    lines = [
        *_how(recipe),
        *(f"{key} = {_toml(getattr(recipe, key))}" for key in ("seed", "scale_dtype", "kept_dtype")),
    ]
    if recipe.bits_per_weight is not None:
        lines.append(f"bits_per_weight = {recipe.bits_per_weight!r}")
    lines += ["", "[calibration]"]
    lines += [f"{key} = {_toml(value)}" for key, value in recipe.calibration.model_dump(mode="json").items()]
    for rule in recipe.rules:
        lines += ["", "[[rules]]", f"match = {_toml(rule.match)}", *(["keep = true"] if rule.keep else []), *_how(rule)]
    return "\n".join(lines) + "\n"


def _how(of: Recipe | Rule) -> list[str]:
    """The lines of method and scheme, where there are any."""
    lines = []
    if of.method is not None:
        preset = of.method.name in method_names() and load_method(of.method.name, of.scheme) == of.method
        lines.append(f"method = {_toml(of.method.name if preset else of.method.model_dump(mode='json'))}")
    return lines + ([f'scheme = "{of.scheme}"'] if of.scheme is not None else [])


def _toml(value: Any) -> str:
    """A TOML value; tables in line, without their empty keys."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(v)}" for key, v in value.items() if v is not None) + " }"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value)  # TOML's basic strings escape as JSON does, for what settings hold
    return repr(value)
