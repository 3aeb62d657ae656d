"""onnxruntime's MatMulNBits: 2, 4 and 8 bits, symmetric, one float32 scale a block.

`accuracy_level` 4 rounds inputs to int8, 1 keeps them in float32. A session holds a model of many linears that share
their input and write to one buffer. With many rows it holds fewer, lest one run of it take too long; weights are
read once for all rows then, so where they come from matters less.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpu_peers.contract import Case, Inputs, Run, UnavailableError

REMEDY = "pip install onnxruntime onnx"
BITS = (2, 4, 8)
# Of one run of a session, at most, if it holds more than one linear.
_MOST_PRODUCTS = 4e9


def libraries() -> tuple[Any, Any]:
    """onnxruntime and onnx.

    Raises:
        UnavailableError: one of them is missing.
    """
    try:
        return importlib.import_module("onnxruntime"), importlib.import_module("onnx")
    except ImportError as error:
        raise UnavailableError(f"onnxruntime is left out: {error}. To have it: {REMEDY}") from error


@dataclass
class MatMulNBits:
    """`bits` bits in blocks of `block_size`; float inputs (accuracy_level 1) or int8 (accuracy_level 4)."""

    case: Case
    bits: int
    block_size: int
    inputs: Inputs
    name: str = field(init=False)
    detail: str = ""
    _session: tuple[tuple[int, int], tuple[Any, list[Any]]] | None = None

    def __post_init__(self) -> None:
        """Draw codes and scales."""
        self._runtime, self._onnx = libraries()
        self.name = f"onnxruntime {self.inputs} b{self.block_size}"
        blocks = -(-self.case.in_features // self.block_size)
        shape = (len(self.case.tile), blocks, self.block_size)
        codes = torch.randint(0, 1 << self.bits, shape, dtype=torch.uint8)
        scale = torch.rand(shape[:2]) * 0.02 + 0.001
        self.decoded = ((codes.float() - (1 << self.bits - 1)) * scale[..., None]).flatten(1)[
            :, : self.case.in_features
        ]
        places = np.arange(self.bits, dtype=np.uint8)
        packed = np.packbits(
            (codes.numpy()[..., None] >> places & 1).reshape(*shape[:2], -1), axis=-1, bitorder="little"
        )
        self._codes = self.case.repeated(torch.from_numpy(packed))
        self._scale = self.case.repeated(scale)
        self.weight_bytes = self._codes.nbytes + self._scale.nbytes

    def bind(self, x: Tensor, threads: int) -> Run:
        """See `Contender`."""
        most = max(1, int(_MOST_PRODUCTS / (self.case.weights * len(x))))
        # Two at least, so that a single weight is not found in the cache.
        nodes = max(2, min(self.case.copies(self.weight_bytes), most))
        if self._session is None or self._session[0] != (threads, nodes):
            self._session = None  # frees the old one first
            self._session = ((threads, nodes), self._start(threads, nodes))
        session, _ = self._session[1]
        inputs, result = x.contiguous(), torch.empty(len(x), self.case.out_features)
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, np.float32, tuple(inputs.shape), inputs.data_ptr())
        for index in range(nodes):
            binding.bind_output(f"y{index}", "cpu", 0, np.float32, tuple(result.shape), result.data_ptr())

        def linears(count: int) -> int:
            runs = -(-count // nodes)
            for _ in range(runs):
                session.run_with_iobinding(binding)
            return runs * nodes

        # `inputs` lives as long as `output` does
        return Run(linears, lambda: (inputs, result)[1])

    def _start(self, threads: int, nodes: int) -> tuple[Any, list[Any]]:
        """A session of `nodes` linears, whose weights are almost copies of one another, and these weights."""
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        values = {"codes": self._codes.numpy(), "scale": self._scale.flatten().numpy()}
        names, handed = [], []
        for index in range(nodes):
            # Values stay where they are, and equal weights are kept once: each needs a copy that differs, here in the
            # last row.
            values["codes"][-1].reshape(-1)[:4] = np.frombuffer(np.int32(index).tobytes(), np.uint8)
            names += [f"{part}{index}" for part in values]
            handed += [self._runtime.OrtValue.ortvalue_from_numpy(value.copy()) for value in values.values()]
        options.add_external_initializers(names, handed)
        model = self._model(nodes, values)
        session = self._runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return session, handed

    def _model(self, nodes: int, values: dict[str, Any]) -> bytes:
        """The model; its weights are handed over apart."""
        helper, types = self._onnx.helper, self._onnx.TensorProto
        attributes = {
            "K": self.case.in_features,
            "N": self.case.out_features,
            "bits": self.bits,
            "block_size": self.block_size,
            "accuracy_level": 4 if self.inputs == "int8" else 1,
        }
        linears, outputs, initializers = [], [], []
        for index in range(nodes):
            operands = ["x", f"codes{index}", f"scale{index}"]
            linears.append(
                helper.make_node("MatMulNBits", operands, [f"y{index}"], domain="com.microsoft", **attributes)
            )
            outputs.append(helper.make_tensor_value_info(f"y{index}", types.FLOAT, ["rows", self.case.out_features]))
            for part, value in values.items():
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                tensor = types(name=f"{part}{index}", data_type=kind, dims=value.shape, data_location=types.EXTERNAL)
                tensor.external_data.add(key="location", value="given by the caller")
                initializers.append(tensor)
        x = helper.make_tensor_value_info("x", types.FLOAT, ["rows", self.case.in_features])
        graph = helper.make_graph(linears, "linears", [x], outputs, initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
