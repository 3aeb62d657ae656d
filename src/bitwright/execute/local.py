"""Local threads. PyTorch releases the interpreter lock in its kernels, so threads share memory and use all cores."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int = 2
) -> Iterator[Result]:
    """Results of `function` over `items`, in order, computed by `workers` threads.

    At most `workers + ahead` items are begun and not yet taken, which bounds memory. Each worker computes
    with one PyTorch thread: work is split over items, and what one item gives never depends on `workers`.
    The first error cancels what has not begun and is raised.
    """
    remaining = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="bitwright", initializer=_one_thread)
    pending: deque[Future[Result]] = deque()
    try:
        pending.extend(pool.submit(function, item) for item in islice(remaining, workers + ahead))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    # The OpenMP thread count is a setting of each thread, hence set in the worker itself.
    torch.set_num_threads(1)
