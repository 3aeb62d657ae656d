"""Runs with transforms and learning: the artefact is what was learned, the streams are what they claim to be, resumed
runs give the same bytes, and learning helps a model that knows something. Invariants numbered as in the research
notes on OmniQuant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import bitwright
from bitwright import walk
from bitwright.calibration.stream import Stream
from bitwright.calibration.text import builtin
from bitwright.checkpoint.load import load_model, load_tokenizer
from bitwright.checkpoint.open import open_source
from bitwright.errors import RecipeError
from bitwright.models import adapter_for
from bitwright.transforms.rotate import Rotate, rotated

SMALL = ("calibration.windows=6", "calibration.window_tokens=64")
QUICK = ("learn.epochs=2", "learn.batch_windows=3")
# id: method, scheme, settings
METHODS = {
    "omniquant": ("omniquant", "w3a16g32", QUICK),
    "omniquant-paper": ("omniquant-paper", "w2a16", ("learn.epochs=1", "learn.augmented=true")),
    "omniquant-everything": ("omniquant", "w3a8kv4g32", (*QUICK, "learn.query_key=true")),
    "omniquant+gptq": ("omniquant+gptq", "w3a16g32", QUICK),
    "omniquant+spqr": ("omniquant+spqr", "w3a16", QUICK),
    "omniquant-smooth": ("omniquant", "w4a4", (*QUICK, "transform.name=smooth", "learn.augmented=true")),
    "omniquant-rotated": (
        "omniquant",
        "w3a8g32",
        (*QUICK, "rotate.online_down=true", "transform.sites=['norm', 'value']"),
    ),
    "awq": ("awq", "w3a16g32", ()),
    "smoothquant": ("smoothquant", "w8a8", ()),
    "smoothquant-w4a4kv4": ("smoothquant", "w4a4kv4", ()),
}
STEPS = 150
RATE = 4e-3
ONE = bitwright.RunOptions(workers=1)
LEARNED = [name for name in METHODS if name.startswith("omniquant")]


def recipe(name: str, text: Path, *more: str) -> bitwright.Recipe:
    method, scheme, settings = METHODS[name]
    return bitwright.load_recipe(method, scheme, None, [*SMALL, f'calibration.text="{text}"', *settings, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Spy:
    """Every pass of a stream through a block: index, whether it is the float model's stream, and what came out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.passes: list[tuple[int, bool, dict[str, Tensor], Tensor]] = []
        self.walks: list[walk.Walk] = []
        start, advance = walk.Walk.__init__, walk.BlockRunner.advance

        def begin(walker: walk.Walk, *args: object) -> None:
            start(walker, *args)  # type: ignore[arg-type]
            self.walks.append(walker)

        def look(runner: walk.BlockRunner, index: int, block: nn.Module, stream: Stream) -> None:
            tensors = {name: value.detach().clone() for name, value in block.named_parameters()}
            advance(runner, index, block, stream)
            if self.walks:
                output = torch.cat([batch.clone() for batch in stream])
                self.passes.append((index, stream is not self.walks[-1]._stream, tensors, output))

        monkeypatch.setattr(walk.Walk, "__init__", begin)
        monkeypatch.setattr(walk.BlockRunner, "advance", look)

    @property
    def ids(self) -> Tensor:
        return self.walks[-1].ids


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tiny_llama_folder: Path, text_file: Path, tmp_path_factory) -> tuple[str, Path, Spy]:
    out = tmp_path_factory.mktemp(request.param) / "out"
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        bitwright.quantize(str(tiny_llama_folder), out, recipe=recipe(request.param, text_file), options=ONE)
    return request.param, out, spy


def float_model(name: str, folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model that the recipe quantizes, rotated where it asks for it, and its tensors."""
    model, source = load_model(str(folder)).model, open_source(str(folder))
    if name == "omniquant-rotated":
        source = rotated(source, adapter_for(source.config), Rotate(online_down=True), seed=0)
    return model, {key: source.read(key) for key in source.tensors}


@torch.no_grad()
def hidden_states(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Outputs of the blocks, before the final norm."""
    found: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, output: found.append(output)) for layer in model.model.layers]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def close(one: Tensor, other: Tensor, limit: float) -> bool:
    return float((one - other).abs().max()) <= limit * float(other.abs().max())


def test_9_the_float_stream_never_sees_a_quantized_weight(
    finished: tuple[str, Path, Spy], tiny_llama_folder: Path
) -> None:
    name, _, spy = finished
    model, tensors = float_model(name, tiny_llama_folder)
    passes = [(index, seen, output) for index, is_float, seen, output in spy.passes if is_float]
    for index, seen, _ in passes:
        assert all(torch.equal(value, tensors[f"model.layers.{index}.{key}"]) for key, value in seen.items())
    if name not in LEARNED:
        return
    for index, expected in enumerate(hidden_states(model, spy.ids)):
        # per block the targets, and after them where it is asked for the second loss's
        targets = next(output for at, _, output in passes if at == index)
        if name == "omniquant-rotated":  # a rotation keeps lengths alone
            targets, expected = targets.norm(dim=-1), expected.norm(dim=-1)
        assert close(targets, expected, 1e-5)


def test_9_the_quantized_stream_is_that_of_the_loaded_model(finished: tuple[str, Path, Spy]) -> None:
    name, out, spy = finished
    model = load_model(str(out)).model
    own = [(index, output) for index, is_float, _, output in spy.passes if not is_float]
    assert [index for index, _ in own] == [0, 1]
    for (_, output), expected in zip(own, hidden_states(model, spy.ids), strict=True):
        # a sum in another order may round an activation to the next code
        share = float(((output - expected).abs() > 1e-4 * float(expected.abs().max())).float().mean())
        assert share <= (0.0 if METHODS[name][1].partition("a")[2].startswith("16") else 0.02)


