"""The compiled kernels for the CPU: `CpuWeight`, a packed weight laid out for them, and `CpuKernel`, which makes those.

The layout (csrc/cpu/matmul.hpp) is made from the native format when a weight is first used and never stored, beside the
parts themselves: it takes the codes' bits again, and 16 or 32 bits a group for each of scale and zero. Two-level grids
on the row axis with float16 statistics, codes of up to 4 bits and superblocks of a multiple of 16 rows stay as they
are; others are decoded to one level in float32. An outlier takes 6 bytes. Groups are padded to 16 or to a multiple of
32 columns.

Two modes, declared where a weight is used (`runtime.linear.set_cpu_mode`), never chosen by themselves:

- `exact`: weights are decoded in registers to the very values of `QTensor.dequantize` and multiplied by float32 inputs
  in float32. Differs from the reference by the order of summation alone.
- `fast`: inputs are rounded to int8, symmetrically, with a range for every token and 32 columns of its row; products
  are summed as integers, zeros corrected by the sums of inputs, outliers multiplied by the float inputs.

Results do not depend on the number of threads, `torch.get_num_threads()`. `BITWRIGHT_NATIVE=0` turns the kernels off;
`BITWRIGHT_ISA` names an instruction set to use instead of the machine's best.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bitwright.errors import PlanError
from bitwright.formats.native import TensorEntry, check_parts
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime import reference
from bitwright.runtime.reference import PackedWeight
from bitwright.words import CpuMode

# Sizes of the layout, as csrc/cpu/matmul.hpp has them: rows of a tile, columns of a chunk and of a panel.
_TILE, _CHUNK, _PANEL = 16, 32, 128
# The interface of csrc/cpu/module.cpp that this file speaks.
INTERFACE = (1, _TILE, _CHUNK, _PANEL)
_CACHE_LINE = 64
# Narrower groups would be padded to more than twice their columns.
_LEAST_GROUP = 8
_SCALE_KINDS = {"float16": 0, "float32": 1, "levels": 2}
_ZERO_KINDS = {"constant": 0, "byte": 1, "float16": 2, "float32": 3, "levels": 4}


def _load_native() -> ModuleType | None:
    """The compiled module, if there is one of this version."""
    try:
        module = importlib.import_module("bitwright._native")
    except ImportError:
        return None
    return module if getattr(module, "MATMUL_INTERFACE", None) == INTERFACE else None


_NATIVE = _load_native()


def available() -> bool:
    """Whether the compiled kernels can be used; `rounding.columns.backend_reason` tells what is missing."""
    return _NATIVE is not None and os.environ.get("BITWRIGHT_NATIVE") != "0"


def instruction_sets() -> list[str]:
    """Names that BITWRIGHT_ISA may have on this machine, the best last; none without compiled kernels."""
    return [] if _NATIVE is None else list(_NATIVE.matmul_isas())


def instruction_set() -> str:
    """What the compiled kernels use: the best that this machine has, or what BITWRIGHT_ISA names.

    Raises:
        PlanError: it names none of this machine.
    """
    names = instruction_sets()
    chosen = os.environ.get("BITWRIGHT_ISA", names[-1])
    if chosen not in names:
        raise PlanError(
            f"BITWRIGHT_ISA is {chosen!r}, needed one of {', '.join(names)} on this machine; unset it to use the best"
        )
    return chosen


def supports(weight: PackedWeight) -> bool:
    """Whether the kernels take `weight`: on the CPU, in groups of 8 or more columns."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in weight.stored().values())
    return (
        available() and on_cpu and min(weight.group_size, weight.in_features) >= min(_LEAST_GROUP, weight.in_features)
    )


