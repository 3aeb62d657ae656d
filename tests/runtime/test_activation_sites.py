"""Declared sites: what modules do to their inputs, and whole models from plan to file to evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import bitwright
from bitwright.errors import FormatError, PlanError
from bitwright.formats.native import read_quantization_config, read_sites
from bitwright.numeric.activation import ActivationSpec, InputSite, KvSpec, fake_quantize
from bitwright.numeric.hadamard import hadamard_blocks
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.publish import quantization_settings
from bitwright.recipe import load_recipe
from bitwright.rows import Row
from bitwright.runtime.attention import quantize_kv
from bitwright.runtime.huggingface import register
from bitwright.runtime.linear import QuantizedLinear

register()

IDS = torch.tensor([[5, 17, 300, 41, 77, 8, 9, 250]])
SITES = {
    "token": InputSite(activation=ActivationSpec(bits=4)),
    "symmetric": InputSite(activation=ActivationSpec(bits=8, symmetric=True, clip=0.9)),
    "tensor": InputSite.static(ActivationSpec(bits=6, granularity="tensor"), -2.5, 3.0),
    "hadamard": InputSite(transform="hadamard"),
    "both": InputSite(transform="hadamard", activation=ActivationSpec(bits=4)),
}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    return model(ids, use_cache=False, **arguments).logits


def load(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model.eval()


def by_hand(site: InputSite, x: Tensor) -> Tensor:
    """Transform, then quantize."""
    x = hadamard_blocks(x) if site.transform else x
    return x if site.activation is None else fake_quantize(x, site.activation, site.scale, site.zero)


@pytest.mark.parametrize("kind", SITES)
def test_linear(kind: str, make_qtensor: Callable[..., QTensor]) -> None:
    q, bias, x = make_qtensor((10, 24), WeightSpec(bits=4, group_size=8), 0.1), torch.randn(10), torch.randn(2, 3, 24)
    module = QuantizedLinear.from_qtensor(q, bias, SITES[kind])
    expected = functional.linear(by_hand(SITES[kind], x), q.dequantize(), bias)
    torch.testing.assert_close(module(x), expected)
    assert f"input={SITES[kind].label()}" in repr(module)
    assert module(x.half()).dtype == torch.float16
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order], rtol=0, atol=0)


@pytest.mark.parametrize("kind", SITES)
def test_sites_compile_into_one_graph(kind: str, make_qtensor: Callable[..., QTensor]) -> None:
    q, x = make_qtensor((10, 24), WeightSpec(bits=4)), torch.randn(3, 24)
    module = QuantizedLinear.from_qtensor(q, site=SITES[kind])
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


SCHEMES = ["w8a8", "w6a6", "w4a16kv4", "w4a8kv8", "w4a4kv4g32"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_scheme_to_evaluation(scheme: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """The model that was stored computes what the float model with the decoded weights and hooks does.

    In float64, so that no code flips.
    """
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", "rtn", scheme)
    model = load(tmp_path / "out").double()
    reference = LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval().double()
    plain = logits(reference)
    reference.load_state_dict(model.state_dict(), strict=False)  # what is kept, as it is stored
    wanted = bitwright.Scheme.parse(scheme)
    spec = ActivationSpec(bits=wanted.activation_bits) if wanted.activation_bits < 16 else None
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        linear = reference.get_submodule(name)
        linear.weight.data = module.dequantize(torch.float64)
        assert (None if module.site is None else module.site.activation) == spec
        if spec is not None:
            linear.register_forward_pre_hook(lambda module, args: fake_quantize(args[0], spec))
    sites = [n for n, module in model.named_modules() if isinstance(module, QuantizedLinear) and module.site]
    assert len(sites) == (0 if spec is None else 14)
    if wanted.kv_bits < 16:
        quantize_kv(reference, KvSpec(bits=wanted.kv_bits))
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits(model), plain, rtol=1e-3, atol=1e-4)


def test_weights_alone_are_what_they_were(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Bits of activations change no byte of a weight, and without them nothing is declared."""
    for scheme in ("w4a16", "w4a4kv4"):
        bitwright.quantize(str(tiny_llama_folder), tmp_path / scheme, "rtn", scheme)
    for shard in sorted((tmp_path / "w4a16").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "w4a4kv4" / shard.name).read_bytes()
    config = json.loads((tmp_path / "w4a16" / "config.json").read_text())["quantization_config"]
    assert (config["activations"], config["kv_cache"]) == ([], None)
    assert not any("input" in tensor for tensor in config["tensors"].values())
    assert load(tmp_path / "w4a16").config._attn_implementation == "sdpa"


