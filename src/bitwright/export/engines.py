"""What an engine will load, told from a plan: before any work, not after hours of it.

vLLM's rules are those of its compressed-tensors loader (2026): weight-only linears of 4 and 8 bits, 8-bit weights with
8-bit inputs, one scheme for the linears that it fuses. `vllm` means its kernels for GPUs, `vllm-cpu` those for x86
processors, which are fewer. Where it depends on the version, the kernels or the hardware, an obstacle is not `certain`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from bitwright.errors import PlanError
from bitwright.formats.compressed_tensors import refusal
from bitwright.formats.native import TensorEntry
from bitwright.numeric.activation import ActivationSpec, KvSpec
from bitwright.numeric.outliers import NoOutliers
from bitwright.numeric.spec import WeightSpec
from bitwright.rows import Row

# Linears that vLLM joins into one: all of them need the same scheme.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_GROUP_SIZES = (32, 64, 128)
# What both sizes of a matrix must be a multiple of for vLLM's kernel for weights of 4 bits on processors.
_CPU_TILE = 32
# Sizes that a matrix must be a multiple of for Marlin, vLLM's fastest kernels: out, in.
_MARLIN_TILE = (64, 128)


@dataclass(frozen=True)
class Obstacle:
    """Why an engine will not load a module, or may not; `remedy` says what to change in the recipe."""

    module: str
    reason: str
    remedy: str
    certain: bool = True

    def line(self) -> str:
        """The obstacle in one line."""
        return f"{self.module}: {self.reason}; {self.remedy}" + ("" if self.certain else " (depends on the version)")


def for_engine(
    engine: str, rows: Iterable[Row], *, kv_cache: KvSpec | None = None, embedding: str | None = None
) -> list[Obstacle]:
    """What stands in the way of serving the result of a plan with `engine`; empty when nothing does.

    Args:
        engine: "vllm" or "vllm-cpu".
        rows: of the plan.
        kv_cache: of the plan.
        embedding: name of the token embedding.

    Raises:
        PlanError: another engine.
    """
    engines: dict[str, Kernels] = {"vllm": _on_gpu, "vllm-cpu": _on_cpu}
    if engine not in engines:
        raise PlanError(f"engine {engine!r} is not known; needed one of {', '.join(engines)}")
    return list(_vllm(engines[engine], list(rows), kv_cache, embedding))


Kernels = Callable[[Row, WeightSpec], Iterable[Obstacle]]
"""What the kernels for weights alone do not take of a matrix."""


def _vllm(kernels: Kernels, rows: list[Row], kv_cache: KvSpec | None, embedding: str | None) -> Iterator[Obstacle]:
    for row in rows:
        if row.action != "quantize" or row.spec is None:
            continue
        found = next(_row_obstacles(kernels, row, row.spec), None)
        if found is None and row.module == embedding:
            reason = "is an embedding, which only recent versions read quantized"
            found = Obstacle(
                row.module,
                reason,
                f"leave out the rule that quantizes it, or use --set keep={row.module}",
                certain=not row.spec.symmetric,
            )
        if found is not None:
            yield found
    yield from _split_fusions(rows)
    if kv_cache is not None and kv_cache.grid == "int":
        reason = f"is quantized to {kv_cache.bits} bits for each token and head; vLLM knows fp8 with fixed scales"
        yield Obstacle(
            "the KV cache", reason, "use kv8 in the scheme with --set activations.kv.grid=fp8, or leave kv out of it"
        )


def _row_obstacles(kernels: Kernels, row: Row, spec: WeightSpec) -> Iterator[Obstacle]:
    """The obstacles of one matrix, the plainest first."""
    shape = (row.shape[0], row.shape[1])
    if (problem := refusal(TensorEntry(spec, shape), odd_bits=True)) is not None:
        reason, _, remedy = problem.rpartition("; ")
        yield Obstacle(row.module, reason, remedy)
    if row.method is not None and not isinstance(row.method.outliers, NoOutliers):
        yield Obstacle(row.module, "may keep outliers, which have no place there", "use --set outliers.name=none")
    if row.hadamard:
        yield Obstacle(row.module, "has its input rotated at run time", "use --set rotate.online_down=false")
    yield from kernels(row, spec) if row.activation is None else _with_inputs(row, spec, row.activation)


def _on_cpu(row: Row, spec: WeightSpec) -> Iterator[Obstacle]:
    if spec.bits != 4:
        reason = f"has {spec.bits} bits; the only kernel for weights alone on x86 processors takes 4"
        yield Obstacle(row.module, reason, "use w4a16, w8a8, or serve the native folder with the plugin")
    if any(size % _CPU_TILE for size in row.shape):
        reason = f"is {list(row.shape)}; the kernel for processors needs multiples of {_CPU_TILE}"
        yield Obstacle(
            row.module,
            reason,
            f"use --set keep={row.module} to leave it in float, or serve the native folder with the plugin",
        )


def _on_gpu(row: Row, spec: WeightSpec) -> Iterator[Obstacle]:
    if spec.bits not in (4, 8):
        reason = f"has {spec.bits} bits, {'symmetric' if spec.symmetric else 'asymmetric'}"
        if not spec.symmetric:
            yield Obstacle(
                row.module, f"{reason}; versions before 0.32 need 4 or 8", "use w4 or w8, or symmetric codes", False
            )
        yield Obstacle(row.module, f"{reason}; only versions with Humming kernels take it", "use w4 or w8", False)
    whole_rows = spec.groups(row.shape[1]) == 1
    if not whole_rows and spec.group_size not in _GROUP_SIZES:
        sizes = ", ".join(f"g{size}" for size in _GROUP_SIZES)
        reason = f"has groups of {spec.group_size}, for which few kernels exist"
        yield Obstacle(row.module, reason, f"use {sizes}, or no g for one group per channel", False)
    if any(size % tile for size, tile in zip(row.shape, _MARLIN_TILE, strict=True)):
        reason = f"is {list(row.shape)}, no multiple of {list(_MARLIN_TILE)}: the fastest kernels do not take it"
        yield Obstacle(
            row.module, reason, f"use --set keep={row.module} to leave it in float, if vLLM refuses it", False
        )


def _with_inputs(row: Row, spec: WeightSpec, inputs: ActivationSpec) -> Iterator[Obstacle]:
    label = f"has w{spec.bits}a{inputs.bits}"
    if inputs.clip != 1:
        yield Obstacle(
            row.module, f"clips its inputs to {inputs.clip:g} of their range", "use --set activations.clip=1"
        )
    if inputs.bits != 8 or spec.bits not in (4, 8):
        yield Obstacle(row.module, f"{label}, and vLLM takes w8a8", "use w8a8, or w4a16")
    if not spec.symmetric:
        yield Obstacle(row.module, f"{label} with asymmetric weights", "use symmetric ones (-sym)")
    if spec.bits == 8 and spec.groups(row.shape[1]) > 1:
        yield Obstacle(row.module, f"{label} with groups of {spec.group_size}", "use one group per channel (no g)")
    if spec.bits == 4:
        dynamic = inputs.granularity == "token"
        yield Obstacle(row.module, f"{label}, for which few processors have kernels", "use w8a8, or w4a16", not dynamic)


def _split_fusions(rows: list[Row]) -> Iterator[Obstacle]:
    """Linears that are joined in vLLM and do not agree."""
    by_module = {row.module: row for row in rows if len(row.shape) == 2}
    for names in _FUSED:
        for module in [module for module in by_module if module.rpartition(".")[2] == names[0]]:
            parent = module.rpartition(".")[0]
            siblings = [by_module[f"{parent}.{name}"] for name in names if f"{parent}.{name}" in by_module]
            if len({(row.action, row.spec, row.activation) for row in siblings}) > 1:
                kinds = ", ".join("float" if row.spec is None else row.spec.label() for row in siblings)
                reason = f"{', '.join(names)} are {kinds}, and vLLM joins them into one"
                yield Obstacle(parent, reason, "give them one scheme")
