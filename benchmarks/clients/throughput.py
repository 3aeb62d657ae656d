"""vLLM's throughput over HTTP: a native model and its float model, under concurrent requests, in turns.

Two servers stand side by side; only one is asked at a time, and they take turns, so that whatever else the machine does
falls on both. Runs in vLLM's environment: python -m clients.throughput FLOAT NATIVE.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from openai import AsyncOpenAI

from clients.server import serve

PROMPT = "Write down what you know of number {n}. It is"


def main() -> None:
    """Serve, ask in turns, print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs=2, help="folders: the float model, then the native one")
    parser.add_argument("--requests", type=int, default=16, help="at the same time")
    parser.add_argument("--tokens", type=int, default=32, help="of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the models (minutes)")
    parser.add_argument("--mode", choices=("exact", "fast"), default="exact", help="of bitwright's CPU kernels")
    chosen = parser.parse_args()
    with ExitStack() as stack:
        urls = [stack.enter_context(serve(model, _options(chosen))) for model in chosen.models]
        for url in urls:
            asyncio.run(_round(url, chosen))  # the first requests pay for what is laid out once
        speeds = [[asyncio.run(_round(url, chosen)) for url in urls] for _ in range(chosen.rounds)]
    for model, found in zip(chosen.models, zip(*speeds, strict=True), strict=True):
        print(f"{model.name}: {statistics.median(found):.1f} tokens/s ({', '.join(f'{speed:.1f}' for speed in found)})")
    ratios = [native / plain for plain, native in speeds]
    print(f"ratio of a round: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


def _options(chosen: argparse.Namespace) -> list[str]:
    """Of both servers."""
    compiled = [] if chosen.compile else ["--enforce-eager"]
    mode = ["--additional-config", f'{{"bitwright_cpu_mode": "{chosen.mode}"}}']
    return ["--max-model-len", "512", *compiled, *mode]


async def _round(url: str, chosen: argparse.Namespace) -> float:
    """Tokens per second of all requests together, streamed."""
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        started = time.perf_counter()
        counts = await asyncio.gather(*(_request(client, n, chosen.tokens) for n in range(chosen.requests)))
        seconds = time.perf_counter() - started
    assert counts == [chosen.tokens] * chosen.requests, counts
    return sum(counts) / seconds


async def _request(client: AsyncOpenAI, n: int, tokens: int) -> int:
    """Tokens that the server says it sent."""
    stream = await client.completions.create(
        model="model",
        prompt=PROMPT.format(n=n),
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    return [chunk.usage.completion_tokens async for chunk in stream if chunk.usage is not None][-1]


if __name__ == "__main__":
    main()
