"""The operators `bitwright::linear`, `site_linear` and `embedding`: schema, checks, shapes, choice of kernel.

Every call passes the checks below before a kernel sees a pointer: kernels may assume the layout of
`formats.native`. What only values can break (outlier indices, NaN) is refused once, when a model is loaded.

A kernel for a device replaces the reference through `set_linear_kernel` or `set_embedding_kernel`; it
receives checked arguments and may itself fall back to `reference` for cases it does not cover. The schema is
functional and has a fake (shape-only) version, so that `torch.compile` and `torch.export` see one node.

On CUDA the parts of a weight may lie in the CPU's memory: kernels make their layout from them once
(`runtime.linear.keep_packed_on_cpu`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.native import PART_NAMES, TensorEntry, check_layout
from bitwright.numeric.activation import ActivationSpec, InputSite, fake_quantize
from bitwright.runtime import reference
from bitwright.runtime.cpu import CpuKernel
from bitwright.runtime.reference import PackedWeight
from bitwright.runtime.triton.layout import resident, weight_bytes

if TYPE_CHECKING:
    from bitwright.runtime.triton.kernel import TritonKernel

LinearKernel = Callable[[Tensor, PackedWeight, Tensor | None], Tensor]
EmbeddingKernel = Callable[[Tensor, PackedWeight, torch.dtype], Tensor]
SiteKernel = Callable[[Tensor, PackedWeight, Tensor | None, InputSite], Tensor]

_PARTS = len(PART_NAMES)
_WEIGHT = ", ".join(f"Tensor{'' if name == 'weight_packed' else '?'} {name}" for name in PART_NAMES)
_LAYOUT = "int bits, int group_size, int in_features, int[] bilevel"
_SITE = "int site_bits, bool site_symmetric, float site_clip, float? site_scale, int? site_zero"

_LIBRARY = torch.library.Library("bitwright", "DEF")
_LIBRARY.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, {_LAYOUT}) -> Tensor")
_LIBRARY.define(f"site_linear(Tensor x, {_WEIGHT}, Tensor? bias, {_LAYOUT}, {_SITE}) -> Tensor")
_LIBRARY.define(f"embedding(Tensor ids, {_WEIGHT}, {_LAYOUT}, ScalarType dtype) -> Tensor")


@cache
def _triton_kernel() -> TritonKernel | None:
    """The Triton kernels, imported when a weight first meets a CUDA tensor; None where there is no package triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from bitwright.runtime.triton.kernel import TritonKernel

    return TritonKernel()


def _cuda_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    kernel = _triton_kernel()
    if kernel is None:
        return reference.linear(x, resident(weight, x), bias)
    return kernel.linear(x, weight, bias)


def _cuda_embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    kernel = _triton_kernel()
    if kernel is None:
        return reference.embedding(ids, resident(weight, ids), dtype)
    return kernel.embedding(ids, weight, dtype)


def _cuda_site_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, site: InputSite) -> Tensor:
    kernel = _triton_kernel()
    if kernel is None:
        return reference.linear(_simulated(x, site), resident(weight, x), bias)
    return kernel.site_linear(x, weight, bias, site)


# Device type -> kernel; `reference` serves every device that is not here.
_cpu = CpuKernel()
_linear_kernels: dict[str, LinearKernel] = {"cpu": _cpu.linear, "cuda": _cuda_linear}
_embedding_kernels: dict[str, EmbeddingKernel] = {"cpu": _cpu.embedding, "cuda": _cuda_embedding}
# Products that quantize their inputs themselves; elsewhere they are simulated.
_site_kernels: dict[str, SiteKernel] = {"cuda": _cuda_site_linear}
# Device types whose kernels take parts from the CPU.
_from_cpu = {"cuda"}


def set_linear_kernel(device_type: str, kernel: LinearKernel | None) -> None:
    """Use `kernel` for `bitwright::linear` on `device_type` ("cpu", "cuda"); None: the reference again."""
    if kernel is None:
        _linear_kernels.pop(device_type, None)
    else:
        _linear_kernels[device_type] = kernel


def set_embedding_kernel(device_type: str, kernel: EmbeddingKernel | None) -> None:
    """Use `kernel` for `bitwright::embedding` on `device_type`; None: the reference again."""
    if kernel is None:
        _embedding_kernels.pop(device_type, None)
    else:
        _embedding_kernels[device_type] = kernel


def quantizes_inputs(device: torch.device) -> bool:
    """Whether a kernel of `device` may quantize inputs itself: modules then call `site_linear`."""
    return device.type in _site_kernels


def path_of(weight: PackedWeight, site: InputSite | None, device: torch.device) -> tuple[str, int]:
    """What multiplies by `weight` on `device`, in words, and the bytes of it that this reads; made on the way.

    On the CPU, and without the package triton, the stored parts are counted.
    """
    kernel = _triton_kernel() if device.type == "cuda" else None
    if kernel is None:
        return f"on {device.type}" if device.type != "cuda" else "reference: no package triton", weight_bytes(weight)
    return kernel.path(weight, site, device)


