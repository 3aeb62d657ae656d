"""The real model through the real journey: EasyQuant is nearer to the float model than round-to-nearest."""

from pathlib import Path

import pytest

import bitwright

OPTIONS = bitwright.EvalOptions(windows=2, length=256)


@pytest.mark.real
@pytest.mark.usefixtures("smollm2_gguf")
def test_easyquant_beats_rtn_on_the_real_model(tmp_path: Path) -> None:
    found = {}
    for method in ("rtn", "easyquant"):
        out = tmp_path / method
        summary = bitwright.quantize("demo", out, method, "w3a16g64")
        found[method] = bitwright.eval(str(out), against="demo", options=OPTIONS)
        assert found[method].bits_per_weight == pytest.approx(summary.bits_per_weight)
        assert found[method].bytes == summary.bytes
    assert found["easyquant"].kl_mean_nats < 0.8 * found["rtn"].kl_mean_nats
    assert found["easyquant"].float_perplexity == found["rtn"].float_perplexity
    assert found["easyquant"].top1_agreement > 0.4
