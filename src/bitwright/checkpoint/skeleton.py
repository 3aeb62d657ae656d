"""The skeleton: a `transformers` model without weights.

It stands on the meta device, so even the largest model costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from bitwright.checkpoint.quiet import quiet_transformers
from bitwright.errors import PlanError
from bitwright.models.edges import Config
from bitwright.untrusted.boundary import brief


def build_skeleton(config: Config) -> Any:
    """The causal LM of `config` (the content of `config.json`) on the meta device, in evaluation mode.

    Its attention is what `from_pretrained` would choose: sdpa, or eager where a model does not support that.

    Raises:
        PlanError: transformers refuses the config.
    """
    # importing transformers takes seconds
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    plain = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    with quiet_transformers(), torch.device("meta"):
        try:
            full = CONFIG_MAPPING[config["model_type"]].from_dict(plain)
            skeleton = AutoModelForCausalLM.from_config(full, dtype=torch.float32)
        except Exception as error:  # a config that makes no sense raises what it likes
            raise PlanError(
                f"transformers cannot build a {config.get('model_type')} from config.json: {brief(error)}; correct the "
                "file"
            ) from error
    return skeleton.eval().requires_grad_(False)
