"""NaN and infinity in weights: found by name, before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from bitwright.checkpoint.source import Source
from bitwright.errors import WeightError
from bitwright.execute.local import ahead, spread
from bitwright.numeric.measure import not_finite

_PIECE = 1 << 17


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a float tensor that is not finite throughout.

    Raises:
        WeightError: naming it, and how many of its values are NaN or infinite.
    """
    if not tensor.is_floating_point():
        return
    flat = tensor.detach().reshape(-1)
    bad = sum(spread(lambda start: not_finite(flat[start : start + _PIECE]), range(0, tensor.numel(), _PIECE)))
    if bad:
        raise WeightError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or Inf, needed finite weights; "
            "the checkpoint is damaged or diverged"
        )


def finite_tensors(source: Source, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `source` called `names`, the smallest first, each once it is known to be finite.

    Raises:
        CheckpointError: a tensor cannot be read.
        WeightError: one holds NaN or Inf; it is named.
    """
    ordered = sorted(names, key=lambda name: (source.tensors[name].numel, name))
    for name, values in zip(ordered, ahead(source.read, ordered), strict=True):
        check_finite(name, values)
        yield name, values


def check_source(source: Source) -> None:
    """Check that every tensor of `source` is finite, before work that takes long.

    Raises:
        CheckpointError: a tensor cannot be read.
        WeightError: one holds NaN or Inf; it is named.
    """
    for _ in finite_tensors(source, source.tensors):
        pass
