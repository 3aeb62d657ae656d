"""Interleaved timing: contenders take turns, and what counts are the ratios of neighbouring turns.

One thread is timed by its own processor time, several by the wall clock, after a pause in which the threads of the
contender before stop spinning.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

# Idle threads of GNU OpenMP spin for up to this long on some processors.
SETTLE_SECONDS = 25e-3
_CACHE_SIZES = Path("/sys/devices/system/cpu/cpu0/cache")
_PROBE_WIDTH = 1 << 14


def seconds(linears: Callable[[int], int], count: int, threads: int) -> float:
    """Time of one of `count` linears."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    started = clock()
    done = linears(count)
    return (clock() - started) / done


def interleaved(
    contenders: dict[str, Callable[[int], int]], threads: int, rounds: int, sample_seconds: float
) -> dict[str, list[float]]:
    """Seconds of one linear of every contender in every round; a turn takes `sample_seconds` or one call."""
    counts = {}
    for name, linears in contenders.items():
        linears(1)
        counts[name] = max(1, int(sample_seconds / max(seconds(linears, 1, threads), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, linears in contenders.items():
            if threads > 1:
                time.sleep(SETTLE_SECONDS)
            times[name].append(seconds(linears, counts[name], threads))
    return times


def paired(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and largest of the ratios `slow` over `fast`, round by round."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def ratio_text(slow: Sequence[float], fast: Sequence[float]) -> str:
    """`paired` for a table."""
    middle, low, high = paired(slow, fast)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def last_level_cache_bytes() -> int:
    """Of the first processor; 0 where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20}
    texts = [path.read_text().strip() for path in _CACHE_SIZES.glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=0)


def read_bandwidth(threads: int, memory_bytes: int) -> float:
    """Bytes read in a second by a product of a float32 matrix with a vector, the best of several."""
    torch.set_num_threads(threads)
    memory = torch.ones(max(1, memory_bytes // (4 * _PROBE_WIDTH)), _PROBE_WIDTH)

    def read(count: int) -> int:
        for _ in range(count):
            torch.mv(memory, memory[0])
        return count

    return memory.numel() * 4 / min(seconds(read, 1, threads) for _ in range(6))


def interference() -> dict[str, float]:
    """Load of the machine and processor seconds stolen from it so far, to be kept beside the figures."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    try:
        stolen = int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        stolen = float("nan")
    return {"load_average": load, "stolen_seconds": stolen}
