"""Compiles kernels for sm_90 without a GPU and prints, as JSON, what `test_triton_compiled.py` looks at.

A program of its own: a process that interprets Triton cannot compile.
"""

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitwright.runtime.triton.configs import gemm_config, gemv_config
from bitwright.runtime.triton.dequantize import dequantize_kernel
from bitwright.runtime.triton.gemm import gemm_kernel
from bitwright.runtime.triton.gemv import gemv_kernel
from bitwright.runtime.triton.layout import ZERO_LEVELS, ZERO_TENSOR

OUT, IN = 4096, 4096
POINTERS = {"low": "*i32", "x": "*fp16", "out": "*fp16", "slot_start": "*i32", "slot_column": "*i16"}
POINTERS |= {"slot_value": "*fp16", "turned": "*fp16", "high": "*i32", "statistics": "*fp16"}
# planes, kind of zero, group, outliers
WEIGHTS = {
    "w4g128": ((4, 0), ZERO_TENSOR, 128, False),
    "w3g128": ((2, 1), ZERO_TENSOR, 128, False),
    "w3g16 levels, outliers": ((2, 1), ZERO_LEVELS, 16, True),
}


def compiled(kernel: Any, weight: str, constants: dict[str, Any], warps: int, stages: int) -> dict[str, Any]:
    (low, high), kind, group, outliers = WEIGHTS[weight]
    constants = constants | {"UNITS": IN // 32, "GROUPS": IN // group, "GROUP_HALVES": group // 16}
    constants |= {"LOW": low, "HIGH": high, "KIND": kind, "CENTRE": 8.0}
    absent = {"ids", "bias", "step"} | ({"high"} if not high else set())
    absent |= set() if outliers else {"slot_start", "slot_column", "slot_value", "turned"}
    absent.add("zero" if kind == ZERO_LEVELS else "statistics")
    pointers = POINTERS | {"scale": "*u8" if kind == ZERO_LEVELS else "*fp16", "zero": "*u8"}
    signature, values, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        part = name.removesuffix("_ptr")
        if name in constants or part in absent:
            signature[name], values[(place,)] = "constexpr", constants.get(name)
            continue
        signature[name] = pointers[part] if name.endswith("_ptr") else "i32"
        if name.endswith("_ptr") or name in ("columns", "out_features", "first_row"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    return {
        "local_bytes": sum(int(size) for size in re.findall(r"\.local .*\[(\d+)\]", ptx)),
        "frame": _frame_bytes(made.asm["cubin"]),
        "shared_bytes": made.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "wide_copies": len(re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]*\][^;]* 0x10", ptx)),
        "matrix_products": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
    }


def _frame_bytes(cubin: bytes) -> int:
    """The most stack that a thread uses, of the cubin's resource table: registers are spilled to it."""
    import subprocess
    import tempfile
    from pathlib import Path

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(stack) + int(local) for stack, local in re.findall(r"STACK:(\d+) .*?LOCAL:(\d+)", table))


def main() -> None:
    found = {}
    for weight in WEIGHTS:
        config = gemv_config(OUT // 16, IN // 32)
        constants = {"SPLITS": config.splits, "SPAN": config.span}
        constants |= {"BLOCK_UNITS": config.block_units, "BLOCK_SLOTS": config.block_slots}
        found[f"gemv {weight}"] = compiled(gemv_kernel, weight, constants, config.warps, 1)
        small = gemm_config(OUT, IN // 32, 16)
        constants = {"SPLITS": 1, "SPAN": IN // 32, "BLOCK_UNITS": small.block_units, "BLOCK_OUT": small.block_out}
        constants |= {"BLOCK_ROWS": small.block_rows, "BLOCK_SLOTS": small.block_slots}
        found[f"gemm {weight}"] = compiled(gemm_kernel, weight, constants, small.warps, small.stages)
    constants = {"BLOCK_OUT": 64, "BLOCK_UNITS": 4}
    found["dequantize w4g128"] = compiled(dequantize_kernel, "w4g128", constants, 4, 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
