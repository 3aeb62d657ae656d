"""The C++ kernels under the compiler's sanitizers: memory, undefined behaviour, and races between threads.

The programs compare with double precision as well, so that what the sanitizers watch is known to compute something.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from toolchain import Build, Toolchain

from bitwright.runtime.cpu import instruction_sets

ALL_ISAS = ("avx2", "avx512", "avx512vnni")
PROGRAMS = ("check_matmul", "check_columns", "check_threads", "check_decode")
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "detect_leaks=0",  # leaks need ptrace, which containers forbid
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
UNDEFINED = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
DEBUG = ("-O1", "-g1", "-fno-omit-frame-pointer")
# The kernels of an instruction set are a hundred functions of unrolled loops, which take four times as long with all
# checks: addresses are checked by calls, null pointers and sizes by the address sanitizer alone, and alignment not at
# all, since they read and write through memcpy and unaligned loads.
LIGHT = ("-fno-sanitize=null,object-size,alignment", "-fno-sanitize-address-use-after-scope")
CALLS = ("--param", "asan-instrumentation-with-call-threshold=0")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def address_programs(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("address")
    why = toolchain.accepts(UNDEFINED, folder)
    if why:
        message = f"the compiler has no address and undefined-behaviour sanitizers: {why}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    light = LIGHT if toolchain.accepts((*UNDEFINED, *CALLS), folder) else (*LIGHT, *CALLS)
    # Without the package's own module nothing is known about the machine: the programs find out.
    isas = instruction_sets() or ALL_ISAS
    left_out = tuple(isa for isa in ALL_ISAS if isa not in isas)
    toolchain.build(Build((*DEBUG, *UNDEFINED), light, left_out), PROGRAMS, folder)
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_kernels_under_the_address_sanitizer(address_programs: Path, program: str) -> None:
    done = run(address_programs / program)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("broken", ["short-codes", "short-result"])
def test_one_element_beyond_is_seen(address_programs: Path, broken: str) -> None:
    isas = run(address_programs / "check_matmul", "isas").stdout.split()
    assert isas[0] == "baseline"
    for isa in isas:
        done = run(address_programs / "check_matmul", broken, isa)
        assert done.returncode != 0, isa
        assert "ERROR: AddressSanitizer" in done.stderr, done.stderr


def test_threads_under_the_thread_sanitizer(toolchain: Toolchain, tmp_path: Path) -> None:
    why = toolchain.accepts(("-fsanitize=thread",), tmp_path)
    if why:
        pytest.skip(f"programs with the thread sanitizer do not run here: {why}")
    # The kernels of other instruction sets share nothing that those of the baseline do not.
    toolchain.build(Build((*DEBUG, "-fsanitize=thread"), (), ALL_ISAS), ("check_threads", "check_decode"), tmp_path)
    for program in ("check_threads", "check_decode"):
        done = run(tmp_path / program, "threads")
        assert done.returncode == 0, done.stdout + done.stderr
