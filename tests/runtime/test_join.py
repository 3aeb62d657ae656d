"""Linears of one input as one matrix, inside a model: the same outputs, fewer products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bitwright
from bitwright.checkpoint.load import load_model
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime.join import JoinedLinear, join_shared_inputs
from bitwright.runtime.linear import QuantizedLinear, keep_packed_on_cpu

IDS = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["rtn:w4a16g32", "easyquant:w3a16g32", "rtn:w8a8"])
def folder(request: pytest.FixtureRequest, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("joined") / "out"
    method, scheme = request.param.split(":")
    bitwright.quantize(str(tiny_llama_folder), out, method, scheme)
    return out


def products(model: nn.Module) -> int:
    return sum(isinstance(module, QuantizedLinear) for module in model.modules())


@torch.inference_mode()
def test_the_model_computes_the_same_with_fewer_products(folder: Path) -> None:
    model = load_model(str(folder)).model
    expected, before = model(IDS).logits, products(model)
    assert join_shared_inputs(model) == 4  # two in each of two blocks
    assert products(model) == before - 2 * 3
    assert torch.allclose(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    # again, with a cache, and where parts stay on the CPU
    assert keep_packed_on_cpu(model) == products(model)
    one = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(one, load_model(str(folder)).model.generate(IDS, max_new_tokens=4, do_sample=False))
    assert all(not joined._outputs for joined in model.modules() if isinstance(joined, JoinedLinear))


def test_the_compiler_sees_one_graph(folder: Path) -> None:
    model = load_model(str(folder)).model
    with torch.inference_mode():
        expected = model(IDS, use_cache=False).logits
    join_shared_inputs(model)
    block = model.model.layers[0].mlp
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x), block(x), rtol=1e-5, atol=1e-6)
        assert torch.allclose(model(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


class Mlp(nn.Module):
    def __init__(self, gate: QuantizedLinear, up: QuantizedLinear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = gate, up


def test_other_inputs_biases_and_layouts(quantize_minmax: Callable[..., QTensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 64, generator=generator) for rows in (48, 32)]
    specs = WeightSpec(bits=4, group_size=32), WeightSpec(bits=8, group_size=32)
    bias = torch.randn(32, generator=generator)
    one, other = (QuantizedLinear.from_qtensor(quantize_minmax(weight, specs[0])) for weight in weights)
    other.bias = nn.Parameter(bias, requires_grad=False)
    x, y = torch.randn(2, 3, 64, generator=generator).unbind()
    expected = [one(x), other(x), one(y), other(y)]
    model = Mlp(one, other)
    assert join_shared_inputs(model) == 1
    found = [model.gate_proj(x), model.up_proj(x), model.gate_proj(y), model.up_proj(y)]
    # asked in another order, and twice
    found += [model.up_proj(y), model.gate_proj(x), model.gate_proj(x)]
    for ours, theirs in zip(found, [*expected, expected[3], expected[0], expected[0]], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    odd = Mlp(one, QuantizedLinear.from_qtensor(quantize_minmax(weights[1], specs[1])))
    assert join_shared_inputs(odd) == 0
