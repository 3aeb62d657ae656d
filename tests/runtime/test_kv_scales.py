"""fp8 KV caches from recipe to file to model: scales against the cache of the float model, outputs against a cache that
rounds by itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel

import bitwright
from bitwright.calibration.tokens import calibration_windows
from bitwright.checkpoint.load import load_tokenizer
from bitwright.checkpoint.open import open_source
from bitwright.cli import main
from bitwright.errors import FormatError, PlanError, RecipeError
from bitwright.export.folder import NativeFolder
from bitwright.formats.native import Sites, read_sites
from bitwright.numeric.activation import KvSpec
from bitwright.numeric.fp8 import KvScales
from bitwright.runtime.decode_support import supports
from bitwright.runtime.huggingface import register
from bitwright.runtime.linear import QuantizedLinear

register()

FP8 = KvSpec(bits=8, grid="fp8")
GRID = "activations.kv.grid=fp8"
FLOAT_STREAM = ("inputs.stream=float", "inputs.sequential=false")
IDS = torch.tensor([[5, 17, 300, 41, 77, 8, 9, 250]])


def recipe(text: Path, method: str = "rtn", scheme: str = "w8a16kv8g32-sym", *more: str) -> bitwright.Recipe:
    small = [f"calibration.text={json.dumps(str(text))}", "calibration.windows=3", "calibration.window_tokens=40"]
    return bitwright.load_recipe(method, scheme, overrides=[*small, GRID, *more])


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def sites_of(folder: Path) -> Sites:
    return read_sites(config_of(folder))


def scales_of_caches(source: Path, wanted: bitwright.Recipe) -> list[KvScales]:
    """From the caches that the float model fills while it reads the calibration windows."""
    ids = calibration_windows(wanted.calibration, load_tokenizer(open_source(str(source))), wanted.seed).ids
    model = LlamaForCausalLM.from_pretrained(source).eval().float()
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    return [KvScales.of(float(layer.keys.abs().max()), float(layer.values.abs().max())) for layer in layers]


class Fp8Cache(DynamicCache):
    """Holds float8 tensors of keys and values, as engines do."""

    def __init__(self, scales: list[KvScales]):
        super().__init__()
        self.scales, self.stored = scales, [{} for _ in scales]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        pair, found = self.scales[layer_idx], []
        for name, states, scale in (("k", key_states, pair.k), ("v", value_states, pair.v)):
            codes = (states.float() / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
            before = self.stored[layer_idx].get(name)
            # Joined as bytes: not everything is written for float8.
            joined = codes.view(torch.uint8)
            joined = joined if before is None else torch.cat([before, joined], dim=2)
            self.stored[layer_idx][name] = joined
            found.append((joined.view(torch.float8_e4m3fn).float() * scale).to(states.dtype))
        return found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.stored[layer_idx]["k"].shape[2] if self.stored[layer_idx] else 0


def load(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model.eval()


@pytest.mark.parametrize(
    ("method", "scheme", "more"),
    [
        ("rtn", "w8a16kv8g32-sym", FLOAT_STREAM),
        ("rtn", "w8a8kv8-sym", ("activations.granularity=tensor", *FLOAT_STREAM)),
        ("gptq", "w4a16kv8g32", (*FLOAT_STREAM, "inputs.correction=0")),
    ],
)
def test_scales_are_those_of_the_float_models_cache(
    method: str, scheme: str, more: tuple[str, ...], tiny_llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    wanted = recipe(text_file, method, scheme, *more)
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=wanted)
    sites = sites_of(tmp_path / "out")
    assert sites.kv_cache == FP8
    assert list(sites.kv_scales) == [f"model.layers.{n}.self_attn" for n in (0, 1)]
    for found, expected in zip(sites.kv_scales.values(), scales_of_caches(tiny_llama_folder, wanted), strict=True):
        # The float model runs all windows at once: sums differ in their last bits.
        assert found.k == pytest.approx(expected.k, rel=1e-5)
        assert found.v == pytest.approx(expected.v, rel=1e-5)


def test_later_blocks_see_what_the_quantized_ones_give(
    tiny_llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    wanted = recipe(text_file, "rtn", "w2a16kv8g32")
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=wanted)
    found, expected = list(sites_of(tmp_path / "out").kv_scales.values()), scales_of_caches(tiny_llama_folder, wanted)
    # The first block reads embeddings as they are stored, in float16.
    assert found[0].k == pytest.approx(expected[0].k, rel=1e-3)
    assert found[1].k != pytest.approx(expected[1].k, rel=1e-2)


@pytest.mark.parametrize("scheme", ["w8a16kv8g32-sym", "w8a8kv8-sym"])
def test_outputs_are_those_of_a_cache_of_float8(
    scheme: str, tiny_llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """In float64, so that no code flips between one pass and decoding token by token."""
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=recipe(text_file, "rtn", scheme))
    model = load(tmp_path / "out").double()
    reference = LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval().double()
    reference.load_state_dict(model.state_dict(), strict=False)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = reference.get_submodule(name)
            linear.weight.data = module.dequantize(torch.float64)
            if module.site is not None:
                linear.register_forward_pre_hook(lambda _, args, site=module.site: site.apply(args[0]))
    scales = list(sites_of(tmp_path / "out").kv_scales.values())
    with torch.no_grad():
        found = model(IDS, use_cache=False).logits
        whole = reference(IDS, past_key_values=Fp8Cache(scales)).logits
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)
        cache, steps = Fp8Cache(scales), []
        for place in range(IDS.shape[1]):
            positions = torch.tensor([[place]])
            output = reference(IDS[:, place : place + 1], past_key_values=cache, position_ids=positions)
            steps.append(output.logits)
        torch.testing.assert_close(found, torch.cat(steps, dim=1), rtol=1e-9, atol=1e-9)
        assert (found - reference(IDS, use_cache=False).logits).abs().max() > 1e-5


def test_nothing_but_the_cache_changes(tiny_llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "fp8", recipe=recipe(text_file))
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "plain", "rtn", "w8a16g32-sym")
    for shard in sorted((tmp_path / "plain").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "fp8" / shard.name).read_bytes()
    assert {**config_of(tmp_path / "fp8"), "kv_cache": None} == config_of(tmp_path / "plain")


@pytest.mark.parametrize("stop_at", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_resumed_run_gives_the_same_bytes(
    method: str, stop_at: str, tiny_llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    wanted = recipe(text_file, method, "w4a16kv8g32")
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "at once", recipe=wanted)

    def stop(what: str, done: int, total: int) -> None:
        if what == stop_at:
            raise KeyboardInterrupt

    options = bitwright.RunOptions(progress=stop)
    with pytest.raises(KeyboardInterrupt):
        bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=wanted, options=options)
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=wanted)
    for path in (tmp_path / "at once").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_kept_and_learned_blocks_have_scales_too(tiny_llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Scales are those of the finished transform, whether or not keys' weights are quantized."""
    wanted = recipe(
        text_file, "omniquant", "w4a8kv8g32", "learn.epochs=1", "learn.query_key=true", "activations.granularity=token"
    )
    wanted = wanted.model_copy(update={"rules": (bitwright.Rule(match="*.1.self_attn.k_proj", keep=True),)})
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=wanted)
    assert len(sites_of(tmp_path / "out").kv_scales) == 2
    assert torch.isfinite(load(tmp_path / "out")(IDS).logits).all()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_by_the_command_line(
    method: str, tiny_llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["bitwright", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    wanted = ["--method", method, "--scheme", "w4a16kv8g32", "--set", GRID, "--calibration", str(text_file)]
    wanted += ["--set", "calibration.windows=2", "--set", "calibration.window_tokens=32"]
    assert run("plan", str(tiny_llama_folder), *wanted, "--json", str(tmp_path / "plan.json")) == 0
    assert "KV cache: kv8-fp8 with fixed scales" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "plan.json").read_text())["kv_cache"]["grid"] == "fp8"
    folder = str(tmp_path / "out")
    assert run("quantize", str(tiny_llama_folder), "--out", folder, *wanted, "--format", "compressed-tensors") == 0
    assert run("import", folder + "-compressed-tensors", "--out", str(tmp_path / "back")) == 0
    assert sites_of(tmp_path / "back") == sites_of(tmp_path / "out")
    assert run("export", folder, "--to", "gptq", "--out", str(tmp_path / "gptq")) == 2
    assert "the KV cache: is quantized" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("scheme", "more", "message"),
    [
        ("w8a16g32", (), r"grid=fp8 has 8 bits, and the scheme says no kv; write kv8"),
        ("w8a16kv4g32", (), r"grid=fp8 has 8 bits, and the scheme says kv4; write kv8"),
        ("w8a16kv8g32", ("activations.kv.rope=before",), r"activations.kv.rope=after"),
        ("w8a16kv8g32", ("activations.kv.past_only=true",), r"activations.kv.past_only=false"),
        (
            "w8a16kv8g32",
            ("activations.kv.symmetric=true",),
            r"floats have none; use --set activations.kv.symmetric=false",
        ),
        ("w8a16kv8g32", ("activations.kv.grid=fp4",), r"activations\.kv\.grid"),
    ],
)
def test_refusals(scheme: str, more: tuple[str, ...], message: str, tiny_llama_folder: Path, text_file: Path) -> None:
    with pytest.raises((PlanError, RecipeError), match=message):
        bitwright.plan(str(tiny_llama_folder), recipe=recipe(text_file, "rtn", scheme, *more))
    with pytest.raises(ValueError, match="has 8 bits, got 4"):
        KvSpec(bits=4, grid="fp8")


