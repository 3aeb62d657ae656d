"""Blocks run one at a time give what the whole model gives, in every family, and memory is given back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import CONFIGS, VOCABULARY

from bitwright.calibration.blocks import BlockRunner
from bitwright.checkpoint.source import HuggingFaceSource
from bitwright.errors import CalibrationError, CheckpointError, PlanError
from bitwright.models import adapter_for


def windows(count=5, tokens=24, seed=0):
    return torch.randint(3, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(seed))


def runner_of(folder, ids, batch=None):
    source = HuggingFaceSource(folder)
    return BlockRunner(source, adapter_for(source.config), ids, batch)


def whole(model, blocks, ids):
    """Output of every block, and the logits, of the whole model."""
    seen = []

    def look(_, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(look) for block in model.get_submodule(blocks)]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen, logits


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_one_at_a_time_are_the_whole_model(make_model, name):
    folder, model = make_model(name)
    ids = windows()
    runner = runner_of(folder, ids, batch=2)
    expected = [whole(model, runner.adapter.blocks, part) for part in ids.split(2)]
    with runner.first_inputs() as stream:
        for index in range(runner.blocks):
            runner.advance(index, runner.block(index), stream)
            for found, (outputs, _) in zip(stream, expected, strict=True):
                torch.testing.assert_close(found, outputs[index], rtol=0, atol=1e-6)
        with runner.head() as logits_of, torch.no_grad():
            for hidden, (_, logits) in zip(stream, expected, strict=True):
                torch.testing.assert_close(logits_of(hidden), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-alibi"])
def test_batch_size_does_not_matter(make_model, name):
    folder, _ = make_model(name)
    ids = windows()
    results = []
    for batch in (1, 3, 100):
        runner = runner_of(folder, ids, batch)
        with runner.first_inputs() as stream:
            for index in range(runner.blocks):
                runner.advance(index, runner.block(index), stream)
            results.append(torch.cat(list(stream)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-6)


def test_other_batch_sizes_are_recorded_when_they_come(make_model):
    folder, model = make_model("falcon-alibi")
    ids = windows()
    runner = runner_of(folder, ids, batch=2)
    assert runner.batch == 2
    with torch.no_grad(), runner.first_inputs() as stream:
        inputs = torch.cat(list(stream))[:4]
        outputs, _ = whole(model, runner.adapter.blocks, ids[:4])
        torch.testing.assert_close(runner.run(0, runner.block(0), inputs), outputs[0], rtol=0, atol=1e-6)


def test_default_batch_is_about_2048_tokens_and_no_more_than_there_are(make_model):
    folder, _ = make_model("llama")
    assert runner_of(folder, windows(5, 24)).batch == 5
    assert runner_of(folder, windows(100, 24)).batch == 2048 // 24


def test_nothing_but_blocks_asked_for_stays_in_memory(make_model):
    folder, _ = make_model("opt-350m")
    runner = runner_of(folder, windows())
    with runner.first_inputs() as stream:
        one, other = runner.block(0), runner.block(0)
        with runner.head() as logits_of:
            logits_of(stream.read(0))
    assert all(parameter.is_meta for parameter in runner._skeleton.parameters())
    for parameter, twin in zip(one.parameters(), other.parameters(), strict=True):
        assert (parameter.dtype, parameter.requires_grad) == (torch.float32, False)
        assert parameter.data_ptr() != twin.data_ptr()
    assert not one.training


def test_gradients_flow_where_they_are_asked_for(make_model):
    folder, _ = make_model("llama")
    runner = runner_of(folder, windows())
    block = runner.block(1)
    with runner.first_inputs() as stream:
        hidden = stream.read(0)
    assert not runner.run(1, block, hidden).requires_grad
    weight = block.mlp.up_proj.weight.requires_grad_(True)
    # a function in the block's place, as learning passes one
    runner.run(1, lambda hidden, *args, **kwargs: block(hidden, *args, **kwargs), hidden).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_sixteen_bit_checkpoints_are_computed_in_float32(make_model, tmp_path):
    _, model = make_model("llama")
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(tmp_path)
    runner = runner_of(tmp_path, windows())
    with runner.first_inputs() as stream:
        runner.advance(0, runner.block(0), stream)
        found = stream.read(0)
    (outputs, *_), _ = whole(half.float().eval(), "model.layers", windows())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, outputs, rtol=0, atol=1e-6)


def test_random_state_is_left_alone(make_model):
    folder, _ = make_model("gemma3")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    runner = runner_of(folder, windows())
    runner.block(0)
    assert torch.equal(torch.rand(3), expected)


def test_arguments_that_depend_on_the_tokens_are_refused(make_model, monkeypatch):
    folder, _ = make_model("llama")
    original = BlockRunner._run_before_blocks

    def leaking(self, ids):
        hidden, found = original(self, ids)
        found[2].kwargs["tokens"] = ids
        return hidden, found

    monkeypatch.setattr(BlockRunner, "_run_before_blocks", leaking)
    with pytest.raises(CalibrationError, match=r"block 2 of llama .* depend on the tokens"):
        runner_of(folder, windows())


def test_blocks_that_never_run_are_reported(make_model, monkeypatch):
    folder, _ = make_model("llama")
    runner = runner_of(folder, windows())
    monkeypatch.setattr(type(runner._skeleton), "forward", lambda self, **_: None)
    with pytest.raises(CalibrationError, match=r"ran blocks \[\] of 3; needed every block once"):
        runner.arguments(0, 3)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 65, dtype=torch.int64), "65 tokens; the model reads at most 64"),
        (torch.full((2, 8), VOCABULARY), f"token ids {VOCABULARY} to {VOCABULARY}; the model knows 0 to 95"),
        (torch.full((2, 8), -1), "token ids -1 to -1"),
        (torch.zeros(8, dtype=torch.int64), r"torch\.int64 \[8\], needed"),
        (torch.zeros(0, 8, dtype=torch.int64), "at least one token"),
        (torch.zeros(2, 8), r"torch\.float32"),
    ],
)
def test_windows_that_do_not_fit_the_model_are_refused(make_model, ids, message):
    folder, _ = make_model("opt")
    with pytest.raises(CalibrationError, match=message):
        runner_of(folder, ids)


def test_a_block_with_nan_is_named(make_model):
    folder, _ = make_model("llama")
    runner = runner_of(folder, windows())
    block = runner.block(1)
    block.mlp.down_proj.weight[3, 4] = torch.nan
    with runner.first_inputs() as stream, pytest.raises(CalibrationError, match="output of block 1: 120 of 3840"):
        runner.advance(1, block, stream)


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(make_model, tmp_path):
    folder = shutil.copytree(make_model("llama")[0], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight has shape \[48, 32\], needed"):
        runner_of(folder, windows()).block(0)
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.0\.self_attn\.q_proj\.bias"):
        runner_of(folder, windows()).block(0)
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": "fast"}))
    with pytest.raises(PlanError, match="cannot build a llama"):
        runner_of(folder, windows())
