"""Fuzzing at length: `python tests/fuzz --mutants 5000`, some hours on two processors.

The same seed gives the same mutants everywhere; `--only READER --first N --mutants 1` shows one again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from subjects import SUBJECTS
from workers import judged


def main() -> int:
    """Judge as many mutants as asked for, say what went wrong, and show totals by reader."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--mutants", type=int, default=5000, help="in all, spread over the readers")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant of every reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a reader by name; repeatable")
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    readers = [index for index, one in enumerate(SUBJECTS) if chosen.only is None or one.name in chosen.only]
    each = -(-chosen.mutants // len(readers))
    # One after the other in rounds, so that an early end has seen something of every reader.
    tasks = [(reader, chosen.first + number) for number in range(each) for reader in readers]
    counts: dict[str, Counter[str]] = {SUBJECTS[reader].name: Counter() for reader in readers}
    started, wrong = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as place:
        for verdict in judged(tasks, chosen.workers, chosen.seed, Path(place)):
            counts[verdict.subject][verdict.kind] += 1
            if not verdict.sound or len(tasks) == 1:
                wrong += not verdict.sound
                print(f"--- {verdict.subject}, mutant {verdict.number}: {verdict.kind}\n{verdict.detail}", flush=True)
    kinds = ("refused", "accepted", "foreign", "hang", "memory", "crash")
    print(f"{'':28}" + "".join(f"{kind:>10}" for kind in kinds))
    for name, found in counts.items():
        print(f"{name:28}" + "".join(f"{found[kind]:10}" for kind in kinds))
    print(f"{len(tasks)} mutants, seed {chosen.seed}, {wrong} wrong, {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