def test_one_rule_may_name_it_for_all(tiny_llama_folder: Path, text_file: Path) -> None:
    rules = (bitwright.Rule(match="*.down_proj", scheme="w8a16kv8g32"),)
    wanted = recipe(text_file, "rtn", "w4a16g32").model_copy(update={"rules": rules})
    assert bitwright.plan(str(tiny_llama_folder), recipe=wanted).kv_cache == FP8


def test_loading_and_saving(tiny_llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=recipe(text_file))
    model = load(tmp_path / "out")
    assert "a quantized KV cache" in str(supports(model))
    model.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "out")
    assert torch.equal(load(tmp_path / "again")(IDS).logits, model(IDS).logits)
    plain = load(tmp_path / "out").dequantize()
    assert plain.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("change", ["one missing", "one too many"])
def test_a_wrong_number_of_scales(change: str, tiny_llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=recipe(text_file))
    whole = json.loads((tmp_path / "out" / "config.json").read_text())
    scales = whole["quantization_config"]["kv_cache"]["scales"]
    if change == "one missing":
        name = next(iter(scales))
        del scales[name]
    else:
        name = "model.layers.7.self_attn"
        scales[name] = {"k": 1.0, "v": 1.0}
    (tmp_path / "out" / "config.json").write_text(json.dumps(whole))
    with pytest.raises(FormatError, match=rf"quantization_config\.kv_cache: .*{name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(FormatError, match=rf"{name}: .* needs those of every attention, 2 in all"):
        NativeFolder.open(tmp_path / "out")
