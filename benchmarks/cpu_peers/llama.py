"""llama.cpp's decoding of a whole model, through the package llama_cpp: its C interface, less the Python around it."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cpu_peers import ggml
from cpu_peers.contract import UnavailableError


def library() -> Any:
    """The package, silent, less the kernels that crash here.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        llama = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise UnavailableError(f"llama.cpp is left out: {error}. To have it: {ggml.REMEDY}") from error
    ggml.load(None)
    llama.llama_log_set(_SILENCE, ctypes.c_void_p(0))
    return llama


_SILENCE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def quantize(source: Path, kind: str, out: Path) -> Path:
    """`source` (GGUF) as `out` with most tensors of type `kind`, as llama.cpp itself chooses them.

    Raises:
        UnavailableError: llama.cpp does not write it.
    """
    llama = library()
    if not out.exists():
        parameters = llama.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
        parameters.allow_requantize = True
        unfinished = out.with_suffix(".unfinished")
        if llama.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(parameters)):
            raise UnavailableError(f"llama.cpp could not write {source} as {kind}")
        unfinished.rename(out)
    return out


@dataclass
class Llama:
    """One sequence of one GGUF model."""

    path: Path
    max_length: int
    weight_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Load the model."""
        self._llama = library()
        parameters = self._llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        if ggml.load(None).crashes:
            # Left alone, llama.cpp takes the memory whose kernels crash; it can only be told to take none but plain.
            parameters.use_extra_bufts = False
            print(
                f"llama.cpp runs {self.path.name} without any repacking: not its best; build it without those kernels"
            )
        self._model = self._llama.llama_model_load_from_file(str(self.path).encode(), parameters)
        if not self._model:
            raise UnavailableError(f"llama.cpp cannot load {self.path}")
        settings = self._llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = self.max_length
        self._context = self._llama.llama_init_from_model(self._model, settings)
        self._memory = self._llama.llama_get_memory(self._context)
        self._vocabulary = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        self.weight_bytes = self._llama.llama_model_size(self._model)

    def set_threads(self, threads: int) -> None:
        """For all that follows."""
        self._llama.llama_set_n_threads(self._context, threads, threads)

    def prefill(self, ids: Tensor) -> int:
        """The likeliest token behind `ids` [tokens], which start a new sequence."""
        self._llama.llama_memory_clear(self._memory, True)
        return self._decode(ids.tolist())

    def step(self, token: int) -> int:
        """The likeliest token behind `token`."""
        return self._decode([token])

    def _decode(self, ids: list[int]) -> int:
        tokens = (self._llama.llama_token * len(ids))(*ids)
        status = self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode ended with status {status}")
        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())
