"""What the kernels compile to for an H100, which needs no GPU: no spills, and weights read 16 bytes at a time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_kernels.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_kernels_neither_spill_nor_read_in_small_pieces(compiled: dict[str, dict[str, int]]) -> None:
    for name, found in compiled.items():
        assert found["frame"] == 0, name
        assert found["local_bytes"] == 0, name
        # Three programs to a multiprocessor of 228 KiB; two of those with large blocks.
        assert found["shared_bytes"] < (113 if name.endswith("1024 rows") else 72) * 1024, name
    # Words of the first block before the loop and of the next within it.
    assert compiled["gemv w4g128"]["wide_loads"] == 8
    assert compiled["gemv w3g128"]["wide_loads"] == 6
    assert compiled["gemv w3g16 levels, outliers"]["wide_loads"] == 6
    for name, found in compiled.items():
        if name.startswith("gemm"):
            assert found["wide_copies"] > 0, name
            assert found["matrix_products"] > 0, name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_8_bit_products_use_the_instructions_that_there_are(compiled: dict[str, dict[str, int]]) -> None:
    for kind in ("int8", "e4m3"):
        # 16 rows of 2048 codes and the input's, 16 bytes at a time by 128 threads.
        assert compiled[f"8 bits, {kind}, 4096 outputs, 1 rows"]["wide_loads"] == 17
        for out, rows in ((4096, 16), (8192, 16), (4096, 64), (4096, 1024)):
            found = compiled[f"8 bits, {kind}, {out} outputs, {rows} rows"]
            assert found["wide_copies"] > 0, (kind, out, rows)
            # For few rows and outputs e4m3 is multiplied as float16.
            native = (kind, out, rows) != ("e4m3", 4096, 16)
            assert found[f"{kind}_products" if native else "matrix_products"] > 0, (kind, out, rows)
        # Inputs of 16 bits are read once, and divisions are exact.
        found = compiled[f"quantize {kind}"]
        assert found["wide_loads"] == 4
        assert found["wide_stores"] == 2
        assert found["exact_divisions"] > 0
        assert found["other_divisions"] == 0