@dataclass(frozen=True)
class CpuWeight:
    """A weight [out, in] in the kernels' layout; made by `CpuWeight.of`."""

    # Types of inputs.
    DTYPES: ClassVar = (torch.float32, torch.float16, torch.bfloat16)

    out_features: int
    in_features: int
    tensors: tuple[Tensor, ...]  # what `native` has the addresses of
    native: Any

    @staticmethod
    def of(weight: PackedWeight) -> CpuWeight:
        """The layout of `weight`, which `supports` it. Takes a copy: `weight` may change afterwards.

        Raises:
            FormatError: `weight` breaks any rule of the native format.
            PlanError: BITWRIGHT_ISA names no instruction set of this machine.
        """
        assert _NATIVE is not None
        stored, spec = weight.stored(), weight.spec
        outliers = 0 if weight.outlier_val is None else weight.outlier_val.numel()
        value_bits = 16 if weight.outlier_step is None else 8
        check_parts("weight", stored, TensorEntry(spec, weight.shape, outliers, value_bits))
        width = spec.group_width(weight.in_features)
        kinds, grid = _grid(weight, spec)
        layout = _Padding.of(weight.in_features, width)
        tiles = -(-weight.out_features // _TILE)
        codes = torch.empty(tiles * layout.chunks * weight.bits * 64 + _CACHE_LINE, dtype=torch.uint8)
        # Vectors are read fastest from whole cache lines.
        codes = codes[-codes.data_ptr() % _CACHE_LINE :]
        sparse = _outliers(weight.outliers(), tiles, layout)
        tensors = (codes, *grid, *sparse)
        native = _NATIVE.Matrix(
            (*weight.shape, width, weight.bits),
            (*kinds, float(spec.centre)),
            tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
            instruction_set(),
        )
        words = weight.weight_packed.contiguous()
        native.repack(words.data_ptr(), words.shape[1], codes.data_ptr(), torch.get_num_threads())
        return CpuWeight(*weight.shape, tuple(tensor for tensor in tensors if tensor is not None), native)

    @property
    def bytes(self) -> int:
        """Memory of the layout."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors)

    def linear(self, x: Tensor, bias: Tensor | None = None, mode: CpuMode = "exact") -> Tensor:
        """`x` [..., in] times the transposed weight, plus `bias` [out]: [..., out] of the type of `x`.

        Args:
            x: float32, float16 or bfloat16 on the CPU.
            bias: floats on the CPU.
            mode: the arithmetic; see above.

        Raises:
            ValueError: an argument does not fit.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features or x.dtype not in self.DTYPES or x.device.type != "cpu":
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)} on {x.device}, "
                f"needed float32, float16 or bfloat16 [..., {self.in_features}] on cpu"
            )
        if mode not in ("exact", "fast"):
            raise ValueError(f"mode is {mode!r}, needed 'exact' or 'fast'")
        shift = 0
        if bias is not None:
            if tuple(bias.shape) != (self.out_features,) or bias.device.type != "cpu":
                raise ValueError(f"bias is {list(bias.shape)} on {bias.device}, needed [{self.out_features}] on cpu")
            bias = bias.float().contiguous()
            shift = bias.data_ptr()
        inputs = x.float().contiguous()
        result = torch.empty(*x.shape[:-1], self.out_features)
        rows = inputs.numel() // self.in_features
        if rows:
            threads = torch.get_num_threads()
            self.native.multiply(inputs.data_ptr(), shift, result.data_ptr(), rows, mode == "fast", threads)
        return result if x.dtype == torch.float32 else result.to(x.dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` (int32 or int64, any shape) as `dtype`, [*ids.shape, in].

        Raises:
            ValueError: `ids` are not integers on the CPU.
            IndexError: a row does not exist.
        """
        if ids.dtype not in (torch.int32, torch.int64) or ids.device.type != "cpu":
            raise ValueError(f"ids are {ids.dtype} on {ids.device}, needed int32 or int64 on cpu")
        places = ids.to(torch.int64).contiguous()
        result = torch.empty(*ids.shape, self.in_features)
        if places.numel():
            low, high = (int(value) for value in torch.aminmax(places))
            if low < 0 or high >= self.out_features:
                raise IndexError(f"ids lie in {low}..{high}, needed rows 0..{self.out_features - 1}")
            self.native.decode_rows(places.data_ptr(), places.numel(), result.data_ptr())
        return result.to(dtype)


# --- the layout ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Padding:
    """Where columns stand once groups are padded; as `complete` in csrc/cpu/repack.cpp."""

    group_width: int
    padded_width: int
    chunks: int

    @staticmethod
    def of(in_features: int, width: int) -> _Padding:
        groups = -(-in_features // width)
        if groups > 1 and width <= _CHUNK // 2:
            return _Padding(width, _CHUNK // 2, -(-groups // 2))
        padded = -(-width // _CHUNK) * _CHUNK
        last = in_features - (groups - 1) * width
        return _Padding(width, padded, ((groups - 1) * padded + -(-last // _CHUNK) * _CHUNK) // _CHUNK)

    def column(self, column: Tensor) -> Tensor:
        """Padded columns of `column`."""
        return column // self.group_width * self.padded_width + column % self.group_width


def _tiled(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` [out, groups] as `dtype` [tiles, groups, 16]; rows that do not exist are 0."""
    rows, groups = values.shape
    tiles = -(-rows // _TILE)
    padded = torch.zeros(tiles * _TILE, groups, dtype=dtype)
    padded[:rows] = values.to(dtype)
    return padded.view(tiles, _TILE, groups).transpose(1, 2).contiguous()


def _grid(weight: PackedWeight, spec: WeightSpec) -> tuple[tuple[int, int], tuple[Tensor | None, ...]]:
    """Kinds of scale and zero, and their tensors: scale, zero, statistics."""
    if spec.scale_dtype == "float16" and reference.packs_levels(spec, _TILE):
        codes, statistics = reference.packed_levels(weight, _TILE)
        return (_SCALE_KINDS["levels"], _ZERO_KINDS["levels"]), (_tiled(codes, torch.uint8), None, statistics)
    grid = weight.grid()
    # One level stored as float16 stays so; bfloat16 and decoded levels need float32.
    half = spec.bilevel is None and spec.scale_dtype == "float16"
    float_kind, dtype = ("float16", torch.float16) if half else ("float32", torch.float32)
    scale = _tiled(grid.scale, dtype)
    if spec.symmetric:
        return (_SCALE_KINDS[float_kind], _ZERO_KINDS["constant"]), (scale, None, None)
    if spec.zero == "int":
        return (_SCALE_KINDS[float_kind], _ZERO_KINDS["byte"]), (scale, _tiled(grid.zero, torch.uint8), None)
    return (_SCALE_KINDS[float_kind], _ZERO_KINDS[float_kind]), (scale, _tiled(grid.zero, dtype), None)


def _outliers(outliers: Outliers | None, tiles: int, layout: _Padding) -> tuple[Tensor | None, ...]:
    """Start of every panel, place within it, and residual: bucketed by tile and panel, rising by column and row."""
    if outliers is None:
        return None, None, None
    rows, column = outliers.rows(), layout.column(outliers.column)
    panels = -(-layout.chunks * _CHUNK // _PANEL)
    bucket = rows // _TILE * panels + column // _PANEL
    place = column % _PANEL * _TILE + rows % _TILE
    order = torch.argsort(bucket * (_PANEL * _TILE) + place)
    start = torch.zeros(tiles * panels + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(bucket, minlength=tiles * panels), 0, out=start[1:])
    # Places are below 2^12, so int16 holds them as the kernels read them.
    return start.to(torch.int32), place[order].to(torch.int16), outliers.residual[order].float()


# --- who holds it --------------------------------------------------------------------------------------------------


def _stamp(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """What changes when the contents of `tensors` do."""
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


class CpuKernel:
    """The kernels behind `bitwright::linear` and `bitwright::embedding` on the CPU, in exact mode.

    Remembers the layout of each weight for as long as its `weight_packed` lives and no part of it changes.
    """

    def __init__(self) -> None:
        """Nothing is remembered yet."""
        self._prepared: Any = WeakIdKeyDictionary()

    def prepared(self, weight: PackedWeight) -> CpuWeight | None:
        """The layout of `weight`; None where `supports` does not hold.

        Raises:
            FormatError, ValueError: see `CpuWeight.of`.
        """
        if not supports(weight):
            return None
        # All parts but the first, which is the key, are held: another tensor cannot take an address meanwhile.
        parts = list(weight.stored().values())
        numbers = (weight.bits, weight.group_size, weight.in_features, tuple(weight.bilevel))
        stamp, isa = _stamp(parts), instruction_set()
        found = self._prepared.get(weight.weight_packed)
        if found is not None and found[:3] == (stamp, numbers, isa):
            made: CpuWeight = found[4]
            return made
        made = CpuWeight.of(weight)
        self._prepared[weight.weight_packed] = (stamp, numbers, isa, parts[1:], made)
        return made

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """A `LinearKernel`; what the kernels do not cover goes to the reference."""
        prepared = self.prepared(weight) if x.dtype in CpuWeight.DTYPES else None
        return reference.linear(x, weight, bias) if prepared is None else prepared.linear(x, bias)

    def embedding(self, ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """An `EmbeddingKernel`; what the kernels do not cover goes to the reference."""
        # float64 is exact too: every weight is a float32.
        prepared = self.prepared(weight)
        return reference.embedding(ids, weight, dtype) if prepared is None else prepared.rows(ids, dtype)


class HeldWeight:
    """A module's layout, for as long as its parts stay as they are; copies and pickles of the module start without."""

    def __init__(self) -> None:
        """Nothing is held yet."""
        self._parts: list[Tensor] = []
        self._stamp: tuple[tuple[int, int], ...] = ()
        self._weight: CpuWeight | None = None

    def get(self, kernel: CpuKernel, parts: list[Tensor], packed: Callable[[], PackedWeight]) -> CpuWeight | None:
        """The layout of `packed()`, whose tensors are `parts`; None where the kernels do not take it."""
        same = len(parts) == len(self._parts) and all(a is b for a, b in zip(parts, self._parts, strict=True))
        if same and self._stamp == _stamp(parts):
            return self._weight
        self._weight = kernel.prepared(packed())
        self._parts, self._stamp = parts, _stamp(parts)
        return self._weight

    def __reduce__(self) -> tuple[type[HeldWeight], tuple[()]]:
        """Without the layout: addresses mean nothing elsewhere."""
        return HeldWeight, ()


def direct(x: Tensor) -> bool:
    """Whether a module may pass `x` to a `CpuWeight` without the operator: eager, plain, on the CPU, no gradient."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu":
        return False
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return not (traced or (x.requires_grad and torch.is_grad_enabled()))
