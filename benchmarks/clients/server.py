"""vLLM's server, as a user would start it: what `vllm serve` runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Its processes take all processors unless told, and its memory for the KV cache likewise.
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def dtype_of(model: Path) -> str:
    """The type to serve `model` in on processors."""
    config = json.loads((model / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method", "bitwright")
    # vLLM's own kernels for 4 bits on processors have no float32.
    return "float32" if method == "bitwright" else "float16"


@contextmanager
def serve(model: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """A server of `model`, ready, under the name "model"; the base URL of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command `vllm` looks for a package of that name, and the one for processors is called vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--dtype", dtype_of(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "model", "--no-enable-prefix-caching", *options]
    server = subprocess.Popen(command, env={**SETTINGS, "VLLM_LOGGING_LEVEL": "WARNING", **os.environ})
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit(f"the server of {model} ended with status {server.returncode}") from None
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()
