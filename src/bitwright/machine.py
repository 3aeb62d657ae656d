"""What this machine has and what a job will need of it: memory, disk, time."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitwright.errors import PlanError
from bitwright.execute.local import default_workers, torch_threads
from bitwright.execute.memory import available_memory_bytes, current_rss_bytes
from bitwright.journey import process_row
from bitwright.plan import Plan, Row
from bitwright.rounding.nearest import CHUNK_WEIGHTS

# Seconds per byte of reading, hashing and syncing, on a plain disk of 1 GB/s: only matters beside fast methods.
_SECONDS_PER_BYTE = 1e-9
# Float temporaries of a range search for each thread: the chunk, its buffers, its outlier masks.
_THREAD_BYTES = 16 * 4 * CHUNK_WEIGHTS


@dataclass(frozen=True)
class Estimate:
    """What a plan will need, before it starts."""

    seconds: float
    peak_rss_bytes: int
    disk_bytes: int
    workers: int


def estimate(plan: Plan, workers: int | None = None) -> Estimate:
    """Needs of `plan` on this machine.

    Time comes from quantizing a small random tile with each distinct method and spec, right now, so it
    follows the processor and its load; memory is counted from the plan's largest tensors.
    """
    workers = workers or default_workers()
    speed: dict[str, float] = {}
    seconds = 0.0
    for row in plan.rows():
        seconds += row.source_bytes * _SECONDS_PER_BYTE
        if row.action == "quantize" and row.spec is not None and row.method is not None:
            key = f"{row.spec} {row.method}"
            if key not in speed:
                speed[key] = _seconds_per_weight(row)
            seconds += row.weights * speed[key] / min(workers, default_workers())
    # One tensor in work, two read ahead, one unit of results on its way to disk.
    working = max((_working_bytes(row) for row in plan.rows()), default=0)
    waiting = sum(sorted((row.source_bytes for row in plan.rows()), reverse=True)[:2])
    finished = max((sum(row.bytes for row in unit.rows) for unit in plan.units), default=0)
    peak = current_rss_bytes() + working + waiting + finished + workers * _THREAD_BYTES
    return Estimate(seconds, peak, plan.bytes, workers)


def _working_bytes(row: Row) -> int:
    """Memory of one tensor in work: its source, and its codes (twice, to verify) and packed words, or its copy."""
    if row.action == "quantize":
        return row.source_bytes + 2 * row.weights + row.bytes
    return row.source_bytes if row.stored_dtype == row.source_dtype else row.source_bytes + row.bytes


def _seconds_per_weight(row: Row) -> float:
    """Of one thread, for the whole journey of a small random tensor."""
    shape = (max(1, CHUNK_WEIGHTS // row.shape[1]), row.shape[1])
    tile = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch_threads(1):
        for _ in range(2):  # the first run also warms up the allocator
            started = time.perf_counter()
            process_row(replace(row, shape=shape), tile, {})
        return (time.perf_counter() - started) / tile.numel()


def check_machine(needs: Estimate, out: Path) -> None:
    """Refuse a job that this machine cannot finish.

    Raises:
        PlanError: too little free memory or disk; the message says how much of which.
    """
    available = available_memory_bytes()
    growth = needs.peak_rss_bytes - current_rss_bytes()
    if available is not None and growth > available:
        raise PlanError(
            f"needs about {growth / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free; "
            f"use fewer workers than {needs.workers} (--workers)"
        )
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if needs.disk_bytes > free:
        raise PlanError(
            f"needs about {needs.disk_bytes / 1e9:.2f} GB of disk at {folder} and {free / 1e9:.2f} GB are free"
        )
