"""Killed before any one step that changes the disk and started again, a job ends with the same bytes, alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import bitwright
from bitwright.errors import ResumeError
from bitwright.export.targets import export_model

STEPS = ("mkdir", "rename", "unlink", "rmdir", "fsync", "open", "ftruncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KILLS = 12
"""So many steps of a run are tried, evenly spread."""
Job = Callable[[Path], Any]


class Killed(BaseException):
    """From a step on nothing changes the disk, as of a process that was killed."""


@contextmanager
def killed_before(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Within, steps that change the disk from number `step` on fail; gives those that were taken."""
    taken: list[str] = []

    def stand_in(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if name != "open" or arguments[1] & WRITES:
                if len(taken) >= step:
                    raise Killed
                taken.append(name)
            return real(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, stand_in(name, getattr(os, name)))
        yield taken


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_every_step(job: Job, again: Job, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`job` makes the folder that it is given; `again` is it, started again."""
    (place / "whole").mkdir()
    with killed_before(10**9, monkeypatch) as taken:
        job(place / "whole" / "out")
    whole = contents(place / "whole" / "out")
    assert len(taken) > KILLS
    last = [len(taken) - 1 - back for back in range(6)]  # publishing and tidying, step by step
    for step in sorted({*range(0, len(taken), -(-len(taken) // KILLS)), *last}):
        here = place / str(step)
        here.mkdir()
        with killed_before(step, monkeypatch), suppress(Killed):
            job(here / "out")
        again(here / "out")
        assert [path.name for path in here.iterdir()] == ["out"], f"killed before step {step}, {taken[step]}"
        assert contents(here / "out") == whole, f"killed before step {step}, {taken[step]}"


def test_quantize(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(out: Path) -> None:
        bitwright.quantize(str(tiny_llama_folder), out, "rtn", "w4a16g32")

    check_every_step(job, job, tmp_path, monkeypatch)


def test_export(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = tmp_path / "native"
    bitwright.quantize(str(tiny_llama_folder), native, "rtn", "w4a16g32")
    (tmp_path / "kills").mkdir()

    def job(out: Path) -> None:
        export_model(native, out, "compressed-tensors")

    def again(out: Path) -> None:
        there = out.exists()
        with suppress(ResumeError):  # it was there already, and is refused
            job(out)
            assert not there

    check_every_step(job, again, tmp_path / "kills", monkeypatch)
