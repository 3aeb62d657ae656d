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
from bitwright.execute.numeric_class import numeric_class
from bitwright.journey import process_row
from bitwright.plan import Plan
from bitwright.rounding.nearest import CHUNK_WEIGHTS
from bitwright.rows import Row

# Seconds per byte of reading, hashing and syncing, on a plain disk of 1 GB/s: only matters beside fast methods.
_SECONDS_PER_BYTE = 1e-9
# Float temporaries of a range search for each thread: the chunk, its buffers, its outlier masks.
_THREAD_BYTES = 16 * 4 * CHUNK_WEIGHTS
# What attention, norms and narrow matrices add to the operations of a block's linears, in time.
BLOCK_OVERHEAD = 1.6


@dataclass(frozen=True)
class Estimate:
    """What a plan will need, before it starts."""

    seconds: float
    peak_rss_bytes: int
    disk_bytes: int
    workers: int
    numeric_class: str | None = None
    """In which a calibrated job would be computed; None for one without data, which comes out equal everywhere."""


def estimate(plan: Plan, workers: int | None = None) -> Estimate:
    """Needs of `plan` on this machine.

    Time comes from quantizing a small random tile with each distinct method and spec, right now, so it
    follows the processor and its load; that of calibrated methods from the speed of a matrix product. Memory is
    counted from the plan's largest tensors and, with calibration, its largest block.
    """
    workers = workers or default_workers()
    speed: dict[str, float] = {}
    seconds = 0.0
    for row in plan.rows():
        seconds += row.source_bytes * _SECONDS_PER_BYTE
        if row.action == "quantize" and row.spec is not None and row.method is not None and not row.calibrated:
            key = f"{row.spec} {row.method}"
            if key not in speed:
                speed[key] = _seconds_per_weight(row)
            seconds += row.weights * speed[key] / min(workers, default_workers())
    # One tensor in work, two read ahead, one unit of results on its way to disk.
    working = max((_working_bytes(row) for row in plan.rows()), default=0)
    waiting = sum(sorted((row.source_bytes for row in plan.rows()), reverse=True)[:2])
    finished = max((sum(row.bytes for row in unit.rows) for unit in plan.units), default=0)
    peak = current_rss_bytes() + working + waiting + finished + workers * _THREAD_BYTES
    if plan.inputs is not None:
        seconds += _calibration_operations(plan) / operations_per_second(workers)
        peak += _calibration_bytes(plan)
    return Estimate(seconds, peak, plan.bytes, workers, None if plan.inputs is None else numeric_class(workers))


def _calibration_operations(plan: Plan) -> float:
    """Floating-point operations of forward and backward passes, Hessians, factors and columns."""
    assert plan.inputs is not None
    tokens = plan.recipe.calibration.windows * plan.recipe.calibration.window_tokens
    passes = _passes(plan)
    leaders = {group[0] for group in plan.adapter.shared_inputs}
    total = 0.0
    for unit in plan.units:
        for row in unit.rows:
            if unit.block is not None and len(row.shape) == 2:
                total += 2.0 * passes * tokens * row.weights
            if row.calibrated and unit.block is not None:
                out_features, in_features = row.shape
                if row.module.removeprefix(plan.adapter.block_prefix(unit.block)) in leaders:
                    # panels of half a symmetric product; cross moments are not symmetric
                    total += (1.2 + (2.0 if plan.inputs.correction else 0.0)) * tokens * in_features**2
                total += 2.0 * in_features**3 + 2.0 * out_features * in_features**2
    return BLOCK_OVERHEAD * total


def _passes(plan: Plan) -> float:
    """How often all calibration tokens go forward through a block; a backward pass counts as two."""
    assert plan.inputs is not None
    assert plan.calibrated_method is not None
    learn = plan.calibrated_method.learn
    # The pass that advances the stream, and those that stop at each stage; forward, forward and backward.
    passes = (2.3 if plan.inputs.sequential else 2.0) + (3.0 if plan.inputs.weighting == "gradient" else 0.0)
    passes += 1.0 if plan.inputs.correction or learn is not None else 0.0  # the float model's stream
    if learn is not None:
        # As much again goes into the weights themselves, which every step quantizes anew.
        passes += (1.0 + learn.augmented) * (2 * 3.0 * learn.epochs + learn.checks + 1.0)
    return passes


def _calibration_bytes(plan: Plan) -> int:
    """A block in float32 twice, its activations for one batch, and the largest Hessian with its factors."""
    block = max(sum(4 * row.weights for row in unit.rows) for unit in plan.units if unit.block is not None)
    widest = max(row.shape[1] for row in plan.rows() if row.calibrated)
    tokens = max(2048, plan.recipe.calibration.window_tokens)
    vocabulary = max(row.shape[0] for row in plan.rows() if len(row.shape) == 2)
    head = 3 * 4 * vocabulary * tokens if plan.inputs is not None and plan.inputs.weighting == "gradient" else 0
    return 2 * block + max(head, 4 * 12 * tokens * widest + 5 * 8 * widest**2)


def operations_per_second(workers: int) -> float:
    """Of a float32 matrix product, right now."""
    matrix = torch.ones(768, 768)
    with torch_threads(workers):
        _ = matrix @ matrix
        started = time.perf_counter()
        for _ in range(4):
            _ = matrix @ matrix
        return 4 * 2 * 768**3 / (time.perf_counter() - started)


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