def cpu_kernel() -> CpuKernel | None:
    """The compiled kernels, if they serve the CPU: modules may call them directly, past the operators' checks."""
    return _cpu if _linear_kernels.get("cpu") == _cpu.linear else None


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`x` [..., in] times the transposed quantized weight, plus `bias` [out]: [..., out] of the type of `x`.

    Raises:
        FormatError: a tensor of `weight` does not have the layout of the native format.
        ValueError: `x` or `bias` does not fit `weight`.
    """
    result: Tensor = torch.ops.bitwright.linear(x, *_tensors(weight), bias, *_layout(weight))
    return result


def site_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, site: InputSite) -> Tensor:
    """`linear` of `x` quantized as `site.activation`, which is there, says; its transform is left to the caller.

    Where a device has no kernel for that, `x` is rounded in float (`fake_quantize`) and goes to `linear`'s.

    Raises:
        FormatError, ValueError: see `linear`.
    """
    spec = site.activation
    assert spec is not None
    numbers = (spec.bits, spec.symmetric, spec.clip, site.scale, site.zero)
    result: Tensor = torch.ops.bitwright.site_linear(x, *_tensors(weight), bias, *_layout(weight), *numbers)
    return result


def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (int32 or int64, any shape) of the quantized weight: [*ids.shape, in] of `dtype`.

    Raises:
        FormatError: a tensor of `weight` does not have the layout of the native format.
        ValueError: `ids` are not integers or on another device.
        IndexError: an id is outside the weight's rows.
    """
    result: Tensor = torch.ops.bitwright.embedding(ids, *_tensors(weight), *_layout(weight), dtype)
    return result


def _tensors(weight: PackedWeight) -> list[Tensor | None]:
    """The parts of `weight` in the order of the schema."""
    return [getattr(weight, name) for name in PART_NAMES]


def _layout(weight: PackedWeight) -> tuple[int, int, int, list[int]]:
    """The numbers of `weight` in the order of the schema."""
    return weight.bits, weight.group_size, weight.in_features, list(weight.bilevel)


def _weight(tensors: tuple[Any, ...], layout: tuple[Any, ...]) -> PackedWeight:
    """Inverse of `_tensors` and `_layout`."""
    fields = [*tensors, *layout[:-1], tuple(layout[-1])]
    return PackedWeight(*fields)


@lru_cache(maxsize=256)
def _site(bits: int, symmetric: bool, clip: float, scale: float | None, zero: int | None) -> InputSite:
    """Inverse of the numbers of a site."""
    granularity: Any = "token" if scale is None else "tensor"
    spec = ActivationSpec(bits=bits, symmetric=symmetric, clip=clip, granularity=granularity)
    return InputSite(activation=spec, scale=scale, zero=zero)


def _simulated(x: Tensor, site: InputSite) -> Tensor:
    """`x` rounded in float."""
    assert site.activation is not None
    return fake_quantize(x, site.activation, site.scale, site.zero)


def _linear(x: Tensor, *arguments: Any, fake: bool, sites: bool) -> Tensor:
    bias, numbers = arguments[_PARTS], arguments[_PARTS + 1 :]
    weight = _weight(arguments[:_PARTS], numbers[:4])
    _check_weight(weight, x.device)
    _check_linear(x, weight, bias)
    if fake:
        return x.new_empty((*x.shape[:-1], weight.out_features))
    if sites:
        site = _site(*numbers[4:])
        site_kernel = _site_kernels.get(x.device.type)
        if site_kernel is not None:
            return site_kernel(x, weight, bias, site)
        x = _simulated(x, site)
    return _linear_kernels.get(x.device.type, reference.linear)(x, weight, bias)


def _embedding(ids: Tensor, *arguments: Any, fake: bool) -> Tensor:
    weight, dtype = _weight(arguments[:_PARTS], arguments[_PARTS:-1]), arguments[-1]
    _check_weight(weight, ids.device)
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"bitwright::embedding: ids are {ids.dtype}, needed int32 or int64")
    if fake:
        return ids.new_empty((*ids.shape, weight.in_features), dtype=dtype)
    return _embedding_kernels.get(ids.device.type, reference.embedding)(ids, weight, dtype)


def _check_weight(weight: PackedWeight, device: torch.device) -> None:
    """Refuse tensors that are not the layout of the entry they themselves imply, or on another device."""
    stored = weight.stored()
    for name, tensor in stored.items():
        if tensor.device != device and not (tensor.device.type == "cpu" and device.type in _from_cpu):
            raise ValueError(f"bitwright: {name} is on {tensor.device}, needed {device} as the input")
        if not tensor.is_contiguous():
            raise FormatError(f"bitwright: {name} has strides {tensor.stride()}, needed a contiguous tensor")
    if weight.weight_packed.dim() != 2:
        raise FormatError(f"bitwright: weight_packed has {weight.weight_packed.dim()} axes, needed 2")
    try:
        spec = weight.spec
    except ValueError as error:
        raise FormatError(f"bitwright: no layout has these tensors and sizes: {error}") from None
    outliers = 0 if weight.outlier_val is None else weight.outlier_val.numel()
    value_bits = 16 if weight.outlier_step is None else 8
    check_layout("bitwright", stored, TensorEntry(spec, weight.shape, outliers, value_bits))


def _check_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"bitwright::linear: x is {x.dtype} {list(x.shape)}, needed floats [..., {weight.in_features}]"
        )
    if bias is not None and (tuple(bias.shape) != (weight.out_features,) or bias.device != x.device):
        raise ValueError(
            f"bitwright::linear: bias is {list(bias.shape)} on {bias.device}, "
            f"needed [{weight.out_features}] on {x.device}"
        )


def _no_gradient(ctx: object, *gradients: Tensor) -> None:
    raise NotImplementedError("bitwright operators have no backward; run quantized models under torch.no_grad()")


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "linear": partial(_linear, sites=False),
    "site_linear": partial(_linear, sites=True),
    "embedding": _embedding,
}
for _name, _function in _FUNCTIONS.items():
    # One implementation for all devices: the checks come first, then the table above chooses the kernel.
    _LIBRARY.impl(_name, partial(_function, fake=False), "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitwright::{_name}", partial(_function, fake=True), lib=_LIBRARY)
    torch.library.register_autograd(f"bitwright::{_name}", _no_gradient, lib=_LIBRARY)
