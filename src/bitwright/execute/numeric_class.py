"""The numeric class: what decides in which order a machine adds up, hence the last digits of calibrated results.

Matrix libraries cut long sums into parts by the width of the processor's vectors, by its make, and by the number of
threads; another version may cut them in another way. Runs of one class give the same bytes.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


def numeric_class(threads: int) -> str:
    """In one line: threads, processor and its instructions as PyTorch uses them, and the libraries that add up."""
    build = torch.__config__.show()
    found = (
        re.search(r"(Math Kernel Library) Version ([\d.]+)", build) or re.search(r"(BLAS_INFO)=(\w+)", build),
        re.search(r"(MKL-DNN) v([\d.]+)", build),
    )
    names = {"Math Kernel Library": "MKL ", "MKL-DNN": "oneDNN ", "BLAS_INFO": "BLAS "}
    libraries = [names[match[1]] + match[2] for match in found if match is not None]
    processor = " ".join([platform.machine(), *_maker(), torch.backends.cpu.get_cpu_capability()])
    some = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{some} on {processor} with {', '.join([f'PyTorch {torch.__version__}', *libraries])}"


def _maker() -> list[str]:
    """Who made the processor, where the system tells: libraries choose kernels by it."""
    if not _CPUINFO.exists():
        return []
    match = re.search(r"^(?:vendor_id|CPU implementer)\s*:\s*(\S+)", _CPUINFO.read_text(errors="replace"), re.MULTILINE)
    return [] if match is None else [match[1]]
