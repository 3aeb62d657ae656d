"""Sensitivity: cheap measures against their definitions, probes against whole models, tau against counting pairs."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitwright
from bitwright.analyze.choices import parse_choice
from bitwright.analyze.fisher import draw_tokens
from bitwright.analyze.probe import Prober
from bitwright.analyze.sensitivity import (
    Cost,
    Probes,
    Run,
    Sensitivity,
    kendall_tau,
    measure_sensitivity,
    squared_outputs,
    withheld,
)
from bitwright.checkpoint.load import load_model
from bitwright.checkpoint.open import open_source
from bitwright.errors import RecipeError
from bitwright.evaluate import Windows, compare
from bitwright.models import adapter_for

CHOICES = [parse_choice(text) for text in ("rtn:w2a16g32", "rtn:w3a16g32", "gptq:w3a16g32", "rtn:w8a16g32")]
IDS = torch.randint(2, 320, (3, 40), generator=torch.Generator().manual_seed(0))
PROBE_IDS = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(1))
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@pytest.fixture(scope="module")
def loud_folder(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights, so that its answers depend on them."""
    folder = tmp_path_factory.mktemp("loud")
    loaded = load_model(str(tiny_llama_folder))
    for parameter in loaded.model.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(loud_folder: Path) -> Sensitivity:
    probes = Probes(PROBE_IDS, count=24)
    return measure_sensitivity(open_source(str(loud_folder)), CHOICES, IDS, Run(probes))


def decoded(model: nn.Module, module: str) -> Tensor:
    """What a packed linear multiplies with, [out, in]."""
    with torch.no_grad():
        return model.get_submodule(module).dequantize()


