"""Sites: what happens to the inputs of a float block's linears, as their quantized versions will have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from bitwright.numeric.activation import InputSite


@contextmanager
def input_sites(block: nn.Module, sites: Mapping[str, InputSite]) -> Iterator[None]:
    """Within, each linear of `sites`, by name relative to `block`, gets its inputs as `QuantizedLinear` would."""
    with ExitStack() as stack:
        for name, site in sites.items():

            def apply(_: nn.Module, args: tuple[Tensor, ...], site: InputSite = site) -> Any:
                return (site.apply(args[0]), *args[1:])

            stack.callback(block.get_submodule(name).register_forward_pre_hook(apply).remove)
        yield
