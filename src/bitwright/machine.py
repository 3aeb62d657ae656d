"""What this machine has and what a job will need of it: memory, disk, time."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import linear

from bitwright.calibration.blocks import BATCH_TOKENS
from bitwright.calibration.hessians import Evidence
from bitwright.errors import PlanError
from bitwright.execute.local import default_workers, own_threads, torch_threads
from bitwright.execute.memory import available_memory_bytes, current_rss_bytes
from bitwright.execute.numeric_class import numeric_class
from bitwright.journey import process_row
from bitwright.plan import Plan
from bitwright.rounding.nearest import CHUNK_WEIGHTS
from bitwright.rows import Row

# Seconds per byte of reading, hashing and syncing, on a plain disk of 1 GB/s: only matters beside fast methods.
_SECONDS_PER_BYTE = 1e-9
# Seconds per weight of decoding the blocks of a GGUF file, and of rescaling the demo's besides.
_SECONDS_PER_GGUF_WEIGHT = 15e-9
_SECONDS_PER_DEMO_WEIGHT = 35e-9
# How long the speed of matrix products is measured, and how wide a matrix of a calibrated method is at most.
_MEASURED_SECONDS = 0.3
_MEASURED_ROWS, _MEASURED_FEATURES = 256, 2048
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

    Time comes from quantizing a small random tile with each distinct method and spec and, with calibration, from
    products of the size of the largest linear, right now and on as many threads as the job will have: so it follows
    the processor and its load. Memory is counted from the plan's largest tensors and, with calibration, its largest
    block.
    """
    workers = workers or default_workers()
    seconds = _reading_seconds(plan) / min(workers, default_workers())
    measured: dict[str, _Cost] = {}
    for row in plan.rows():
        if row.action == "quantize" and len(row.shape) == 2:
            key = f"{row.spec} {row.method} {row.shape[1] if row.needs_hessian else None}"
            if key not in measured:
                measured[key] = _cost(row, workers, plan.inputs is not None)
            seconds += measured[key].seconds(row)
    # One tensor in work, two read ahead, one unit of results on its way to disk.
    working = max((_working_bytes(row) for row in plan.rows()), default=0)
    waiting = sum(sorted((row.source_bytes for row in plan.rows()), reverse=True)[:2])
    finished = max((sum(row.bytes for row in unit.rows) for unit in plan.units), default=0)
    peak = current_rss_bytes() + working + waiting + finished + workers * _THREAD_BYTES
    if plan.inputs is not None:
        seconds += _calibration_operations(plan) / operations_per_second(workers, _largest_product(plan))
        peak += _calibration_bytes(plan)
    return Estimate(seconds, peak, plan.bytes, workers, None if plan.inputs is None else numeric_class(workers))


def _reading_seconds(plan: Plan) -> float:
    """Of one thread: to read, decode and hash the source, and to write the result."""
    weights = sum(row.weights for row in plan.rows())
    decoding = _SECONDS_PER_GGUF_WEIGHT if plan.source.endswith(".gguf") else 0.0
    decoding = _SECONDS_PER_DEMO_WEIGHT if plan.source == "demo" else decoding
    return plan.source_bytes * _SECONDS_PER_BYTE + weights * decoding


@dataclass(frozen=True)
class _Cost:
    """Seconds that a measured tile took: `factor` of them for its inputs alone, the others for each of its rows."""

    factor: float
    per_weight: float
    features: int

    def seconds(self, row: Row) -> float:
        """Those of a whole row of the plan: a factor costs the cube of the inputs, error feedback the square."""
        wider = row.shape[1] / self.features if row.needs_hessian else 1.0
        return self.factor * wider**3 + self.per_weight * max(wider, 1.0) * row.weights


def _cost(row: Row, workers: int, calibrated: bool) -> _Cost:
    """What the journey of a small random tensor with the method and spec of `row` costs, in `workers` threads."""
    assert row.method is not None
    features, rows = row.shape[1], max(1, workers * CHUNK_WEIGHTS // row.shape[1])
    evidence = None
    random = torch.Generator().manual_seed(0)
    if row.needs_hessian:
        features, rows = min(features, _MEASURED_FEATURES), _MEASURED_ROWS
        inputs = torch.randn(2 * features, features, generator=random)
        evidence = Evidence(inputs.T @ inputs / len(inputs), len(inputs))
    tile = torch.randn(min(rows, row.shape[0]), features, generator=random) * 0.02
    row = replace(row, shape=tuple(tile.shape))
    with torch_threads(workers) if calibrated else own_threads(workers):
        for _ in range(2):  # the first run also warms up the allocator
            started = time.perf_counter()
            outcome = process_row(row, tile, {}, evidence)
            seconds = time.perf_counter() - started
    factor = outcome.seconds.get("factorization", 0.0)
    return _Cost(factor, (seconds - factor) / tile.numel(), features)


def _calibration_operations(plan: Plan) -> float:
    """Floating-point operations of forward and backward passes and of Hessians."""
    assert plan.inputs is not None
    tokens = plan.recipe.calibration.windows * plan.recipe.calibration.window_tokens
    passes = _passes(plan)
    leaders = {group[0] for group in plan.adapter.shared_inputs}
    total = 0.0
    for unit in plan.units:
        for row in unit.rows:
            if unit.block is not None and len(row.shape) == 2:
                total += 2.0 * passes * tokens * row.weights
            leads = unit.block is not None and row.module.removeprefix(plan.adapter.block_prefix(unit.block)) in leaders
            if row.needs_hessian and leads:
                # panels of half a symmetric product; cross moments are not symmetric
                total += (1.2 + (2.0 if plan.inputs.correction else 0.0)) * tokens * row.shape[1] ** 2
    if plan.inputs.weighting == "gradient":
        head = max(row.weights for row in plan.rows() if len(row.shape) == 2)
        total += 2.0 * 3.0 * tokens * head / BLOCK_OVERHEAD
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


def _largest_product(plan: Plan) -> tuple[int, int, int]:
    """Tokens of a batch, outputs and inputs of the largest linear."""
    tokens = min(BATCH_TOKENS, plan.recipe.calibration.windows * plan.recipe.calibration.window_tokens)
    out_features, in_features = max((row.shape for row in plan.rows() if row.calibrated), key=math.prod)
    return tokens, out_features, in_features


def operations_per_second(workers: int, sizes: tuple[int, int, int] = (768, 768, 768)) -> float:
    """Of a float32 product of `sizes`, at most 4096 each, right now."""
    tokens, out_features, in_features = (min(size, 4096) for size in sizes)
    inputs, weight = torch.ones(tokens, in_features), torch.ones(out_features, in_features)
    with torch_threads(workers):
        _ = linear(inputs, weight)
        started, products = time.perf_counter(), 0
        while (seconds := time.perf_counter() - started) < _MEASURED_SECONDS or not products:
            _ = linear(inputs, weight)
            products += 1
        return products * 2 * tokens * out_features * in_features / seconds


def _working_bytes(row: Row) -> int:
    """Memory of one tensor in work: its source, and its codes (twice, to verify) and packed words, or its copy."""
    if row.action == "quantize":
        return row.source_bytes + 2 * row.weights + row.bytes
    return row.source_bytes if row.stored_dtype == row.source_dtype else row.source_bytes + row.bytes


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
