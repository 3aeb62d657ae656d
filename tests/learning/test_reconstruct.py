"""Block reconstruction: it never ends worse than it began, whatever happens on the way (invariant 10), its loss is
what it says, and what it does depends on nothing but its inputs, the seed and the block.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright.errors import WeightError
from bitwright.learning import reconstruct as module
from bitwright.learning.parameters import Learnables
from bitwright.learning.reconstruct import Learn, reconstruct

KINDS = {
    "clip": frozenset({"clip"}),
    "scale": frozenset({"scale"}),
    "weight": frozenset({"weight"}),
    "all": frozenset({"clip", "scale", "shift", "weight"}),
}
FAST = Learn(epochs=3, clip_rate=3e-2, scale_rate=1e-2, weight_rate=3e-2)


def silent(text: str) -> None:
    pass


def run(job, learnables: Learnables, settings: Learn = FAST, seed: int = 0):
    return reconstruct(job.runner, job.task, learnables, settings, seed, silent)


def loss(job, learnables: Learnables) -> float:
    return module._Session(job.runner, job.task, learnables).loss()


def finite(learnables: Learnables) -> bool:
    with torch.no_grad():
        values = [*learnables.state(), *learnables.fused().values(), *learnables.quantized().values()]
    return all(bool(value.isfinite().all()) for value in values)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_10_learning_lowers_the_loss_and_reports_what_it_left(make_job, name: str, kinds: str) -> None:
    job = make_job(name)
    learnables = job.learnables(KINDS[kinds])
    before = loss(job, learnables)
    curve = run(job, learnables)
    assert curve.first == before
    assert curve.best < 0.99 * curve.first
    assert loss(job, learnables) == curve.best
    assert len(curve.epochs) == FAST.epochs
    assert curve.stopped is None
    assert curve.to_json()["loss_after"] == curve.best


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("rate", [10.0, 1e4])
def test_10_absurd_rates_leave_the_start_or_better(make_job, name: str, kinds: str, rate: float) -> None:
    job = make_job(name)
    learnables = job.learnables(KINDS[kinds])
    settings = Learn(epochs=3, clip_rate=rate, scale_rate=rate, weight_rate=rate, schedule="constant", checks=3)
    curve = run(job, learnables, settings)
    assert math.isfinite(curve.first)
    assert curve.best <= curve.first
    assert loss(job, learnables) == curve.best
    assert finite(learnables)


@pytest.mark.parametrize("checks", [1, 4])
def test_10_a_loss_that_becomes_nan_brings_back_the_best(make_job, monkeypatch, checks: int) -> None:
    job = make_job("llama")
    step, count = module._Session.step, 0
    kept: list[list[Tensor]] = []

    def broken(self, part, scale) -> float:
        nonlocal count
        count += 1
        if count == 13:  # of 5 steps an epoch: in the third
            kept.append(self.learnables.state())
            return math.nan
        return step(self, part, scale)

    learnables = job.learnables()
    begin = learnables.state()
    monkeypatch.setattr(module._Session, "step", broken)
    curve = run(job, learnables, FAST.model_copy(update={"epochs": 4, "checks": checks}))
    assert count == 13
    assert curve.stopped is not None
    assert "epoch 3" in curve.stopped
    assert len(curve.epochs) == 2
    assert not same(learnables.state(), kept[0])
    # with one check at the end nothing was measured before; with four the epochs that were finished count
    assert same(learnables.state(), begin) == (checks == 1)
    assert (curve.best == curve.first) == (checks == 1)
    assert loss(job, learnables) == curve.best
    assert finite(learnables)


def test_10_a_gradient_that_becomes_nan_moves_nothing(make_job, monkeypatch) -> None:
    job = make_job("opt")
    step = module._Session.step

    def broken(self, part, scale) -> float:
        value = step(self, part, scale)
        next(iter(self.learnables.groups["scale"].values())).grad[0] = math.nan
        return value

    learnables = job.learnables()
    begin = learnables.state()
    monkeypatch.setattr(module._Session, "step", broken)
    curve = run(job, learnables)
    assert curve.stopped == "loss or gradient not finite in epoch 1"
    assert same(learnables.state(), begin)
    assert curve.to_json()["epoch_losses"] == []


def test_10_a_scale_that_no_stored_type_holds_ends_learning(make_job, monkeypatch) -> None:
    job = make_job("llama")
    quantized, count = Learnables.quantized, 0

    def broken(self) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        if count > 4:
            raise WeightError("a scale of 1e+05 does not fit float16")
        return quantized(self)

    learnables = job.learnables()
    begin = learnables.state()
    monkeypatch.setattr(Learnables, "quantized", broken)
    curve = run(job, learnables)
    assert curve.stopped == "loss or gradient not finite in epoch 1"
    assert same(learnables.state(), begin)


def test_10_a_start_that_is_not_finite_is_left_alone_and_said(make_job) -> None:
    job = make_job("llama")
    broken = {**job.start.tensors, "input_layernorm.weight": torch.full((64,), math.nan)}
    job.start = replace(job.start, tensors=broken)
    learnables = job.learnables()
    begin = learnables.state()
    curve = run(job, learnables)
    assert curve.stopped == "loss not finite before the first step"
    assert same(learnables.state(), begin)
    assert curve.to_json()["loss_before"] is None
    assert curve.to_json()["loss_after"] is None


def test_3_a_block_without_error_is_left_alone(make_job) -> None:
    job = make_job("llama")
    job.task = replace(job.task, inputs=job.task.targets)
    outputs = job.task.inputs.copy()
    job.runner.advance(1, job.task.block, outputs)
    job.task, job.start = replace(job.task, targets=outputs), replace(job.start, specs={})
    learnables = job.learnables()
    curve = run(job, learnables)
    assert (curve.first, curve.best, curve.epochs) == (0.0, 0.0, [])
    assert all(torch.equal(value, job.start.tensors[key]) for key, value in learnables.quantized().items())


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_loss_is_that_of_a_loop(make_job, augmented: bool, weighed: bool) -> None:
    weights = torch.rand(7, 16, generator=torch.Generator().manual_seed(3)) if weighed else None
    job = make_job("opt", augmented=augmented, token_weights=weights)
    learnables = job.learnables()
    tensors = learnables.quantized()
    inputs, targets = (torch.cat(list(stream)) for stream in (job.task.inputs, job.task.targets))
    second = torch.cat(list(job.task.augmented)) if augmented else None
    error = size = 0.0

    def call(hidden, *args, **kwargs):
        return torch.func.functional_call(job.task.block, tensors, (hidden, *args), kwargs)

    with torch.no_grad():
        for window in range(7):
            output = job.runner.run(1, call, inputs[window : window + 1])[0].double()
            token = torch.ones(16, 1) if weights is None else weights[window].unsqueeze(1)
            size += float((token * targets[window].double().square()).sum())
            error += float((token * (output - targets[window]).square()).sum())
            if second is not None:
                error += float((token * (output - second[window]).square()).sum())
    assert loss(job, learnables) == pytest.approx(error / size, rel=1e-5)


def test_steps_over_all_parts_average_to_the_loss_and_its_gradient(make_job) -> None:
    job = make_job("llama", token_weights=torch.rand(7, 16, generator=torch.Generator().manual_seed(4)))
    grads, totals = [], []
    for windows in (1, 2, 3):
        learnables = job.learnables()
        session = module._Session(job.runner, job.task, learnables)
        total = 0.0
        for part in session.batches(windows):
            share = (part[1].stop - part[1].start) / 7
            before = [leaf.grad.clone() if leaf.grad is not None else 0.0 for leaf in leaves(learnables)]
            total += share * session.step(part, 2.0)
            for leaf, old in zip(leaves(learnables), before, strict=True):
                leaf.grad = old + share * (leaf.grad - old)
        totals.append(total)
        grads.append([leaf.grad for leaf in leaves(learnables)])
        assert total == pytest.approx(session.loss(), rel=1e-5)
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    # relative to the largest of all: those of query and key scales are next to nothing in a random block
    size = max(float(grad.abs().max()) for grad in grads[0])
    for one, other, third in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * size)
        torch.testing.assert_close(one, third, rtol=1e-3, atol=1e-5 * size)


def leaves(learnables: Learnables) -> list[Tensor]:
    return [leaf for group in learnables.groups.values() for leaf in group.values()]


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 9])
def test_batches_cover_every_window_once(make_job, windows: int) -> None:
    job = make_job("llama")
    parts = list(module._Session(job.runner, job.task, job.learnables()).batches(windows))
    covered = [number * 3 + index for number, part in parts for index in range(part.start, part.stop)]
    assert covered == list(range(7))
    assert all(1 <= part.stop - part.start <= windows for _, part in parts)


def test_the_order_depends_on_seed_and_block_alone(make_job, monkeypatch) -> None:
    seen: list[tuple[int, int]] = []

    def look(self, part, scale) -> float:
        seen.append((part[0], part[1].start))
        for leaf in leaves(self.learnables):
            leaf.grad = torch.zeros_like(leaf)
        return 1.0

    monkeypatch.setattr(module._Session, "step", look)
    job, settings = make_job("llama"), Learn(epochs=4, batch_windows=1)

    def order(seed: int = 5, index: int = 1, kinds: str = "clip", **changes) -> list[tuple[int, int]]:
        seen.clear()
        torch.rand(3)  # the generator that everybody shares moves on
        task = replace(job.task, index=index)
        changed = settings.model_copy(update=changes)
        reconstruct(job.runner, task, job.learnables(KINDS[kinds]), changed, seed, silent)
        return list(seen)

    first = order()
    assert len(first) == 28
    epochs = [first[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 7 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert order() == first
    assert order(kinds="all", clip_rate=0.5, schedule="constant", checks=4) == first
    assert order(seed=6) != first
    assert order(index=0) != first


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_checkpointing_changes_no_bit(make_job, monkeypatch, name: str) -> None:
    results = []
    for short in (False, True):
        job = make_job(name, augmented=True)
        monkeypatch.setattr(module._Session, "_memory_is_short", lambda self, short=short: short)
        learnables = job.learnables()
        session = module._Session(job.runner, job.task, learnables)
        value = session.step((1, slice(0, 2)), 0.5)
        grads = [leaf.grad for leaf in leaves(learnables)]
        assert all(grad is not None and bool(grad.any()) for grad in grads)
        curve = run(job, job.learnables())
        results.append((value, grads, curve))
        assert not any("forward" in vars(child) for child in job.task.block.modules())
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_checkpointing_keeps_the_hooks_of_linears(make_job, monkeypatch) -> None:
    """Inputs that are rounded in forward are rounded again when they are recomputed."""
    grads = []
    for short in (False, True):
        job = make_job("llama")
        monkeypatch.setattr(module._Session, "_memory_is_short", lambda self, short=short: short)
        calls = []

        def coarse(_, args, calls=calls):
            calls.append(1)
            return ((args[0] * 64).detach().round() / 64 + args[0] - args[0].detach(), *args[1:])

        hook = job.task.block.get_submodule("mlp.up_proj").register_forward_pre_hook(coarse)
        learnables = job.learnables()
        module._Session(job.runner, job.task, learnables).step((0, slice(0, 3)), 1.0)
        hook.remove()
        assert len(calls) == (2 if short else 1)
        grads.append([leaf.grad for leaf in leaves(learnables)])
    assert same(*grads)


def test_memory_is_short_where_activations_would_take_it(make_job, monkeypatch) -> None:
    job = make_job("llama")
    session = module._Session(job.runner, job.task, job.learnables())
    for available, short in ((None, False), (2**40, False), (1000, True)):
        monkeypatch.setattr(module, "available_memory_bytes", lambda available=available: available)
        assert session._memory_is_short() is short


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 1 / 15)])
def test_rates(make_job, monkeypatch, schedule, last: float) -> None:
    seen: list[list[float]] = []
    step = torch.optim.AdamW.step

    def look(self, closure=None):
        seen.append([group["lr"] for group in self.param_groups])
        assert all(group["weight_decay"] == 0 for group in self.param_groups)
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    job = make_job("opt")
    rates = {"clip_rate": 1e-3, "scale_rate": 2e-3, "weight_rate": 4e-3}
    run(job, job.learnables(), Learn(epochs=3, schedule=schedule, **rates))
    assert len(seen) == 15  # 7 windows in batches of 3, 2 at a time, make 5 parts
    assert seen[0] == [1e-3, 2e-3, 2e-3, 4e-3]
    assert seen[-1] == pytest.approx([last * rate for rate in seen[0]])


def test_the_same_job_gives_the_same_bits(make_job) -> None:
    one, other = make_job("opt"), make_job("opt")
    first, second = one.learnables(), other.learnables()
    assert run(one, first, seed=3) == run(other, second, seed=3)
    assert same(first.state(), second.state())
    third = one.learnables()
    run(one, third, seed=4)
    assert not same(first.state(), third.state())
    assert all(not p.requires_grad and p.grad is None for p in one.task.block.parameters())


def test_any_seed_of_a_recipe_will_do(make_job) -> None:
    job = make_job("llama")
    assert run(job, job.learnables(), FAST, seed=2**64).stopped is None
