"""Tiny models of many families, each saved as a folder, and transformers imported once without its warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS

with warnings.catch_warnings():
    # packages that transformers imports where they are installed may warn of their own deprecations
    warnings.simplefilter("ignore")
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    import bitwright.models.discover  # noqa: F401

from bitwright.checkpoint.quiet import quiet_transformers


@pytest.fixture(scope="session")
def make_model(tmp_path_factory) -> Callable[[str], tuple[Path, Any]]:
    """Name of a config -> a folder with random weights, read-only by agreement, and the whole model."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(name: str) -> tuple[Path, Any]:
        if name not in made:
            config = CONFIG_MAPPING[CONFIGS[name]["model_type"]].from_dict(CONFIGS[name])
            with torch.random.fork_rng(devices=[]), quiet_transformers():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
                for parameter in model.parameters():
                    # norms and biases away from one and zero, so that a missing one would show
                    spread = 0.1 * torch.randn_like(parameter)
                    parameter.data.add_(spread) if parameter.ndim < 2 else parameter.data.mul_(5)
                folder = tmp_path_factory.mktemp(name)
                model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return make
