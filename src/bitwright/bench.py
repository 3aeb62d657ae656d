"""`bench`: how fast a MODEL decodes and reads a prompt on this machine, and how near the memory's limit that is.

One text, greedy, a prompt of random tokens; prefill and decode apart. Every step of a decoder reads all weights, so
the bytes of weights read in a second, over what a plain pass over memory reads in the same minute, say how much is left
to gain. Weights that fit into the processor's caches can pass 100 %.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from bitwright.checkpoint.load import load_model
from bitwright.errors import EvaluationError
from bitwright.execute.local import default_workers, torch_threads
from bitwright.execute.memory import peak_rss_bytes
from bitwright.execute.shown import Shown
from bitwright.rounding import columns
from bitwright.runtime import cpu
from bitwright.runtime.decode import LeanDecoder, supports
from bitwright.runtime.linear import PackedModule, QuantizedLinear, TiedLinear, set_cpu_mode
from bitwright.words import CpuMode

_ROUNDS = 5
# Of the pass over memory: beyond any processor's caches.
_PROBE_FLOATS = 1 << 26
_PROBE_WIDTH = 1 << 14


@dataclass(frozen=True, repr=False)
class Bench(Shown):
    """What was measured, medians over rounds after one that warms up.

    Attributes:
        path: "lean" (`runtime.decode`) or "transformers".
        path_reason: why not the lean path; None where it was.
        kernels: instruction set of the compiled kernels; "reference" where they are missing and "float" where the
            model is not quantized.
        kernels_reason: what keeps the compiled kernels from a quantized model; None where nothing does.
        weight_bytes_per_token: weights that a step of decoding reads; None for models with experts.
        read_bandwidth_share: `weight_bytes_per_token` in the time of a step, over `read_bandwidth_bytes_per_second`.
        peak_rss_bytes: of the process, from loading to the end of the first round.
    """

    model: str
    path: str
    path_reason: str | None
    kernels: str
    kernels_reason: str | None
    mode: CpuMode
    threads: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    weight_bytes_per_token: int | None
    read_bandwidth_bytes_per_second: float
    read_bandwidth_share: float | None
    peak_rss_bytes: int

    def facts(self) -> dict[str, str]:
        """See `Shown.facts`."""
        return {
            "model": self.model,
            "decode": f"{self.decode_tokens_per_second:.1f} tokens/s",
            "prefill": f"{self.prefill_tokens_per_second:.1f} tokens/s",
            "path, kernels, mode": f"{self.path}, {self.kernels}, {self.mode}",
            "threads": str(self.threads),
        }

    def to_json(self) -> dict[str, Any]:
        """The measurement for `bench --json`."""
        return asdict(self)


def bench(
    model: str,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    threads: int | None = None,
    mode: CpuMode = "exact",
) -> Bench:
    """Measure `model` with `threads` (default: all processors) and the compiled kernels' `mode`.

    Raises:
        CheckpointError, FormatError: the model cannot be loaded.
        EvaluationError: a number is not positive, the text is longer than the model takes, or there is no such mode
            or no quantized linear that it could change.
    """
    threads = default_workers() if threads is None else threads
    for name, number in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("threads", threads)):
        if number < 1:
            raise EvaluationError(f"{name} is {number}, needed 1 or more")
    if mode not in get_args(CpuMode):
        raise EvaluationError(f"mode is {mode!r}, needed one of {', '.join(get_args(CpuMode))}")
    loaded = load_model(model).model
    length, limit = prompt_tokens + new_tokens, getattr(loaded.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise EvaluationError(
            f"{prompt_tokens} + {new_tokens} tokens, but {model} takes {limit}; give fewer by "
            "--prompt-tokens and --new-tokens"
        )
    packed = any(isinstance(module, PackedModule) for module in loaded.modules())
    if mode == "fast" and not packed:
        raise EvaluationError(f"{model} has no quantized linear, which mode 'fast' needs; use --mode exact")
    with torch_threads(threads):
        reason = supports(loaded, length)
        decoder = _TransformersDecoder(loaded, mode) if reason is not None else LeanDecoder(loaded, mode, length)
        kernels, missing = _kernels(packed)
        ids = torch.randint(loaded.config.vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(0))
        _decode(decoder, ids, new_tokens)
        # Before the pass over memory takes its own.
        peak = peak_rss_bytes()
        prefill, decode, bandwidth = _measure(decoder, ids, new_tokens)
    weights = decoder.weight_bytes
    return Bench(
        model=model,
        path="lean" if reason is None else "transformers",
        path_reason=reason,
        kernels=kernels,
        kernels_reason=missing,
        mode=mode,
        threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=_ROUNDS,
        decode_tokens_per_second=decode,
        prefill_tokens_per_second=prefill,
        weight_bytes_per_token=weights,
        read_bandwidth_bytes_per_second=bandwidth,
        read_bandwidth_share=None if weights is None else weights * decode / bandwidth,
        peak_rss_bytes=peak,
    )


def _kernels(packed: bool) -> tuple[str, str | None]:
    """The kernels that serve, and what is missing."""
    if not packed:
        return "float", None
    if not cpu.available():
        stale = "the compiled module is of another version; install bitwright anew"
        return "reference", columns.backend_reason() if columns.backend() == "reference" else stale
    return cpu.instruction_set(), None


class _Decoder(Protocol):
    """What is measured."""

    @property
    def weight_bytes(self) -> int | None:
        """Weights that a step reads."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits behind the last of `ids`."""

    def step(self, token: int) -> Tensor:
        """Logits behind `token`."""


