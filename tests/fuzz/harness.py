"""One mutant: made, read, and judged. Errors of ours are the only answer to damage besides a result."""

from __future__ import annotations

import logging
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

import torch
from subjects import Subject

from bitwright.errors import BitwrightError

SECONDS = 20
"""That a mutant may take on a busy machine; sound ones take a tenth of a second, hangs for ever."""
MEMORY_BYTES = 1 << 30
"""By which a mutant may raise the peak of the process."""


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: `kind` is "refused", "accepted", or what is wrong: "foreign", "hang" or "memory"."""

    subject: str
    number: int
    kind: str
    detail: str = ""

    @property
    def sound(self) -> bool:
        """Nothing is wrong."""
        return self.kind in ("refused", "accepted")


class _TooLong(BaseException):
    """Not an Exception, so that no reader takes it for damage of its file."""


class Bench:
    """Makes the inputs once, and mutants of them in a folder of its own."""

    def __init__(self, place: Path, seed: int = 0):
        """Work below `place`; `seed` draws all mutants."""
        self._place, self._seed = place, seed

    def base(self, subject: Subject) -> Path:
        """The sound input, made on first use."""
        folder = self._place / "sound" / subject.name.replace(" ", "-").replace(",", "")
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            subject.make(folder)
        return folder

    def mutant(self, subject: Subject, number: int) -> Path:
        """Mutant `number`, in a folder that the next one takes."""
        folder = self._copy(subject)
        random = Random(f"{self._seed} {subject.name} {number}")
        glob, mutation = subject.files[random.randrange(len(subject.files))]
        path = random.choice(sorted(folder.glob(glob)))
        mutation(path, random)
        return folder

    def _copy(self, subject: Subject) -> Path:
        folder, work = self._place / "mutant" / "input", self._place / "mutant" / "work"
        shutil.rmtree(folder.parent, ignore_errors=True)
        work.mkdir(parents=True)
        # as it is, modes and times included: some readers look at them
        shutil.copytree(self.base(subject), folder, symlinks=True)
        return folder

    def judge(self, subject: Subject, number: int) -> Verdict:
        """What the reader makes of mutant `number`."""
        return self._verdict(subject, number, self.mutant(subject, number))

    def judge_sound(self, subject: Subject, number: int) -> Verdict:
        """What command `number` of the reader makes of the input as it was made."""
        return self._verdict(subject, number, self._copy(subject))

    def _verdict(self, subject: Subject, number: int, folder: Path) -> Verdict:
        run = subject.runs[number % len(subject.runs)]
        before = _peak_bytes()
        kind, detail = "accepted", ""
        try:
            with _quiet(), _limited(SECONDS):
                run(folder, folder.with_name("work"))
        except BitwrightError as error:
            kind, detail = "refused", f"{type(error).__name__}: {error}"
        except _TooLong:
            kind, detail = "hang", traceback.format_exc()
        except Exception:  # noqa: BLE001 (this is what is looked for)
            kind, detail = "foreign", traceback.format_exc()
        grown = _peak_bytes() - before
        if grown > MEMORY_BYTES:
            kind, detail = "memory", f"{grown / 1e9:.1f} GB more; {detail}"
        return Verdict(subject.name, number, kind, detail)


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def _quiet() -> Iterator[None]:
    """Damaged files make libraries warn and log; the random state is restored besides."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
