"""Plans: exact bytes from headers alone, every refusal at once, rules in order."""

import json
from pathlib import Path

import pytest

import bitwright
from bitwright.checkpoint.source import HuggingFaceSource, Source
from bitwright.errors import CheckpointError, PlanError
from bitwright.plan import make_plan
from bitwright.recipe import Recipe, load_recipe


def recipe(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(file=path)


def test_no_weights_are_read(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HuggingFaceSource, "read", lambda *_: pytest.fail("a weight was read"))
    plan = bitwright.plan(str(tiny_llama_folder), method="easyquant", scheme="w4a16g32")
    actions = {row.tensor: row.action for row in plan.rows()}
    assert actions["model.layers.1.mlp.down_proj.weight"] == "quantize"
    assert actions["lm_head.weight"] == actions["model.embed_tokens.weight"] == "keep"
    assert [unit.label for unit in plan.units] == ["embeddings", "block 0", "block 1", "head"]
    json.dumps(plan.to_json())


def test_expected_bytes_are_the_bytes_written(tiny_llama_folder: Path, tmp_path: Path) -> None:
    arguments = {"method": "rtn", "scheme": "w3a16g16"}
    plan = bitwright.plan(str(tiny_llama_folder), **arguments)
    summary = bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", **arguments)
    assert plan.bytes == summary.bytes
    assert plan.bits_per_weight == summary.bits_per_weight


def test_the_first_matching_rule_decides(tiny_llama_folder: Path, tmp_path: Path) -> None:
    made = make_plan(
        HuggingFaceSource(tiny_llama_folder),
        recipe(
            tmp_path,
            """
            method = "rtn"
            scheme = "w4a16g32"
            rules = [
              {match = "model.layers.0.*", keep = true},
              {match = "*.down_proj", scheme = "w8a16"},
              {match = "lm_head", method = "hqq", scheme = "w6a16g64"},
            ]
            """,
        ),
    )
    becomes = {row.module: row.spec.label() if row.spec else "kept" for row in made.rows()}
    assert becomes["model.layers.0.mlp.down_proj"] == "kept"
    assert becomes["model.layers.1.mlp.down_proj"] == "w8-asym"
    assert becomes["model.layers.1.mlp.up_proj"] == "w4g32-asym"
    assert becomes["lm_head"] == "w6g64-asym-fzero"


def test_all_refusals_come_at_once(tiny_llama_folder: Path, tmp_path: Path) -> None:
    text = """
    rules = [
      {match = "*.q_proj", method = "rtn", scheme = "w4a16g1024"},
      {match = "*.k_proj", method = "rtn", scheme = "w4a12"},
      {match = "*.nonsense", keep = true},
    ]
    """
    with pytest.raises(PlanError) as caught:
        make_plan(HuggingFaceSource(tiny_llama_folder), recipe(tmp_path, text))
    message = str(caught.value)
    assert "groups of 1024 are wider than the 64 inputs" in message
    assert "12-bit activations" in message
    assert "'*.nonsense' matches no linear" in message
    assert "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj: claimed by no rule" in message


class FakeSource(Source):
    """A source of which only headers exist."""

    def __init__(self, real: HuggingFaceSource, **config: object):
        self.label, self.config, self.tensors = "fake", real.config | config, dict(real.tensors)

    def read(self, name: str):
        raise AssertionError

    def files(self) -> list[Path]:
        return []

    def write_side_files(self, folder: Path) -> None:
        raise AssertionError


def test_checkpoints_that_do_not_fit_their_config(tiny_llama_folder: Path) -> None:
    base = HuggingFaceSource(tiny_llama_folder)
    wanted = load_recipe("rtn", "w4a16")
    with pytest.raises(PlanError, match=r"beyond the 1 that config.json says"):
        make_plan(FakeSource(base, num_hidden_layers=1), wanted)
    with pytest.raises(PlanError, match=r"no weight for model.layers.2"):
        make_plan(FakeSource(base, num_hidden_layers=3), wanted)
    strange = FakeSource(base)
    strange.tensors["model.layers.0.mlp.experts.weight"] = base.tensors["lm_head.weight"]
    with pytest.raises(PlanError, match=r"experts.weight: .* is a matrix that the llama adapter does not know"):
        make_plan(strange, wanted)


def test_tied_heads_are_quantized_through_the_embedding(tiny_llama_folder: Path, tmp_path: Path) -> None:
    tied = FakeSource(HuggingFaceSource(tiny_llama_folder), tie_word_embeddings=True)
    with pytest.raises(PlanError, match=r"tied to model.embed_tokens"):
        make_plan(tied, recipe(tmp_path, 'method="rtn"\nscheme="w4a16"\nrules=[{match="lm_head"}]'))
    made = make_plan(tied, recipe(tmp_path, 'method="rtn"\nscheme="w4a16"\nrules=[{match="*embed_tokens"}]'))
    assert made.tied_head == "lm_head"
    assert {row.tensor: row.action for row in made.rows()}["lm_head.weight"] == "tied"


@pytest.mark.parametrize("model", ["/no/such/folder", "nothing.gguf", "no"])
def test_models_that_are_not_there(model: str) -> None:
    with pytest.raises(CheckpointError, match="no"):
        bitwright.plan(model, method="rtn", scheme="w4a16")
