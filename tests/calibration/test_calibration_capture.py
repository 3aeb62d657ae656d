"""Hooks show what linears are given, change nothing, stop the block as early as asked, and go away."""

from __future__ import annotations

import pytest
import torch
from families import VOCABULARY
from torch import nn

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.capture import group_inputs
from bitwright.checkpoint.source import HuggingFaceSource
from bitwright.models import adapter_for

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@pytest.fixture
def setup(make_model, request):
    folder, _ = make_model(getattr(request, "param", "llama"))
    source = HuggingFaceSource(folder)
    ids = torch.randint(3, VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(1))
    runner = BlockRunner(source, adapter_for(source.config), ids)
    with runner.first_inputs() as stream:
        return runner, runner.block(0), stream.read(0)


def seen_by_forward_hooks(runner, block, hidden):
    """Inputs of all linears by another mechanism, and the output, without any of the code under test."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: seen.update({name: args[0].clone()}))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    output = runner.run(0, block, hidden)
    for handle in handles:
        handle.remove()
    return seen, output


def hooks_of(block):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in block.modules())


@pytest.mark.parametrize("setup", ["llama", "qwen3", "opt", "cohere", "falcon"], indirect=True)
def test_every_linear_is_shown_its_input_and_the_output_keeps_its_bits(setup):
    runner, block, hidden = setup
    expected, output = seen_by_forward_hooks(runner, block, hidden)
    found = group_inputs(runner, 0, block, hidden, runner.adapter.linears, whole=True)
    assert list(found.inputs) == list(runner.adapter.linears)
    for name, inputs in found.inputs.items():
        assert inputs.shape == (hidden.shape[0] * hidden.shape[1], block.get_submodule(name).in_features)
        assert torch.equal(inputs, expected[name].flatten(0, -2))
    assert torch.equal(found.output, output)
    assert set(found.coverage(runner.adapter.linears).values()) == {40}
    assert hooks_of(block) == 0


def test_linears_of_a_group_share_the_tensor_whichever_are_asked_for(setup):
    runner, block, hidden = setup
    found = group_inputs(runner, 0, block, hidden, QKV)
    assert found.inputs[QKV[0]] is found.inputs[QKV[1]] is found.inputs[QKV[2]]
    one = group_inputs(runner, 0, block, hidden, QKV[2:])
    assert list(one.inputs) == [QKV[2]]
    assert torch.equal(one.inputs[QKV[2]], found.inputs[QKV[2]])


@pytest.mark.parametrize(
    ("linears", "after"),
    [(QKV, "self_attn.q_proj"), (("self_attn.o_proj",), "self_attn.o_proj"), (("mlp.down_proj",), "mlp.down_proj")],
)
def test_the_block_stops_before_the_last_linear_asked_for_runs(setup, linears, after):
    runner, block, hidden = setup
    ran = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    found = group_inputs(runner, 0, block, hidden, linears)
    order = list(runner.adapter.linears)
    assert set(ran) == set(order[: order.index(after)])
    assert found.output is None
    assert list(found.inputs) == list(linears)


def test_later_work_in_place_does_not_reach_what_was_seen(setup):
    runner, block, hidden = setup
    expected = group_inputs(runner, 0, block, hidden, ("mlp.down_proj",)).inputs["mlp.down_proj"]

    def spoil(_, args, output):
        args[0].zero_()

    block.mlp.down_proj.register_forward_hook(spoil)
    found = group_inputs(runner, 0, block, hidden, ("mlp.down_proj",), whole=True)
    assert torch.equal(found.inputs["mlp.down_proj"], expected)


def test_a_linear_called_twice_or_never_counts_its_tokens(setup):
    runner, block, hidden = setup
    up, down = block.mlp.up_proj, block.mlp.down_proj
    block.mlp.forward = lambda values: values + down(up(values[:, :3])).sum() + down(input=up(values[:, 3:6])).sum()
    found = group_inputs(runner, 0, block, hidden, runner.adapter.linears, whole=True)
    # gate_proj never ran, and it stands for up_proj: linears that share an input run together
    assert found.coverage(("self_attn.q_proj", "mlp.down_proj", "mlp.gate_proj")) == {
        "self_attn.q_proj": 40,
        "mlp.down_proj": 24,
        "mlp.gate_proj": 0,
    }


def test_hooks_are_removed_when_the_block_fails(setup):
    runner, block, hidden = setup

    def fail(*_):
        raise ZeroDivisionError

    block.mlp.act_fn.forward = fail
    with pytest.raises(ZeroDivisionError):
        group_inputs(runner, 0, block, hidden, runner.adapter.linears)
    assert hooks_of(block) == 0


def test_unknown_linears_are_refused(setup):
    runner, block, hidden = setup
    with pytest.raises(ValueError, match=r"no linears \['mlp.fc3'\]"):
        group_inputs(runner, 0, block, hidden, ("mlp.fc3", "mlp.down_proj"))
