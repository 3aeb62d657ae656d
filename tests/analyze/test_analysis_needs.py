"""What an analysis needs, told beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitwright.analyze import needs as needs_module
from bitwright.analyze.needs import AnalysisNeeds, analysis_needs
from bitwright.analyze.run import Budget
from bitwright.errors import PlanError

LITTLE = Budget("little", 2, 32, (0, 1), ("text", "nonsense"))


def test_it_counts_what_will_be_done(tiny_llama_folder, monkeypatch):
    monkeypatch.setattr(needs_module, "operations_per_second", lambda workers: 1e9)
    model = str(tiny_llama_folder)
    little = analysis_needs(model, LITTLE)
    assert little.parts == ("4 draws of 2 x 32 tokens",)
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert little.seconds == pytest.approx(1.5 * 2 * 1.6 * linears * 4 * 64 / 1e9)
    one = analysis_needs(model, LITTLE, sets=["code"])
    assert one.parts == ("2 draws of 2 x 32 tokens",)
    matrix = replace(LITTLE, probes=3, matrix=("rtn:w4a16g32", "gptq:w4a16g32"))
    full = analysis_needs(model, matrix)
    # Plain rounding sees no data: once for each set. Error feedback: for each set and seed.
    assert full.parts[1:] == ("sensitivity of 14 linears, 3 measured", "6 quantizations for the matrix")
    assert full.seconds > little.seconds
    assert full.peak_rss_bytes >= little.peak_rss_bytes


def test_too_little_memory_is_refused(monkeypatch):
    monkeypatch.setattr(needs_module, "available_memory_bytes", lambda: 10**9)
    AnalysisNeeds(1.0, 10**6, ()).check()
    with pytest.raises(PlanError, match=r"1\.0 GB are free"):
        AnalysisNeeds(1.0, 10**12, ()).check()
