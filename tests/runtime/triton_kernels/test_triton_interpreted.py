"""Runs `test_triton_kernels.py` and `test_triton_w8a8.py` in Triton's interpreter where there is no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which runs these tests itself")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets Triton itself")
@pytest.mark.parametrize("name", ["test_triton_kernels.py", "test_triton_w8a8.py"])
def test_kernels_in_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", str(HERE / name)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[2], check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
