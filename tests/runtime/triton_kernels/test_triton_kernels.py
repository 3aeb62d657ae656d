"""The Triton kernels against float64: every bit width, every kind of grid.

On a GPU where there is one, else in Triton's interpreter: `test_triton_interpreted.py` runs this file in a process of
its own, since the interpreter must be asked for before anything imports Triton, and transformers does.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright.formats.native import pack
from bitwright.numeric.measure import sqnr_db, squared_error
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime import ops, reference
from bitwright.runtime.reference import PackedWeight

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; test_triton_interpreted.py runs these", allow_module_level=True)

from bitwright.runtime.triton import configs, kernel
from bitwright.runtime.triton.kernel import TritonKernel
from bitwright.runtime.triton.layout import TritonWeight

Make = Callable[..., QTensor]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter rounds to bfloat16 towards zero, and multiplies matrices of it as if they were integers.
INTERPRETED = DEVICE.type == "cpu"
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
# SQNR that outputs must have: what rounding outputs, and for several rows weights, to the type of the inputs leaves.
FLOORS = {HALF: 60.0, BFLOAT: 42.0, FLOAT: 105.0}

SYMMETRIC, INT_ZERO, FLOAT_ZERO = {"symmetric": True}, {"zero": "int"}, {"zero": "float"}
LEVELS = {"zero": "float", "bilevel": {"axis": "row", "size": 16, "scale_bits": 3, "zero_bits": 3}}
WIDE_LEVELS = LEVELS | {"scale_dtype": "float32"}
COLUMN_LEVELS = {"zero": "float", "bilevel": {"axis": "column", "size": 8, "scale_bits": 6, "zero_bits": 6}}

# bits, (out, in), group size, kind, share of outliers, their bits, type of inputs. Together: every width; ragged tiles,
# units and groups; groups of half a unit, of units and of all; every kind of scale and zero.
CASES = {
    "w2g128": (2, (32, 256), 128, SYMMETRIC, 0.0, 16, HALF),
    "w3g128": (3, (40, 384), 128, INT_ZERO, 0.0, 16, HALF),
    "w3g16 levels": (3, (36, 300), 16, LEVELS, 0.02, 16, HALF),
    "w4g16 levels": (4, (16, 64), 16, WIDE_LEVELS, 0.02, 8, BFLOAT),
    "w4g32": (4, (19, 597), 32, INT_ZERO, 0.02, 16, BFLOAT),
    "w4g64": (4, (48, 320), 64, FLOAT_ZERO, 0.05, 8, HALF),
    "w4g128": (4, (130, 256), 128, INT_ZERO, 0.0, 16, HALF),
    "w4g48": (4, (9, 310), 48, FLOAT_ZERO | {"scale_dtype": "bfloat16"}, 0.05, 16, FLOAT),
    "w5g32": (5, (33, 96), 32, COLUMN_LEVELS, 0.0, 16, HALF),
    "w6 channel": (6, (7, 301), None, FLOAT_ZERO, 0.05, 16, BFLOAT),
    "w7g16": (7, (20, 100), 16, SYMMETRIC, 0.0, 16, HALF),
    "w8 channel": (8, (21, 230), None, SYMMETRIC, 0.01, 16, HALF),
    "one weight": (4, (1, 1), None, INT_ZERO, 0.0, 16, FLOAT),
}


def make_weight(make_qtensor: Make, case: str) -> tuple[QTensor, PackedWeight, torch.dtype]:
    bits, shape, group_size, kind, share, value_bits, dtype = CASES[case]
    q = make_qtensor(shape, WeightSpec(bits=bits, group_size=group_size, **kind), share, bits, value_bits)
    stored = {name: tensor.to(DEVICE) for name, tensor in pack(q).items()}
    return q, PackedWeight.of(stored, q.spec, shape[1]), dtype


def expected(q: QTensor, x: Tensor, bias: Tensor | None) -> Tensor:
    product = x.cpu().double() @ q.dequantize().double().T
    return product if bias is None else product + bias.cpu().double()


def sqnr(exact: Tensor, found: Tensor) -> float:
    return sqnr_db(*squared_error(exact, found.cpu()))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fresh memory is NaN, so that an output that no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_behind_the_last_scale_is_used(make_qtensor: Make, rows: int) -> None:
    # an odd number of groups of half a unit: the last unit's second half has none
    _, stored, dtype = make_weight(make_qtensor, "w7g16")
    weight = TritonWeight.of(stored)
    count = weight.scale.numel()
    behind = torch.full((count + 64,), torch.nan, dtype=weight.scale.dtype, device=DEVICE)
    behind[:count] = weight.scale.flatten()
    poisoned = replace(weight, scale=behind[:count].view(weight.scale.shape))
    x = torch.randn(rows, weight.in_features, device=DEVICE).to(dtype)
    assert torch.equal(kernel.linear(x, poisoned), kernel.linear(x, weight))


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_decoded_weight(make_qtensor: Make, case: str) -> None:
    q, stored, dtype = make_weight(make_qtensor, case)
    weight = TritonWeight.of(stored)
    bias = torch.randn(q.shape[0], device=DEVICE)
    x = torch.randn(1, q.shape[1], device=DEVICE).to(dtype)
    assert sqnr(expected(q, x, bias), kernel.gemv(x, weight, bias)) > FLOORS[dtype]
    if dtype != FLOAT:
        dtype = HALF if INTERPRETED else dtype
        x = torch.randn(5, q.shape[1], device=DEVICE).to(dtype)
        assert sqnr(expected(q, x, bias), kernel.gemm(x, weight, bias)) > FLOORS[dtype]


@pytest.mark.parametrize("case", CASES)
def test_decoded_weights_are_exact(make_qtensor: Make, case: str) -> None:
    q, stored, dtype = make_weight(make_qtensor, case)
    weight, rows = TritonWeight.of(stored), q.shape[0]
    whole = q.dequantize()
    assert torch.equal(kernel.dequantize(weight, FLOAT).cpu(), whole)
    if not (INTERPRETED and dtype == BFLOAT):
        assert torch.equal(kernel.dequantize(weight, dtype).cpu(), whole.to(dtype))
    if rows > 16:
        assert torch.equal(kernel.dequantize(weight, FLOAT, 16, rows - 16).cpu(), whole[16:])
    ids = torch.randint(rows, (2, 3))
    assert torch.equal(kernel.embedding(ids.to(DEVICE), weight, FLOAT).cpu(), whole[ids])


@pytest.mark.parametrize("rows", [17, 33, 64])
def test_every_block_of_rows(make_qtensor: Make, rows: int) -> None:
    q, stored, dtype = make_weight(make_qtensor, "w3g16 levels")
    x = torch.randn(rows, q.shape[1], device=DEVICE).to(dtype)
    assert sqnr(expected(q, x, None), kernel.gemm(x, TritonWeight.of(stored))) > FLOORS[dtype]


def test_splits_change_nothing_but_rounding_and_calls_repeat(
    make_qtensor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, stored, dtype = make_weight(make_qtensor, "w3g16 levels")
    weight, bias = TritonWeight.of(stored), torch.randn(q.shape[0], device=DEVICE)
    monkeypatch.setattr(configs, "gemv_config", lambda *shape: configs.GemvConfig(3, 4, 2, 4, 4))
    small = configs.GemmConfig(3, 4, 2, 4, 4, 64, 16, 2)
    monkeypatch.setattr(configs, "gemm_config", lambda *shape: small)
    for rows, function in ((1, kernel.gemv), (6, kernel.gemm)):
        x = torch.randn(rows, q.shape[1], device=DEVICE).to(dtype)
        found = function(x, weight, bias)
        assert sqnr(expected(q, x, bias), found) > FLOORS[dtype]
        assert torch.equal(found, function(x, weight, bias))


def test_configs_cover_every_column_once() -> None:
    for units in (1, 3, 18, 48, 128, 448, 896):
        for tiles in (1, 36, 256, 1792):
            config = configs.gemv_config(tiles, units)
            assert (config.splits - 1) * config.span < units <= config.splits * config.span
            assert config.span % config.block_units == 0
            for rows in (2, 16, 17, 64):
                small = configs.gemm_config(16 * tiles, units, rows)
                assert (small.splits - 1) * small.span < units <= small.splits * small.span
                assert small.span % small.block_units == 0
                assert rows <= small.block_rows


def test_the_seam(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    q, stored, _ = make_weight(make_qtensor, "w4g64")
    seam = TritonKernel()
    monkeypatch.setitem(ops._linear_kernels, DEVICE.type, seam.linear)
    monkeypatch.setitem(ops._embedding_kernels, DEVICE.type, seam.embedding)
    for shape in ((0,), (1,), (2, 3), (70,)):
        x = torch.randn(*shape, q.shape[1], device=DEVICE, dtype=HALF)
        found = ops.linear(x, stored)
        assert found.shape == (*shape, q.shape[0])
        if x.numel():
            assert sqnr(expected(q, x, None), found) > FLOORS[HALF]
    ids = torch.tensor([[1, 0]], device=DEVICE)
    assert torch.equal(ops.embedding(ids, stored, FLOAT).cpu(), q.dequantize()[torch.tensor([[1, 0]])])
    made = seam.prepared(stored)
    assert seam.prepared(stored) is made
    stored.weight_scale.mul_(2)
    again = seam.prepared(stored)
    assert again is not made
    # float64 and groups that no unit can hold go to the reference.
    x = torch.randn(1, q.shape[1], device=DEVICE, dtype=torch.float64)
    assert torch.equal(seam.linear(x, stored, None), reference.linear(x, stored, None))


def test_parts_on_the_cpu_are_laid_out_on_the_device(make_qtensor: Make) -> None:
    q, _, _ = make_weight(make_qtensor, "w4g64")
    parts, seam = PackedWeight.of(pack(q), q.spec, q.shape[1]), TritonKernel()
    made = seam.prepared(parts, DEVICE)
    assert made is not None
    assert made.device.type == DEVICE.type
    assert seam.prepared(parts, DEVICE) is made
    x = torch.randn(3, q.shape[1], device=DEVICE, dtype=HALF)
    assert sqnr(expected(q, x, None), seam.linear(x, parts, None)) > FLOORS[HALF]
    assert torch.equal(seam.embedding(torch.tensor([1], device=DEVICE), parts, FLOAT).cpu(), q.dequantize()[[1]])


def test_inputs_of_any_stride_and_offset(make_qtensor: Make) -> None:
    q, stored, dtype = make_weight(make_qtensor, "w4g64")
    weight = TritonWeight.of(stored)
    wide = torch.randn(8, 2 * q.shape[1] + 1, device=DEVICE).to(dtype)
    for x in (wide[:1, 1 : 1 + q.shape[1]], wide[:3, 1::2], wide[:1, 1::2]):
        assert sqnr(expected(q, x, None), kernel.linear(x, weight)) > FLOORS[dtype]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_calls_can_be_captured(make_qtensor: Make) -> None:
    q, stored, dtype = make_weight(make_qtensor, "w3g16 levels")
    seam = TritonKernel()
    for rows in (1, 4, 80):
        x = torch.randn(rows, q.shape[1], device=DEVICE).to(dtype)
        once = seam.linear(x, stored, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = seam.linear(x, stored, None)
        found.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, once)
