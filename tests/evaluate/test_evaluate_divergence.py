"""KL divergence and agreement against float64, their invariants, and what must be refused."""

from __future__ import annotations

import pytest
import torch
from stubs import VOCABULARY, Table, uniform

from bitwright.errors import EvaluationError
from bitwright.evaluate import compare, window_losses
from bitwright.evaluate.divergence import kl_divergence


def near(seed, amount):
    """A bigram model and a perturbed copy of it."""
    model, other = Table(seed, scale=3.0), Table(seed, scale=3.0)
    other.table = other.table + amount * Table(seed + 100).table
    return other, model


def test_kl_and_losses_match_float64(windows):
    model, reference = near(0, 0.3)
    result = compare(model, reference, windows)
    log_p, log_q = (m.table.double().log_softmax(-1)[windows.ids[:, :-1]] for m in (reference, model))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(result.kl, expected, rtol=1e-4, atol=1e-6)
    assert result.kl_mean == pytest.approx(float(expected.mean()), rel=1e-5)
    assert result.kl_max == pytest.approx(float(expected.max()), rel=1e-4)
    quantiles = torch.quantile(expected.flatten(), torch.tensor([0.5, 0.9, 0.99, 0.999]).double())
    assert result.kl_quantiles() == pytest.approx(quantiles.tolist(), rel=1e-4)
    assert result.top1_agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
    torch.testing.assert_close(result.losses, window_losses(model, windows))
    torch.testing.assert_close(result.reference_losses, window_losses(reference, windows))
    assert result.protocol == windows.protocol


def test_a_model_against_itself_is_exactly_zero_apart(windows):
    model = Table(1)
    result = compare(model, model, windows)
    assert result.kl_max == result.kl_mean == 0.0
    assert result.top1_agreement == 1.0
    assert result.flips == (0, 0)
    assert torch.equal(result.losses, result.reference_losses)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3, 1.0])
def test_kl_of_large_vocabularies_is_not_negative_and_close_to_float64(noise):
    generator = torch.Generator().manual_seed(0)
    p = 8 * torch.randn(8, 20_000, generator=generator) + 30
    q = p + noise * torch.randn(8, 20_000, generator=generator)
    result = kl_divergence(p, q)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    assert float(result.min()) >= -1e-6
    torch.testing.assert_close(result, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-4, atol=1e-6)


def test_tokens_that_the_reference_rules_out_add_nothing():
    p, q = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.zeros(1, 3)
    assert float(kl_divergence(p, q)) == pytest.approx(float(torch.tensor(1.5).log()), rel=1e-6)
    assert float(kl_divergence(q, p)) == torch.inf


def test_flips_swap_with_the_models(windows):
    model, reference = near(2, 2.0)
    there, back = compare(model, reference, windows), compare(reference, model, windows)
    assert there.flips == back.flips[::-1]
    assert sum(there.flips) > 0
    assert torch.equal(there.agree, back.agree)


def test_chunks_do_not_matter_and_progress_counts_windows(windows, monkeypatch):
    model, reference = near(3, 0.5)
    whole, seen = compare(model, reference, windows), []
    monkeypatch.setattr("bitwright.evaluate.logits._CHUNK_ELEMENTS", 5 * VOCABULARY)
    parts = compare(model, reference, windows, lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(parts.kl, whole.kl)
    assert torch.equal(parts.agree, whole.agree)
    assert seen == [(index + 1, 10) for index in range(10)]


def test_models_see_one_window_at_a_time(windows):
    shapes = []

    def model(ids):
        shapes.append(tuple(ids.shape))
        return uniform(ids)

    compare(model, uniform, windows)
    assert shapes == [(1, 32)] * 10


def test_nan_and_other_vocabularies_are_refused(windows):
    def broken(ids):
        return torch.full((*ids.shape, VOCABULARY), torch.nan)

    with pytest.raises(EvaluationError, match=r"^model, window 0: the loss is not finite"):
        compare(broken, uniform, windows)
    with pytest.raises(EvaluationError, match=r"^reference, window 0: the loss is not finite"):
        compare(uniform, broken, windows)
    with pytest.raises(EvaluationError, match="vocabularies differ: 11 in the model, 12 in the reference"):
        compare(uniform, Table(0, vocabulary=12), windows)
