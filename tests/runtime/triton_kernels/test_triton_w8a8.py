"""8-bit products: codes of activations equal to the CPU's exactly, integer sums exact, everything against float64.

On a GPU where there is one, else in Triton's interpreter, by way of `test_triton_interpreted.py`.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright.formats.native import pack
from bitwright.numeric.activation import ActivationSpec, InputSite, dynamic_range, fake_quantize
from bitwright.numeric.measure import sqnr_db, squared_error
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime import ops
from bitwright.runtime.linear import QuantizedLinear
from bitwright.runtime.reference import PackedWeight

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; test_triton_interpreted.py runs these", allow_module_level=True)

from bitwright.runtime.triton import configs, w8a8
from bitwright.runtime.triton.kernel import TritonKernel
from bitwright.runtime.triton.layout import int8_refusal
from bitwright.runtime.triton.w8a8 import Tokens8, Weight8

Make = Callable[..., QTensor]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF, FLOAT = torch.float16, torch.float32
# What rounding outputs to their type leaves; float32 sums scales and bias after exact integers.
FLOORS = {HALF: 65.0, FLOAT: 125.0}
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

SPECS = {
    "asymmetric": ActivationSpec(bits=8),
    "symmetric": ActivationSpec(bits=8, symmetric=True),
    "clipped": ActivationSpec(bits=8, clip=0.7),
    "5 bits": ActivationSpec(bits=5),
    "4 bits, symmetric": ActivationSpec(bits=4, symmetric=True, clip=0.9),
}
STATIC = {
    "static": InputSite.static(ActivationSpec(bits=8, granularity="tensor"), -2.5, 3.1),
    "static, symmetric": InputSite.static(ActivationSpec(bits=8, granularity="tensor", symmetric=True), -2.0, 1.0),
}
SITES = {name: InputSite(activation=spec) for name, spec in SPECS.items()} | STATIC
SYMMETRIC, INT_ZERO, FLOAT_ZERO = {"symmetric": True}, {"zero": "int"}, {"zero": "float", "scale_dtype": "float32"}
# Ragged outputs, columns that are no multiple of a block or of 16, every kind of zero: bits, shape, kind.
WEIGHTS = {
    "symmetric": (8, (40, 128), SYMMETRIC),
    "int zeros": (8, (19, 100), INT_ZERO),
    "float zeros": (8, (33, 301), FLOAT_ZERO),
    "7 bits": (7, (7, 65), INT_ZERO),
    "one weight": (8, (1, 1), SYMMETRIC),
}


def make_weight(make_qtensor: Make, case: str) -> tuple[QTensor, PackedWeight]:
    bits, shape, kind = WEIGHTS[case]
    q = make_qtensor(shape, WeightSpec(bits=bits, **kind), 0.0, bits)
    return q, PackedWeight.of({name: t.to(DEVICE) for name, t in pack(q).items()}, q.spec, shape[1])


def numbers(site: InputSite) -> tuple[ActivationSpec, tuple[float, int] | None]:
    assert site.activation is not None
    return site.activation, None if site.scale is None or site.zero is None else (site.scale, site.zero)


def grid(x: Tensor, site: InputSite) -> tuple[Tensor, Tensor]:
    """Scale and zero of every token, float32 [tokens, 1]."""
    spec, static = numbers(site)
    if static is None:
        return dynamic_range(x, spec)
    return torch.full((x.shape[0], 1), static[0]), torch.full((x.shape[0], 1), float(static[1]))


def expected(x: Tensor, site: InputSite, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Inputs rounded as the reference rounds float32, products in float64."""
    spec, _ = numbers(site)
    product = fake_quantize(x.cpu().float(), spec, site.scale, site.zero).double() @ weight.double().T
    return product if bias is None else product + bias.cpu().double()


def sqnr(exact: Tensor, found: Tensor) -> float:
    return sqnr_db(*squared_error(exact, found.cpu()))


def tokens(rows: int, columns: int) -> Tensor:
    """Of very different sizes, one of one sign, one of zeros; with ties at halves."""
    x = torch.randn(rows, columns) * 10 ** torch.linspace(-3, 3, rows)[:, None]
    if rows > 3:
        x[1], x[2], x[3] = x[1].abs(), 0, torch.arange(columns) % 256 / 2
    return x


