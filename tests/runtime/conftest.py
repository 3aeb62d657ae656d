"""Fixtures of the tests of the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bitwright.runtime.cpu import instruction_sets


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("BITWRIGHT_ISA", request.param)
    return str(request.param)


@pytest.fixture
def _keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