def test_8_the_artefact_says_how_learning_went(finished: tuple[str, Path, Spy]) -> None:
    name, out, _ = finished
    found = bitwright.inspect(out, verify=True)
    assert found.complaints == []
    records = [r for r in found.manifest["tensors"] if r["action"] == "quantize"]
    assert len(records) == 14
    assert not any(record["fallbacks"] for record in records)
    for record in records if name in LEARNED else ():
        assert 0 < record["loss_after"] <= record["loss_before"] < math.inf
        assert record["stopped"] is None
        assert len(record["epoch_losses"]) == (1 if name == "omniquant-paper" else 2)
    if name in ("omniquant", "awq"):
        assert all(len(record["awq_exponents"]) == 4 for record in records)
    rewritten = {r["tensor"] for r in found.manifest["tensors"] if r.get("rewritten")}
    assert bool(rewritten) == (name != "omniquant-paper")


@pytest.mark.parametrize("stop_at", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_8_a_resumed_run_gives_the_same_bytes(
    finished: tuple[str, Path, Spy], tiny_llama_folder: Path, text_file: Path, tmp_path: Path, stop_at: str
) -> None:
    name, out, _ = finished

    def stop(what: str, done: int, total: int) -> None:
        if what == stop_at:
            raise KeyboardInterrupt

    wanted = recipe(name, text_file)
    with pytest.raises(KeyboardInterrupt):
        bitwright.quantize(
            str(tiny_llama_folder),
            tmp_path / "out",
            recipe=wanted,
            options=bitwright.RunOptions(workers=1, progress=stop),
        )
    summary = bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=wanted, options=ONE)
    assert summary.resumed_shards == (1 if ".0." in stop_at else 2)
    assert contents(tmp_path / "out") == contents(out)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("inputs.stream=float", "inputs.sequential=false"), "--set inputs.stream=quantized"),
        (("rounding.name=gptq",), "decide the nearest codes"),
        (("rotate.online_down=true",), "leave down out"),
        (("learn.epochs=0",), "greater than or equal to 1"),
    ],
)
def test_impossible_recipes_are_refused(text_file: Path, settings: tuple[str, ...], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        recipe("omniquant", text_file, *settings)


# --- a model that knows something ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A trained model, and text that it has not seen for calibration and evaluation."""

    folder: Path
    calibration: Path
    ids: Tensor
    logits: Tensor


@pytest.fixture(scope="module")
def trained(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Llama of 2 blocks, hidden 64, trained for a few seconds on the built-in text."""
    folder = tmp_path_factory.mktemp("trained")
    text, tokenizer = builtin("calibration").content, load_tokenizer(open_source(str(tiny_llama_folder)))
    calibration = folder.parent / f"{folder.name}.txt"
    calibration.write_text(text[300_000:340_000])
    tokens = torch.tensor(tokenizer(text[:200_000])["input_ids"])
    held_out = torch.tensor(tokenizer(builtin("evaluation").content[:12_000])["input_ids"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama_folder)).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
        for step in range(STEPS):
            optimiser.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
            starts = torch.randint(0, len(tokens) - 65, (16, 1))
            batch = tokens[starts + torch.arange(65)]
            logits = model(batch[:, :-1], use_cache=False).logits
            nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimiser.step()
            optimiser.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = held_out[: 40 * 64].reshape(40, 64)
    with torch.no_grad():
        return Trained(folder, calibration, ids, model(ids, use_cache=False).logits)


def losses(trained: Trained, logits: Tensor) -> tuple[float, float]:
    """Mean negative log likelihood of the held-out text, and mean KL from the float model, in nats."""
    log_q, log_p = logits.double().log_softmax(-1), trained.logits.double().log_softmax(-1)
    nll = nn.functional.nll_loss(log_q[:, :-1].flatten(0, 1), trained.ids[:, 1:].flatten())
    return float(nll), float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def quantized_losses(trained: Trained, out: Path, method: str, scheme: str, *settings: str) -> tuple[float, float]:
    calibration = (
        "calibration.windows=32",
        "calibration.window_tokens=128",
        f'calibration.text="{trained.calibration}"',
    )
    wanted = bitwright.load_recipe(method, scheme, None, [*calibration, *settings])
    bitwright.quantize(str(trained.folder), out, recipe=wanted, options=ONE)
    with torch.no_grad():
        return losses(trained, load_model(str(out)).model(trained.ids, use_cache=False).logits)


# bits: KL of learned over that of nearest, at most
MARGINS = {4: 0.95, 3: 0.75, 2: 0.9}


@pytest.mark.parametrize("bits", MARGINS)
def test_10_float_then_learned_then_nearest(trained: Trained, tmp_path: Path, bits: int) -> None:
    """In KL, which is 0 of the float model; the loss itself, of which a few tokens are but a sample, at 2 bits."""
    scheme, epochs = f"w{bits}a16g32", "learn.epochs=3"
    nearest = quantized_losses(trained, tmp_path / "rtn", "rtn", scheme)
    for method in ("omniquant", "omniquant-paper"):
        learned = quantized_losses(trained, tmp_path / method, method, scheme, epochs)
        assert 0 < learned[1] < MARGINS[bits] * nearest[1]
        if bits == 2:
            assert losses(trained, trained.logits)[0] < learned[0] < nearest[0]
