"""Who owns the weight of the head: what is stored decides, with the flag and the class, as where transformers loads it.

Every combination goes the whole way: plan, quantize, load, export and import; its logits are those of the float model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

import bitwright
from bitwright.checkpoint.load import load_model
from bitwright.checkpoint.open import open_source
from bitwright.errors import CheckpointError
from bitwright.export.targets import export_model, import_model
from bitwright.models import ADAPTERS, adapter_for
from bitwright.recipe import Recipe, Rule, load_recipe

IDS = torch.tensor([[3, 7, 11, 200, 5, 9]])
SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64}
GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}


@dataclass(frozen=True)
class Kind:
    """A class of models: its config, the names of both weights, and what it does without being told."""

    config: dict[str, Any]
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    ties: bool = True
    default: bool = False


KINDS = {
    "llama": Kind({**GATED, "model_type": "llama"}),
    "gemma3": Kind({**GATED, "model_type": "gemma3_text"}, default=True),
    "opt": Kind(
        {**SIZES, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
        "model.decoder.embed_tokens",
        default=True,
    ),
    # discovered, and its checkpoints call the head otherwise
    "gpt_neox": Kind({**SIZES, "model_type": "gpt_neox", "intermediate_size": 64}, "gpt_neox.embed_in", "embed_out"),
}
FLAGS = (True, False, None)
STORED = ("embedding", "head", "both, equal", "both, different")


def write(folder: Path, kind: Kind, flag: bool | None, stored: str) -> None:
    """A random model whose config says `flag` (None: nothing) and whose file holds what `stored` says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**kind.config, tie_word_embeddings=False)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    embedding, head = f"{kind.embedding}.weight", f"{kind.head}.weight"
    if stored == "both, equal":
        tensors[head] = tensors[embedding].clone()
    elif not stored.startswith("both"):
        del tensors[head if stored == "embedding" else embedding]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content.pop("tie_word_embeddings")
    content |= {} if flag is None else {"tie_word_embeddings": flag}
    (folder / "config.json").write_text(json.dumps(content))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS).logits
    return found


def recipe(kind: Kind, shared: bool, quantized: bool) -> Recipe:
    """8 bits everywhere; embedding and head as well if `quantized`."""
    base = load_recipe("rtn", "w8a16g32")
    names = [kind.embedding] + ([] if shared else [kind.head])
    rules = tuple(Rule(match=name, keep=not quantized, method=base.method if quantized else None) for name in names)
    rules = tuple(rule.model_copy(update={"scheme": base.scheme if quantized else None}) for rule in rules)
    return base.model_copy(update={"rules": rules, "kept_dtype": "source"})


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", KINDS)
def test_all_the_way(tmp_path: Path, tiny_llama_folder: Path, name: str, flag: bool | None, stored: str) -> None:
    kind, folder = KINDS[name], tmp_path / "float"
    write(folder, kind, flag, stored)
    for path in tiny_llama_folder.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    asked = kind.default if flag is None else flag
    if not asked and not stored.startswith("both"):
        lost = "head" if stored == "embedding" else "embedding"
        with pytest.raises(CheckpointError, match=f"{getattr(kind, lost)}.weight is missing"):
            bitwright.plan(str(folder), "rtn", "w8a16g32")
        return
    shared = asked and kind.ties and stored != "both, different"
    adapter = adapter_for(open_source(str(folder)).config)
    assert (adapter.tied_head, adapter.head) == (shared, kind.head)
    reference = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(reference, logits(load_model(str(folder)).model))
    for quantized in (True, False):
        if quantized and name in ("gemma3", "gpt_neox"):
            continue  # one scales its embedding, the other calls its head otherwise than its checkpoints
        out, back = tmp_path / f"native-{quantized}", tmp_path / f"hf-{quantized}"
        bitwright.quantize(str(folder), out, recipe=recipe(kind, shared, quantized))
        ours = logits(load_model(str(out)).model)
        assert float((ours - reference).norm() / reference.norm()) < 0.03
        export_model(out, back, "hf")
        theirs = logits(AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32))
        assert float((theirs - ours).norm() / ours.norm()) < 0.03
    if name != "gpt_neox":
        export_model(out, tmp_path / "foreign", "compressed-tensors")
        import_model(tmp_path / "foreign", tmp_path / "again")
        again = logits(load_model(str(tmp_path / "again")).model)
        assert torch.equal(again, ours)


def test_a_class_that_ties_nothing(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "dim_head": 16, "dim_ff": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model("cpmant", vocab_size=64, prompt_length=4, prompt_types=4, segment_types=4, **sizes)
    assert config.tie_word_embeddings
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).save_pretrained(tmp_path)
    assert open_source(str(tmp_path)).config["tie_word_embeddings"] is False
    stored = load_file(tmp_path / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing .*cpmant shares no weight"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_assume_what_transformers_assumes(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    sizes = {key: value for key, value in config.to_dict().items() if key != "tie_word_embeddings"}
    assert ADAPTERS[kind](sizes).tied_head == config.tie_word_embeddings
