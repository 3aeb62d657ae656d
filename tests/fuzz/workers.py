"""Processes that judge mutants, so that a crash or a hang in compiled code is seen and survived."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

from harness import SECONDS, Bench, Verdict
from subjects import SUBJECTS

Task = tuple[int, int]
"""Index of a subject, and number of a mutant."""


class Worker:
    """A process that judges mutants, and is replaced where one kills it."""

    def __init__(self, place: Path, seed: int):
        """Start it; it works below `place`."""
        self._context = multiprocessing.get_context("spawn")
        self._place, self._seed = place, seed
        self.task: Task | None = None
        self._start()

    def _start(self) -> None:
        self.connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(theirs, self._place, self._seed), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        """Let it judge another one."""
        self.task, self.since = task, time.monotonic()
        self.connection.send(task)

    def answer(self) -> Verdict | None:
        """What it found; "crash" or "hang" where it is gone or had to be ended; None where it is still busy."""
        if self.task is None:
            return None
        subject, number = SUBJECTS[self.task[0]].name, self.task[1]
        found: Verdict | None = None
        if self.connection.poll():
            try:
                found = self.connection.recv()
            except (EOFError, ConnectionError):
                self._process.join()
                found = Verdict(subject, number, "crash", f"exit status {self._process.exitcode}")
                self._start()
        elif time.monotonic() - self.since > 3 * SECONDS + 60:
            self._process.kill()
            self._process.join()
            found = Verdict(subject, number, "hang", "in compiled code")
            self._start()
        if found is not None:
            self.task = None
        return found


def serve(connection: Connection, place: Path, seed: int) -> None:
    """Judge what comes through `connection` until it is closed."""
    os.nice(10)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    bench = Bench(place, seed)
    while True:
        try:
            subject, number = connection.recv()
        except EOFError:
            return
        connection.send(bench.judge(SUBJECTS[subject], number))


def judged(tasks: list[Task], workers: int, seed: int, place: Path) -> Iterator[Verdict]:
    """The verdicts on all `tasks`, as they come."""
    waiting = iter(tasks)
    crew = [Worker(place / str(number), seed) for number in range(min(workers, len(tasks)))]
    left = len(tasks)
    while left:
        for worker in crew:
            verdict = worker.answer()
            if verdict is not None:
                left -= 1
                yield verdict
            if worker.task is None and (task := next(waiting, None)) is not None:
                worker.give(task)
        wait([worker.connection for worker in crew if worker.task is not None], timeout=1)