def test_invariant_8_save_and_load_evaluate_alike(tiny_llama_folder: Path, tmp_path: Path) -> None:
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "first", "rtn", "w4a4kv4g32")
    model = load(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert second["quantization_config"] == first["quantization_config"]
    assert "bitwright_kv" not in json.dumps(second)
    again = load(tmp_path / "second")
    assert torch.equal(logits(again), logits(model))
    ids = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(again.generate(IDS, max_new_tokens=5, do_sample=False), ids)


def test_invariant_11_padding_and_order_in_a_whole_model(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """In float64, so that no code flips."""
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", "rtn", "w4a4kv4")
    model = load(tmp_path / "out").double()
    expected = logits(model)
    padded, mask = functional.pad(IDS, (3, 0), value=1), functional.pad(torch.ones_like(IDS), (3, 0))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 3:]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    both = logits(model, torch.cat([IDS.flip(1), IDS]))
    torch.testing.assert_close(both[1:], expected, rtol=1e-8, atol=1e-8)


def declare(folder: Path, site: dict[str, Any], module: str = "model.layers.0.mlp.down_proj") -> None:
    """Rewrite the config of a quantized `folder` so that one input is transformed."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["tensors"][module]["input"] = site
    (folder / "config.json").write_text(json.dumps(config))


def test_declared_transforms_run_and_fold_back(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """`dequantize` gives plain modules for inputs as they come, and lets activations and the KV cache be float."""
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", "rtn", "w8a16")
    declare(tmp_path / "out", {"transform": "hadamard", "activation": None, "scale": None, "zero": None})
    model = load(tmp_path / "out")
    assert model.model.layers[0].mlp.down_proj.site == InputSite(transform="hadamard")
    expected = logits(model)
    plain = model.dequantize()
    assert type(plain.model.layers[0].mlp.down_proj) is nn.Linear
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "low", "rtn", "w8a4kv2")
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "high", "rtn", "w8a16")
    low = load(tmp_path / "low").dequantize()
    torch.testing.assert_close(logits(low), logits(load(tmp_path / "high")), rtol=1e-4, atol=1e-5)


def test_embeddings_have_no_input(tiny_llama_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'method = "rtn"\nscheme = "w8a8"\nrules = [{match = "*embed_tokens"}, {match = "lm_head", scheme = "w8a8g32"}]'
    )
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    outside = read_quantization_config(config).keys() - read_sites(config).inputs.keys()
    assert outside == {"model.embed_tokens", "lm_head"}
    load(tmp_path / "out")
    declare(
        tmp_path / "out",
        {"transform": None, "activation": 0, "scale": None, "zero": None},
        "model.embed_tokens",
    )
    with pytest.raises(FormatError, match=r"model\.embed_tokens\.input: .* is an embedding"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_settings_reach_the_files(tiny_llama_folder: Path, tmp_path: Path) -> None:
    overrides = ["activations.clip=0.9", "activations.symmetric=true", "activations.kv.past_only=true"]
    recipe = load_recipe("rtn", "w4a6kv3", overrides=overrides)
    plan = bitwright.plan(str(tiny_llama_folder), recipe=recipe)
    assert plan.kv_cache == KvSpec(bits=3, past_only=True)
    assert plan.to_json()["kv_cache"]["past_only"] is True
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=recipe)
    sites = read_sites(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    assert sites.kv_cache == plan.kv_cache
    assert {site.activation for site in sites.inputs.values()} == {ActivationSpec(bits=6, clip=0.9, symmetric=True)}
    assert {row.activation for row in plan.rows() if row.action == "quantize"} == {
        ActivationSpec(bits=6, clip=0.9, symmetric=True)
    }
    load(tmp_path / "out")


def test_ranges_of_a_calibrated_run_reach_the_files(tiny_llama_folder: Path) -> None:
    """The place where a run that has seen the inputs hands their ranges over."""
    plan, spec = bitwright.plan(str(tiny_llama_folder), "rtn", "w8a8"), ActivationSpec(bits=8, granularity="tensor")
    units = [replace(unit, rows=tuple(_with_activation(row, spec) for row in unit.rows)) for unit in plan.units]
    plan = replace(plan, units=tuple(units))
    ranges = {row.tensor: (-1.0, 0.1 * index) for index, row in enumerate(plan.rows())}
    records = [
        {"tensor": row.tensor, "outliers": 0, "outlier_value_bits": 16, "input_range": ranges[row.tensor]}
        for row in plan.rows()
    ]
    sites = read_sites(json.loads(json.dumps(quantization_settings(plan, records))))
    assert len(sites.inputs) == 14
    for module, site in sites.inputs.items():
        assert site == InputSite.static(spec, *ranges[f"{module}.weight"])


def test_static_ranges_of_plain_rounding_are_those_seen(
    tiny_llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Nearest codes need no inputs, but a static range does: the method is calibrated for it alone."""
    overrides = [
        f"calibration.text={json.dumps(str(text_file))}",
        "calibration.windows=3",
        "calibration.window_tokens=40",
    ]
    recipe = bitwright.load_recipe("rtn", "w8a8", overrides=["activations.granularity=tensor", *overrides])
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=recipe)
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "dynamic", "rtn", "w8a8")
    loaded, plain = load(tmp_path / "out"), load(tmp_path / "dynamic")
    sites = {name: module.site for name, module in loaded.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(sites) == 14
    assert {site.activation for site in sites.values()} == {ActivationSpec(bits=8, granularity="tensor")}
    assert len({site.scale for site in sites.values()}) == 8  # linears of one input share its range
    for name, module in loaded.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.dequantize(), plain.get_submodule(name).dequantize())


