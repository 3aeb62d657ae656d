"""Compiling the kernels and their C++ test programs: the sources and flags of CMakeLists.txt, and a build's own."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Build:
    """How the kernels and test programs are compiled: flags of all files, and of the kernels' instruction sets."""

    flags: tuple[str, ...]
    isa_flags: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # instruction sets not to compile
    optimize: bool = False  # as the package is built


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler and the kernels' sources, each with the flags that CMakeLists.txt gives it."""

    compiler: str
    sources: tuple[tuple[Path, tuple[str, ...]], ...]
    flags: tuple[str, ...]

    def run(self, arguments: Sequence[str | Path]) -> None:
        """Run the compiler; what it says goes into the failure."""
        done = subprocess.run([self.compiler, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, f"{self.compiler} {shlex.join(map(str, arguments))}\n{done.stderr}"

    def accepts(self, flags: Sequence[str], folder: Path) -> str:
        """Why a program compiled with `flags` does not run here; empty if it does."""
        source, program = folder / "empty.cpp", folder / "empty"
        source.write_text("int main() { return 0; }\n")
        done = subprocess.run([self.compiler, *flags, source, "-o", program], capture_output=True, text=True)
        if done.returncode == 0:
            done = subprocess.run([program], capture_output=True, text=True)
        return "" if done.returncode == 0 else (done.stderr.strip() or f"exit status {done.returncode}")

    def build(self, build: Build, programs: Sequence[str], folder: Path) -> None:
        """Compile the kernels, two files at a time, and link each of `programs` with them into `folder`."""
        common = ["-std=c++17", "-fPIC", *self.flags, *build.flags, f"-I{ROOT / 'csrc' / 'cpu'}"]
        if not build.optimize:
            common = [flag for flag in common if flag not in ("-O3", "-DNDEBUG")]
        common += [f"-DLEFT_OUT_{isa.upper()}" for isa in build.left_out]
        left_out = {f"matmul_{isa}" for isa in build.left_out}
        jobs = []
        # The slowest first.
        for source, flags in sorted(self.sources, key=lambda pair: not pair[0].stem.startswith("matmul_")):
            slow = build.isa_flags if source.stem.startswith("matmul_") else ()
            if source.stem not in left_out:
                jobs.append((source, [*common, *flags, *slow]))
        jobs += [(HERE / f"{name}.cpp", common) for name in ("sample", "left_out", *programs)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: self.run([*job[1], "-c", job[0], "-o", folder / f"{job[0].stem}.o"]), jobs))
        objects = [folder / f"{source.stem}.o" for source, _ in jobs if source.stem not in programs]
        for program in programs:
            self.run([*build.flags, folder / f"{program}.o", *objects, "-pthread", "-o", folder / program])


def _options(text: str, variables: dict[str, str]) -> tuple[str, ...]:
    """Flags as CMake writes them, lists with semicolons or spaces, variables filled in."""
    filled = re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], text.strip('"'))
    return tuple(filled.replace(";", " ").split())


def kernel_sources(machine: str = "") -> tuple[tuple[tuple[Path, tuple[str, ...]], ...], tuple[str, ...]]:
    """Sources of the library bitwright_kernels, each with its flags; and the flags of all.

    For this processor, or for the `machine` that CMake's CMAKE_SYSTEM_PROCESSOR names.
    """
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    variables = {name: " ".join(value.split()) for name, value in re.findall(r"set\((\w+_FLAGS)\s+([^)]*)\)", text)}
    own = dict(re.findall(r"set_source_files_properties\((\S+) PROPERTIES COMPILE_OPTIONS (\"[^\"]*\")\)", text))
    files = re.findall(r"csrc/cpu/\w+\.cpp", "".join(re.findall(r"add_library\(bitwright_kernels[^)]*\)", text)))
    branches = re.findall(r"if\(CMAKE_SYSTEM_PROCESSOR MATCHES \"(\S+)\"\)(.*?)(?=else|endif)", text, re.DOTALL)
    for processors, branch in branches:
        if re.search(processors, machine or platform.machine()):
            files += re.findall(r"csrc/cpu/\w+\.cpp", "".join(re.findall(r"target_sources\([^)]*\)", branch)))
    everywhere = re.findall(r"target_compile_options\(bitwright_kernels PRIVATE ([^)]*)\)", text)
    assert len(files) >= 5, "CMakeLists.txt lists the kernels in a way that is not understood here"
    assert len(branches) == 2
    assert len(everywhere) == 1
    sources = tuple((ROOT / name, _options(own.get(name, ""), variables)) for name in files)
    return sources, (*_options(everywhere[0], variables), "-DNDEBUG")
