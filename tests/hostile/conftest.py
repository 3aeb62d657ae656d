"""Folders to be damaged: a tiny Llama in float, the same quantized by bitwright, and by another program."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_folders import Damaged

import bitwright
from bitwright.export.targets import export_model


@pytest.fixture(scope="session")
def whole(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Healthy folders by kind: float, native, foreign."""
    place = tmp_path_factory.mktemp("whole")
    bitwright.quantize(str(tiny_llama_folder), place / "native", "rtn", "w4a16g32-sym")
    export_model(place / "native", place / "foreign", "compressed-tensors")
    return {"float": tiny_llama_folder, "native": place / "native", "foreign": place / "foreign"}


@pytest.fixture
def damage(whole: dict[str, Path], tmp_path: Path) -> Callable[[str], Damaged]:
    """Copies a healthy folder of a kind."""
    return lambda kind: Damaged(Path(shutil.copytree(whole[kind], tmp_path / kind)))
