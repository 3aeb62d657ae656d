"""Perplexity against closed forms and an independent reference, and what it must refuse."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from stubs import VOCABULARY, Letters, Table, uniform

from bitwright.calibration.text import Text
from bitwright.errors import EvaluationError
from bitwright.evaluate import compare_protocols, perplexity_of, token_windows, window_losses
from bitwright.evaluate.perplexity import Windows


def reference_perplexity(model, tokens, length):
    """The protocol again, in float64 and plain Python, from the text of the paper's code."""
    total, count = 0.0, len(tokens) // length
    for start in range(0, count * length, length):
        window = tokens[start : start + length]
        logits = model(torch.tensor([window])).logits[0].double().tolist()
        loss = 0.0
        for row, target in zip(logits[:-1], window[1:], strict=True):
            top = max(row)
            loss += top + math.log(sum(math.exp(value - top) for value in row)) - row[target]
        total += loss / (length - 1) * length
    return math.exp(total / (count * length))


def test_uniform_logits_give_the_vocabulary_size(windows):
    assert perplexity_of(window_losses(uniform, windows)) == pytest.approx(VOCABULARY, rel=1e-6)


def test_a_bigram_model_matches_its_closed_form(windows):
    model = Table(1)
    log_p = model.table.double().log_softmax(-1)
    expected = -log_p[windows.ids[:, :-1], windows.ids[:, 1:]].mean(1)
    torch.testing.assert_close(window_losses(model, windows), expected, rtol=1e-6, atol=0)


def test_equals_an_independent_reference(text, windows):
    tokens = Letters()(text.content, verbose=False)["input_ids"]
    expected = reference_perplexity(Table(2, scale=3.0), tokens, 32)
    assert perplexity_of(window_losses(Table(2, scale=3.0), windows)) == pytest.approx(expected, rel=1e-6)


def test_windows_do_not_depend_on_each_other_nor_on_the_chunk_size(windows, monkeypatch):
    whole = window_losses(Table(3), windows)
    order = torch.randperm(windows.count, generator=torch.Generator().manual_seed(0))
    shuffled = Windows(windows.ids[order], "x", 0, 0)
    assert torch.equal(window_losses(Table(3), shuffled), whole[order])
    monkeypatch.setattr("bitwright.evaluate.logits._CHUNK_ELEMENTS", 3 * VOCABULARY)
    torch.testing.assert_close(window_losses(Table(3), windows), whole, rtol=1e-12, atol=0)


def test_half_precision_logits_are_normalised_in_float32(windows):
    model = Table(4)
    half = window_losses(lambda ids: model.table.bfloat16()[ids], windows)
    model.table = model.table.bfloat16().float()
    assert torch.equal(half, window_losses(model, windows))


def test_windows_are_disjoint_start_with_one_bos_and_count_the_dropped_tail(text):
    windows = token_windows(Letters(), text, length=32)
    assert (windows.count, windows.length, windows.dropped_tokens, windows.total_tokens) == (10, 32, 11, 331)
    stream = Letters()(text.content, verbose=False)["input_ids"]
    assert windows.ids.flatten().tolist() == stream[:320]
    limited = token_windows(Letters(), text, length=32, limit=3)
    assert torch.equal(limited.ids, windows.ids[:3])
    assert limited.dropped_tokens == 11


def test_gptq_bos_puts_bos_before_every_window(text):
    windows = token_windows(Letters(), text, length=32, protocol="gptq+bos")
    assert windows.ids.shape == (10, 32)
    assert (windows.ids[:, 0] == 0).all()
    stream = Letters()(text.content, verbose=False, add_special_tokens=False)["input_ids"]
    assert windows.ids[:, 1:].flatten().tolist() == stream[:310]
    assert windows.dropped_tokens == 330 % 31


def test_progress_counts_windows(windows):
    seen = []
    window_losses(uniform, windows, lambda done, total: seen.append((done, total)))
    assert seen == [(index + 1, 10) for index in range(10)]


def test_too_short_a_text_says_how_many_tokens_there_are():
    with pytest.raises(EvaluationError, match=r"'tiny': found 6 tokens; one window needs 2048.*--length 6"):
        token_windows(Letters(), Text("tiny", "abcde"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 1}, "length 1"),
        ({"limit": 0}, "limit of 0"),
        ({"protocol": "rolling"}, "needed one of gptq, gptq\\+bos"),
    ],
)
def test_requests_without_a_meaning_are_refused(text, arguments, message):
    with pytest.raises(EvaluationError, match=message):
        token_windows(Letters(), text, **arguments)


def test_gptq_bos_needs_a_bos_token(text):
    tokenizer = SimpleNamespace(bos_token_id=None)
    with pytest.raises(EvaluationError, match="no BOS token; use --protocol gptq"):
        token_windows(tokenizer, text, protocol="gptq+bos")


def test_protocol_ids_name_everything_and_differences_are_refused(text, windows):
    assert windows.protocol.startswith(f"gptq:32|windows:10|text:letters@{text.sha256[:12]}|tokens:")
    compare_protocols(windows.protocol, token_windows(Letters(), text, length=32).protocol)
    others = [
        (token_windows(Letters(), text, length=32, protocol="gptq+bos"), "'gptq:32' against 'gptq\\+bos:32'"),
        (token_windows(Letters(), text, length=16), "'gptq:32' against 'gptq:16'"),
        (token_windows(Letters(), text, length=32, limit=4), "'windows:10' against 'windows:4'"),
        (token_windows(Letters(), Text("other", text.content), length=32), "'text:letters@"),
    ]
    for other, message in others:
        with pytest.raises(EvaluationError, match=message):
            compare_protocols(windows.protocol, other.protocol)
    with pytest.raises(EvaluationError, match="'llamacpp-half:512'"):
        compare_protocols(windows.protocol, "llamacpp-half:512")


def test_another_tokenizer_is_another_protocol(text, windows):
    ids = [(token + 1) % VOCABULARY for token in Letters()(text.content, verbose=False)["input_ids"]]

    def tokenizer(_text, **_options):
        return {"input_ids": ids}

    with pytest.raises(EvaluationError, match="'tokens:"):
        compare_protocols(windows.protocol, token_windows(tokenizer, text, length=32).protocol)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda ids: torch.full((*ids.shape, VOCABULARY), torch.nan), "window 0: the loss is not finite"),
        (lambda ids: torch.zeros(*ids.shape, 5), "outside the model's vocabulary of 5"),
        (lambda ids: torch.zeros(1, 1, VOCABULARY), r"answered \(1, 1, 11\); needed logits \[1, 32"),
        (lambda ids: "logits", "answered str"),
    ],
)
def test_answers_that_are_no_measurement_are_refused(windows, model, message):
    with pytest.raises(EvaluationError, match=message):
        window_losses(model, windows)


def test_a_loss_beyond_float64_is_infinite_perplexity():
    assert perplexity_of(torch.tensor([1e4], dtype=torch.float64)) == math.inf


def test_the_tokenizer_does_not_warn_about_a_long_text(caplog):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", model_max_length=4)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        windows = token_windows(tokenizer, Text("ab", "a b " * 20), length=8)
    finally:
        logger.removeHandler(caplog.handler)
    assert windows.count == 5
    assert not caplog.records
