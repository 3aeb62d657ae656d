"""Token weights, block by block, are those of back-propagation through the whole model."""

from copy import deepcopy

import pytest
import torch
from families import VOCABULARY

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.gradients import token_weights
from bitwright.checkpoint.source import HuggingFaceSource
from bitwright.models import adapter_for


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "opt", "qwen3", "gemma3"])
def test_blocks_one_at_a_time_are_the_whole_model(make_model, name):
    folder, shared = make_model(name)
    model = deepcopy(shared)  # it gets hooks
    ids = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))
    source = HuggingFaceSource(folder)
    runner = BlockRunner(source, adapter_for(source.config), ids, batch=2)
    said: list[str] = []
    found = token_weights(runner, memory_bytes=0, progress=said.append)
    expected = {}

    def watch(key):
        def look(module, args, output):
            output.register_hook(
                lambda grad: expected.__setitem__(key, grad.square().sum(-1).reshape(ids.shape)) or None
            )

        return look

    for index in range(runner.blocks):
        block = model.get_submodule(f"{runner.adapter.blocks}.{index}")
        for linear in runner.adapter.linears:
            block.get_submodule(linear).register_forward_hook(watch((index, linear)))
    model.requires_grad_(False)
    # Nothing has a gradient but what the embedding gives out.
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    assert found.keys() == expected.keys()
    for key, weights in found.items():
        torch.testing.assert_close(weights, expected[key], rtol=2e-4, atol=1e-8)
    assert said[0].startswith("gradients: forward")
    assert said[-1] == "gradients: backward, block 0"
