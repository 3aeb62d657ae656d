"""Loading a folder gives the model that was saved, or says what is missing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitwright.checkpoint.load import load_model
from bitwright.errors import CheckpointError


@pytest.fixture
def folder(tmp_path, tiny_llama_folder):
    return shutil.copytree(tiny_llama_folder, tmp_path / "copy")


def test_folder_is_loaded_in_the_wanted_dtype(tiny_llama_folder, capfd):
    saved = load_file(tiny_llama_folder / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(str(tiny_llama_folder), dtype)
        state = loaded.model.state_dict()
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name], value.to(dtype)) for name, value in saved.items())
        assert not loaded.model.training
        assert (loaded.label, loaded.quantized) == (str(tiny_llama_folder), False)
        assert loaded.folder == tiny_llama_folder
    assert loaded.tokenizer.decode(loaded.tokenizer("the dog").input_ids) == "the dog"
    assert capfd.readouterr() == ("", "")


def test_missing_tokenizer_is_named(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=f"{folder}: no tokenizer.*token ids: a .safetensors file"):
        _ = load_model(str(folder)).tokenizer  # the weights are of use without it


def test_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{folder}, its tokenizer: cannot be understood"):
        _ = load_model(str(folder)).tokenizer


def test_missing_weights_do_not_become_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing \(1 such\)"):
        load_model(str(folder))


def test_config_of_another_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(CheckpointError, match=r"has shape \[64, 128\], needed \[64, 96\] \(6 such\)"):
        load_model(str(folder))


def test_folder_of_another_quantizer_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="already quantized"):
        load_model(str(folder))


def test_unknown_name_lists_what_was_tried():
    with pytest.raises(CheckpointError, match="demo"):
        load_model("no-such-model")
