"""A virtual environment for each peer, and its runs in it.

Everything lives in the work folder and is kept, so that another run neither installs nor quantizes again:

    <work>/<peer>/venv              the environment, with `installed.json` beside it: the pins it was made from
    <work>/<peer>/<scheme>-<key>/   one result; the key hashes all that it depends on
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.contract import RESULT

HERE = Path(__file__).parent
_IDLE = 19
"""The lowest priority, of a process and of a session."""


class PeerError(Exception):
    """A peer cannot be installed or did not finish; the message is one line for the table."""


@dataclass(frozen=True)
class Peer:
    """A peer as users name it.

    Attributes:
        label: what the table calls it.
        pins: what is installed: the newest releases that go together.
        options: arguments of the benchmark that change its result.
        variables: for its installation.
        environment: the peer whose environment it shares; None: its own.
        activations: whether it quantizes activations too.
    """

    label: str
    pins: tuple[str, ...]
    options: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    environment: str | None = None
    activations: bool = False


LLMCOMPRESSOR = (
    "llmcompressor==0.14.0.1",
    "compressed-tensors==0.19.0",
    "transformers==5.17.0",  # this release refuses later ones
    "datasets==5.2.0",
)
COMMON = ("torch==2.13.0", "safetensors==0.8.0", "accelerate==1.15.0", "numpy==2.4.6")
PEERS = {
    "llmcompressor": Peer(
        label="llm-compressor GPTQ",
        pins=(*LLMCOMPRESSOR, *COMMON),
    ),
    "smoothquant": Peer(
        label="llm-compressor SmoothQuant",
        pins=(*LLMCOMPRESSOR, *COMMON),
        environment="llmcompressor",
        activations=True,
    ),
    "autoround": Peer(
        label="AutoRound",
        pins=("auto-round==0.16.1", "transformers==5.23.0", "datasets==5.2.0", *COMMON),
        options=("iterations", "seed"),
    ),
    "hqq": Peer(
        label="HQQ",
        pins=("hqq==0.2.8.post1", "transformers==5.23.0", *COMMON),
        variables=(("DISABLE_CUDA", "1"),),  # its setup would compile kernels for a GPU
    ),
}


@dataclass(frozen=True)
class Inputs:
    """What every peer is given: files, and the hashes that tell whether a kept result is still theirs."""

    model: Path
    windows: Path
    sha256: str


def install(name: str, work: Path) -> Path:
    """Python of the peer's environment, which is made where it is missing or has other pins.

    Raises:
        PeerError: pip did not get through; its last words are in the message, all of them in `install.log`.
    """
    peer, folder = PEERS[name], work / name
    python, stamp = folder / "venv" / "bin" / "python", folder / "installed.json"
    wanted = json.dumps(peer.pins)
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    log = folder / "install.log"
    log.unlink(missing_ok=True)
    _logged([sys.executable, "-m", "venv", "--clear", str(folder / "venv")], log, os.environ)
    _logged([str(python), "-m", "pip", "install", *peer.pins], log, {**os.environ, **dict(peer.variables)})
    stamp.write_text(wanted)
    return python


def result_folder(name: str, scheme: str, inputs: Inputs, options: Mapping[str, int], work: Path) -> Path:
    """Where the peer's result for this job is or will be."""
    peer = PEERS[name]
    # comments and layout do not count: results that took an hour should outlive a better word
    program = [ast.dump(ast.parse((HERE / file).read_text())) for file in (f"{name}.py", "contract.py")]
    used = {option: options[option] for option in peer.options}
    job = json.dumps([peer.pins, program, scheme, inputs.sha256, used], sort_keys=True)
    return work / name / f"{scheme}-{hashlib.sha256(job.encode()).hexdigest()[:12]}"


def run(name: str, python: Path, out: Path, arguments: list[str], background: bool) -> dict[str, Any]:
    """Let the peer do its job unless its result is there; what `result.json` says.

    Args:
        name: of the peer.
        python: of its environment.
        out: the result's folder.
        arguments: for the peer's program.
        background: give way to everything else on the machine.

    Raises:
        PeerError: it did not finish; its last words are in the message.
    """
    if not (out / RESULT).is_file():
        # nothing is to be fetched from anywhere, and nothing kept outside the work folder
        variables = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
            "HF_HOME": str(out.parent / "cache"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        log = out.with_name(out.name + ".log")
        log.unlink(missing_ok=True)
        # as a module, so that a file named like the package it measures does not hide it
        command = [str(python), "-m", f"peers.{name}", *arguments]
        _logged(command, log, variables, cwd=HERE.parent, before=_give_way if background else None)
    found: dict[str, Any] = json.loads((out / RESULT).read_text())
    return found


def _logged(
    command: list[str],
    log: Path,
    variables: Mapping[str, str],
    cwd: Path | None = None,
    before: Callable[[], None] | None = None,
) -> None:
    """Run a command with its output appended to a log; PeerError with the log's last line where it fails."""
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            cwd=cwd,
            start_new_session=before is not None,
            preexec_fn=before,
        )
        try:
            status = process.wait()
        finally:
            if process.poll() is None:  # interrupted: a session of its own would outlive this one
                process.kill()
    if status:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise PeerError(f"{errors[-1][:200]} (exit status {status}; {log})")


def _give_way() -> None:
    """The lowest priority, also of the session: Linux shares processors among sessions before processes."""
    os.nice(_IDLE)
    with contextlib.suppress(OSError):  # kernels without groups by session
        Path("/proc/self/autogroup").write_text(str(_IDLE))
