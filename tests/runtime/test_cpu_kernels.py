"""The compiled CPU kernels: float64 on every instruction set, hostile inputs, threads, and who holds layouts."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import FormatError, PlanError
from bitwright.formats.native import pack
from bitwright.numeric.measure import sqnr_db, squared_error
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime import cpu, ops, reference
from bitwright.runtime.cpu import CpuKernel, CpuWeight, HeldWeight, instruction_sets
from bitwright.runtime.linear import QuantizedEmbedding, QuantizedLinear, TiedLinear, set_cpu_mode
from bitwright.runtime.reference import PackedWeight

Make = Callable[..., QTensor]

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the compiled kernels are not built, or turned off")

SYMMETRIC, INT_ZERO, FLOAT_ZERO = {"symmetric": True}, {"zero": "int"}, {"zero": "float"}


def two_level(size: int, scale_bits: int, zero_bits: int | None) -> dict:
    level = {"axis": "row", "size": size, "scale_bits": scale_bits, "zero_bits": zero_bits}
    return {"zero": "float", "bilevel": level}


# (out, in), group size, kind, share of outliers, their bits. Together: whole and ragged tiles of rows, chunks, panels
# and groups; groups padded to 16 and to 32; each kind of scale and zero that the kernels know.
CASES = {
    "whole": ((32, 256), 32, SYMMETRIC, 0.0, 16),
    "ragged rows": ((19, 128), 64, INT_ZERO, 0.01, 16),
    "ragged columns": ((16, 597), 128, INT_ZERO, 0.02, 8),
    "channel": ((7, 301), None, FLOAT_ZERO, 0.05, 16),
    "narrow": ((33, 304), 16, FLOAT_ZERO, 0.02, 8),
    "odd narrow": ((5, 45), 16, INT_ZERO, 0.1, 16),
    "padded to 16": ((9, 100), 12, INT_ZERO, 0.05, 16),
    "padded to 32": ((9, 310), 24, SYMMETRIC, 0.05, 16),
    "bfloat16": ((20, 96), 32, {"zero": "float", "scale_dtype": "bfloat16"}, 0.0, 16),
    "levels": ((50, 304), 16, two_level(16, 3, 3), 0.02, 16),
    "levels, large": ((50, 160), 32, two_level(32, 4, 2), 0.02, 8),
    "levels, decoded": ((20, 96), 16, two_level(4, 3, 3), 0.0, 16),
    "scale levels": ((20, 96), 16, two_level(16, 3, None), 0.0, 16),
    "one weight": ((1, 1), None, INT_ZERO, 0.0, 16),
}
ROWS = (1, 2, 3, 8, 21)


def make_weight(make_qtensor: Make, case: str, bits: int) -> tuple[QTensor, CpuWeight]:
    shape, group_size, kind, share, value_bits = CASES[case]
    q = make_qtensor(shape, WeightSpec(bits=bits, group_size=group_size, **kind), share, bits, value_bits)
    return q, CpuWeight.of(packed(q))


def packed(q: QTensor) -> PackedWeight:
    return PackedWeight.of(pack(q), q.spec, q.shape[1])


def sqnr(expected: Tensor, found: Tensor) -> float:
    return sqnr_db(*squared_error(expected, found))


def rounded_inputs(x: Tensor, q: QTensor) -> Tensor:
    """Inputs as fast mode sees them: 32 columns of a group, or two groups of up to 16, share a range."""
    width, groups = q.spec.group_width(q.shape[1]), q.spec.groups(q.shape[1])
    parts = [x[:, i * width : (i + 1) * width] for i in range(groups)]
    if groups > 1 and width <= 16:
        chunks = [torch.cat(parts[i : i + 2], dim=1) for i in range(0, groups, 2)]
    else:
        chunks = [chunk for part in parts for chunk in part.split(32, dim=1)]
    largest = [chunk.abs().amax(dim=1, keepdim=True) for chunk in chunks]
    return torch.cat([torch.round(c * (127 / a)).double() * (a / 127) for c, a in zip(chunks, largest, strict=True)], 1)


# --- arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_both_modes_are_what_they_say(make_qtensor: Make, bits: int, case: str) -> None:
    q, weight = make_weight(make_qtensor, case, bits)
    grid, whole = q.grid.decode(q.codes).double(), q.dequantize().double()
    bias = torch.randn(q.shape[0])
    for rows in ROWS:
        x = torch.randn(rows, q.shape[1])
        assert sqnr(x.double() @ whole.T + bias.double(), weight.linear(x, bias)) > 115
        # Outliers meet the inputs as they came.
        expected = rounded_inputs(x, q) @ grid.T + x.double() @ (whole - grid).T
        assert sqnr(expected, weight.linear(x, mode="fast")) > 110
    ids = torch.randint(q.shape[0], (3, 2))
    assert torch.equal(weight.rows(ids, torch.float32), q.dequantize()[ids])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("case", ["ragged rows", "narrow", "levels"])
def test_every_output_is_written_and_nothing_else(make_qtensor: Make, case: str, mode: str) -> None:
    q, weight = make_weight(make_qtensor, case, 3)
    for rows in ROWS:
        x = torch.randn(rows, q.shape[1])
        size, guard = rows * q.shape[0], 64
        poisoned = torch.full((size + 2 * guard,), torch.nan)
        weight.native.multiply(x.data_ptr(), 0, poisoned.data_ptr() + 4 * guard, rows, mode == "fast", 1)
        assert torch.isfinite(poisoned[guard:-guard]).all()
        assert poisoned[:guard].isnan().all()
        assert poisoned[-guard:].isnan().all()
        assert torch.equal(poisoned[guard:-guard].view(rows, -1), weight.linear(x, mode=mode))


# Fast mode against the float64 product with the same weights, in dB: independent of the bits of the weights, whose
# codes are exact. Inputs of one large channel in 64, at 30 times the rest, lose what shares their 32 columns.
@pytest.mark.parametrize("bits", range(2, 9))
def test_error_of_fast_mode(quantize_minmax: Make, bits: int) -> None:
    q = quantize_minmax(torch.randn(128, 512), WeightSpec(bits=bits, group_size=128), 0.002)
    weight, x = CpuWeight.of(packed(q)), torch.randn(64, 512)
    wild = x * torch.where(torch.arange(512) % 64 == 5, 30.0, 1.0)
    for inputs, floor_db in ((x, 42), (wild, 38)):
        assert sqnr(inputs.double() @ q.dequantize().double().T, weight.linear(inputs, mode="fast")) > floor_db


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_values_that_are_not_finite_come_through(make_qtensor: Make, mode: str) -> None:
    q, weight = make_weight(make_qtensor, "whole", 4)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(3, q.shape[1])
        x[1, 70] = value
        found = weight.linear(x, mode=mode)
        assert torch.isfinite(found[[0, 2]]).all()
        assert not torch.isfinite(found[1]).any()
    for value in (0.0, 1e-38, 1e-42):
        assert torch.isfinite(weight.linear(torch.full((2, q.shape[1]), value), mode=mode)).all()


@pytest.mark.usefixtures("isa")
def test_largest_codes_and_inputs_do_not_overflow() -> None:
    for bits in range(2, 9):
        spec = WeightSpec(bits=bits, group_size=None, symmetric=True)
        module = QuantizedLinear.from_qtensor(_constant(spec, (16, 4096), spec.max_code))
        x = torch.ones(2, 4096)
        expected = float((spec.max_code - spec.centre) * 4096)
        weight = CpuWeight.of(module.packed())
        for inputs, sign in ((x, 1), (-x, -1)):
            for mode in ("exact", "fast"):
                assert torch.allclose(weight.linear(inputs, mode=mode), torch.tensor(sign * expected), rtol=1e-6)


def _constant(spec: WeightSpec, shape: tuple[int, int], code: int) -> QTensor:
    from bitwright.numeric.grid import Grid

    groups = (shape[0], spec.groups(shape[1]))
    grid = Grid(torch.ones(groups), torch.full(groups, float(spec.centre)), spec)
    return QTensor(torch.full(shape, code, dtype=torch.uint8), grid)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_more_rows_than_are_packed_at_once(make_qtensor: Make, mode: str) -> None:
    q, weight = make_weight(make_qtensor, "ragged rows", 4)
    x = torch.randn(1100, q.shape[1])
    found = weight.linear(x, mode=mode)
    assert torch.equal(found[:512], weight.linear(x[:512], mode=mode))
    assert torch.equal(found[1024:], weight.linear(x[1024:], mode=mode))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs(make_qtensor: Make, dtype: torch.dtype) -> None:
    q, weight = make_weight(make_qtensor, "ragged rows", 4)
    x, bias = torch.randn(2, 3, q.shape[1]).to(dtype), torch.randn(q.shape[0]).to(dtype)
    assert torch.equal(weight.linear(x, bias), weight.linear(x.float(), bias.float()).to(dtype))


# --- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_keep_threads")
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_threads_do_not_matter(make_qtensor: Make, mode: str) -> None:
    weight, inputs, expected = _work_for_threads(make_qtensor, mode)
    for threads in (2, 3, 4, 1):
        torch.set_num_threads(threads)
        for x, wanted in zip(inputs, expected, strict=True):
            assert torch.equal(weight.linear(x, mode=mode), wanted)


@pytest.mark.usefixtures("_keep_threads")
def test_several_callers_at_once(make_qtensor: Make) -> None:
    weight, inputs, expected = _work_for_threads(make_qtensor, "fast")
    torch.set_num_threads(3)
    wrong: list[int] = []

    def call() -> None:
        for _ in range(10):
            for i, x in enumerate(inputs):
                if not torch.equal(weight.linear(x, mode="fast"), expected[i]):
                    wrong.append(i)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.usefixtures("_keep_threads")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own(make_qtensor: Make) -> None:
    weight, inputs, expected = _work_for_threads(make_qtensor, "exact")
    torch.set_num_threads(2)
    assert torch.equal(weight.linear(inputs[-1]), expected[-1])
    with warnings.catch_warnings():
        # Newer Pythons warn of any fork beside threads.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        # No PyTorch operation here: its own threads did not survive.
        result = torch.empty(0).new_empty(expected[-1].shape)
        x = inputs[-1]
        weight.native.multiply(x.data_ptr(), 0, result.data_ptr(), x.shape[0], False, 2)
        os._exit(0 if result.tolist() == expected[-1].tolist() else 1)
    assert os.waitpid(child, 0)[1] == 0


def _work_for_threads(make_qtensor: Make, mode: str) -> tuple[CpuWeight, list[Tensor], list[Tensor]]:
    """A weight, inputs that are worth four threads, and what one thread makes of them."""
    q = make_qtensor((1000, 640), WeightSpec(bits=3, group_size=16, **two_level(16, 3, 3)), 0.01)
    weight, inputs = CpuWeight.of(packed(q)), [torch.randn(rows, 640) for rows in (1, 3, 33)]
    torch.set_num_threads(1)
    return weight, inputs, [weight.linear(x, mode=mode) for x in inputs]


# --- hostile inputs ------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused(make_qtensor: Make) -> None:
    q, weight = make_weight(make_qtensor, "ragged rows", 3)
    x = torch.randn(2, q.shape[1])
    for wrong in (x[:, 1:], x.double(), x.long(), x.to("meta"), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"needed float32, float16 or bfloat16 \[\.\.\., 128\] on cpu"):
            weight.linear(wrong)
    for bias in (torch.zeros(18), torch.zeros(19, 1), torch.zeros(19, device="meta")):
        with pytest.raises(ValueError, match=r"bias is .* needed \[19\] on cpu"):
            weight.linear(x, bias)
    with pytest.raises(ValueError, match="mode is 'quick', needed 'exact' or 'fast'"):
        weight.linear(x, mode="quick")
    for ids in (torch.tensor([19]), torch.tensor([0, -1])):
        with pytest.raises(IndexError, match=r"needed rows 0\.\.18"):
            weight.rows(ids, torch.float32)
    for ids in (torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1], device="meta")):
        with pytest.raises(ValueError, match="needed int32 or int64 on cpu"):
            weight.rows(ids, torch.float32)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_inputs_of_any_layout(make_qtensor: Make, mode: str) -> None:
    q, weight = make_weight(make_qtensor, "ragged columns", 3)
    x, bias = torch.randn(4, q.shape[1]), torch.randn(q.shape[0])
    expected = weight.linear(x, bias, mode)
    offset = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert offset.data_ptr() % 16 != 0
    for same in (x.T.contiguous().T, torch.cat([x, x], 1)[:, : x.shape[1]], offset, x.view(2, 2, -1)):
        assert torch.equal(weight.linear(same, bias, mode).view_as(expected), expected)
    assert torch.equal(weight.linear(x, bias.repeat_interleave(2)[::2], mode), expected)
    for shape in ((0,), (2, 0), (0, 3)):
        assert weight.linear(torch.empty(*shape, x.shape[1]), bias, mode).shape == (*shape, 16)
    assert weight.linear(x[0], bias, mode).shape == (16,)
    assert weight.rows(torch.empty(0, 2).long(), torch.float16).shape == (0, 2, x.shape[1])


def test_damaged_weights_are_refused_before_any_kernel(make_qtensor: Make) -> None:
    q = make_qtensor((6, 300), WeightSpec(bits=3, group_size=32), 0.05)
    good = packed(q)
    assert good.outlier_idx is not None
    assert good.weight_scale is not None
    damaged = [
        ({"outlier_idx": torch.full_like(good.outlier_idx, 255)}, "outlier_idx"),
        ({"outlier_counts": torch.zeros_like(good.outlier_counts)}, "outlier_counts"),
        ({"weight_scale": good.weight_scale * torch.nan}, "weight_scale: holds NaN"),
        ({"weight_packed": torch.full_like(good.weight_packed, -1)}, "padding bits"),
        ({"weight_packed": good.weight_packed[:, 1:].contiguous()}, "weight_packed: found"),
    ]
    for changes, message in damaged:
        with pytest.raises(FormatError, match=message):
            CpuWeight.of(replace(good, **changes))
        with pytest.raises(FormatError, match=message):
            ops.linear(torch.randn(1, 300), replace(good, **changes))


def test_native_parts_of_any_alignment(make_qtensor: Make) -> None:
    q = make_qtensor((6, 300), WeightSpec(bits=3, group_size=32), 0.05)
    x, good = torch.randn(2, 300), packed(q)
    odd = {}
    for name, tensor in good.stored().items():
        odd[name] = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor).copy_(tensor)
    assert torch.equal(CpuWeight.of(replace(good, **odd)).linear(x), CpuWeight.of(good).linear(x))


def test_environment(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    q = make_qtensor((8, 64), WeightSpec(bits=4, group_size=32))
    monkeypatch.setenv("BITWRIGHT_ISA", "z80")
    with pytest.raises(PlanError, match="BITWRIGHT_ISA is 'z80', needed one of baseline"):
        CpuWeight.of(packed(q))
    monkeypatch.setenv("BITWRIGHT_NATIVE", "0")
    module, x = QuantizedLinear.from_qtensor(q), torch.randn(2, 64)
    assert module.cpu_weight() is None
    assert torch.equal(module(x), reference.linear(x, packed(q), None))


def test_without_a_usable_module(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "INTERFACE", (0, 0, 0, 0))
    monkeypatch.setattr(cpu, "_NATIVE", cpu._load_native())
    assert not cpu.available()
    assert instruction_sets() == []
    q, x = make_qtensor((8, 64), WeightSpec(bits=4, group_size=32)), torch.randn(2, 64)
    assert torch.equal(QuantizedLinear.from_qtensor(q)(x), reference.linear(x, packed(q), None))


# --- modules -------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(make_qtensor: Make) -> QuantizedLinear:
    return QuantizedLinear.from_qtensor(make_qtensor((24, 96), WeightSpec(bits=4, group_size=32), 0.02), torch.ones(24))


def test_a_module_makes_its_layout_once(module: QuantizedLinear) -> None:
    x = torch.randn(3, 96)
    first = module(x)
    held = module.cpu_weight()
    assert held is not None
    assert torch.equal(module(x), first)
    assert module.to("cpu").cpu_weight() is held
    # The operator finds the same layout.
    kernel = ops.cpu_kernel()
    assert kernel is not None
    assert kernel.prepared(module.packed()) is held
    assert torch.equal(ops.linear(x, module.packed(), module.bias), first)


def test_a_layout_is_dropped_when_a_part_changes(module: QuantizedLinear) -> None:
    x = torch.randn(3, 96)
    module(x)
    held = module.cpu_weight()
    module.get_buffer("weight_scale").mul_(2)
    assert module.cpu_weight() is not held
    torch.testing.assert_close(module(x), reference.linear(x, module.packed(), module.bias))
    held = module.cpu_weight()
    module.weight_scale = module.get_buffer("weight_scale") * 2
    assert module.cpu_weight() is not held
    torch.testing.assert_close(module(x), reference.linear(x, module.packed(), module.bias))
    other = {name: tensor.flip(0) for name, tensor in module.stored().items() if name == "weight_packed"}
    module.load_state_dict({**module.state_dict(), **other})
    torch.testing.assert_close(module(x), reference.linear(x, module.packed(), module.bias))
    module.to("meta")
    assert module.cpu_weight() is None


def test_layouts_die_with_their_weight(module: QuantizedLinear) -> None:
    module(torch.randn(1, 96))
    held = module.cpu_weight()
    assert held is not None
    gone = weakref.ref(held)
    del held, module.weight_packed
    module._held = HeldWeight()
    gc.collect()
    assert gone() is None


def test_copies_start_without_a_layout(module: QuantizedLinear) -> None:
    x = torch.randn(3, 96)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other._held._weight is None
        assert torch.equal(other(x), expected)
        assert other.cpu_weight() is not module.cpu_weight()


def test_a_registered_kernel_serves_modules_too(module: QuantizedLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 96)
    monkeypatch.setitem(ops._linear_kernels, "cpu", lambda x, weight, bias: reference.linear(x, weight, bias) + 1)
    assert module.cpu_weight() is None
    assert torch.equal(module(x), reference.linear(x, module.packed(), module.bias) + 1)


def test_modules_refuse_as_the_operator_does(module: QuantizedLinear) -> None:
    with pytest.raises(ValueError, match=r"bitwright::linear: x is .* needed floats \[\.\.\., 96\]"):
        module(torch.randn(3, 95))
    with pytest.raises(NotImplementedError, match="no backward"):
        module(torch.randn(3, 96, requires_grad=True)).sum().backward()
    with torch.no_grad():
        assert not module(torch.randn(3, 96, requires_grad=True)).requires_grad
    assert module(torch.randn(3, 96).double()).dtype == torch.float64


def test_mode_is_declared_for_a_model(make_qtensor: Make, module: QuantizedLinear) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = QuantizedEmbedding.from_qtensor(make_qtensor((500, 96), WeightSpec(bits=4, group_size=32)))
            self.proj = module
            self.head = TiedLinear(self.embed)

    model, x = Model(), torch.randn(5, 96)
    exact = [model.proj(x), model.head(x)]
    set_cpu_mode(model, "fast")
    assert (model.proj.cpu_mode, model.head.cpu_mode) == ("fast", "fast")
    for found, wanted in zip([model.proj(x), model.head(x)], exact, strict=True):
        assert 35 < sqnr(wanted, found) < 60
    assert copy.deepcopy(model).proj.cpu_mode == "fast"
    set_cpu_mode(model, "exact")
    assert torch.equal(model.head(x), exact[1])
    # Lookup and head share one layout.
    assert torch.equal(model.embed(torch.tensor([[3, 499]])), model.embed.dequantize()[[3, 499]][None])
    with pytest.raises(ValueError, match="mode is 'quick', needed one of exact, fast"):
        set_cpu_mode(model, "quick")
    with pytest.raises(ValueError, match="Linear has no quantized linear"):
        set_cpu_mode(nn.Linear(2, 2), "fast")


def test_what_the_kernels_do_not_take(make_qtensor: Make) -> None:
    q = make_qtensor((8, 64), WeightSpec(bits=4, group_size=4))
    assert not cpu.supports(packed(q))
    assert CpuKernel().prepared(packed(q)) is None
    x = torch.randn(2, 64)
    assert torch.equal(QuantizedLinear.from_qtensor(q)(x), reference.linear(x, packed(q), None))
