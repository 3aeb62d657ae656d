"""One evaluation from end to end: stable keys, null for what was not measured."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from stubs import Letters, Table, uniform

from bitwright.evaluate import EvalOptions, evaluate_model

OPTIONS = EvalOptions(windows=8, length=32)
KEYS = [
    "perplexity",
    "float_perplexity",
    "kl_mean_nats",
    "kl_median_nats",
    "kl_p90_nats",
    "kl_p99_nats",
    "kl_p999_nats",
    "kl_max_nats",
    "top1_agreement",
    "top1_lost",
    "top1_gained",
    "delta_ln_ppl",
    "delta_ln_ppl_low",
    "delta_ln_ppl_high",
    "bits_per_weight",
    "bytes",
    "windows",
    "length",
    "dropped_tokens",
    "protocol",
    "seconds",
    "peak_rss_bytes",
]


def test_with_a_reference_everything_is_measured(text):
    seen = []
    result = evaluate_model(
        Table(1),
        Letters(),
        text,
        reference=uniform,
        options=OPTIONS,
        progress=lambda done, total: seen.append((done, total)),
    )
    record = result.to_json()
    assert list(record) == KEYS
    assert [key for key, value in record.items() if value is None] == ["bits_per_weight", "bytes"]
    assert result.float_perplexity == pytest.approx(11, rel=1e-6)
    assert result.delta_ln_ppl == pytest.approx(math.log(result.perplexity / result.float_perplexity))
    assert result.delta_ln_ppl_low < result.delta_ln_ppl < result.delta_ln_ppl_high
    assert 0 < result.kl_median_nats <= result.kl_p90_nats <= result.kl_p99_nats <= result.kl_p999_nats
    assert result.kl_p999_nats <= result.kl_max_nats
    assert (result.windows, result.length, result.dropped_tokens) == (8, 32, 11)
    assert result.protocol.startswith("gptq:32|windows:8|text:letters@")
    assert result.peak_rss_bytes > 2**20
    assert seen[-1] == (8, 8)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_without_a_reference_the_distance_is_null(text):
    result = evaluate_model(uniform, Letters(), text, options=OPTIONS)
    assert result.perplexity == pytest.approx(11, rel=1e-6)
    distance = KEYS[1:14]
    assert all(result.to_json()[key] is None for key in distance)


def test_few_windows_leave_the_interval_null(text):
    result = evaluate_model(Table(1), Letters(), text, reference=uniform, options=EvalOptions(windows=2, length=32))
    assert result.delta_ln_ppl is not None
    assert result.delta_ln_ppl_low is None
    assert result.delta_ln_ppl_high is None


def test_the_caller_fills_in_the_size(text):
    result = evaluate_model(uniform, Letters(), text, options=OPTIONS)
    sized = dataclasses.replace(result, bits_per_weight=4.25, bytes=1000)
    assert sized.to_json() | {"bits_per_weight": None, "bytes": None} == result.to_json()
