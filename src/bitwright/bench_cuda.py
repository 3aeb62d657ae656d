"""`bench --device cuda`: how fast a MODEL decodes and reads a prompt on a GPU, and what it takes of its memory.

The ordinary forward pass of transformers with a cache of fixed length, so any architecture: one step is captured in a
CUDA graph and replayed, so that the host's time counts for nothing; prefill is not captured. Times are those of CUDA
events. A quantized model is measured beside the same model with decoded weights in the same 16-bit type, where that
fits. Weights read by a step over the bandwidth of a large copy (bytes read and written) say how much is left to gain.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from bitwright.checkpoint.load import load_model
from bitwright.errors import EvaluationError
from bitwright.execute.shown import Shown
from bitwright.runtime import ops
from bitwright.runtime.join import join_shared_inputs
from bitwright.runtime.linear import PackedModule, QuantizedLinear, TiedLinear, keep_packed_on_cpu
from bitwright.words import ComputeType

_ROUNDS = 5
_WARM_UP = 3  # steps before a capture: kernels are compiled and weights laid out in the first
_COPY_BYTES = 1 << 30
# Free memory that a float model needs beside its weights: cache, activations, fragments.
_MARGIN = 1.15


@dataclass(frozen=True)
class Speed:
    """What one model reached, medians over rounds after one that warms up.

    Attributes:
        weight_bytes_per_token: weights that a step reads, as laid out; None for models with experts.
        copy_bandwidth_share: `weight_bytes_per_token` in the time of a step, over the bandwidth of a copy.
        peak_loading_bytes: allocated on the device, from loading to the end of the first round.
        peak_running_bytes: the same afterwards.
        graph_reason: why steps were not replayed from a CUDA graph; None where they were.
    """

    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    weight_bytes_per_token: int | None
    copy_bandwidth_share: float | None
    peak_loading_bytes: int
    peak_running_bytes: int
    graph_reason: str | None


@dataclass(frozen=True, repr=False)
class CudaBench(Shown):
    """What was measured.

    Attributes:
        kernels: what multiplies, in words, and in how many products; linears of one input are one where they agree.
        measured: the model as it is.
        unquantized: it with decoded weights in `dtype`; None where `unquantized_reason` says why.
    """

    model: str
    device: str
    dtype: ComputeType
    prompt_tokens: int
    new_tokens: int
    rounds: int
    copy_bandwidth_bytes_per_second: float
    kernels: dict[str, int]
    measured: Speed
    unquantized: Speed | None
    unquantized_reason: str | None

    def facts(self) -> dict[str, str]:
        """See `Shown.facts`."""
        return dict(self.lines())

    def to_json(self) -> dict[str, Any]:
        """The measurement for `bench --json`."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Labels and values, for people."""
        bandwidth = f"{self.copy_bandwidth_bytes_per_second / 1e12:.2f} TB/s"
        products = [("products", f"{count}: {path}") for path, count in self.kernels.items()]
        found = [("device", f"{self.device}, {self.dtype}"), ("copy bandwidth", bandwidth), *products]
        found += self._lines_of(self.measured, "")
        if self.unquantized is None:
            return [*found, ("unquantized", f"not measured: {self.unquantized_reason}")]
        ratio = self.measured.decode_tokens_per_second / self.unquantized.decode_tokens_per_second
        return [*found, *self._lines_of(self.unquantized, "unquantized: "), ("decode, times as fast", f"{ratio:.2f}")]

    def _lines_of(self, speed: Speed, prefix: str) -> list[tuple[str, str]]:
        share, weights = speed.copy_bandwidth_share, speed.weight_bytes_per_token
        lines = [
            (f"decode, {self.new_tokens} tokens", f"{speed.decode_tokens_per_second:.1f} tokens/s"),
            (f"prefill, {self.prompt_tokens} tokens", f"{speed.prefill_tokens_per_second:.1f} tokens/s"),
            ("weights read per token", "unknown" if weights is None else f"{weights / 1e9:.3f} GB"),
            ("share of copy bandwidth", "unknown" if share is None else f"{share:.0%}"),
            ("peak memory, running", f"{speed.peak_running_bytes / 1e9:.3f} GB"),
            ("peak memory, loading", f"{speed.peak_loading_bytes / 1e9:.3f} GB"),
        ]
        if speed.graph_reason is not None:
            lines.append(("without CUDA graph", speed.graph_reason))
        return [(prefix + label, text) for label, text in lines]


