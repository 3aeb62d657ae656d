"""What we write, in programs that do not know bitwright: nothing loads with random weights in the place of packed ones.

Each kind of folder is loaded in a fresh process, with bitwright imported and without.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitwright
from bitwright.errors import FormatError
from bitwright.export.targets import export_model, import_model
from bitwright.formats.folder import INDEX, NOTE, PLAIN_INDEX, WEIGHTS_KEY

LOAD = """
import json, sys, warnings
warnings.simplefilter("ignore")
IMPORT
import torch
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            found[folder] = model(torch.tensor([[3, 1, 4, 1, 5]])).logits.sum().item()
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
# Other formats, and what transformers needs for them; without a package it must not go on.
PACKAGES = {"compressed-tensors": "compressed_tensors", "gptq": "optimum", "awq": "gptqmodel"}


def loaded_in_a_fresh_process(folders: list[Path], first: str) -> dict[str, Any]:
    """For every folder the sum of some logits, or the error, where the line `first` runs before transformers."""
    command = [sys.executable, "-c", LOAD.replace("IMPORT", first), *map(str, folders)]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return {Path(folder).name: value for folder, value in found.items()}


@torch.no_grad()
def sum_of_logits(model: PreTrainedModel) -> float:
    return float(model(torch.tensor([[3, 1, 4, 1, 5]])).logits.sum())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Every kind of folder that bitwright writes, under the name of the kind."""
    place = tmp_path_factory.mktemp("folders")
    recipe = bitwright.load_recipe("rtn", "w4a16g32-sym", overrides=["seed=1"])
    bitwright.quantize(str(tiny_llama_folder), place / "quantized", recipe=recipe)
    for target in (*PACKAGES, "hf"):
        export_model(place / "quantized", place / target, target)
    import_model(place / "compressed-tensors", place / "imported")
    model = AutoModelForCausalLM.from_pretrained(place / "quantized")
    model.save_pretrained(place / "saved")
    model.save_pretrained(place / "saved in shards", max_shard_size=20_000)
    return place


NATIVE = ("quantized", "imported", "saved", "saved in shards")


def test_without_bitwright_nothing_packed_loads(place: Path) -> None:
    found = loaded_in_a_fresh_process([place / name for name in (*NATIVE, *PACKAGES, "hf")], "")
    for name in NATIVE:
        assert found[name].startswith("ValueError: "), name
        assert found[name].endswith(NOTE), name
    for name, package in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            assert found[name].startswith("ImportError: "), name
    assert isinstance(found["hf"], float)


@pytest.mark.parametrize("first", ["import bitwright", "import transformers, bitwright"])
def test_with_bitwright_everything_native_loads(first: str, place: Path) -> None:
    found = loaded_in_a_fresh_process([place / name for name in NATIVE], first)
    expected = sum_of_logits(AutoModelForCausalLM.from_pretrained(place / "quantized", dtype=torch.float32))
    assert found == {name: pytest.approx(expected, rel=1e-4) for name in NATIVE}


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.parametrize("first", ["import bitwright; ", ""])
def test_lm_eval_as_a_loader(first: str, place: Path) -> None:
    code = "import sys; from lm_eval.models.huggingface import HFLM; HFLM(pretrained=sys.argv[1], device='cpu')"
    command = [sys.executable, "-W", "ignore", "-c", first + code, str(place / "quantized")]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert (done.returncode == 0) == bool(first), done.stderr


@pytest.mark.parametrize("name", NATIVE)
def test_no_file_has_the_name_that_others_look_for(name: str, place: Path) -> None:
    names = {path.name for path in (place / name).iterdir()}
    assert INDEX in names
    assert not names & {"model.safetensors", PLAIN_INDEX}
    weight_map = json.loads((place / name / INDEX).read_text())["weight_map"]
    assert set(weight_map.values()) <= names
    assert json.loads((place / name / "config.json").read_text())[WEIGHTS_KEY] == NOTE


def test_folders_in_other_formats_do_not_carry_the_note(place: Path) -> None:
    for name in (*PACKAGES, "hf"):
        assert WEIGHTS_KEY not in json.loads((place / name / "config.json").read_text())
        assert (place / name / PLAIN_INDEX).exists()


def test_folders_from_before_load(place: Path, tmp_path: Path) -> None:
    for path in (place / "quantized").iterdir():
        (tmp_path / (PLAIN_INDEX if path.name == INDEX else path.name)).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config[WEIGHTS_KEY]
    (tmp_path / "config.json").write_text(json.dumps(config))
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path, place / "quantized")]
    assert sum_of_logits(models[0]) == sum_of_logits(models[1])


def test_saving_over_a_folder_leaves_one_index(place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "quantized", dtype=torch.float32)
    expected = sum_of_logits(model)
    for options in ({"max_shard_size": 20_000}, {}, {"max_shard_size": 20_000}):
        model.save_pretrained(tmp_path, **options)
        assert not {path.name for path in tmp_path.iterdir()} & {"model.safetensors", PLAIN_INDEX}
        assert sum_of_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)) == expected


def test_ways_of_saving_that_there_are_not(place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "quantized")
    with pytest.raises(FormatError, match="variant"):
        model.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(FormatError, match="load its folder again"):
        type(model).save_pretrained(model, tmp_path)
    with pytest.raises(FormatError, match="load its folder again"):
        pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_pushing_is_done_with_the_native_names(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    model = AutoModelForCausalLM.from_pretrained(place / "quantized")
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, *args, **kwargs: pushed.append((args, kwargs)))
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/model", private=True, token="t")
    assert pushed == [(("someone/model",), {"token": "t", "private": True})]
    assert (tmp_path / INDEX).exists()
