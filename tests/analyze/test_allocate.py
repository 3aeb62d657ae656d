"""Allocation: the knapsack against trying everything, limits kept, recipes that plan consumes."""

import itertools
from pathlib import Path

import numpy as np
import pytest

import bitwright
from bitwright.analyze.allocate import (
    MAX_STATES,
    Allocation,
    Option,
    allocate,
    allocated_recipe,
    knapsack,
    recipe_toml,
)
from bitwright.analyze.choices import Choice, check_mixable, choices_of, default_choices, parse_choice
from bitwright.errors import PlanError, RecipeError

CHOICES = [parse_choice(text) for text in ("rtn:w2a16g32", "rtn:w3a16g32", "rtn:w4a16g32", "rtn:w8a16g32")]


def instance(seed: int, items: int, options: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(seed)
    costs = [random.integers(1, 60, options).astype(float) for _ in range(items)]
    values = [random.choice([0.0, 0.5, 1.0], options) * random.lognormal(0, 2, options) for _ in range(items)]
    return costs, values


def brute_force(costs: list[np.ndarray], values: list[np.ndarray], limit: float) -> float:
    best = np.inf
    for picks in itertools.product(*(range(len(cost)) for cost in costs)):
        if sum(cost[pick] for cost, pick in zip(costs, picks, strict=True)) <= limit:
            best = min(best, sum(value[pick] for value, pick in zip(values, picks, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(30))
def test_the_knapsack_is_brute_force(seed: int) -> None:
    costs, values = instance(seed, items=1 + seed % 6, options=2 + seed % 4)
    least, most = sum(cost.min() for cost in costs), sum(cost.max() for cost in costs)
    for limit in np.linspace(least, most + 1, 6):
        found = knapsack(costs, values, limit)
        assert found.cost <= limit + 1e-6
        assert found.value == pytest.approx(brute_force(costs, values, limit), abs=1e-12)
        assert found.bound <= found.value + 1e-9
        swapped = knapsack(values, costs, found.value)  # the fewest bytes for that loss
        assert swapped.value == pytest.approx(brute_force(values, costs, found.value * (1 + 1e-9)), abs=1e-9)


def test_large_instances_stay_within_the_limit_and_close_to_the_bound() -> None:
    random = np.random.default_rng(0)
    sizes = random.choice([331776, 110592, 884736], 300)
    bits = np.array([2.3, 3.3, 4.3, 5.3, 8.3])
    costs = [np.floor(size * bits * random.uniform(0.98, 1.02, 5) / 8) for size in sizes]
    values = [size * random.lognormal(0, 1.5) * 4.0**-bits * random.uniform(0.7, 1.3, 5) for size in sizes]
    limit = float(sizes.sum()) * 3.5 / 8
    found = knapsack(costs, values, limit)
    assert found.cost <= limit * (1 + 1e-8)
    assert found.bound <= found.value <= found.bound * 1.001
    assert MAX_STATES >= 1000
    with pytest.raises(ValueError, match="cheapest"):
        knapsack(costs, values, 1.0)


def table(tensors: int = 5, seed: int = 0) -> dict[str, list[Option]]:
    random = np.random.default_rng(seed)
    found = {}
    for number in range(tensors):
        size, care = int(random.integers(1, 9)) * 100, float(random.lognormal(0, 1.5))
        found[f"model.layers.{number}.mlp.up_proj.weight"] = [
            Option(choice, size * choice.bits, care * 4.0**-choice.bits) for choice in CHOICES
        ]
    return found


def test_the_order_of_tensors_does_not_matter() -> None:
    options = table()
    turned = dict(reversed(options.items()))
    budget = sum(rows[1].bytes for rows in options.values()) + 150
    one, other = allocate(options, max_bytes=budget), allocate(turned, max_bytes=budget)
    assert one == other
    assert one.bytes <= budget
    assert one.loss <= sum(rows[1].loss for rows in options.values())  # uniform bits of as many bytes


def test_fewer_bytes_for_a_loss_and_less_loss_for_bytes_agree() -> None:
    options = table(6, seed=1)
    within = allocate(options, max_bytes=sum(rows[1].bytes for rows in options.values()))
    back = allocate(options, max_loss=within.loss)
    assert back.bytes <= within.bytes
    assert back.loss <= within.loss * (1 + 1e-9)


def test_tensors_that_go_together_take_one_choice() -> None:
    options = table(6, seed=2)
    names = sorted(options)
    budget = sum(rows[1].bytes for rows in options.values()) + 70
    free, tied = (allocate(options, max_bytes=budget, together=some) for some in ((), (names[:3], [*names[3:5], "?"])))
    for group in (names[:3], names[3:5]):
        assert len({tied.picks[name].choice for name in group}) == 1
    assert tied.bytes <= budget
    assert tied.loss >= free.loss


def test_limits_that_cannot_be_kept_are_refused() -> None:
    options = table()
    with pytest.raises(PlanError, match=r"at least \d+ bytes, and 10 are allowed; add choices of fewer"):
        allocate(options, max_bytes=10)
    with pytest.raises(PlanError, match=r"at least [\d.e-]+ nats, and 0 are allowed; add choices of more"):
        allocate(options, max_loss=0)
    with pytest.raises(ValueError, match="exactly one"):
        allocate(options)
    with pytest.raises(ValueError, match="no option for all"):
        allocate({"a": options[min(options)][:1], "b": options[min(options)][1:]}, max_bytes=1e9, together=[("a", "b")])


def test_the_recipe_is_what_was_allocated(tiny_llama_folder: Path, tmp_path: Path) -> None:
    choices = [*CHOICES[1:], parse_choice("spqr:w3a16:outliers.share=0.0625"), parse_choice("gptq:w4a16g64")]
    plans = {choice: bitwright.plan(str(tiny_llama_folder), recipe=recipe_for(choice)) for choice in choices}
    rows = {choice: [row for row in plan.rows() if row.action == "quantize"] for choice, plan in plans.items()}
    picks = {}
    for number, row in enumerate(rows[choices[0]]):
        choice = choices[number % len(choices)]
        planned = next(r for r in rows[choice] if r.tensor == row.tensor)
        picks[row.tensor] = Option(choice, planned.bytes, 0.0)
    base = bitwright.load_recipe("rtn", "w4a16", overrides=["seed=3", "calibration.windows=5"])
    allocation = Allocation(picks, 0.0)
    recipe = allocated_recipe(allocation, base)
    assert (recipe.seed, recipe.calibration.windows) == (3, 5)
    planned = bitwright.plan(str(tiny_llama_folder), recipe=recipe)
    for row in planned.rows():
        if row.action == "quantize":
            assert row.method == picks[row.tensor].choice.method
            assert row.bytes == picks[row.tensor].bytes
    assert sum(row.bytes for row in planned.rows() if row.action == "quantize") == allocation.bytes
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_toml(recipe))
    assert bitwright.load_recipe(file=path) == recipe


def recipe_for(choice: Choice) -> bitwright.Recipe:
    return bitwright.Recipe(method=choice.method, scheme=choice.scheme)


@pytest.mark.parametrize("name", ["omniquant+spqr", "spqr-paper", "easyquant-paper", "rotate"])
def test_any_recipe_survives_toml(name: str, tmp_path: Path) -> None:
    rules = [
        {"match": "model.embed*", "keep": True},
        {"match": "*.q_proj", "method": name, "scheme": "w3a16"},
        {"match": "*.v_proj", "scheme": "w8a16g32-sym"},
    ]
    recipe = bitwright.Recipe.model_validate({"method": name, "scheme": "w4a16g32", "rules": rules})
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_toml(recipe))
    assert bitwright.load_recipe(file=path) == recipe


def test_choices_are_spelled_as_they_are_read() -> None:
    for choice in (*default_choices(), *choices_of(["spqr", "gptq"]), *choices_of(["omniquant+spqr"])):
        assert parse_choice(choice.label) == choice
    assert check_mixable(default_choices()) is None
    assert parse_choice("spqr:w3a16:outliers.share=0.02").outlier_share == 0.02
    assert parse_choice("spqr:w3a16").group_size == 32
    assert {choice.bits for choice in choices_of(["rtn"])} == {2, 3, 4, 5, 6, 8}
    with pytest.raises(RecipeError, match="needed METHOD:SCHEME"):
        parse_choice("rtn")


def test_choices_that_no_recipe_can_mix_are_refused() -> None:
    with pytest.raises(RecipeError, match="treat whole blocks differently"):
        choices_of(["gptq", "gptq-paper"])
    with pytest.raises(RecipeError, match="rotations"):
        check_mixable([parse_choice("rotate:w4a16"), parse_choice("rtn:w4a16")])
    with pytest.raises(RecipeError, match="given twice"):
        check_mixable([CHOICES[0], CHOICES[0]])
    with pytest.raises(RecipeError, match="no choices"):
        check_mixable([])