class Accelerator(Protocol):
    """The device that is measured; `Cuda`, and a stand-in where tests have none."""

    device: torch.device
    name: str

    def seconds(self, run: Callable[[], object]) -> float:
        """Time of what `run` gives the device to do."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """`run`, which was called before, to be replayed. RuntimeError: it cannot be captured."""

    def reset_peak(self) -> None:
        """Forget the peak of memory."""

    def peak_bytes(self) -> int:
        """The most memory since then."""

    def free_bytes(self) -> int:
        """Memory that could still be had."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        """Find it.

        Raises:
            EvaluationError: there is none.
        """
        if not torch.cuda.is_available():
            build = "has no CUDA" if torch.version.cuda is None else f"is for CUDA {torch.version.cuda}"
            raise EvaluationError(
                f"device cuda: found no GPU that PyTorch {torch.__version__} can use (this build {build}), needed one; "
                "run on a machine with an NVIDIA GPU, its driver and a CUDA build of PyTorch, or use --device cpu"
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name()

    def seconds(self, run: Callable[[], object]) -> float:
        """Between events before and behind it."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """The replay of a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def reset_peak(self) -> None:
        """Of PyTorch's allocator."""
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Allocated tensors, not what the allocator keeps."""
        return torch.cuda.max_memory_allocated()

    def free_bytes(self) -> int:
        """As the driver says, once the allocator has given back what it can."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


