"""Streams: the hidden states of all calibration windows on their way through the blocks.

A stream is a list of batches that are replaced one by one as they pass a block, so there is never a second copy
of the whole. It lives in memory, or in a temporary file where it would be too large.

The file is read and written, not mapped: mapped pages count as memory of the process, and a full disk would kill
it where a failed write is an error with a message. It has no name (on POSIX systems), so it is gone with the
process however that ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from bitwright.execute.memory import available_memory_bytes

SHARE = 4
"""A stream stays in memory up to one such part of what is available: two streams, a block, and room to work."""
UNKNOWN_BYTES = 2**30
"""The bound where the system does not tell how much is available."""
_ITEM_BYTES = 4  # float32


class Stream:
    """Hidden states float32 [windows, tokens, features], in batches of windows.

    Iterating gives the batches in order, each [up to `batch`, tokens, features]; a batch may be written while it
    is being looked at. Batches in memory are given out as they are, not copied: do not change them in place.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        batch: int,
        memory_bytes: int | None = None,
        folder: Path | None = None,
    ):
        """An empty stream; every batch must be written before it is read.

        Args:
            shape: windows, tokens, features.
            batch: windows in a batch; the last may have fewer.
            memory_bytes: larger streams go to a file; None: a quarter of the memory that is available now.
            folder: where the file is made; None: the system's folder for temporary files, which some systems
                keep in memory, so name a folder on disk where it matters.

        Raises:
            OSError: the file cannot be made.
        """
        self.shape = shape
        self.batch = batch
        self._sizes = [min(batch, shape[0] - start) for start in range(0, shape[0], batch)]
        self._batches: list[Tensor | None] = [None] * len(self._sizes)
        self._written = [False] * len(self._sizes)
        self._file: IO[bytes] | None = None
        self._bounds = (memory_bytes, folder)
        if self.bytes > (_default_bound() if memory_bytes is None else memory_bytes):
            self._file = tempfile.TemporaryFile(prefix="bitwright-", dir=folder)  # noqa: SIM115 - until close

    @property
    def bytes(self) -> int:
        """Size of all batches."""
        windows, tokens, features = self.shape
        return windows * tokens * features * _ITEM_BYTES

    @property
    def spilled(self) -> bool:
        """Whether the batches are in a file."""
        return self._file is not None

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._sizes)

    def __iter__(self) -> Iterator[Tensor]:
        """The batches in order."""
        return (self.read(index) for index in range(len(self)))

    def read(self, index: int) -> Tensor:
        """Batch number `index`: float32 [windows of the batch, tokens, features].

        Raises:
            ValueError: it was never written.
            OSError: the file cannot be read.
        """
        if not self._written[index]:
            raise ValueError(f"batch {index} of the stream was read before it was written")
        if self._file is None:
            batch = self._batches[index]
            assert batch is not None
            return batch
        result = torch.empty(self._shape(index))
        self._file.seek(self._offset(index))
        if self._file.readinto(result.numpy()) != result.nbytes:  # type: ignore[attr-defined]
            raise OSError(f"batch {index} of the stream: the temporary file is shorter than what was written")
        return result

    def write(self, index: int, value: Tensor) -> None:
        """Let `value`, in the shape that `read` tells, take the place of batch number `index`.

        Raises:
            ValueError: the shape is not that of the batch.
            OSError: the disk is full.
        """
        if tuple(value.shape) != self._shape(index):
            raise ValueError(f"batch {index} of the stream: got {list(value.shape)}, needed {list(self._shape(index))}")
        value = value.detach().to("cpu", torch.float32).contiguous()
        if self._file is None:
            self._batches[index] = value
        else:
            self._file.seek(self._offset(index))
            self._file.write(value.numpy().data)
            self._file.flush()
        self._written[index] = True

    def copy(self) -> Stream:
        """Another stream with the same batches; in memory the two share them until one is written."""
        other = Stream(self.shape, self.batch, *self._bounds)
        for index, batch in enumerate(self):
            other.write(index, batch)
        return other

    def close(self) -> None:
        """Free memory and file; the stream cannot be used afterwards."""
        if self._file is not None:
            self._file.close()
        self._batches = [None] * len(self._sizes)
        self._written = [False] * len(self._sizes)

    def __enter__(self) -> Stream:
        """The stream itself; leaving closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _shape(self, index: int) -> tuple[int, int, int]:
        return (self._sizes[index], *self.shape[1:])

    def _offset(self, index: int) -> int:
        return index * self.batch * self.shape[1] * self.shape[2] * _ITEM_BYTES


def _default_bound() -> int:
    available = available_memory_bytes()
    return UNKNOWN_BYTES if available is None else available // SHARE
