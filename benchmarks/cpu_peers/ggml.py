"""llama.cpp's kernels, through the C interface of the ggml libraries that the wheel of llama-cpp-python carries.

Weights lie where llama.cpp would put them: in the first of the CPU's extra kinds of memory (tiles for AMX, interleaved
rows) that takes a product with them, or else in plain memory. K-quants need in features by 256; where that fails, the
format that llama.cpp's own quantizer falls back to stands in. Needs a build with OpenMP, as the sdist makes by default:
without it every graph would start threads of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import subprocess
import sys
import weakref
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cpu_peers.contract import Case, Inputs, Run, UnavailableError, relative_error

REMEDY = "pip install llama-cpp-python (or build its sdist for this machine), or name its folder with --llama-cpp-lib"
TYPES = {"Q4_0": 2, "Q5_0": 6, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "IQ4_NL": 20}
_F32 = 0
_STAND_INS = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0"}
_K_BLOCK = 256
# Products of one graph, about, and linears at most.
_GRAPH_PRODUCTS, _MOST_NODES = 1e8, 64


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_TO_FLOAT = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("block_size", c_int64),
        ("block_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", _TO_FLOAT),
    )


# Function: (type of the result, types of the arguments).
_BASE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_log_set": (None, (_LOG, c_void_p)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "ggml_get_type_traits": (POINTER(_TypeTraits), (c_int,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buft_alloc_buffer": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_buffer_get_base": (c_void_p, (c_void_p,)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_get_default_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
}
_CPU: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
}


@dataclass
class Ggml:
    """The libraries' functions by name, less the leading `ggml_`; `crashes`: a kind of memory had to be dropped."""

    folder: Path
    crashes: bool = False

    def __post_init__(self) -> None:
        """Load the libraries.

        Raises:
            UnavailableError: they are not in the folder, or are of another interface.
        """
        try:
            for stem, functions in (("libggml-base", _BASE), ("libggml-cpu", _CPU)):
                path = next(iter(sorted(self.folder.glob(f"{stem}.so")) + sorted(self.folder.glob(f"{stem}.dylib"))))
                library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                for name, (result, arguments) in functions.items():
                    function = getattr(library, name)
                    function.restype, function.argtypes = result, arguments
                    setattr(self, name.removeprefix("ggml_"), function)
        except (StopIteration, OSError, AttributeError) as error:
            raise UnavailableError(f"llama.cpp is left out: {self.folder}: {error!r}. To have it: {REMEDY}") from error
        # It tells of every weight that it lays out.
        self._silence = _LOG(lambda *_: None)
        self.log_set(self._silence, None)
        self.backend: Any = self.backend_cpu_init()
        self.registry: Any = self.backend_cpu_reg()
        self.device: Any = self.backend_reg_dev_get(self.registry, 0)
        self.memory_kinds = [*itertools.takewhile(bool, self.extra_kinds())]
        self.memory_kinds.append(self.backend_get_default_buffer_type(self.backend))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The functions."""

    def extra_kinds(self) -> Any:
        """What llama.cpp tries for weights before plain memory: its own list, which ends with None."""
        address = self.backend_reg_get_proc_address(self.registry, b"ggml_backend_dev_get_extra_bufts")
        return ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device) if address else [None]

    def drop_crashing_kinds(self) -> None:
        """Take those kinds of memory from `memory_kinds` whose kernels crash on this machine.

        Under some hypervisors AMX is announced and then fails.
        """
        *extra, plain = self.memory_kinds
        self.memory_kinds = []
        for index, kind in enumerate(extra):
            command = [sys.executable, "-m", "cpu_peers.ggml", str(self.folder), str(index)]
            tried = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, check=False)
            if tried.returncode == 0:
                self.memory_kinds.append(kind)
            else:
                self.crashes = True
                name = self.backend_buft_name(kind).decode()
                print(f"llama.cpp's kernels for {name} memory end with status {tried.returncode} here: left out")
        self.memory_kinds.append(plain)

    def context(self, tensors: int, graphs: int = 0, graph_size: int = 0) -> Any:
        """Room for descriptions, none for data."""
        size = (tensors + 8) * self.tensor_overhead() + graphs * self.graph_overhead_custom(graph_size, False)
        return self.init(_InitParams(size + (1 << 16), None, True))


@lru_cache(maxsize=1)
def load(folder: str | None) -> Ggml:
    """The libraries in `folder` (default: those of the installed llama_cpp).

    Raises:
        UnavailableError: there are none.
    """
    if folder is None:
        found = importlib.util.find_spec("llama_cpp")
        if found is None or not found.submodule_search_locations:
            raise UnavailableError(f"llama.cpp is left out: llama_cpp is not installed. To have it: {REMEDY}")
        folder = str(Path(next(iter(found.submodule_search_locations))) / "lib")
    ggml = Ggml(Path(folder))
    ggml.drop_crashing_kinds()
    return ggml


@dataclass
class MulMat:
    """`ggml_mul_mat` with weights of a quantized type; it rounds inputs to int8 in blocks of 32 or 256."""

    case: Case
    ggml: Ggml
    type: str
    name: str = field(init=False)
    inputs: Inputs = "int8"
    detail: str = field(init=False)

    def __post_init__(self) -> None:
        """Quantize, and lay out all copies."""
        self.name = f"llama.cpp {self.type}"
        wide = self.case.in_features % _K_BLOCK == 0
        used = self.type if wide else _STAND_INS.get(self.type, self.type)
        if self.case.in_features % 32:
            raise UnavailableError(f"llama.cpp {self.type} needs in features by 32, got {self.case.in_features}")
        blob = self._quantize(TYPES[used])
        self.weight_bytes = blob.nbytes
        count = self.case.copies(blob.nbytes)
        context = self.ggml.context(count)
        size = (self.case.in_features, self.case.out_features)
        self._weights = [self.ggml.new_tensor_2d(context, TYPES[used], *size) for _ in range(count)]
        kind = self._memory_kind(TYPES[used])
        buffer = self.ggml.backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            raise UnavailableError(f"llama.cpp {self.type} is left out: no memory for {count} weights")
        weakref.finalize(self, self.ggml.backend_buffer_free, buffer)
        weakref.finalize(self, self.ggml.free, context)
        for weight in self._weights:
            self.ggml.backend_tensor_set(weight, blob.ctypes.data, 0, blob.nbytes)
        memory = self.ggml.backend_buft_name(kind).decode()
        self.detail = memory if used == self.type else f"{used} {memory}"

    def _quantize(self, kind: int) -> Any:
        """The weight's bytes [out, bytes of a row]; sets `decoded`."""
        tile = self.case.tile.contiguous()
        rows, columns = tile.shape
        codes = np.empty((rows, self.ggml.row_size(kind, columns)), np.uint8)
        self.ggml.quantize_chunk(kind, tile.data_ptr(), codes.ctypes.data, 0, rows, columns, None)
        self.decoded = torch.empty(rows, columns)
        traits = self.ggml.get_type_traits(kind).contents
        traits.to_float(codes.ctypes.data, self.decoded.data_ptr(), rows * columns)
        return self.case.repeated(torch.from_numpy(codes)).numpy()

    def _memory_kind(self, kind: int) -> Any:
        """The first kind of memory in which a weight of this type can be multiplied."""
        for memory in self.ggml.memory_kinds:
            context, graph = self.ggml.context(1), self.ggml.context(2)
            weight = self.ggml.new_tensor_2d(context, kind, self.case.in_features, self.case.out_features)
            buffer = self.ggml.backend_alloc_ctx_tensors_from_buft(context, memory)
            x = self.ggml.new_tensor_2d(graph, _F32, self.case.in_features, 512)
            fits = self.ggml.backend_dev_supports_op(self.ggml.device, self.ggml.mul_mat(graph, weight, x))
            self.ggml.backend_buffer_free(buffer)
            self.ggml.free(context)
            self.ggml.free(graph)
            if fits:
                return memory
        raise UnavailableError(f"llama.cpp {self.type} is left out: no memory of the CPU takes it")

    def bind(self, x: Tensor, threads: int) -> Run:
        """See `Contender`."""
        ggml, rows = self.ggml, len(x)
        self.ggml.backend_cpu_set_n_threads(ggml.backend, threads)
        nodes = int(min(_MOST_NODES, len(self._weights), max(1, _GRAPH_PRODUCTS // (self.case.weights * rows))))
        graphs, size = len(self._weights) // nodes, max(64, 4 * nodes)
        context = ggml.context(len(self._weights) + 1, graphs, size)
        inputs, outputs = x.contiguous(), torch.empty(rows, self.case.out_features)
        data = ggml.backend_buft_alloc_buffer(ggml.memory_kinds[-1], inputs.nbytes + outputs.nbytes + 256)
        base = ggml.backend_buffer_get_base(data)
        x_tensor = ggml.new_tensor_2d(context, _F32, self.case.in_features, rows)
        ggml.backend_tensor_alloc(data, x_tensor, base)
        ggml.backend_tensor_set(x_tensor, inputs.data_ptr(), 0, inputs.nbytes)
        built, y_tensor = [], None
        for first in range(0, graphs * nodes, nodes):
            graph = ggml.new_graph_custom(context, size, False)
            for weight in self._weights[first : first + nodes]:
                y_tensor = ggml.mul_mat(context, weight, x_tensor)
                # One after the other, they may write to one place, as far as the next boundary of a cache line.
                ggml.backend_tensor_alloc(data, y_tensor, base + -(-inputs.nbytes // 64) * 64)
                ggml.build_forward_expand(graph, y_tensor)
            built.append(graph)
        turn = itertools.cycle(built)

        def linears(count: int) -> int:
            runs = -(-count // nodes)
            for _ in range(runs):
                ggml.backend_graph_compute(ggml.backend, next(turn))
            return runs * nodes

        def output() -> Tensor:
            ggml.backend_tensor_get(y_tensor, outputs.data_ptr(), 0, outputs.nbytes)
            return outputs

        weakref.finalize(linears, ggml.free, context)
        weakref.finalize(linears, ggml.backend_buffer_free, data)
        return Run(linears, output)


def _probe(folder: str, index: str) -> None:
    """Multiply in one kind of memory; for a process of its own."""
    ggml = Ggml(Path(folder))
    ggml.memory_kinds = [ggml.memory_kinds[int(index)], ggml.memory_kinds[-1]]
    case = Case.of(512, 512, 0)
    contender = MulMat(case, ggml, "Q4_0")
    for rows in (1, 16):
        x = torch.randn(rows, case.in_features)
        relative_error(contender, contender.bind(x, 1), x)


if __name__ == "__main__":
    _probe(*sys.argv[1:])
