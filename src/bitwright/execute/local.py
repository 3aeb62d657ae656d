"""Local execution: reading and writing in threads beside the caller's, and two ways to compute on all processors.

`own_threads` is for work that falls into independent pieces, such as chunks of rows: every piece is computed by one
thread from its first operation to its last. Threads meet once a piece, so one whose processor is taken by another
program delays only itself, and no result depends on how many there are.

`torch_threads` is for what is one piece, such as a product of large matrices: PyTorch spreads every operation over an
OpenMP team, whose threads meet after each and spin while they wait. Small operations then take many times as long as
on one thread as soon as another program wants a processor: do not use it for them. It stays in the caller's thread:
OpenMP keeps a team for every thread that computes, and when teams outnumber the processors every wait becomes a sleep.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import TypeVar

import torch

from bitwright.execute.fork import check_threads, pytorch_is_alone

Item = TypeVar("Item")
Result = TypeVar("Result")

_POOL: ContextVar[ThreadPoolExecutor | None] = ContextVar("_POOL", default=None)


def default_workers() -> int:
    """Processors that this process may use; one in a forked child (see `fork`)."""
    if pytorch_is_alone():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def ahead(function: Callable[[Item], Result], items: Iterable[Item], depth: int = 1) -> Iterator[Result]:
    """Results of `function` over `items`, in order, made by one background thread beside the caller's own work.

    `items` is advanced in the caller's thread, at most `depth + 1` items beyond the results taken, which bounds
    memory. So an iterator of computations is overlapped with a `function` that writes, and an iterator of names
    with one that reads. The first error is raised where its result would have been.
    """
    remaining = iter(items)
    pool = _threads(1)
    pending: deque[Future[Result]] = deque()
    try:
        pending.extend(pool.submit(function, item) for item in islice(remaining, depth + 1))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def own_threads(count: int) -> Iterator[None]:
    """`spread` computes with `count` threads inside the block; PyTorch uses one in each of them, and in this one."""
    with torch_threads(1):
        if count == 1:
            yield
            return
        pool = _threads(count)
        token = _POOL.set(pool)
        try:
            yield
        finally:
            _POOL.reset(token)
            pool.shutdown(wait=True, cancel_futures=True)


def spread(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Results of `function` over independent `items`, in order, by the threads of `own_threads`; without, by this one.

    The first error, in the order of `items`, is raised.
    """
    pool = _POOL.get()
    return [function(item) for item in items] if pool is None else list(pool.map(function, items))


def _threads(count: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch computes alone and without gradients; both settings belong to the thread."""
    return ThreadPoolExecutor(count, "bitwright", initializer=_compute_alone)


def _compute_alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with `count` threads inside the block, and with as many as before after it.

    Raises:
        PlanError: more than one in a forked child.
    """
    check_threads(count)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