def _with_activation(row: Row, spec: ActivationSpec) -> Row:
    return row if row.activation is None else replace(row, activation=spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('method = "rtn"\nscheme = "w4a12"', "12-bit activations; needed a4 to a8"),
        ('method = "rtn"\nscheme = "w4a16kv12"', "12-bit KV cache; needed kv2 to kv8"),
        (
            'method = "rtn"\nscheme = "w4a4kv4"\nrules = [{match = "*.q_proj", scheme = "w4a4kv8"}]',
            "the model has one: let the rules agree",
        ),
    ],
)
def test_refusals_of_the_plan(text: str, message: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(PlanError, match=message) as error:
        bitwright.plan(str(tiny_llama_folder), recipe=tmp_path / "recipe.toml")
    assert len(str(error.value)) < 400


def test_rules_that_do_not_name_the_kv_cache_leave_it_to_others(tiny_llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        'method = "rtn"\nscheme = "w4a4kv4"\nrules = [{match = "*.down_proj", scheme = "w8a8"}]'
    )
    plan = bitwright.plan(str(tiny_llama_folder), recipe=tmp_path / "recipe.toml")
    assert plan.kv_cache == KvSpec(bits=4)
    bits = {row.module.rpartition(".")[2]: row.activation.bits for row in plan.rows() if row.activation}
    assert bits["down_proj"] == 8
    assert bits["o_proj"] == 4
