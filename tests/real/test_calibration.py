"""The real model block by block: the same logits as the whole model, its own samples, and a stream on disk."""

from __future__ import annotations

import pytest
import torch

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.capture import group_inputs
from bitwright.calibration.sample import sample_from_model
from bitwright.calibration.statistics import Hessian
from bitwright.checkpoint.load import load_model
from bitwright.checkpoint.open import open_source
from bitwright.models import adapter_for


@pytest.mark.real
@pytest.mark.usefixtures("smollm2_gguf")
def test_the_real_model_block_by_block() -> None:
    loaded = load_model("demo")
    ids = sample_from_model(loaded.model, 2, 24, seed=0)
    text = loaded.tokenizer.decode(ids[0])
    assert sum(letter.isascii() for letter in text) > 0.9 * len(text)  # words, not noise
    with torch.no_grad():
        expected = loaded.model(input_ids=ids, use_cache=False).logits
    source = open_source("demo")
    runner = BlockRunner(source, adapter_for(source.config), ids)
    hessian = Hessian(1536, name="mlp.down_proj")
    with runner.first_inputs(memory_bytes=0) as stream:
        for index in range(runner.blocks):
            block = runner.block(index)
            if index == 1:
                hessian.update(
                    group_inputs(runner, index, block, stream.read(0), ["mlp.down_proj"]).inputs["mlp.down_proj"]
                )
            runner.advance(index, block, stream)
        with runner.head() as logits_of, torch.no_grad():
            logits = logits_of(stream.read(0))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert hessian.tokens == 48
    assert torch.linalg.eigvalsh(hessian.mean.double()).min() > -1e-4
