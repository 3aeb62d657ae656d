"""llama.cpp, through llama-cpp-python: .gguf files."""

from __future__ import annotations

import os

import numpy as np
from llama_cpp import Llama, llama_cpp

from clients.contract import answer

_CONTEXT = 1024


class LlamaCpp:
    """A .gguf file on the CPU, with as many threads as the process may use processors."""

    def __init__(self, model: str) -> None:
        """Load `model`."""
        self.kernel = "ggml"
        if os.environ.get("CLIENTS_LLAMA_PLAIN") == "1":
            # Some virtual machines claim instructions that then crash the kernels of repacked weights.
            self.kernel = "ggml without repacking: not its best"
            defaults = llama_cpp.llama_model_default_params
            llama_cpp.llama_model_default_params = lambda: _plain(defaults())
        threads = len(os.sched_getaffinity(0))
        settings = {"n_ctx": _CONTEXT, "n_batch": _CONTEXT, "n_threads": threads, "n_threads_batch": threads}
        self._model = Llama(model, logits_all=True, verbose=False, **settings)

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """See `Client`."""
        self._model.reset()
        tokens, last = [], ids
        while len(tokens) < new_tokens:
            self._model.eval(last)
            last = [int(self._model.scores[self._model.n_tokens - 1].argmax())]
            tokens += last
        return tokens

    def losses(self, ids: list[int]) -> list[float]:
        """See `Client`."""
        self._model.reset()
        self._model.eval(ids)
        logits = self._model.scores[: len(ids) - 1].astype(np.float64)
        peak = logits.max(axis=1)
        total = np.log(np.exp(logits - peak[:, None]).sum(axis=1)) + peak
        found = logits[np.arange(len(ids) - 1), ids[1:]]
        return (total - found).tolist()


def _plain(parameters):
    parameters.use_extra_bufts = False
    return parameters


if __name__ == "__main__":
    answer(LlamaCpp)
