"""Serving native folders with vLLM: `register` is the plugin that vLLM's processes call when they start.

`routing` says which of the folder's matrices a layer of vLLM consists of and collects their tensors, `matrices`
multiplies by them, and `plugin` alone imports vLLM. Devices are those of `runtime.ops`.
"""

from __future__ import annotations

from bitwright.errors import PlanError


def register() -> None:
    """Teach vLLM the method "bitwright" (entry point group `vllm.general_plugins`); again changes nothing.

    Raises:
        PlanError: vLLM is not installed.
    """
    try:
        from bitwright.runtime.vllm.plugin import register as register_config
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "vllm":
            raise
        raise PlanError(
            "bitwright's plugin for vLLM needs the package vllm, which is missing; install it with: "
            "pip install 'bitwright[vllm]'"
        ) from error
    register_config()