def _measure(decoder: _Decoder, ids: Tensor, new_tokens: int) -> tuple[float, float, float]:
    """Tokens of prefill and of decoding, and bytes that can be read, in a second."""
    memory = torch.ones(_PROBE_FLOATS // _PROBE_WIDTH, _PROBE_WIDTH)
    _read(memory)
    prefills, decodes, reads = [], [], []
    for _ in range(_ROUNDS):
        # One pass is short, and whatever else runs only makes it slower.
        reads.append(min(_seconds(lambda: _read(memory)) for _ in range(3)))
        prefill, decode = _decode(decoder, ids, new_tokens)
        prefills.append(prefill)
        decodes.append(decode)
    return ids.numel() / median(prefills), new_tokens / median(decodes), memory.numel() * 4 / median(reads)


def _decode(decoder: _Decoder, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for `ids` and for `new_tokens` steps after them."""
    started = time.perf_counter()
    token = int(decoder.prefill(ids).argmax())
    between = time.perf_counter()
    for _ in range(new_tokens):
        token = int(decoder.step(token).argmax())
    return between - started, time.perf_counter() - between


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _read(memory: Tensor) -> Tensor:
    """Read a matrix once, with all threads, to do almost nothing with it."""
    return torch.mv(memory, memory[0])


class _TransformersDecoder:
    """The ordinary forward pass of transformers with its growing cache."""

    def __init__(self, model: Any, mode: CpuMode) -> None:
        if mode != "exact":
            set_cpu_mode(model, mode)
        self._model = model
        self._cache: Any = None

    @property
    def weight_bytes(self) -> int | None:
        """Weights of all linears and the head; None with experts, of which a token reads some."""
        if any(parameter.dim() > 2 for parameter in self._model.parameters()):
            return None
        total = 0
        for module in self._model.modules():
            if isinstance(module, nn.Linear):
                total += module.weight.numel() * module.weight.itemsize
            elif isinstance(module, QuantizedLinear | TiedLinear):
                total += _packed_bytes(module.embedding if isinstance(module, TiedLinear) else module)
        return total

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits behind the last of `ids` [tokens], which start a new text."""
        self._cache = None
        return self._forward(ids[None])

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Logits behind `token`."""
        return self._forward(torch.tensor([[token]]))

    def _forward(self, ids: Tensor) -> Tensor:
        output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        logits: Tensor = output.logits[0, -1]
        return logits


def _packed_bytes(module: PackedModule) -> int:
    """As laid out for the kernels, or as stored."""
    weight = module.cpu_weight()
    return sum(part.numel() * part.itemsize for part in module.stored().values()) if weight is None else weight.bytes
