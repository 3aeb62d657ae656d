"""Bounds: sizes in `config.json` against the headers of the files that must hold them, before any model is built.

A model without data costs next to nothing for each weight and much for each module, so what counts modules (blocks,
experts, heads) is bounded by the tensors that there are, and every size by their sizes. These are bounds and no check
of what fits: `agreement` does that, with the model at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bitwright.checkpoint.clues import block_key
from bitwright.errors import CheckpointError
from bitwright.models.edges import Config

Shape = tuple[int, ...]
LARGEST_NUMBER = 1 << 62
"""Of any integer: libraries compute with 64 bits."""
MOST_POSITIONS = 1 << 28
"""Of a context: some classes compute a table of all positions."""
_MORE_BLOCKS = 256
"""Blocks that a config may have beyond those in the files: then `agreement` can say which are missing."""
_MORE_PARTS = 1024
"""The same for experts and other counts of modules, some of which mean nothing to a dense model."""
_MORE = 16
"""By how much a size may exceed every size in the files: hidden sizes are multiples of what is stored in pieces."""
# Sizes and counts in the configs of model families; what counts tokens and positions is held by no tensor.
_SIZE = re.compile(
    r"size|dim|width|heads?$|n_head|layers?$|expert|rank|hidden|intermediate|embd|inner|d_model|d_ff|ffn"
)
_POSITIONS = re.compile(r"position|n_ctx|context|max_seq")
_COUNT = re.compile(r"expert|layers?$|blocks?$|depth")
_NO_SIZE = re.compile(r"position|length|window|token|chunk|context|ctx|batch|image|patch|audio|vision|pretraining|max_")
_REMEDY = "config.json belongs to another checkpoint or is damaged: download it again or correct the file"


def check_bounds(label: str, config: Config, shapes: Mapping[str, Shape | None]) -> None:
    """Refuse a config that asks for far more than the tensors of `shapes` (None: not known) can be.

    Raises:
        CheckpointError: naming the key of config.json, and what the files hold.
    """
    sizes = {size for shape in shapes.values() for size in shape or ()}
    # sizes that are packed into fewer stored numbers are not known
    known = all(shape is not None for shape in shapes.values())
    largest = max(sizes, default=1)
    numbers = {int(part) for name in shapes for part in name.split(".") if part.isdecimal() and len(part) < 10}
    block, count = block_key(config)
    if count > len(numbers) + _MORE_BLOCKS:
        raise CheckpointError(
            f"{label}: config.json says {block} = {count}, and the files hold the tensors of at most {len(numbers)} "
            f"blocks; {_REMEDY}"
        )
    for key, value in _integers(config):
        if not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
            raise CheckpointError(f"{label}: config.json says {key} = {str(value)[:40]}, which no model has; {_REMEDY}")
        name = key.rpartition(".")[2]
        if value > MOST_POSITIONS and _POSITIONS.search(name):
            raise CheckpointError(
                f"{label}: config.json says {key} = {value}, more than {MOST_POSITIONS}, which no model has; {_REMEDY}"
            )
        if known and value > _MORE * largest and _SIZE.search(name) and not _NO_SIZE.search(name):
            raise CheckpointError(
                f"{label}: config.json says {key} = {value}, and the largest size of any tensor in the files is "
                f"{largest}; {_REMEDY}"
            )
        if _COUNT.search(name) and value > len(numbers) + _MORE_PARTS and value not in sizes:
            raise CheckpointError(
                f"{label}: config.json says {key} = {value}, and the tensors in the files count to {len(numbers)} at "
                f"most; {_REMEDY}"
            )


def _integers(config: Config) -> Iterator[tuple[str, int]]:
    """Every integer in `config`, with its path."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{path}.{key}".removeprefix("."), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(path, inner) for inner in value]
        elif type(value) is int:
            yield path, value