def inputs_and_gradients(folder: Path, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By module: inputs [tokens, in] and gradients of the summed loss at the outputs [tokens, out], whole model."""
    model = load_model(str(folder)).model
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def look(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name] = args[0].detach().flatten(0, 1).double()
        output.register_hook(lambda g: gradients.__setitem__(name, g.detach().flatten(0, 1).double()))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            module.register_forward_hook(partial(look, name))
    logits = model(ids, use_cache=False).logits.flatten(0, 1)
    uniform = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw_tokens(logits.detach(), uniform.flatten())
    nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return inputs, gradients


def test_the_cheap_measures_are_what_they_say(loud_folder: Path, found: Sensitivity, tmp_path: Path) -> None:
    inputs, gradients = inputs_and_gradients(loud_folder, IDS)
    bitwright.quantize(str(loud_folder), tmp_path / "out", "rtn", "w3a16g32")
    weights = dict(load_model(str(loud_folder)).model.named_parameters())
    model = load_model(str(tmp_path / "out")).model
    records = {row["tensor"]: row for row in bitwright.inspect(tmp_path / "out").manifest["tensors"]}
    costs = [cost for cost in found.costs if cost.choice == CHOICES[1]]
    assert len(costs) == 14
    for cost in costs:
        module = cost.tensor.removesuffix(".weight")
        weight = weights[cost.tensor].detach().double()
        change = decoded(model, module).double() - weight
        errors, outputs = inputs[module] @ change.T, inputs[module] @ weight.T
        assert cost.weight_error == pytest.approx(float(change.square().sum() / weight.square().sum()), rel=1e-5)
        assert cost.weight_error_db == pytest.approx(-records[cost.tensor]["sqnr_db"], abs=1e-3)
        assert cost.hessian_error == pytest.approx(float(errors.square().sum() / outputs.square().sum()), rel=1e-4)
        parent, _, own = module.rpartition(".")
        together = next(group for group in GROUPS if own in group)
        of_tokens = sum(gradients[f"{parent}.{name}"].square().sum(1, keepdim=True) for name in together)
        cares = gradients[module].square().mean(0)
        expected = 0.5 * float((cares * (of_tokens * errors.square()).mean(0)).sum() / of_tokens.mean())
        assert cost.fisher == pytest.approx(expected, rel=1e-3)
        assert cost.bytes == records[cost.tensor]["bytes"]
        assert cost.bits_per_weight == 8 * cost.bytes / weight.numel()


def test_squared_outputs_are_those_of_the_tokens() -> None:
    inputs, change = torch.randn(50, 8).double(), torch.randn(4, 8).double()
    hessian = inputs.T @ inputs / 50
    assert torch.allclose(squared_outputs(change, hessian), (inputs @ change.T).square().mean(0))


def test_drawn_tokens_follow_the_answers() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), -torch.inf]]).expand(4000, 3)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(draw_tokens(logits, uniform), minlength=3) / 4000
    assert counts.tolist() == pytest.approx([0.25, 0.75, 0], abs=0.02)
    assert torch.equal(
        draw_tokens(logits[:1], torch.ones(1).double()), torch.tensor([2])
    )  # never out of the vocabulary


def test_more_bits_cost_less(found: Sensitivity) -> None:
    by_choice = [{c.tensor: c for c in found.costs if c.choice == choice} for choice in CHOICES]
    for tensor in by_choice[0]:
        for measure in ("weight_error", "hessian_error", "fisher"):
            two, three, _, eight = (getattr(rows[tensor], measure) for rows in by_choice)
            assert two > three > eight > 0
        # Error feedback aims at the weighed outputs, at the price of the weights.
        assert by_choice[2][tensor].fisher < by_choice[1][tensor].fisher


def test_probes_agree_with_the_whole_model(loud_folder: Path, found: Sensitivity, tmp_path: Path) -> None:
    reference = load_model(str(loud_folder)).model
    windows = Windows(PROBE_IDS, "probes", 0, PROBE_IDS.numel())
    assert len(found.measured) == 24
    chosen = [cost for cost in found.measured if cost.choice == CHOICES[0]][:3]
    bitwright.quantize(str(loud_folder), tmp_path / "out", "rtn", "w2a16g32")
    quantized = load_model(str(tmp_path / "out")).model
    for cost in chosen:
        model = load_model(str(loud_folder)).model
        module = cost.tensor.removesuffix(".weight")
        model.get_submodule(module).weight.data = decoded(quantized, module)
        expected = compare(partial(model, use_cache=False), reference, windows).kl_mean
        assert cost.measured_kl == pytest.approx(expected, rel=1e-3)


def test_a_weight_put_back_costs_nothing(loud_folder: Path) -> None:
    source = open_source(str(loud_folder))
    with Prober(source, adapter_for(source.config), PROBE_IDS) as prober:
        prober.advance()
        weight = source.read("model.layers.1.mlp.down_proj.weight").float()
        assert prober.kl("mlp.down_proj", weight) == 0
        assert prober.kl("mlp.down_proj", 0.5 * weight) > 1e-4
        assert prober.kl("mlp.down_proj", weight) == 0


def test_probes_of_a_large_vocabulary_keep_hidden_states(loud_folder: Path, monkeypatch) -> None:
    source = open_source(str(loud_folder))
    weight = 0.5 * source.read("model.layers.0.mlp.down_proj.weight").float()
    with Prober(source, adapter_for(source.config), PROBE_IDS) as prober:
        expected = prober.kl("mlp.down_proj", weight)
    monkeypatch.setattr("bitwright.analyze.probe._KEPT_ELEMENTS", 0)
    with Prober(source, adapter_for(source.config), PROBE_IDS) as prober:
        assert prober.kl("mlp.down_proj", weight) == pytest.approx(expected, rel=1e-5)


def test_the_estimate_ranks_tensors_as_measured(found: Sensitivity) -> None:
    tau = found.tau_within("fisher")
    assert tau is not None
    assert tau > 0.4
    assert found.tau("fisher") > 0.6
    assert withheld(found) is None
    assert 0.1 < found.scale() < 10
    options = found.options()
    assert len(options) == 14
    costs = [cost for cost in found.costs if cost.tensor == min(options)]
    expected = [found.scales()[min(options)] * cost.fisher for cost in costs]
    assert [option.loss for option in options[min(options)]] == pytest.approx(expected)


def test_a_measured_tensor_sets_its_own_scale() -> None:
    def cost(tensor: str, fisher: float, measured_kl: float | None = None) -> Cost:
        return Cost(tensor, 0, 64, CHOICES[0], 32, 0.1, 0.1, fisher, measured_kl)

    rows = (cost("a", 1.0, 2.0), cost("a", 4.0, 2.0), cost("b", 1.0, 3.0), cost("b", 2.0), cost("c", 1.0))
    found = Sensitivity((*rows, cost("d", 0.0, 0.0)))
    # a: the geometric mean of 2 and 1/2; c and d: the median of 2, 1/2 and 3
    assert found.scales() == pytest.approx({"a": 1.0, "b": 3.0, "c": 2.0, "d": 2.0})
    assert Sensitivity((cost("a", 1.0),)).scales() == {"a": 1.0}


def test_a_tensor_on_its_grid_costs_nothing(loud_folder: Path, quantize_minmax, tmp_path: Path) -> None:
    loaded = load_model(str(loud_folder))
    weight = loaded.model.model.layers[1].mlp.up_proj.weight
    weight.data = quantize_minmax(weight, CHOICES[1].spec).dequantize()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    probes = Probes(PROBE_IDS, count=14)
    rows = measure_sensitivity(open_source(str(tmp_path)), CHOICES[1:2], IDS, Run(probes)).costs
    (exact,) = (cost for cost in rows if cost.tensor == "model.layers.1.mlp.up_proj.weight")
    assert (exact.weight_error, exact.hessian_error, exact.fisher, exact.measured_kl) == (0, 0, 0, 0)
    assert exact.weight_error_db is None
    assert all(cost.fisher > 0 and cost.measured_kl > 0 for cost in rows if cost is not exact)


def test_methods_that_prepare_blocks_are_stood_for_by_their_rounding(loud_folder: Path) -> None:
    choices = [parse_choice("omniquant+gptq:w3a16g32"), parse_choice("omniquant+gptq:w4a16g32")]
    source = open_source(str(loud_folder))
    costs = measure_sensitivity(source, choices, IDS).costs
    assert len(costs) == 28
    assert {cost.choice for cost in costs} == set(choices)
    with pytest.raises(RecipeError, match="treat whole blocks differently"):
        measure_sensitivity(source, [choices[0], CHOICES[2]], IDS)


# --- Kendall's tau ---------------------------------------------------------------------------------------------------


def slow_tau(x: list[float], y: list[float], strata: list[str]) -> float | None:
    agree = different_x = different_y = 0
    for i in range(len(x)):
        for j in range(i):
            if strata[i] != strata[j]:
                continue
            one, other = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
            agree, different_x, different_y = agree + one * other, different_x + abs(one), different_y + abs(other)
    return agree / math.sqrt(different_x * different_y) if different_x and different_y else None


@pytest.mark.parametrize("seed", range(5))
def test_tau_is_counted_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, 8, (2, 20), generator=generator).double().tolist()
    strata = ["ab"[i % 2] for i in range(20)]
    assert kendall_tau(x, y) == pytest.approx(slow_tau(x, y, ["a"] * 20))
    assert kendall_tau(x, y, strata) == pytest.approx(slow_tau(x, y, strata))
    assert kendall_tau(x, x) == pytest.approx(1)
    assert kendall_tau(x, [-value for value in x]) == pytest.approx(-1)


def test_tau_of_what_does_not_vary_is_none() -> None:
    assert kendall_tau([1, 1, 1], [1, 2, 3]) is None
    assert kendall_tau([1], [1]) is None
    assert kendall_tau([], []) is None
    assert kendall_tau([1, 2], [1, 2], ["a", "b"]) is None


def measured(kls: list[float]) -> Sensitivity:
    costs = [Cost(f"t{i}", 0, 64, CHOICES[i % 2], 32, 0.1, 0.1, 0.01 * (i + 1), kl) for i, kl in enumerate(kls)]
    return Sensitivity(tuple(costs))


def test_advice_is_withheld_where_it_would_mislead() -> None:
    good, bad = measured([0.02 * (i + 1) for i in range(12)]), measured([1 - 0.02 * i for i in range(12)])
    assert withheld(good) is None
    assert good.scale() == pytest.approx(2)
    assert "Kendall's tau of fisher against measured KL is -1.00 over 12 tensors; needed 0.4" in str(withheld(bad))
    assert "needed 8" in str(withheld(measured([0.1, 0.2])))
    assert "the same" in str(withheld(measured([0.1] * 12)))
    assert "the same" in str(withheld(good, "weight_error"))
    assert measured([]).scale() == 1
