"""Compiles kernels for sm_90 without a GPU and prints, as JSON, what `test_triton_compiled.py` looks at.

A program of its own: a process that interprets Triton cannot compile.
"""

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitwright.runtime.triton.configs import gemm8_config, gemm_config, gemv_config
from bitwright.runtime.triton.dequantize import dequantize_kernel
from bitwright.runtime.triton.gemm import gemm_kernel
from bitwright.runtime.triton.gemv import gemv_kernel
from bitwright.runtime.triton.layout import ZERO_LEVELS, ZERO_TENSOR
from bitwright.runtime.triton.matmul8 import gemm8_kernel, gemv8_kernel
from bitwright.runtime.triton.quantize import quantize_e4m3_kernel, quantize_int8_kernel

OUT, IN = 4096, 4096
POINTERS = {"low": "*i32", "x": "*fp16", "out": "*fp16", "slot_start": "*i32", "slot_column": "*i16"}
POINTERS |= {"slot_value": "*fp16", "turned": "*fp16", "high": "*i32", "statistics": "*fp16"}
# planes, kind of zero, group, outliers
WEIGHTS = {
    "w4g128": ((4, 0), ZERO_TENSOR, 128, False),
    "w3g128": ((2, 1), ZERO_TENSOR, 128, False),
    "w3g16 levels, outliers": ((2, 1), ZERO_LEVELS, 16, True),
}
POINTERS8 = {"scale": "*fp32", "zero": "*i32", "sum": "*i32", "out": "*bf16", "bias": "*bf16"}
POINTERS8 |= {f"{side}_{name}": kind for side in "wx" for name, kind in POINTERS8.items()}


def compiled(kernel: Any, weight: str, constants: dict[str, Any], warps: int, stages: int) -> dict[str, Any]:
    (low, high), kind, group, outliers = WEIGHTS[weight]
    constants = constants | {"UNITS": IN // 32, "GROUPS": IN // group, "GROUP_HALVES": group // 16}
    constants |= {"LOW": low, "HIGH": high, "KIND": kind, "CENTRE": 8.0}
    absent = {"ids", "bias", "step"} | ({"high"} if not high else set())
    absent |= set() if outliers else {"slot_start", "slot_column", "slot_value", "turned"}
    absent.add("zero" if kind == ZERO_LEVELS else "statistics")
    pointers = POINTERS | {"scale": "*u8" if kind == ZERO_LEVELS else "*fp16", "zero": "*u8"}
    return _compiled(kernel, pointers, constants, absent, (warps, stages))


def compiled8(
    kernel: Any, codes: str, constants: dict[str, Any], absent: set[str], launch: tuple[int, int]
) -> dict[str, Any]:
    """A kernel of 8-bit codes of type `codes`."""
    both = {"w": codes, "x": codes} if "BLOCK_OUT" in constants else {"x": "*bf16", "codes": codes}
    return _compiled(kernel, POINTERS8 | both, constants, absent, launch)


def _compiled(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], absent: set[str], launch: tuple[int, int]
) -> dict[str, Any]:
    signature, values, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        part = name.removesuffix("_ptr")
        if name in constants or part in absent:
            signature[name], values[(place,)] = "constexpr", constants.get(name)
            continue
        number = "fp32" if name in ("static_scale", "static_zero", "clip") else "i32"
        signature[name] = pointers[part] if name.endswith("_ptr") else number
        if name.endswith("_ptr") or name in ("columns", "out_features", "first_row"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": launch[0], "num_stages": launch[1]}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    return {
        "local_bytes": sum(int(size) for size in re.findall(r"\.local .*\[(\d+)\]", ptx)),
        "frame": _frame_bytes(made.asm["cubin"]),
        "shared_bytes": made.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "wide_copies": len(re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]*\][^;]* 0x10", ptx)),
        "matrix_products": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "int8_products": len(re.findall(r"mma\S*\.s32\.s8\.s8", ptx)),
        "e4m3_products": len(re.findall(r"mma\S*\.e4m3\.e4m3", ptx)),
        "exact_divisions": len(re.findall(r"div\.rn\.f32", ptx)),
        "other_divisions": len(re.findall(r"div\.(?:full|approx)\S*\.f32", ptx)),
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
    print(json.dumps(found | of_8_bits()))


def of_8_bits() -> dict[str, dict[str, Any]]:
    """Products of int8 with zeros on both sides, and of e4m3; activations on their way there."""
    found = {}
    zeros = {f"{side}_{name}" for side in "wx" for name in ("zero", "sum")}
    for name, codes, absent in (("int8", "*i8", set()), ("e4m3", "*fp8e4nv", zeros | {"bias"})):
        for out, rows in ((OUT, 1), (OUT, 16), (2 * OUT, 16), (OUT, 64), (OUT, 1024)):
            config = gemm8_config(out, IN, rows)
            kernel, constants = gemv8_kernel, {"PADDED": IN, "BLOCK_OUT": config.block_out}
            constants |= {"BLOCK_COLUMNS": config.block_columns}
            if config.block_rows:
                kernel, constants = (
                    gemm8_kernel,
                    constants | {"BLOCK_ROWS": config.block_rows, "GROUP": 8, "EXACT": 128},
                )
            launch = config.warps, config.stages
            found[f"8 bits, {name}, {out} outputs, {rows} rows"] = compiled8(kernel, codes, constants, absent, launch)
    constants = {"COLUMNS": IN, "PADDED": IN, "STATIC": False, "BLOCK": IN}
    codes = {"LEAST": 0, "GREATEST": 255, "CENTRE": 128}
    found["quantize int8"] = compiled8(quantize_int8_kernel, "*i8", constants | codes, set(), (4, 3))
    found["quantize e4m3"] = compiled8(quantize_e4m3_kernel, "*fp8e4nv", constants, set(), (4, 3))
    return found


if __name__ == "__main__":
    main()
