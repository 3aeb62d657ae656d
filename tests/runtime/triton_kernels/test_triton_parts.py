"""Where packed parts lie, and the operator that quantizes inputs: everything that needs neither Triton nor a GPU.

The meta device stands for CUDA: modules move there, and operators give shapes.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bitwright.formats.native import pack
from bitwright.numeric.activation import ActivationSpec, InputSite, fake_quantize
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime import ops, reference
from bitwright.runtime.linear import QuantizedEmbedding, QuantizedLinear, TiedLinear, keep_packed_on_cpu
from bitwright.runtime.reference import PackedWeight

Make = Callable[..., QTensor]

META = torch.device("meta")
SITES = {
    "token": InputSite(activation=ActivationSpec(bits=8, clip=0.9)),
    "static": InputSite.static(ActivationSpec(bits=8, granularity="tensor", symmetric=True), -1.5, 2.0),
}


class Model(nn.Module):
    def __init__(self, make_qtensor: Make, group_size: int = 32) -> None:
        super().__init__()
        self.embed = QuantizedEmbedding.from_qtensor(make_qtensor((20, 64), WeightSpec(bits=4, group_size=32), 0.05))
        linear = make_qtensor((64, 64), WeightSpec(bits=3, group_size=group_size, zero="float"))
        self.linear = QuantizedLinear.from_qtensor(linear, torch.randn(64), SITES["token"])
        self.head = TiedLinear(self.embed)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.linear(self.embed(ids)))


def test_packed_parts_stay_and_everything_else_moves(make_qtensor: Make) -> None:
    model = Model(make_qtensor)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert keep_packed_on_cpu(model) == 2
    parts = model.linear.stored()
    model.to(META, torch.bfloat16)
    assert model.linear.bias is not None
    assert model.linear.bias.device == model.embed.output_like.device == META
    assert (model.linear.bias.dtype, model.embed.output_dtype) == (torch.bfloat16, torch.bfloat16)
    # The very tensors: what kernels remember of them stays true.
    assert all(model.linear.stored()[name] is tensor for name, tensor in parts.items())
    state = model.state_dict()
    for name in (name for name in before if not name.endswith("bias")):
        assert state[name].device.type == "cpu"
        assert torch.equal(state[name], before[name])
    assert torch.equal(model.linear.dequantize(), model.linear.qtensor("linear").dequantize())
    keep_packed_on_cpu(model, keep=False)
    assert model.to(META).linear.weight_packed.is_meta


def test_kept_parts_survive_copies_and_saving(make_qtensor: Make) -> None:
    model = Model(make_qtensor)
    ids = torch.tensor([[3, 7]])
    keep_packed_on_cpu(model)
    again = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Model(make_qtensor)
    other.load_state_dict(torch.load(file))
    assert torch.equal(again(ids), model(ids))
    assert torch.equal(other(ids), model(ids))
    assert again.to(META).linear.weight_packed.device.type == "cpu"


def test_weights_without_a_layout_are_left_alone(make_qtensor: Make) -> None:
    model = Model(make_qtensor, group_size=24)
    assert keep_packed_on_cpu(model) == 1
    assert model.to(META).linear.weight_packed.is_meta
    with pytest.raises(ValueError, match="on the meta device; load them first"):
        keep_packed_on_cpu(model)


def test_operators_take_parts_from_the_cpu_where_a_kernel_does(
    make_qtensor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(make_qtensor)
    keep_packed_on_cpu(model)
    model.to(META)
    x = torch.empty(2, 3, 64, device=META)
    with pytest.raises(ValueError, match="weight_packed is on cpu, needed meta"):
        model.linear(x)
    monkeypatch.setattr(ops, "_from_cpu", {"meta"})
    assert model(torch.empty(2, 3, dtype=torch.int64, device=META)).shape == (2, 3, 20)
    monkeypatch.setattr(ops, "_site_kernels", {"meta": lambda *_: None})
    assert model.linear(x).shape == (2, 3, 64)
    assert model.linear(x).device == META


def test_the_reference_refuses_parts_that_are_elsewhere(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_triton_kernel", lambda: None)
    weight = Model(make_qtensor).linear.packed()
    x, ids = torch.empty(2, 64, device=META), torch.empty(2, dtype=torch.int64, device=META)
    for call in (
        lambda: ops._cuda_linear(x, weight, None),
        lambda: ops._cuda_site_linear(x, weight, None, SITES["token"]),
        lambda: ops._cuda_embedding(ids, weight, torch.float32),
    ):
        with pytest.raises(ValueError, match=r"kept on cpu.*keep_packed_on_cpu\(model, keep=False\)"):
            call()
    x = torch.randn(2, 64)
    rounded = fake_quantize(x, SITES["token"].activation, None, None)
    assert torch.equal(ops._cuda_site_linear(x, weight, None, SITES["token"]), reference.linear(rounded, weight, None))


@pytest.mark.parametrize("name", SITES)
def test_site_linear_is_the_simulation_where_no_kernel_is(make_qtensor: Make, name: str) -> None:
    site = SITES[name]
    q = make_qtensor((6, 24), WeightSpec(bits=8), 0.0)
    weight, bias, x = PackedWeight.of(pack(q), q.spec, 24), torch.randn(6), torch.randn(3, 24)
    assert site.activation is not None
    rounded = fake_quantize(x, site.activation, site.scale, site.zero)
    assert torch.equal(ops.site_linear(x, weight, bias, site), ops.linear(rounded, weight, bias))
    module = QuantizedLinear.from_qtensor(q, bias, site)
    torch.testing.assert_close(module(x), ops.site_linear(x, weight, bias, site))


def test_a_kernel_for_sites_gets_the_rotated_input_and_the_site(
    make_qtensor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = InputSite(transform="hadamard", activation=ActivationSpec(bits=8, symmetric=True))
    module = QuantizedLinear.from_qtensor(make_qtensor((6, 32), WeightSpec(bits=8), 0.0), None, site)
    x = torch.randn(3, 32)
    simulated, seen = module(x), []

    def kernel(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, site: InputSite) -> torch.Tensor:
        seen.append(site)
        return reference.linear(ops._simulated(x, site), weight, bias)

    monkeypatch.setattr(ops, "_site_kernels", {"cpu": kernel})
    torch.testing.assert_close(module(x), simulated)
    assert seen == [InputSite(activation=site.activation)]


@pytest.mark.parametrize("name", ["linear", "embedding", *SITES])
def test_opcheck(make_qtensor: Make, name: str) -> None:
    q = make_qtensor((6, 24), WeightSpec(bits=8), 0.1)
    weight = PackedWeight.of(pack(q), q.spec, 24)
    parts, layout = ops._tensors(weight), ops._layout(weight)
    if name == "embedding":
        operator, arguments = torch.ops.bitwright.embedding, (torch.tensor([1, 0]), *parts, *layout, torch.float16)
    else:
        operator, arguments = torch.ops.bitwright.linear, (torch.randn(3, 24), *parts, torch.randn(6), *layout)
    if name in SITES:
        site = SITES[name]
        spec = site.activation
        assert spec is not None
        operator = torch.ops.bitwright.site_linear
        arguments = (*arguments, spec.bits, spec.symmetric, spec.clip, site.scale, site.zero)
    found = torch.library.opcheck(operator.default, arguments)
    assert set(found.values()) == {"SUCCESS"}


def test_site_linear_compiles_as_one_graph(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    q = make_qtensor((6, 24), WeightSpec(bits=8), 0.0)
    module = QuantizedLinear.from_qtensor(q, None, SITES["static"])
    # As on CUDA: the module hands its input over as it is.
    monkeypatch.setattr(ops, "quantizes_inputs", lambda device: True)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (1, 3):
        x = torch.randn(rows, 24)
        assert torch.equal(compiled(x), module(x))