@pytest.mark.parametrize("columns", [1, 300])
@pytest.mark.parametrize("site", SITES)
def test_codes_are_those_of_the_cpu(site: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A range in one block of columns, and over several.
    monkeypatch.setattr(w8a8, "_MOST_BLOCK", 128)
    x, wanted = tokens(5, columns), SITES[site]
    spec, static = numbers(wanted)
    padded = -(-columns // 64) * 64
    ones = torch.ones(1, padded, dtype=torch.int8, device=DEVICE)
    weight = Weight8(columns, ones, torch.ones(1), zero=torch.ones(1, dtype=torch.int32))
    for dtype in (FLOAT, HALF):
        found = w8a8.quantize_int8(x.to(DEVICE, dtype), spec, static, weight)
        scale, zero = grid(x.to(dtype), wanted)
        codes = (found.codes.cpu().int() + (1 << (spec.bits - 1)))[:, :columns].float()
        assert torch.equal(found.scale.cpu(), scale[:, 0])
        assert torch.equal(scale * (codes - zero), fake_quantize(x.to(dtype).float(), spec, wanted.scale, wanted.zero))
        assert found.codes[:, columns:].count_nonzero() == 0
        assert found.sums is not None
        assert torch.equal(found.sums.cpu().float(), (codes - zero).sum(1))
        if spec.symmetric:
            assert found.zero is None
        else:
            assert found.zero is not None
            assert torch.equal(found.zero.cpu() + (1 << (spec.bits - 1)), zero[:, 0].int())


@pytest.mark.parametrize("static", [None, 0.0123])
def test_e4m3_codes_are_those_of_pytorch(static: float | None) -> None:
    x = tokens(6, 100)
    # Every value of e4m3, halves between them, and both zeros.
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0).sort().values
    x[4, :] = values[78:178]
    x[5, :] = (values[78:178] + values[79:179]) / 2
    x[4:, 0] = -448
    scale = (x.abs().amax(1) / 448).clamp_min(2.0**-126) if static is None else torch.full((6,), static)
    codes = (x / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    found = w8a8.quantize_e4m3(x.to(DEVICE), static, 128)
    assert torch.equal(found.scale.cpu(), scale)
    assert torch.equal(found.codes.cpu().view(torch.uint8)[:, :100], codes.view(torch.uint8))
    assert found.codes.view(torch.uint8)[:, 100:].count_nonzero() == 0


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("site", SITES)
def test_int8_products(make_qtensor: Make, case: str, site: str) -> None:
    q, stored = make_weight(make_qtensor, case)
    weight = Weight8.of(stored)
    assert sqnr(q.dequantize(), weight.dequantize()) > 120
    assert torch.equal(weight.dequantize().cpu(), q.dequantize()) or case == "float zeros"
    bias = torch.randn(q.shape[0], device=DEVICE)
    for rows, dtype, shift in ((1, HALF, bias), (3, FLOAT, None)):
        x = torch.randn(rows, q.shape[1], device=DEVICE).to(dtype)
        assert int8_refusal(stored, numbers(SITES[site])[0]) is None
        found = w8a8.int8_linear(x, weight, shift, *numbers(SITES[site]))
        assert found.dtype == dtype
        assert sqnr(expected(x, SITES[site], q.dequantize(), shift), found) > FLOORS[dtype]


@pytest.mark.parametrize("rows", [1, 3, 16, 33, 64, 200])
@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_every_block_of_rows(make_qtensor: Make, kind: str, rows: int) -> None:
    # Several blocks of outputs and of columns, the last of each ragged.
    columns, out_features = (300, 70) if rows < 64 else (150, 40)
    x = torch.randn(rows, columns, device=DEVICE)
    if kind == "int8":
        q = make_qtensor((out_features, columns), WeightSpec(bits=8), 0.0, 3)
        weight = Weight8.of(PackedWeight.of({name: t.to(DEVICE) for name, t in pack(q).items()}, q.spec, columns))
        found = w8a8.int8_linear(x, weight, None, SPECS["asymmetric"], None)
        assert sqnr(expected(x, SITES["asymmetric"], q.dequantize()), found) > FLOORS[FLOAT]
        return
    weight, bias = (
        Weight8.e4m3(torch.randn(out_features, columns, device=DEVICE)),
        torch.randn(out_features, device=DEVICE),
    )
    codes = w8a8.quantize_e4m3(x, None, weight.padded)
    exact = codes.codes[:, :columns].cpu().double() * codes.scale.cpu().double()[:, None]
    exact = exact @ weight.dequantize().cpu().double().T + bias.cpu().double()
    # Hopper's tensor cores align products of e4m3 before they are summed.
    assert sqnr(exact, w8a8.e4m3_linear(x, weight, bias)) > (110 if DEVICE.type == "cpu" else 60)


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # 4 blocks of rows by 5 of outputs, in groups of 3 blocks of rows, the last of each ragged.
    weight = Weight8.e4m3(torch.randn(70, 100, device=DEVICE))
    x = torch.randn(50, 100, device=DEVICE)
    if kind == "int8":
        weight = replace(weight, codes=torch.randint(-128, 128, (70, 128), dtype=torch.int8, device=DEVICE))
        tokens = w8a8.quantize_int8(x, SPECS["symmetric"], None, weight)
    else:
        tokens = w8a8.quantize_e4m3(x, None, weight.padded)
    wanted = w8a8.matmul(tokens, weight, None, FLOAT)
    monkeypatch.setattr(configs, "gemm8_config", lambda *shape: configs.Gemm8Config(16, 16, 64, 4, 2))
    monkeypatch.setattr(w8a8, "_GROUP", 3)
    found = w8a8.matmul(tokens, weight, None, FLOAT)
    assert torch.equal(found, wanted) if kind == "int8" else sqnr(wanted.cpu(), found) > 60
    assert torch.equal(found, w8a8.matmul(tokens, weight, None, FLOAT))


def test_integer_sums_are_exact(make_qtensor: Make) -> None:
    # Scales of one: outputs are the integers, whatever their zeros; the far zero makes large terms cancel.
    weight = Weight8(
        900,
        torch.randint(-128, 128, (5, 960), dtype=torch.int8, device=DEVICE),
        torch.ones(5, device=DEVICE),
        torch.tensor([-128, 127, 0, 5, -77], dtype=torch.int32, device=DEVICE),
    )
    weight.codes[:, 900:] = 0
    weight = replace(weight, sums=weight.codes.sum(1, dtype=torch.int32))
    for rows in (1, 6):
        codes = torch.randint(-128, 128, (rows, 960), dtype=torch.int8, device=DEVICE)
        codes[:, 900:] = 0
        zero = torch.randint(-128, 128, (rows,), dtype=torch.int32, device=DEVICE)
        sums = (codes[:, :900].int() - zero[:, None]).sum(1).int()
        x = Tokens8(codes, torch.ones(rows, device=DEVICE), zero, sums)
        assert weight.zero is not None
        left, right = codes[:, :900].long() - zero[:, None], weight.codes[:, :900].long() - weight.zero[:, None]
        exact = left.cpu() @ right.cpu().T
        assert exact.abs().max() < 1 << 24
        assert torch.equal(w8a8.matmul(x, weight, None, FLOAT).cpu().long(), exact)


def test_tokens_that_are_not_finite(make_qtensor: Make) -> None:
    q, stored = make_weight(make_qtensor, "int zeros")
    weight = Weight8.of(stored)
    x = torch.randn(5, q.shape[1])
    x[1, 3], x[2, 4], x[3, 5] = torch.nan, torch.inf, -torch.inf
    bad, good = [1, 2, 3], [0, 4]
    for name in ("asymmetric", "symmetric", "static", "e4m3"):
        # The reference has NaN in the same tokens, in all of each.
        if name == "e4m3":
            found = w8a8.e4m3_linear(x.to(DEVICE), Weight8.e4m3(q.dequantize().to(DEVICE)))
        else:
            exact = expected(x, SITES[name], q.dequantize())
            assert exact.isnan().all(1).nonzero()[:, 0].tolist() == bad
            found = w8a8.int8_linear(x.to(DEVICE), weight, None, *numbers(SITES[name]))
            assert sqnr(exact[good], found[good]) > FLOORS[FLOAT]
        assert found.isnan().all(1).nonzero()[:, 0].tolist() == bad
        assert found.isnan().any(1).nonzero()[:, 0].tolist() == bad


def test_what_int8_products_do_not_serve(make_qtensor: Make) -> None:
    def reason(spec: WeightSpec, shape: tuple[int, int] = (2, 64), share: float = 0.0) -> str:
        q = make_qtensor(shape, spec, share)
        return str(int8_refusal(PackedWeight.of(pack(q), spec, shape[1]), SPECS["asymmetric"]))

    assert "4 bits" in reason(WeightSpec(bits=4))
    assert "32 of 64 columns" in reason(WeightSpec(bits=8, group_size=32))
    assert "outliers" in reason(WeightSpec(bits=8), share=0.1)
    assert "exceed int32" in reason(WeightSpec(bits=8), (1, 33026))
    assert reason(WeightSpec(bits=8), (1, 33025)) == "None"


def test_the_seam(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seam = TritonKernel()
    monkeypatch.setitem(ops._linear_kernels, DEVICE.type, seam.linear)
    monkeypatch.setitem(ops._site_kernels, DEVICE.type, seam.site_linear)
    served = []
    matmul = w8a8.matmul
    monkeypatch.setattr(w8a8, "matmul", lambda *args: served.append(1) or matmul(*args))
    q = make_qtensor((20, 96), WeightSpec(bits=8), 0.0)
    hadamard = InputSite(transform="hadamard", activation=SPECS["symmetric"])
    for site in (SITES["asymmetric"], STATIC["static"], hadamard):
        module = QuantizedLinear.from_qtensor(q, torch.randn(20), site).to(DEVICE)
        plain = QuantizedLinear.from_qtensor(q, module.bias, site).cpu()
        for shape in ((0,), (1,), (2, 3)):
            x = torch.randn(*shape, 96)
            served.clear()
            found = module(x.to(DEVICE))
            assert found.shape == (*shape, 20)
            assert len(served) == (x.numel() > 0)
            with monkeypatch.context() as patch:
                patch.setattr(ops, "_site_kernels", {})
                patch.delitem(ops._linear_kernels, "cpu")
                exact = plain(x)
            if x.numel():
                assert sqnr(exact.double(), found) > 100
    # Groups go the way of inputs rounded in float; so does float64.
    served.clear()
    grouped = QuantizedLinear.from_qtensor(make_qtensor((20, 96), WeightSpec(bits=8, group_size=32)), None).to(DEVICE)
    grouped.site = SITES["asymmetric"]
    x = torch.randn(2, 96, device=DEVICE, dtype=HALF)
    assert sqnr(expected(x, grouped.site, grouped.dequantize().cpu()), grouped(x)) > 50
    assert module(torch.randn(2, 96, device=DEVICE, dtype=torch.float64)).dtype == torch.float64
    assert not served


def test_weights_are_laid_out_once(make_qtensor: Make) -> None:
    _, stored = make_weight(make_qtensor, "int zeros")
    seam = TritonKernel()
    made = seam.prepared8(stored)
    assert seam.prepared(stored) is not None
    assert seam.prepared8(stored) is made
    stored.weight_scale.mul_(2)
    assert seam.prepared8(stored) is not made
    assert made.bytes == 19 * (128 + 4 + 4 + 4)


def test_paths_say_what_multiplies(make_qtensor: Make) -> None:
    seam = TritonKernel()

    def path(spec: WeightSpec, site: InputSite | None) -> str:
        q = make_qtensor((16, 96), spec, 0.0)
        return seam.path(PackedWeight.of({n: t.to(DEVICE) for n, t in pack(q).items()}, spec, 96), site, DEVICE)[0]

    assert path(WeightSpec(bits=8), SITES["symmetric"]) == "int8 products"
    assert path(WeightSpec(bits=8), None) == "float products"
    assert "rounded in float: its codes have 4 bits" in path(WeightSpec(bits=4), SITES["symmetric"])
    assert path(WeightSpec(bits=4, group_size=24), None) == "reference: groups of 24 columns"


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 33, 64, 65, 5000])
def test_configs_need_no_mask(rows: int) -> None:
    for padded in (64, 128, 576, 4096, 11008, 28672):
        for out_features in (1, 576, 4096, 28672):
            config = configs.gemm8_config(out_features, padded, rows)
            if rows == 1:
                assert config.block_rows == 0
                continue
            assert padded % config.block_columns == 0
            assert config.block_rows >= min(rows, 128)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_calls_can_be_captured(make_qtensor: Make) -> None:
    _, stored = make_weight(make_qtensor, "int zeros")
    seam = TritonKernel()
    for rows in (1, 4, 80):
        x = torch.randn(rows, stored.in_features, device=DEVICE).to(HALF)
        once = seam.site_linear(x, stored, None, SITES["asymmetric"])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = seam.site_linear(x, stored, None, SITES["asymmetric"])
        found.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, once)
