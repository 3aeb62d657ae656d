"""Modules that hold packed weights: `QuantizedLinear`, `QuantizedEmbedding`, and `TiedLinear` for heads.

Buffers bear the names and types of the native format, so a state dict of these modules *is* the format.
Moving a module keeps those types whatever `dtype` is asked for: a scale rounded to another type would shift
the grid under its codes. Only the bias and an embedding's output follow `module.to(dtype)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from bitwright.formats.native import PART_NAMES, TensorEntry, check_parts, pack, parts, unpack
from bitwright.numeric.activation import InputSite
from bitwright.numeric.hadamard import hadamard_blocks
from bitwright.numeric.qtensor import QTensor
from bitwright.runtime import ops, reference
from bitwright.runtime.cpu import CpuWeight, HeldWeight, direct
from bitwright.runtime.reference import PackedWeight
from bitwright.runtime.triton.layout import supports
from bitwright.words import CpuMode


class PackedModule(nn.Module):
    """Base of the modules that own a packed matrix [out, in]; its buffers are the parts of `entry`."""

    # Arithmetic of products on the CPU; see `runtime.cpu` and `set_cpu_mode`.
    cpu_mode: CpuMode = "exact"
    # See `keep_packed_on_cpu`.
    packed_on_cpu: bool = False

    def __init__(self, entry: TensorEntry, device: torch.device | str | None = None) -> None:
        """Uninitialized buffers on `device` ("meta" allocates nothing)."""
        super().__init__()
        self.entry = entry
        self.out_features, self.in_features = entry.shape
        self._held = HeldWeight()
        for name, (shape, dtype) in parts(entry).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    def stored(self) -> dict[str, Tensor]:
        """The parts by local name, as the format stores them."""
        return {name: buffer for name, buffer in self._buffers.items() if name in PART_NAMES and buffer is not None}

    def packed(self) -> PackedWeight:
        """The parts as a kernel receives them."""
        return PackedWeight.of(self.stored(), self.entry.spec, self.in_features)

    def cpu_weight(self) -> CpuWeight | None:
        """The parts as laid out for the compiled kernels, made when first asked for; None where there are none."""
        kernel = ops.cpu_kernel()
        if kernel is None:
            return None
        return self._held.get(kernel, [buffer for buffer in self._buffers.values() if buffer is not None], self.packed)

    def product(self, x: Tensor, bias: Tensor | None, mode: CpuMode, site: InputSite | None = None) -> Tensor:
        """`x` [..., in] times the transposed weight, plus `bias` [out].

        `mode` only matters to the compiled kernels; `site` is what `at_site` left to those that quantize `x`.
        """
        if site is not None:
            return ops.site_linear(x, self.packed(), bias, site)
        # What is not plain and right goes through the operator, whose checks say what is wrong.
        fits = direct(x) and x.dtype in CpuWeight.DTYPES and x.dim() > 0 and x.shape[-1] == self.in_features
        weight = self.cpu_weight() if fits else None
        return ops.linear(x, self.packed(), bias) if weight is None else weight.linear(x, bias, mode)

    def load_parts(self, name: str, stored: Mapping[str, Tensor]) -> None:
        """Take over `stored` after checking it; `name` goes into messages.

        Raises:
            FormatError: `stored` breaks any rule of the native format.
        """
        check_parts(name, stored, self.entry)
        for part, tensor in stored.items():
            setattr(self, part, tensor)

    def qtensor(self, name: str) -> QTensor:
        """The canonical form of the weight; `name` goes into messages."""
        return unpack(name, self.stored(), self.entry)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] as `dtype`, on the device of the parts."""
        return reference.dequantize(self.packed(), dtype)

    def extra_repr(self) -> str:
        """Sizes, spec and outliers, as printed in the model."""
        outliers = f", outliers={self.entry.outliers}" if self.entry.outliers else ""
        return f"{self.in_features}, {self.out_features}, {self.entry.spec.label()}{outliers}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        before = self.stored()
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self.get_buffer(name)
            if self.packed_on_cpu and after.device.type != "cpu":
                setattr(self, name, tensor)
            elif after.dtype != tensor.dtype:
                setattr(self, name, tensor.to(after.device))
        return self


def at_site(x: Tensor, site: InputSite | None) -> tuple[Tensor, InputSite | None]:
    """`x` as a product receives it, and the site if kernels of its device may quantize `x` themselves."""
    if site is None:
        return x, None
    if site.activation is not None and ops.quantizes_inputs(x.device):
        return (x if site.transform is None else hadamard_blocks(x)), site
    return site.apply(x), None


