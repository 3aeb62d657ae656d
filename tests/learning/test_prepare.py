"""What happens to a block before rounding: on the right statistics, by equivalent steps, with nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bitwright.prepare as module
from bitwright.calibration.hessians import HessianPass
from bitwright.numeric.activation import ActivationSpec, InputSite
from bitwright.numeric.spec import WeightSpec
from bitwright.prepare import Block, Preparation, Prepared
from bitwright.ranges.clip import search_clipping
from bitwright.recipe import load_recipe

COARSE = InputSite(activation=ActivationSpec(bits=4))
QUICK = ("learn.epochs=1", "learn.batch_windows=3", "inputs.weighting=uniform")


def prepare(job, method: str, *settings: str, sites: bool = False, specs: bool = True) -> Prepared:
    found = load_recipe(method, "w3a16g16", None, settings).method
    assert found is not None
    linears = job.runner.adapter.linears
    block = Block(
        1,
        job.task.block,
        dict.fromkeys(linears, WeightSpec(bits=3, group_size=16)) if specs else {},
        job.task.inputs,
        job.task.targets,
        dict.fromkeys(linears, COARSE) if sites else {},
    )
    return Preparation(job.runner, found, 0, lambda text: None).run(block, None)


def outputs(job, tensors: dict[str, Tensor]) -> Tensor:
    def call(hidden, *args, **kwargs):
        return torch.func.functional_call(job.task.block, tensors, (hidden, *args), kwargs)

    with torch.no_grad():
        return torch.cat([job.runner.run(1, call, hidden) for hidden in job.task.inputs])


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("method", ["awq", "smoothquant", "omniquant"])
def test_1_the_float_block_computes_what_it_did(make_job, name: str, method: str) -> None:
    job = make_job(name)
    everything = (*QUICK, "learn.query_key=true", "learn.shifts=true", "learn.weights=false")
    learned = everything if method == "omniquant" else ()
    prepared = prepare(job, method, *learned, sites=True)
    before = outputs(job, {})
    assert any(not torch.equal(value, job.start.tensors[key]) for key, value in prepared.tensors.items())
    assert float((outputs(job, prepared.tensors) - before).abs().max()) <= 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("method", ["awq", "omniquant", "omniquant-paper"])
def test_3_with_nothing_to_quantize_no_bit_changes(make_job, method: str) -> None:
    job = make_job("llama")
    targets = job.task.inputs.copy()
    job.runner.advance(1, job.task.block, targets)
    job.task = type(job.task)(1, job.task.block, job.task.inputs, targets)
    prepared = prepare(job, method, *(QUICK if method != "awq" else ()), specs=False)
    for key, value in prepared.tensors.items():
        assert torch.equal(value.view(torch.int32), job.start.tensors[key].view(torch.int32))


def test_the_block_is_left_as_it_was(make_job) -> None:
    job = make_job("opt")
    before = {key: value.clone() for key, value in job.task.block.named_parameters()}
    prepare(job, "omniquant", *QUICK, "learn.shifts=true", "learn.augmented=true", sites=True)
    for key, value in job.task.block.named_parameters():
        assert torch.equal(value, before[key])
        assert not value.requires_grad
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in job.task.block.modules())
    assert not any("forward" in vars(part) for part in job.task.block.modules())


def test_statistics_are_of_inputs_that_nothing_has_rounded(make_job, monkeypatch) -> None:
    """At 4 bits a channel that is faint beside an outlier's rounds to zero, and would count as dead."""
    seen: list[dict[str, Tensor]] = []
    scales = module.smooth_scales

    def look(settings, adapter, tensors, absmax):
        seen.append(absmax)
        return scales(settings, adapter, tensors, absmax)

    monkeypatch.setattr(module, "smooth_scales", look)
    results = [prepare(make_job("llama"), "smoothquant", sites=sites) for sites in (False, True)]
    for name, absmax in seen[0].items():
        assert bool((absmax > 0).all())
        assert torch.equal(absmax, seen[1][name])
    assert all(torch.equal(value, results[1].tensors[key]) for key, value in results[0].tensors.items())


def test_the_second_loss_is_against_float_inputs_too(make_job, monkeypatch) -> None:
    tasks = []
    reconstruct = module.reconstruct

    def look(runner, task, *rest):
        tasks.append(torch.cat(list(task.augmented)))
        hooked = [part for part in task.block.modules() if part._forward_pre_hooks]
        assert len(hooked) == len(runner.adapter.linears)  # while the quantized block is learned
        return reconstruct(runner, task, *rest)

    monkeypatch.setattr(module, "reconstruct", look)
    job = make_job("llama")
    prepare(job, "omniquant-paper", "learn.epochs=1", "learn.augmented=true", sites=True)
    assert torch.equal(tasks[0], outputs(job, {}))


def test_shares_are_searched_on_the_rewritten_block(make_job) -> None:
    """The Hessians of the float block, divided by its scales, are those that the rewritten block would give."""
    job = make_job("llama")
    prepared = prepare(job, "awq")
    block = job.runner.block(1)
    for key, value in prepared.tensors.items():
        block.get_parameter(key).data = value
    linears = job.runner.adapter.linears
    evidence = HessianPass(job.runner, None).gather(1, block, job.task.inputs, linears)
    same = total = 0
    for name in linears:
        spec = WeightSpec(bits=3, group_size=16)
        expected = search_clipping(prepared.tensors[f"{name}.weight"], evidence[name].hessian, spec)
        same += int((expected.upper == prepared.clipping[name].upper).sum())
        total += expected.upper.numel()
    assert same > 0.99 * total
    assert any(exponent > 0 for exponent in prepared.report["awq_exponents"])


def test_what_learning_starts_from_is_never_lost(make_job) -> None:
    """Rates that help nothing leave exactly what the transform and the search found."""
    found = prepare(make_job("llama"), "awq")
    rates = ("learn.clip_rate=100", "learn.scale_rate=100")
    learned = prepare(make_job("llama"), "omniquant", *QUICK, *rates)
    assert learned.report["loss_after"] == learned.report["loss_before"]
    assert all(torch.equal(value, found.tensors[key]) for key, value in learned.tensors.items())
    for name, clipping in found.clipping.items():
        torch.testing.assert_close(learned.clipping[name].upper, clipping.upper, rtol=0, atol=2.0**-23)
