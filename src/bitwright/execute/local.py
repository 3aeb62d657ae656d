"""Local execution: a pipeline of threads between which work flows in order, and PyTorch's own threads inside.

Reading, computing and writing overlap, one thread each. The arithmetic is spread over processors by PyTorch
inside every operation, not by several Python threads: those spend their time handing the interpreter lock to
each other (two gave 1.0 times the speed of one on two processors, two threads inside the operations 1.7).
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


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], torch_threads: int, depth: int = 1
) -> Iterator[Result]:
    """Results of `function` over `items`, in order, computed by one thread while the caller does other work.

    At most `depth` results wait to be taken beside the one in the making, which bounds memory. `items` is
    advanced by the caller's thread. The first error is raised where its result would have been.
    """
    remaining = iter(items)
    pool = ThreadPoolExecutor(1, "bitwright", initializer=torch.set_num_threads, initargs=(torch_threads,))
    pending: deque[Future[Result]] = deque()
    try:
        pending.extend(pool.submit(function, item) for item in islice(remaining, depth + 1))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def kept_torch_threads() -> Iterator[None]:
    """Whatever threads a block sets, the caller's PyTorch uses as many afterwards as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
