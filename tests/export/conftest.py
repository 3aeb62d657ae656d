"""Fixtures of the exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from native_folders import NativeFolders

from bitwright.numeric.qtensor import QTensor


@pytest.fixture
def native_folder(tmp_path: Path, quantize_minmax: Callable[..., QTensor]) -> NativeFolders:
    place = tmp_path / "native"
    place.mkdir()
    return NativeFolders(place, quantize_minmax)
