"""transformers, with bitwright's quantizer for native folders and its own loaders for others."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from bitwright.runtime.huggingface import register
from clients.contract import answer


class Transformers:
    """Any folder."""

    def __init__(self, model: str) -> None:
        """Load `model`."""
        register()
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.kernel = type(self._model.model.layers[0].self_attn.q_proj).__name__

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
