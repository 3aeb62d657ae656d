"""Sites: a float block whose activations are quantized as those of the finished model will be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from bitwright.numeric.activation import InputSite, KvSpec
from bitwright.numeric.fp8 import KvScales
from bitwright.runtime.attention import quantize_kv


@contextmanager
def input_sites(block: nn.Module, sites: Mapping[str, InputSite]) -> Iterator[None]:
    """Within, each linear of `sites`, by name relative to `block`, gets its inputs as `QuantizedLinear` would."""
    with ExitStack() as stack:
        for name, site in sites.items():

            def apply(_: nn.Module, args: tuple[Tensor, ...], site: InputSite = site) -> Any:
                return (site.apply(args[0]), *args[1:])

            stack.callback(block.get_submodule(name).register_forward_pre_hook(apply).remove)
        yield


@contextmanager
def quantized_activations(
    block: nn.Module,
    sites: Mapping[str, InputSite],
    kv_cache: KvSpec | None,
    kv_scales: Mapping[str, KvScales] | None = None,
) -> Iterator[None]:
    """Within, the linears of `block` get their inputs as `input_sites` says, and attention quantized keys and values.

    A spec of past keys and values alone leaves attention in float: blocks run on their own have no mask that tells
    a token's own place. So does a grid of fixed scales while there are none (`kv_scales` is None): they are those of
    the finished transform.
    """
    with ExitStack() as stack:
        stack.enter_context(input_sites(block, sites))
        waits = kv_cache is not None and kv_cache.grid == "fp8" and kv_scales is None
        if kv_cache is not None and not kv_cache.past_only and not waits:
            stack.enter_context(quantize_kv(block, kv_cache, kv_scales))
        yield
