"""Calibrated runs: what was decoded is what later blocks saw, resumed runs give the same bytes, fallbacks fail."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitwright
from bitwright import walk
from bitwright.checkpoint.load import load_model
from bitwright.errors import CalibrationError, EvaluationError, FallbackError, PlanError, RecipeError

SMALL = ("calibration.windows=6", "calibration.window_tokens=64")
# id: method, scheme, settings
METHODS = {
    "gptq": ("gptq", "w4a16g32", ()),
    "gptq-corrected": ("gptq", "w4a16g32", ("inputs.correction=0.5", "rounding.refit=true", "rounding.sweeps=1")),
    "gptq-paper": ("gptq-paper", "w4a16g32", ()),
    "spqr": ("spqr", "w3a16", ("bits_per_weight=4.2",)),
    "spqr-model-wide": ("spqr", "w3a16", ("bits_per_weight=4.2", "outliers.scope=model")),
    "spqr-near-lossless": ("spqr-near-lossless", "w4a16", ()),
    "spqr-paper": ("spqr-paper", "w3a16", ()),
}


def recipe(name: str, text: Path, *more: str) -> bitwright.Recipe:
    method, scheme, settings = METHODS[name]
    return bitwright.load_recipe(method, scheme, None, [*SMALL, f'calibration.text="{text}"', *settings, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tiny_llama_folder: Path, text_file: Path, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param) / "out"
    bitwright.quantize(str(tiny_llama_folder), out, recipe=recipe(request.param, text_file))
    return request.param, out


def test_the_artefact_is_complete_loads_and_counts_its_bits(finished: tuple[str, Path], text_file: Path) -> None:
    name, out = finished
    found = bitwright.inspect(out, verify=True)
    assert found.complaints == []
    loaded = load_model(str(out))
    assert loaded.quantized
    quantized = [r for r in found.manifest["tensors"] if r["action"] == "quantize"]
    assert len(quantized) == 14
    assert all(not r["fallbacks"] and r["dead_columns"] == 0 for r in quantized)
    assert all(r["calibration_tokens"] == 6 * 64 for r in quantized)
    # (13) bits per weight are bytes on disk, tensor by tensor
    stored = [load_file(path) for path in out.glob("*.safetensors")]
    for record in quantized:
        module = record["tensor"].removesuffix("weight")
        nbytes = sum(t.nbytes for part in stored for name, t in part.items() if name.startswith(module))
        assert nbytes == record["bytes"]
    wanted = found.manifest["recipe"]["bits_per_weight"]
    if wanted is not None:
        # tensors this small meet their share in steps, and one limit for all gives them very unlike shares
        slack = 0.1 if name == "spqr-model-wide" else 0.05
        assert found.bits_per_weight == pytest.approx(wanted, abs=slack)
    with pytest.raises(EvaluationError, match="overlap"):
        bitwright.eval(str(out), text=text_file, options=bitwright.EvalOptions(windows=2, length=128))


@pytest.mark.parametrize("stop_at", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_resumed_run_gives_the_same_bytes(
    finished: tuple[str, Path], tiny_llama_folder: Path, text_file: Path, tmp_path: Path, stop_at: str
) -> None:
    method, out = finished

    def stop(what: str, done: int, total: int) -> None:
        if what == stop_at:
            raise KeyboardInterrupt

    wanted = recipe(method, text_file)
    with pytest.raises(KeyboardInterrupt):
        bitwright.quantize(
            str(tiny_llama_folder), tmp_path / "out", recipe=wanted, options=bitwright.RunOptions(progress=stop)
        )
    summary = bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=wanted)
    assert summary.resumed_shards == (1 if ".0." in stop_at else 2)
    assert contents(tmp_path / "out") == contents(out)


def test_10_later_blocks_saw_exactly_what_is_stored(
    tiny_llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}
    advance = walk.BlockRunner.advance

    def spy(runner, index, block, stream):
        seen.update({f"model.layers.{index}.{name}": p.detach().clone() for name, p in block.named_parameters()})
        advance(runner, index, block, stream)

    monkeypatch.setattr(walk.BlockRunner, "advance", spy)
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=recipe("spqr-paper", text_file))
    model = load_model(str(tmp_path / "out")).model
    assert len(seen) == 18
    for name, value in seen.items():
        module = model.get_submodule(name.rpartition(".")[0])
        decoded = module.dequantize() if hasattr(module, "dequantize") else module.weight.data.float()
        assert torch.equal(decoded, value), name


def test_float_inputs_come_from_the_float_model(tiny_llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    wanted = recipe("gptq", text_file, "inputs.stream=float", "inputs.sequential=false", "inputs.correction=0")
    summary = bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=wanted)
    other = bitwright.quantize(str(tiny_llama_folder), tmp_path / "other", recipe=recipe("gptq", text_file))
    losses = [[r["loss"] for r in s.records if r["action"] == "quantize"] for s in (summary, other)]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses[0])
    assert losses[0] != losses[1]


def test_14_inputs_that_are_always_zero_are_reported(tiny_llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_folder, source)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"].zero_()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    wanted = recipe("gptq-paper", text_file)
    with pytest.raises(FallbackError, match=r"layers.1.mlp.gate_proj.*max-fallbacks"):
        bitwright.quantize(str(source), tmp_path / "out", recipe=wanted)
    options = bitwright.RunOptions(max_fallbacks=0.5)
    summary = bitwright.quantize(str(source), tmp_path / "out", recipe=wanted, options=options)
    assert summary.resumed_shards == 2
    fallen = [r["tensor"] for r in summary.records if r.get("fallbacks")]
    assert fallen == [f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "gate", "up")]


def test_too_little_text_is_refused_before_any_work(tiny_llama_folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too little.")
    with pytest.raises(CalibrationError, match="longer text"):
        bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=recipe("gptq", short))
    assert not (tmp_path / "out.partial").exists()


def test_the_model_can_be_its_own_text(tiny_llama_folder: Path, tmp_path: Path) -> None:
    wanted = bitwright.load_recipe("gptq", "w4a16g32", None, [*SMALL, "calibration.text=self"])
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=wanted)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["calibration"]["text"] == "self"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("bits_per_weight=3.01",), "leaves no room"),
        (("rounding.name=gptq", "outliers.name=none"), "keep a share"),
        (("outliers.threshold=0.1",), "keep a share"),
        (("rounding.groups=updated", "rounding.order=activation"), "scatters groups"),
        (("inputs.stream=float", "inputs.correction=0"), "sequential"),
        (("rounding.name=nearest",), "--set rounding.name=gptq"),
        (("rounding.refit=true",), "--set rounding.refit=false"),
        (("inputs.stream=float", "inputs.sequential=false", "inputs.correction=0.5"), "nothing to correct"),
        (("outliers.threshold=0.1", "outliers.scope=model"), "--set outliers.threshold=none"),
    ],
)
def test_impossible_recipes_are_refused(
    tiny_llama_folder: Path, text_file: Path, settings: tuple[str, ...], reason: str
) -> None:
    with pytest.raises((RecipeError, PlanError), match=reason):
        bitwright.plan(str(tiny_llama_folder), recipe=recipe("spqr", text_file, *settings))


def test_heads_have_no_inputs_to_see(tiny_llama_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('method = "gptq"\nscheme = "w4a16g32"\n[[rules]]\nmatch = "lm_head"\nmethod = "gptq"\n')
    with pytest.raises(PlanError, match="outside the blocks"):
        bitwright.plan(str(tiny_llama_folder), recipe=path)
