"""The modules: state dicts, moving without touching stored types, tying, compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitwright.errors import FormatError
from bitwright.formats.native import TensorEntry, pack
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.runtime.linear import QuantizedEmbedding, QuantizedLinear, TiedLinear

SPEC = WeightSpec(bits=3, group_size=8, zero="float", scale_dtype="bfloat16")
TWO_LEVEL = SPEC.model_copy(update={"bilevel": Bilevel(axis="row", size=4, scale_bits=3, zero_bits=3)})


@pytest.fixture(scope="module", params=["one level", "two levels"])
def q(make_qtensor: Callable[..., QTensor], request: pytest.FixtureRequest) -> QTensor:
    if request.param == "one level":
        return make_qtensor((10, 20), SPEC, 0.1)
    return make_qtensor((10, 20), TWO_LEVEL, 0.1, value_bits=8)


class TiedModel(nn.Module):
    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self.embed = embedding
        self.head = TiedLinear(embedding)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def test_linear(q: QTensor) -> None:
    bias, x = torch.randn(10), torch.randn(3, 20)
    module = QuantizedLinear.from_qtensor(q, bias)
    torch.testing.assert_close(module(x), functional.linear(x, q.dequantize(), bias))
    assert torch.equal(module.dequantize(), q.dequantize())
    assert torch.equal(module.qtensor("proj").codes, q.codes)
    assert f"{q.spec.label()}, outliers=" in repr(module)


def test_state_dict_is_the_format(q: QTensor) -> None:
    module = QuantizedLinear.from_qtensor(q, torch.zeros(10))
    assert module.state_dict().keys() == {*pack(q), "bias"}
    other = QuantizedLinear(TensorEntry.of(q), bias=True)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.dequantize(), q.dequantize())


def test_meta_allocates_and_loads(q: QTensor) -> None:
    module = QuantizedLinear(TensorEntry.of(q), bias=True, dtype=torch.bfloat16, device="meta")
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert module.bias is not None
    assert module.bias.dtype == torch.bfloat16
    module.load_parts("proj", pack(q))
    assert torch.equal(module.dequantize(), q.dequantize())
    with pytest.raises(FormatError, match=r"proj\.\w+: missing"):
        module.load_parts("proj", {"weight_packed": pack(q)["weight_packed"]})


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.float16)])
def test_stored_types_survive_moves(q: QTensor, move: Callable[[nn.Module], nn.Module]) -> None:
    linear = move(QuantizedLinear.from_qtensor(q, torch.zeros(10)))
    embedding = move(QuantizedEmbedding.from_qtensor(q))
    for module in (linear, embedding):
        assert {name: t.dtype for name, t in module.stored().items()} == {n: t.dtype for n, t in pack(q).items()}
        assert torch.equal(module.dequantize(), q.dequantize())
    assert linear.bias.dtype == embedding(torch.tensor([1])).dtype != torch.float32


def test_embedding(q: QTensor) -> None:
    ids = torch.tensor([[0, 9], [9, 3]])
    module = QuantizedEmbedding.from_qtensor(q, torch.bfloat16)
    assert torch.equal(module(ids), q.dequantize()[ids].bfloat16())
    assert module.state_dict().keys() == pack(q).keys()


def test_tied_head_owns_nothing_and_follows_copies(q: QTensor) -> None:
    model = TiedModel(QuantizedEmbedding.from_qtensor(q))
    ids = torch.tensor([1, 2])
    weight = q.dequantize()
    torch.testing.assert_close(model(ids), weight[ids] @ weight.T)
    assert model.state_dict().keys() == {f"embed.{name}" for name in pack(q)}
    clone = copy.deepcopy(model)
    assert clone.head.embedding is clone.embed
    assert clone.double()(ids).dtype == torch.float64
    assert model(ids).dtype == torch.float32


def test_modules_compile_as_one_graph(q: QTensor) -> None:
    model = TiedModel(QuantizedEmbedding.from_qtensor(q))
    linear = QuantizedLinear.from_qtensor(q, torch.randn(10)).requires_grad_(False)
    torch.compiler.reset()
    ids, x = torch.tensor([1, 2]), torch.randn(3, 20)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), model(ids))
    assert torch.equal(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), linear(x))
