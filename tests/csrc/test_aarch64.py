"""The kernels of AArch64 on any other processor: cross-compiled, and run by an emulator of two processors.

Needs Debian's `g++-aarch64-linux-gnu` and `qemu-user`, or what gives the same commands; skips without. On an AArch64
machine test_sanitizers.py checks the same kernels as they are.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from toolchain import Build, Toolchain, kernel_sources

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
PROGRAMS = ("check_matmul", "check_columns", "check_threads", "check_decode")
# Processors, and the instruction sets that must be found on them: the one has dot products of bytes, the other not.
PROCESSORS = {"max": ["baseline", "neon", "neondotprod"], "cortex-a53": ["baseline", "neon"]}


@pytest.fixture(scope="module")
def emulator() -> str:
    if platform.machine().lower() in ("aarch64", "arm64"):
        pytest.skip("this processor is AArch64: test_sanitizers.py checks its kernels")
    found = next((path for name in EMULATORS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no qemu-aarch64 to run programs of AArch64: install qemu-user")
    return found


@pytest.fixture(scope="module")
def programs(emulator: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(COMPILER)
    if compiler is None:
        pytest.skip(f"no {COMPILER} to compile for AArch64: install g++-aarch64-linux-gnu")
    folder = tmp_path_factory.mktemp("aarch64")
    # Static: the emulator finds no libraries of another processor.
    build = Build(("-static", "-Werror", "-DWITHOUT_FORK"), optimize=True)
    Toolchain(compiler, *kernel_sources("aarch64")).build(build, PROGRAMS, folder)
    return folder


@pytest.mark.parametrize("processor", PROCESSORS)
def test_instruction_sets_are_those_of_the_processor(emulator: str, programs: Path, processor: str) -> None:
    command = [emulator, "-cpu", processor, programs / "check_matmul", "isas"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.split() == PROCESSORS[processor]


# The other programs' kernels are the same on every processor, or differ as those of products do.
@pytest.mark.parametrize(
    ("program", "processor"), [*((program, "max") for program in PROGRAMS), ("check_matmul", "cortex-a53")]
)
def test_kernels_on_aarch64(emulator: str, programs: Path, program: str, processor: str) -> None:
    done = subprocess.run([emulator, "-cpu", processor, programs / program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
