"""vLLM: native folders through the plugin, others through its own loaders."""

from __future__ import annotations

import json
import os
from pathlib import Path

from clients.contract import answer

# Its processes take all processors unless told, and its memory for the KV cache likewise.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Errors arrive as they are, and the model can be looked at.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


class Vllm:
    """Any folder."""

    def __init__(self, model: str) -> None:
        """Load `model`."""
        from vllm import LLM

        config = json.loads((Path(model) / "config.json").read_text())
        native = config["quantization_config"]["quant_method"] == "bitwright"
        # Its own kernels for 4 bits on processors have no float32.
        dtype = "float32" if native else "bfloat16"
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
