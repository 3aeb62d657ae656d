"""Instructions that the kernels execute, counted by callgrind: the gate against slower kernels, as time is not.

Counts are pinned in instruction_counts.json for every compiler known, by its version, and hold within 3 %. A change
for the better fails too, until `make counts` pins it. Bounds per weight hold with any compiler; the pins of one that
is not known are none. Valgrind executes no AVX-512, so the baseline and AVX2 stand for the rest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from toolchain import HERE, Build, Toolchain

PINNED = HERE / "instruction_counts.json"
TOLERANCE = 0.03
RENEW = "BITWRIGHT_RENEW_COUNTS"

# Instructions for a weight and row of inputs, at most: half as many again as GCC 12 needs.
BOUNDS = {
    "4 bits g128 exact": {"baseline": 5.4, "avx2": 2.0},
    "4 bits g128 fast": {"baseline": 7.5, "avx2": 0.47},
    "3 bits g128 exact": {"baseline": 5.8, "avx2": 2.2},
    "3 bits g128 fast": {"baseline": 7.2, "avx2": 0.6},
    "2 bits g128 exact": {"baseline": 5.4, "avx2": 2.0},
    "2 bits g128 fast": {"baseline": 7.6, "avx2": 0.46},
    "3 bits bilevel g16 exact": {"baseline": 6.9, "avx2": 2.5},
    "3 bits bilevel g16 fast": {"baseline": 8.4, "avx2": 0.86},
    "3 bits bilevel g16 outliers exact": {"baseline": 6.9, "avx2": 2.5},
    "3 bits bilevel g16 outliers fast": {"baseline": 8.5, "avx2": 0.97},
    "3 bits bilevel g16 prefill exact": {"baseline": 1.9, "avx2": 0.57},
    "3 bits bilevel g16 prefill fast": {"baseline": 6.8, "avx2": 0.37},
    "3 bits bilevel g16 outliers prefill exact": {"baseline": 1.9, "avx2": 0.57},
    "3 bits bilevel g16 outliers prefill fast": {"baseline": 6.8, "avx2": 0.39},
    "4 bits g128 prefill exact": {"baseline": 1.8, "avx2": 0.54},
    "4 bits g128 prefill fast": {"baseline": 6.2, "avx2": 0.31},
}
# What outliers of 0.2 % may add. The fastest kernels pack the inputs as floats for them alone.
OUTLIERS_ADD = {"exact": 0.05, "fast": 0.2, "prefill exact": 0.02, "prefill fast": 0.08}


class Counts:
    """Of one run: the compiler, and for every call its instructions and how many weights times rows it took."""

    def __init__(self, program: Path) -> None:
        out = program.with_suffix(".callgrind")
        # Counting starts and ends with `measured`; each call's count becomes a file of its own, in order.
        options = [f"--callgrind-out-file={out}", "--toggle-collect=measured", "--dump-after=measured"]
        command = ["valgrind", "--tool=callgrind", *options, program]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        self.compiler, *lines = done.stdout.splitlines()
        self.instructions: dict[str, int] = {}
        self.products: dict[str, int] = {}
        for part, line in enumerate(lines, start=1):
            name, products = line.split("\t")
            summary = re.search(r"^summary: (\d+)", Path(f"{out}.{part}").read_text(), re.MULTILINE)
            assert summary is not None, f"callgrind's file of {name} has no summary"
            self.instructions[name], self.products[name] = int(summary[1]), int(products)

    def per_product(self, name: str) -> float:
        return self.instructions[name] / self.products[name]


@pytest.fixture(scope="module")
def counts(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Counts:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed: instructions are not counted")
    folder = tmp_path_factory.mktemp("counts")
    # Without debugging information, which would make callgrind slower and change no count.
    build = Build((), left_out=("avx512", "avx512vnni"), optimize=True)
    toolchain.build(build, ("count_instructions",), folder)
    return Counts(folder / "count_instructions")


def test_bounds_hold_with_any_compiler(counts: Counts) -> None:
    over = {}
    for name in counts.instructions:
        call, isa = name.rsplit(", ", 1)
        if counts.per_product(name) > BOUNDS[call][isa]:
            over[name] = (counts.per_product(name), BOUNDS[call][isa])
    assert not over, f"instructions per weight and row, and their bound: {over}"
    assert {name.rsplit(", ", 1)[0] for name in counts.instructions} == BOUNDS.keys()


def test_ratios_hold_with_any_compiler(counts: Counts) -> None:
    for name, instructions in counts.instructions.items():
        call, isa = name.rsplit(", ", 1)
        # Without instructions for sums of bytes, fast mode takes more of them than exact mode.
        if call.endswith(" fast") and isa != "baseline":
            assert instructions <= counts.instructions[f"{call.removesuffix('fast')}exact, {isa}"], name
        if " outliers " in call:
            without = counts.instructions[name.replace(" outliers", "")]
            assert instructions <= without * (1 + OUTLIERS_ADD[call.split(" outliers ")[1]]), name


def test_counts_are_those_pinned(counts: Counts) -> None:
    pinned = json.loads(PINNED.read_text())
    if os.environ.get(RENEW):
        pinned[counts.compiler] = counts.instructions
        PINNED.write_text(json.dumps(pinned, indent=2) + "\n")
    if counts.compiler not in pinned:
        pytest.skip(f"no counts are pinned for {counts.compiler}; `make counts` pins them")
    wanted = pinned[counts.compiler]
    # A processor without AVX2 counts the baseline alone.
    changed = {
        name: f"{found} instead of {wanted.get(name)}"
        for name, found in counts.instructions.items()
        if name not in wanted or abs(found / wanted[name] - 1) > TOLERANCE
    }
    assert not changed, f"instructions changed by more than {TOLERANCE:.0%} (if meant, run `make counts`): {changed}"
