"""llama.cpp's own quantizer: python -m clients.llama_quantize IN.gguf OUT.gguf TYPE [IMPORTANCE.npz].

The archive holds mean squares of inputs, float32 [in], by the names of matrices in the file.
"""

from __future__ import annotations

import ctypes
import os
import sys

import numpy as np
from llama_cpp import llama_cpp


def main() -> None:
    """Quantize, or end with a message."""
    source, out, kind, *importance = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = len(os.sched_getaffinity(0))
    if importance:
        with np.load(importance[0]) as archive:
            arrays = {name: np.ascontiguousarray(archive[name], dtype=np.float32) for name in archive.files}
        parameters.imatrix = entries(arrays)
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp could not make {kind} of {source}")


def entries(arrays: dict[str, np.ndarray]) -> ctypes.Array:
    """As the library wants them: the last one is empty. `arrays` must outlive it."""
    found = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, (name, values) in zip(found, arrays.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return found


if __name__ == "__main__":
    main()
