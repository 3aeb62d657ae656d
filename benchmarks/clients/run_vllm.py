"""vLLM: native folders through the plugin, others through its own loaders."""

from __future__ import annotations

import os
from pathlib import Path

from clients.contract import answer
from clients.server import SETTINGS, dtype_of

# Errors arrive as they are, and the model can be looked at.
os.environ.update({**SETTINGS, "VLLM_LOGGING_LEVEL": "ERROR", **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})


class Vllm:
    """Any folder."""

    def __init__(self, model: str) -> None:
        """Load `model`."""
        from vllm import LLM

        dtype = dtype_of(Path(model))
        self._llm = LLM(model=model, dtype=dtype, max_model_len=1024, enforce_eager=True, seed=0)
        self.kernel = f"{self._llm.apply_model(_kernel)[0]}, {dtype}"

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """See `Client`."""
        return list(self._ask(ids, max_tokens=new_tokens, ignore_eos=True).outputs[0].token_ids)

    def losses(self, ids: list[int]) -> list[float]:
        """See `Client`."""
        found = self._ask(ids, max_tokens=1, prompt_logprobs=0).prompt_logprobs
        return [-places[token].logprob for places, token in zip(found[1:], ids[1:], strict=True)]

    def _ask(self, ids: list[int], **settings):
        from vllm import SamplingParams

        (found,) = self._llm.generate(
            {"prompt_token_ids": ids}, SamplingParams(temperature=0, detokenize=False, **settings), use_tqdm=False
        )
        return found


def _kernel(model) -> str:
    """What computes the first linear."""
    layer = model.model.layers[0].self_attn.qkv_proj
    scheme = getattr(layer, "scheme", None)
    parts = (layer.quant_method, scheme, getattr(scheme, "kernel", None))
    return " ".join(type(part).__name__ for part in parts if part is not None)


if __name__ == "__main__":
    answer(Vllm)
