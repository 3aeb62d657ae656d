"""vLLM's server, asked by the openai client over HTTP."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from openai import OpenAI

from clients.contract import answer
from clients.server import dtype_of, serve

_STACK = ExitStack()


class Http:
    """Any folder, served for as long as this program runs."""

    def __init__(self, model: str) -> None:
        """Start the server."""
        url = _STACK.enter_context(serve(Path(model), ["--max-model-len", "1024", "--enforce-eager"]))
        self._client = OpenAI(base_url=url, api_key="none")
        self.kernel = f"over HTTP, {dtype_of(Path(model))}"

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """See `Client`."""
        extra = {"ignore_eos": True, "return_token_ids": True}
        return list(self._ask(ids, max_tokens=new_tokens, extra_body=extra).token_ids)

    def losses(self, ids: list[int]) -> list[float]:
        """See `Client`."""
        found = self._ask(ids, max_tokens=1, extra_body={"prompt_logprobs": 0}).prompt_logprobs
        return [-places[str(token)]["logprob"] for places, token in zip(found[1:], ids[1:], strict=True)]

    def _ask(self, ids: list[int], **settings):
        return self._client.completions.create(model="model", prompt=ids, temperature=0, **settings).choices[0]


if __name__ == "__main__":
    answer(Http, _STACK.close)