class QuantizedLinear(PackedModule):
    """`nn.Linear` over packed weights; the optional `bias` [out] is a plain parameter.

    `site` says what happens to the input first; None leaves it alone. Its activations are quantized in float
    (simulated), but on CUDA multiplied as integers where the weight allows it (`runtime.triton.w8a8`).
    """

    def __init__(
        self,
        entry: TensorEntry,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        site: InputSite | None = None,
    ) -> None:
        """Uninitialized; `dtype` is the type of the bias."""
        super().__init__(entry, device)
        self.site = site
        empty = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

    @classmethod
    def from_qtensor(cls, q: QTensor, bias: Tensor | None = None, site: InputSite | None = None) -> QuantizedLinear:
        """The module that computes with `q` and `bias` [out] on inputs as `site` has them.

        Raises:
            FormatError: `q` is inconsistent or not representable as stored.
        """
        module = cls(TensorEntry.of(q), device="meta", site=site)
        module.load_parts("QTensor", pack(q))
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out] of the type of `x`."""
        x, left = at_site(x, self.site)
        return self.product(x, self.bias, self.cpu_mode, left)

    def extra_repr(self) -> str:
        """As other packed modules, and the site."""
        return super().extra_repr() + ("" if self.site is None else f", input={self.site.label()}")


class QuantizedEmbedding(PackedModule):
    """`nn.Embedding` over packed weights [rows, in]: decodes only the rows asked for."""

    output_like: Tensor

    def __init__(
        self,
        entry: TensorEntry,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Uninitialized; `dtype` is the type of the output."""
        super().__init__(entry, device)
        # An empty buffer whose only property is a type: it follows `module.to(dtype)` and is never saved.
        self.register_buffer("output_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def from_qtensor(cls, q: QTensor, dtype: torch.dtype = torch.float32) -> QuantizedEmbedding:
        """The module that looks up rows of `q` and returns them as `dtype`.

        Raises:
            FormatError: `q` is inconsistent or not representable as stored.
        """
        module = cls(TensorEntry.of(q), dtype)
        module.load_parts("QTensor", pack(q))
        return module

    @property
    def output_dtype(self) -> torch.dtype:
        """Type of the output."""
        return self.output_like.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `ids` (any shape), [*ids.shape, in]."""
        weight = self.cpu_weight() if direct(ids) and ids.dtype in (torch.int32, torch.int64) else None
        if weight is None:
            return ops.embedding(ids, self.packed(), self.output_dtype)
        return weight.rows(ids, self.output_dtype)


class TiedLinear(nn.Module):
    """A head [rows, in] that multiplies by a quantized embedding's weight and owns no tensor of its own."""

    cpu_mode: CpuMode = "exact"

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        """Share `embedding`; it must stay part of the same model, which moves and saves it."""
        super().__init__()
        self.out_features, self.in_features = embedding.out_features, embedding.in_features
        # In a tuple, the embedding is no submodule: its buffers appear once in the state dict.
        self._shared = (embedding,)

    @property
    def embedding(self) -> QuantizedEmbedding:
        """The embedding whose weight this head uses."""
        return self._shared[0]

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., rows] of the type of `x`."""
        return self.embedding.product(x, None, self.cpu_mode)

    def extra_repr(self) -> str:
        """Sizes, as printed in the model."""
        return f"{self.in_features}, {self.out_features}, tied"


def set_cpu_mode(model: nn.Module, mode: CpuMode) -> None:
    """Declare the arithmetic of the compiled CPU kernels for all quantized linears and heads of `model`.

    `exact`, the default: float32 inputs. `fast`: inputs in int8 (see `runtime.cpu`), which moves outputs by 0.5 % for
    Gaussian inputs and by 1.3 % where every 32 columns hold one far larger than the rest; ignored where the compiled
    kernels do not serve: other devices, `torch.compile`, float64.

    Raises:
        ValueError: there is no such mode, or `model` has no quantized linear.
    """
    if mode not in get_args(CpuMode):
        raise ValueError(f"mode is {mode!r}, needed one of {', '.join(get_args(CpuMode))}")
    modules = [module for module in model.modules() if isinstance(module, QuantizedLinear | TiedLinear)]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no quantized linear; load a folder of the native format")
    for module in modules:
        module.cpu_mode = mode


def keep_packed_on_cpu(model: nn.Module, keep: bool = True) -> int:
    """Move the packed parts of `model` to the CPU's memory, where they stay wherever `model` moves from now on.

    On CUDA the kernels' layout, made of each weight at its first use, is then the only copy on the device; state dicts
    and saving find the parts on the CPU. Weights that have no such layout (`runtime.triton.layout.supports`) are left
    alone. Without `keep` the parts follow the model again, from its next `model.to(device)` on.

    Returns:
        Packed modules that this holds for.

    Raises:
        ValueError: `model` is still on the meta device.
    """
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    if any(module.weight_packed.is_meta for module in modules):
        raise ValueError(f"{type(model).__name__} has weights on the meta device; load them first")
    modules = [module for module in modules if supports(module.packed())]
    for module in modules:
        module.packed_on_cpu = keep
        for name, tensor in module.stored().items() if keep else ():
            setattr(module, name, tensor.cpu())
    return len(modules)
