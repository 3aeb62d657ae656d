"""Logits in blocks of rows: the same losses, divergences and gradients as in one go, for every kind of head."""

from __future__ import annotations

import pytest
import torch
from families import CONFIGS, VOCABULARY
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from bitwright.calibration import logits as blocks
from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.gradients import token_weights
from bitwright.calibration.logits import head_gradient, row_blocks
from bitwright.checkpoint.source import HuggingFaceSource
from bitwright.evaluate import Windows, compare, window_losses
from bitwright.evaluate import logits as evaluated
from bitwright.evaluate.logits import forward_logits, logit_chunks
from bitwright.models import adapter_for

IDS = torch.randint(3, VOCABULARY, (3, 33), generator=torch.Generator().manual_seed(1))
WINDOWS = Windows(IDS, "x", 0, IDS.numel())


@pytest.fixture
def wide(monkeypatch):
    """Every vocabulary counts as large; blocks have 8 rows."""
    monkeypatch.setattr(evaluated, "WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 8 * VOCABULARY)
    monkeypatch.setattr(evaluated, "_CHUNK_ELEMENTS", 4 * VOCABULARY)


def scaled(kind: type, config: type, **more):
    """A model whose class does something to the logits behind its head."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return kind(
        config(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes, **more)
    ).eval()


def models(make_model):
    found = {name: make_model(name)[1] for name in CONFIGS}
    found["gemma2"] = scaled(Gemma2ForCausalLM, Gemma2Config, final_logit_softcapping=0.5)
    found["granite"] = scaled(GraniteForCausalLM, GraniteConfig, logits_scaling=7.0)
    return found


def test_rows_of_every_architecture_are_those_of_the_whole(make_model, wide):
    for name, model in models(make_model).items():
        whole = forward_logits(model, IDS[0], name)[:-1]
        parts = list(logit_chunks(model, IDS[0], name))
        assert [rows.start for rows, _ in parts] == list(range(0, 32, 4)), name
        torch.testing.assert_close(torch.cat([some for _, some in parts]), whole, rtol=1e-5, atol=1e-6, msg=name)
        assert "forward" not in model.get_decoder().__dict__, name


def test_measures_are_those_of_the_whole(make_model, wide, monkeypatch):
    model, reference = make_model("llama")[1], make_model("llama-rope")[1]
    calls = []
    real = evaluated._head
    monkeypatch.setattr(evaluated, "_head", lambda *given: calls.append(len(given[1])) or real(*given))
    losses, distance = window_losses(model, WINDOWS), compare(model, reference, WINDOWS)
    assert set(calls) == {8}
    monkeypatch.setattr(evaluated, "WHOLE_ELEMENTS", 2**27)
    torch.testing.assert_close(losses, window_losses(model, WINDOWS), rtol=1e-6, atol=0)
    whole = compare(model, reference, WINDOWS)
    torch.testing.assert_close(distance.kl, whole.kl, rtol=1e-4, atol=1e-9)
    assert torch.equal(distance.agree, whole.agree)


def test_models_that_are_no_classes_of_transformers_answer_in_one_go(wide):
    table = torch.randn(VOCABULARY, VOCABULARY)
    parts = [some for _, some in logit_chunks(lambda ids: table[ids], IDS[0], "table")]
    assert torch.equal(torch.cat(parts), table[IDS[0]][:-1])


@pytest.fixture(scope="module")
def large():
    """A head large enough for the kernels of real ones, and the hidden states of one window."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=192, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval(), torch.randint(0, 8192, (512,)), torch.randn(1, 512, 192)


def test_blocks_change_no_bit_of_what_is_reported(large, monkeypatch):
    model, ids, _ = large
    windows = Windows(ids[None], "x", 0, len(ids))
    expected = window_losses(model, windows)
    monkeypatch.setattr(evaluated, "WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 128 * 8192)
    assert torch.equal(window_losses(model, windows), expected)


def test_blocks_change_no_bit_of_gradients(large, monkeypatch):
    model, ids, hidden = large
    head = model.get_output_embeddings().requires_grad_(False)

    def loss(logits, rows):
        targets = ids[1:][rows]
        return torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum")

    whole = head_gradient(head, hidden, loss)
    monkeypatch.setattr(blocks, "WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 128 * 8192)
    assert torch.equal(head_gradient(head, hidden, loss), whole)


def test_token_weights_are_those_of_the_whole(make_model, monkeypatch):
    folder, _ = make_model("gemma3")
    source = HuggingFaceSource(folder)
    expected = token_weights(BlockRunner(source, adapter_for(source.config), IDS, batch=2))
    monkeypatch.setattr(blocks, "WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 8 * VOCABULARY)
    found = token_weights(BlockRunner(source, adapter_for(source.config), IDS, batch=2))
    for key, weights in found.items():
        torch.testing.assert_close(weights, expected[key], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "expected"),
    [(2048, 49152, 512), (512, 49152, 512), (2048, 262144, 128), (1, 10**9, 1), (5, 2**25, 1)],
)
def test_small_logits_are_made_in_one_go_and_others_in_powers_of_two(tokens, vocabulary, expected):
    found = list(row_blocks(tokens, vocabulary))
    assert (found[0].start, found[0].stop) == (0, min(expected, tokens))
    assert [rows.start for rows in found[1:]] == [rows.stop for rows in found[:-1]]
    assert found[-1].stop == tokens
