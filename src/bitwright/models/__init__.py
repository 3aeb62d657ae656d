"""Models: where the blocks, linears and edges of an architecture are.

`adapter_for` reads the table below; an architecture that is not in it is discovered by running one block.
"""

from __future__ import annotations

from collections.abc import Callable

from bitwright.errors import PlanError
from bitwright.models.adapter import Adapter, block_count
from bitwright.models.edges import BlockShape, Config
from bitwright.models.falcon import falcon
from bitwright.models.gemma3 import gemma3_text
from bitwright.models.llama import llama, mistral
from bitwright.models.mixtral import mixtral
from bitwright.models.opt import opt
from bitwright.models.qwen2 import qwen2
from bitwright.models.qwen3 import qwen3
from bitwright.models.qwen3_moe import qwen3_moe
from bitwright.untrusted.boundary import reading

ADAPTERS: dict[str, Callable[[Config], Adapter]] = {
    "falcon": falcon,
    "gemma3_text": gemma3_text,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "opt": opt,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}

__all__ = ["ADAPTERS", "Adapter", "BlockShape", "adapter_for", "block_count"]


def adapter_for(config: Config) -> Adapter:
    """The adapter of the checkpoint whose `config.json` is `config`.

    Raises:
        PlanError: no `model_type`, or an architecture that is neither in the table nor discoverable.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise PlanError(
            f"config.json has model_type {model_type!r}; the name of an architecture is needed; "
            "add it, for example 'llama'"
        )
    with reading("config.json", PlanError, "correct the file, or download it again"):
        return _adapter(model_type, config)


def _adapter(model_type: str, config: Config) -> Adapter:
    if model_type in ADAPTERS:
        return ADAPTERS[model_type](config)
    # importing transformers takes seconds, which the architectures above need not pay
    from bitwright.models.discover import discover

    return discover(config)
