"""What a forked child may do: compute with one of PyTorch's threads.

A fork copies the thread that calls it and no other. The OpenMP team with which PyTorch has computed in the parent does
not exist in the child, and the first operation that is spread over it waits for ever. Our own threads are started anew
where they are needed, so data-free quantization and packed weights use any number of them in a child too.
"""

from __future__ import annotations

import os
import sys

from bitwright.errors import PlanError

_forked_with_pytorch = False


def keep_children_alive() -> None:
    """From now on, children forked after PyTorch was imported start with one of its threads."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_begin_alone)


def pytorch_is_alone() -> bool:
    """Whether this process was forked from one that had imported PyTorch, so that one thread is all it may use."""
    return _forked_with_pytorch


def check_threads(count: int) -> None:
    """Refuse to give PyTorch more threads than it has here.

    Raises:
        PlanError: more than one in a forked child.
    """
    if count > 1 and pytorch_is_alone():
        raise PlanError(
            f"{count} threads asked for in a forked process, where those of PyTorch do not exist and waiting for them "
            "would never end; pass workers=1, or start the process by the method 'spawn' (or 'forkserver')"
        )


def _begin_alone() -> None:
    global _forked_with_pytorch
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        _forked_with_pytorch = True
        torch.set_num_threads(1)