class StaticDecoder:
    """Greedy decoding of one sequence in which every step makes the same calls and none waits for the device.

    Attributes:
        text: token ids, int64 [max_length + 1]: the prompt and what followed, as far as `steps` went.
    """

    def __init__(self, model: Any, max_length: int) -> None:
        """A cache for `max_length` tokens of `model`, where `model` is.

        Raises:
            ValueError: transformers has no cache of fixed length for it.
        """
        from transformers import StaticCache

        device = next(model.parameters()).device
        self._model, self.max_length = model, max_length
        self._cache = StaticCache(config=model.config, max_cache_len=max_length)
        self.text = torch.zeros(max_length + 1, dtype=torch.int64, device=device)
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, 1, dtype=torch.int64, device=device)

    @property
    def graph_reason(self) -> str | None:
        """Why a captured step could not be replayed; None where it can."""
        sliding = any(getattr(layer, "is_sliding", False) for layer in self._cache.layers)
        return "layers with a sliding window count tokens on the host" if sliding else None

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> None:
        """Start with `ids` (int64 [tokens] on the device), 1 to `max_length`."""
        self._cache.reset()
        count = ids.numel()
        self.text[:count] = ids
        self._forward(ids[None], torch.arange(count, device=ids.device)[None])
        self._position.fill_(count)
        self.text.index_copy_(0, self._position[0], self._token[0])

    @torch.inference_mode()
    def step(self) -> None:
        """Take the last token into the cache and choose the next; at most `max_length` tokens fit."""
        self._forward(self._token, self._position)
        self._position.add_(1)
        self.text.index_copy_(0, self._position[0], self._token[0])

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        output = self._model(ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._token.copy_(output.logits[:, -1].argmax(-1, keepdim=True))


def bench_cuda(
    model: str,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    dtype: ComputeType = "bfloat16",
    accelerator: Accelerator | None = None,
) -> CudaBench:
    """Measure `model` on `accelerator` (default: the current CUDA device), floats in `dtype`.

    Raises:
        CheckpointError, FormatError: the model cannot be loaded.
        EvaluationError: there is no GPU, a number is not positive, the text is longer than the model takes, the type is
            none of the two, or transformers has no cache of fixed length for the model.
    """
    for name, number in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if number < 1:
            raise EvaluationError(f"{name} is {number}, needed 1 or more")
    if dtype not in get_args(ComputeType):
        raise EvaluationError(f"dtype is {dtype!r}, needed one of {', '.join(get_args(ComputeType))}")
    found: Accelerator = Cuda() if accelerator is None else accelerator
    length, torch_dtype = prompt_tokens + new_tokens, getattr(torch, dtype)
    loaded: Any = load_model(model, torch_dtype).model
    limit = getattr(loaded.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise EvaluationError(
            f"{prompt_tokens} + {new_tokens} tokens, but {model} takes {limit}; give fewer by "
            "--prompt-tokens and --new-tokens"
        )
    ids = torch.randint(loaded.config.vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(0))
    bandwidth = _copy_bandwidth(found)
    found.reset_peak()
    join_shared_inputs(loaded)
    keep_packed_on_cpu(loaded)
    loaded.to(found.device)
    packed, float_bytes = _is_packed(loaded), _float_bytes(loaded, torch_dtype)
    measured = _speed(loaded, ids, new_tokens, found, bandwidth)
    kernels = _kernels(loaded, found.device)
    del loaded
    unquantized, reason = None, None if packed else "it is not quantized"
    if packed:
        free = found.free_bytes()
        if free < _MARGIN * float_bytes:
            reason = f"its weights take {float_bytes / 1e9:.1f} GB in {dtype}, and {free / 1e9:.1f} GB are free"
        else:
            found.reset_peak()
            plain: Any = load_model(model, torch_dtype).model
            plain = plain.dequantize(torch_dtype).eval().to(found.device)
            unquantized = _speed(plain, ids, new_tokens, found, bandwidth)
    return CudaBench(
        model=model,
        device=found.name,
        dtype=dtype,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=_ROUNDS,
        copy_bandwidth_bytes_per_second=bandwidth,
        kernels=kernels,
        measured=measured,
        unquantized=unquantized,
        unquantized_reason=reason,
    )


def _speed(model: Any, ids: Tensor, new_tokens: int, accelerator: Accelerator, bandwidth: float) -> Speed:
    """Of `model`, which is on the device, for the prompt `ids` and `new_tokens` steps."""
    ids = ids.to(accelerator.device)
    try:
        decoder = StaticDecoder(model, ids.numel() + new_tokens)
    except (KeyError, ValueError) as error:
        raise EvaluationError(
            f"{type(model).__name__}: transformers has no cache of fixed length for it ({error}); use --device cpu"
        ) from error
    decoder.prefill(ids)
    for _ in range(min(_WARM_UP, new_tokens)):
        decoder.step()
    step, reason = _replayed(decoder, accelerator)
    _round(decoder, step, ids, new_tokens, accelerator)
    loading = accelerator.peak_bytes()
    accelerator.reset_peak()
    rounds = [_round(decoder, step, ids, new_tokens, accelerator) for _ in range(_ROUNDS)]
    prefill, decode = (median(column) for column in zip(*rounds, strict=True))
    weights = _weight_bytes(model, accelerator.device)
    return Speed(
        decode_tokens_per_second=new_tokens / decode,
        prefill_tokens_per_second=ids.numel() / prefill,
        weight_bytes_per_token=weights,
        copy_bandwidth_share=None if weights is None else weights * new_tokens / decode / bandwidth,
        peak_loading_bytes=loading,
        peak_running_bytes=accelerator.peak_bytes(),
        graph_reason=reason,
    )


def _replayed(decoder: StaticDecoder, accelerator: Accelerator) -> tuple[Callable[[], object], str | None]:
    """A step from a CUDA graph; or as it is, and why."""
    if decoder.graph_reason is not None:
        return decoder.step, decoder.graph_reason
    try:
        return accelerator.capture(decoder.step), None
    except RuntimeError as error:
        return decoder.step, f"the model cannot be captured: {str(error).splitlines()[0]}"


def _round(
    decoder: StaticDecoder, step: Callable[[], object], ids: Tensor, new_tokens: int, accelerator: Accelerator
) -> tuple[float, float]:
    """Seconds for `ids` and for `new_tokens` steps after them."""

    def steps() -> None:
        for _ in range(new_tokens):
            step()

    return accelerator.seconds(lambda: decoder.prefill(ids)), accelerator.seconds(steps)


def _copy_bandwidth(accelerator: Accelerator) -> float:
    """Bytes read and written in a second by a large copy."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=accelerator.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * _COPY_BYTES / median(accelerator.seconds(lambda: target.copy_(source)) for _ in range(10))


def _linears(model: nn.Module) -> list[tuple[PackedModule, QuantizedLinear | None]]:
    """What owns the weight of every quantized linear and head, and the linear itself where it is one."""
    found: list[tuple[PackedModule, QuantizedLinear | None]] = []
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            found.append((module, module))
        elif isinstance(module, TiedLinear):
            found.append((module.embedding, None))
    return found


def _is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedModule) for module in model.modules())


def _path(owner: PackedModule, linear: QuantizedLinear | None, device: torch.device) -> tuple[str, int]:
    return ops.path_of(owner.packed(), None if linear is None else linear.site, device)


def _kernels(model: nn.Module, device: torch.device) -> dict[str, int]:
    """What multiplies, and in how many products."""
    plain = sum(isinstance(module, nn.Linear) for module in model.modules())
    counts = Counter(_path(owner, linear, device)[0] for owner, linear in _linears(model))
    return dict(counts) | ({"float weights": plain} if plain else {})


def _weight_bytes(model: nn.Module, device: torch.device) -> int | None:
    """Weights of all linears and the head; None with experts, of which a token reads some."""
    if any(parameter.dim() > 2 for parameter in model.parameters()):
        return None
    plain = (module.weight for module in model.modules() if isinstance(module, nn.Linear))
    packed = (_path(owner, linear, device)[1] for owner, linear in _linears(model))
    return sum(weight.numel() * weight.itemsize for weight in plain) + sum(packed)


def _float_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Memory of the model's weights, were all of them of `dtype`."""
    packed = (
        module.in_features * module.out_features for module in model.modules() if isinstance(module, PackedModule)
    )
    return (sum(packed) + sum(parameter.numel() for parameter in model.parameters())) * dtype.itemsize
