"""Local execution: reading and writing in threads beside the caller's, and PyTorch's own threads inside it.

The arithmetic is spread over processors by PyTorch inside every operation, not by several Python threads: those
spend their time handing the interpreter lock to each other (two gave 1.0 times the speed of one on two
processors, two threads inside the operations 1.7). And it stays in the caller's thread: OpenMP keeps a team of
threads for every thread that computes, and as soon as two teams outnumber the processors, waiting threads sleep
instead of spinning, which made every operation three times slower.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def ahead(function: Callable[[Item], Result], items: Iterable[Item], depth: int = 1) -> Iterator[Result]:
    """Results of `function` over `items`, in order, made by one background thread beside the caller's own work.

    `items` is advanced in the caller's thread, at most `depth + 1` items beyond the results taken, which bounds
    memory. So an iterator of computations is overlapped with a `function` that writes, and an iterator of names
    with one that reads. The first error is raised where its result would have been.
    """
    remaining = iter(items)
    # One PyTorch thread there: a second team would slow the caller's down. The setting belongs to the thread.
    pool = ThreadPoolExecutor(1, "bitwright", initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future[Result]] = deque()
    try:
        pending.extend(pool.submit(function, item) for item in islice(remaining, depth + 1))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with `count` threads inside the block, and with as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
