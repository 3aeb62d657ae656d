"""Sampling from a model follows its distribution, is decided by the seed, and does not depend on the batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bitwright.calibration.sample import sample_from_model
from bitwright.calibration.tokens import Calibration, calibration_windows
from bitwright.errors import CalibrationError


class Bigram:
    """A model whose next token depends on the current one alone; it counts the tokens that it is given."""

    device = torch.device("cpu")

    def __init__(self, logits, bos=0):
        self.logits = logits
        self.config = SimpleNamespace(bos_token_id=bos, vocab_size=len(logits))
        self.given = 0

    def __call__(self, *, input_ids, past_key_values, use_cache):
        assert use_cache
        assert past_key_values == (None if not self.given else self.given)
        self.given += input_ids.shape[1]
        return SimpleNamespace(logits=self.logits[input_ids], past_key_values=self.given)


def test_tokens_follow_the_model_distribution():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    model = Bigram(logits)
    ids = sample_from_model(model, 400, 50, seed=0, batch=400)
    assert model.given == 49
    assert (ids[:, 0] == 0).all()
    counts = torch.zeros(5, 5).index_put_((ids[:, :-1].flatten(), ids[:, 1:].flatten()), torch.tensor(1.0), True)
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), logits.softmax(-1), rtol=0, atol=0.03)


def test_without_bos_first_tokens_are_random():
    first = sample_from_model(Bigram(torch.zeros(7, 7), bos=None), 500, 2, seed=0, batch=500)[:, 0]
    assert set(first.tolist()) == set(range(7))


def test_impossible_tokens_are_never_sampled():
    logits = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf]).expand(4, 4)
    assert set(sample_from_model(Bigram(logits), 50, 20, seed=0, batch=50).flatten().tolist()) == {0, 2}


def test_the_seed_decides_and_the_batch_does_not(make_model):
    _, model = make_model("llama")
    first = sample_from_model(model, 5, 40, seed=1, batch=5)
    assert first.shape == (5, 40)
    assert (first[:, 0] == model.config.bos_token_id).all()
    assert torch.equal(sample_from_model(model, 5, 40, seed=1, batch=2), first)
    assert not torch.equal(sample_from_model(model, 5, 40, seed=2), first)


def test_the_cache_gives_what_the_whole_window_gives(make_model):
    _, model = make_model("qwen3")
    ids = sample_from_model(model, 2, 30, seed=0)
    uniform = torch.rand(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        cumulative = model(input_ids=ids, use_cache=False).logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative[:, :-1].contiguous(), uniform[:, 1:, None].clone(), right=True)[..., 0]
    assert torch.equal(ids[:, 1:], expected)


def test_it_is_a_sampler_of_calibration_windows(make_model):
    _, model = make_model("opt")
    settings = Calibration(text="self", windows=3, window_tokens=40)
    found = calibration_windows(settings, None, 4, lambda *wanted: sample_from_model(model, *wanted))
    assert torch.equal(found.ids, sample_from_model(model, 3, 40, 4))


def test_refusals(make_model):
    _, model = make_model("opt")
    with pytest.raises(CalibrationError, match="windows of 65 tokens; the model reads at most 64"):
        sample_from_model(model, 1, 65, 0)
    with pytest.raises(CalibrationError, match="logits are not finite"):
        sample_from_model(Bigram(torch.full((3, 3), torch.nan)), 1, 5, 0)
