"""Filling the skeleton (`checkpoint.skeleton`): any module of it gets its tensors from a source on demand.

What checkpoints do not store (buffers such as the RoPE frequencies) is computed by the model's own initialisation, as
`from_pretrained` does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.checkpoint.source import Source
from bitwright.errors import CheckpointError


def fill(skeleton: Any, module: nn.Module, name: str, source: Source) -> None:
    """Give `module` and all modules in it the tensors that `source` has under `name`, in float32.

    Raises:
        CheckpointError: a tensor is missing, damaged, or of another shape.
    """
    for path, part in module.named_modules():
        fill_buffers(skeleton, part)
        fill_own(part, f"{name}.{path}" if path else name, source)


def fill_own(module: nn.Module, name: str, source: Source) -> None:
    """The same for the tensors that `module` itself holds, without the modules in it and computed buffers."""
    for leaf, meta in _stored(module):
        set_tensor(module, leaf, read_float(source, f"{name}.{leaf}", meta.shape))


def fill_buffers(skeleton: Any, module: nn.Module) -> None:
    """Compute the buffers of `module` that no checkpoint stores; the modules in it are left alone."""
    found = {
        leaf: buffer
        for leaf, buffer in module.named_buffers(recurse=False)
        if leaf in module._non_persistent_buffers_set and buffer.is_meta
    }
    if not found:
        return
    for leaf, buffer in found.items():
        value = torch.empty_like(buffer, device="cpu")
        # should the initialisation forget one, NaN shows it where leftover memory would not
        setattr(module, leaf, value.fill_(torch.nan) if value.is_floating_point() else value.zero_())
    with torch.random.fork_rng(devices=[]):
        # the same call also "initialises" parameters, which does nothing while they are on the meta device
        skeleton._init_weights(module)


def drop_own(module: nn.Module) -> None:
    """Put the tensors of `fill_own` back to the meta device."""
    for leaf, value in _stored(module):
        set_tensor(module, leaf, value.to("meta"))


def set_tensor(module: nn.Module, leaf: str, value: Tensor) -> None:
    """Let the parameter or buffer `leaf` of `module` be `value` itself, without a copy."""
    parameter = leaf in module._parameters
    setattr(module, leaf, nn.Parameter(value, requires_grad=False) if parameter else value)


def read_float(source: Source, name: str, shape: torch.Size) -> Tensor:
    """A tensor of `source`, floats in float32, checked to have the `shape` that the model expects.

    Raises:
        CheckpointError: it is missing, damaged, or of another shape.
    """
    value = source.read(name)
    if value.shape != shape:
        raise CheckpointError(
            f"{source.label}: tensor {name} has shape {list(value.shape)}, needed {list(shape)}; "
            "the config.json belongs to another checkpoint: download it again"
        )
    return value.float() if value.is_floating_point() else value


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Within, `module` computes `forward`; it stays in its place and keeps its attributes, which models look at."""
    # an attribute of the instance hides the method of its class
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor that `module` itself holds and checkpoints store."""
    yield from list(module.named_parameters(recurse=False))
    for leaf, buffer in list(module.named_buffers(recurse=False)):
        if leaf not in module._non_persistent_buffers_set:
            yield leaf, buffer
