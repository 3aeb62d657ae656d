"""transformers, with bitwright's quantizer for native folders and its own loaders for others."""

from __future__ import annotations

from functools import partial

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from bitwright.runtime.huggingface import register
from clients.contract import answer


class Transformers:
    """Any folder."""

    def __init__(self, model: str) -> None:
        """Load `model`."""
        register()
        load = partial(AutoModelForCausalLM.from_pretrained, model, dtype=torch.float32)
        try:
            self._model, told = load().eval(), ""
        except RuntimeError:
            # compressed-tensors 0.20 does not load packed zeros, those that it wrote itself included.
            config = CompressedTensorsConfig(dequantize=True)
            self._model, told = load(quantization_config=config).eval(), ", decoded: its packed zeros do not load"
        self.kernel = type(self._model.model.layers[0].self_attn.q_proj).__name__ + told

    @torch.inference_mode()
    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """See `Client`."""
        lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        found = self._model.generate(torch.tensor([ids]), do_sample=False, pad_token_id=0, **lengths)
        return found[0, len(ids) :].tolist()

    @torch.inference_mode()
    def losses(self, ids: list[int]) -> list[float]:
        """See `Client`."""
        logits = self._model(torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
        return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()


if __name__ == "__main__":
    answer(Transformers)
