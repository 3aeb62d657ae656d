"""bitwright itself: the reference of the other clients."""

from __future__ import annotations

import torch

from bitwright.checkpoint.load import load_model
from bitwright.runtime.decode import LeanDecoder, supports
from clients.contract import answer


class Bitwright:
    """A native folder on the lean decode path, or where it does not fit in transformers; windows always there."""

    kernel = "bitwright, exact"

    def __init__(self, model: str) -> None:
        """Load `model`."""
        self._model = load_model(model).model
        self._decoder = LeanDecoder(self._model, "exact") if supports(self._model) is None else None

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """See `Client`."""
        if self._decoder is None:
            lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
            return self._model.generate(torch.tensor([ids]), do_sample=False, pad_token_id=0, **lengths)[
                0, len(ids) :
            ].tolist()
        tokens = [int(self._decoder.prefill(torch.tensor(ids)).argmax())]
        while len(tokens) < new_tokens:
            tokens.append(int(self._decoder.step(tokens[-1]).argmax()))
        return tokens

    @torch.inference_mode()
    def losses(self, ids: list[int]) -> list[float]:
        """See `Client`."""
        logits = self._model(torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
        return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()


if __name__ == "__main__":
    answer(Bitwright)
