"""What every client is asked and answers: two JSON files. Plain Python, so that any environment reads it."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol


@dataclass
class Job:
    """`model`, a folder or .gguf file; `prompts` to continue by `new_tokens` each; `windows` to score: token ids."""

    model: str
    prompts: list[list[int]]
    new_tokens: int
    windows: list[list[int]]


@dataclass
class Answer:
    """`tokens` for each prompt, perplexity over all windows, greedy tokens per second of one request at a time.

    `kernel`: what the client calls the kernels of its first linear, where it tells. `error`: why there is no answer.
    """

    tokens: list[list[int]] | None = None
    perplexity: float | None = None
    tokens_per_second: float | None = None
    kernel: str = ""
    error: str | None = None


class Client(Protocol):
    """A loaded model."""

    kernel: str

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """The most probable continuation of `ids`, of exactly `new_tokens`."""

    def losses(self, ids: list[int]) -> Sequence[float]:
        """Negative log probability in nats of every token of `ids` but the first."""


def answer(load: Callable[[str], Client], close: Callable[[], None] = lambda: None) -> None:
    """The program of a client: read the job named first, write the answer named second, and `close` what it opened."""
    job, out = Job(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
    found = Answer()
    try:
        client = load(job.model)
        found.kernel = client.kernel
        client.greedy(job.prompts[0], 2)  # what is compiled or laid out at the first call
        started = time.perf_counter()
        found.tokens = [client.greedy(prompt, job.new_tokens) for prompt in job.prompts]
        seconds = time.perf_counter() - started
        found.tokens_per_second = sum(map(len, found.tokens)) / seconds
        losses = [loss for window in job.windows for loss in client.losses(window)]
        found.perplexity = math.exp(math.fsum(losses) / len(losses))
    except Exception as error:  # noqa: BLE001 (whatever a client says is the answer)
        words = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
        found.error = f"{type(error).__name__}: {words[0]}"
    close()
    out.write_text(json.dumps(asdict(found)))
    sys.stdout.flush()
    # Clients leave threads and processes behind that would keep this one waiting.
    os._exit(0)
