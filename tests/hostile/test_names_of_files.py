"""Indexes and manifests that name files elsewhere, or files that could run programs: refused before any is opened."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import bitwright
from bitwright.checkpoint.load import load_model
from bitwright.errors import CheckpointError, FormatError
from bitwright.export.targets import export_model, import_model
from bitwright.runtime.huggingface import register

MANIFEST = "manifest.json"
NAMES = {
    "../model-00001-of-00004.safetensors": "lies outside the folder",
    "sub/model-00001-of-00004.safetensors": "lies outside the folder",
    "/etc/model.safetensors": "lies outside the folder",
    "..\\model.safetensors": "lies outside the folder",
    "a\0.safetensors": "lies outside the folder",
    "pytorch_model.bin": r"needed files that end in \.safetensors",
}


class Program:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> dict[str, Path]:
    """A float, a native and a foreign folder, each in shards with an index."""
    place = tmp_path_factory.mktemp("folders")
    found = {"float": place / "float", "native": place / "native", "gptq": place / "gptq"}
    AutoModelForCausalLM.from_pretrained(tiny_llama_folder).save_pretrained(found["float"], max_shard_size="100KB")
    for path in tiny_llama_folder.glob("*token*"):
        shutil.copyfile(path, found["float"] / path.name)
    bitwright.quantize(str(found["float"]), found["native"], "rtn", "w4a16g32")
    export_model(found["native"], found["gptq"], "gptq")
    return found


def damaged(folder: Path, place: Path, name: str) -> Path:
    """A copy of `folder` the first shard of whose index and manifest is called `name`, with a program of that name."""
    copy = place / "folder"
    shutil.copytree(folder, copy)
    (place_of_index,) = copy.glob("*.index.json")
    index = json.loads(place_of_index.read_text())
    first = min(index["weight_map"].values())
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    place_of_index.write_text(json.dumps(index))
    if (copy / MANIFEST).exists():
        manifest = json.loads((copy / MANIFEST).read_text())
        manifest["shards"][0] = name
        (copy / MANIFEST).write_text(json.dumps(manifest))
    if "/" not in name and "\0" not in name:
        (copy / name).write_bytes(pickle.dumps(Program(place / "ran")))
    return copy


COMMANDS: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "plan": ("float", lambda folder, out: bitwright.plan(str(folder), "rtn", "w4a16g32")),
    "quantize": ("float", lambda folder, out: bitwright.quantize(str(folder), out, "rtn", "w4a16g32")),
    "load float": ("float", lambda folder, out: load_model(str(folder))),
    "load native": ("native", lambda folder, out: load_model(str(folder))),
    "inspect": ("native", lambda folder, out: bitwright.inspect(folder)),
    "verify": ("native", lambda folder, out: bitwright.inspect(folder, verify=True)),
    "export": ("native", lambda folder, out: export_model(folder, out, "hf")),
    "generate": ("native", lambda folder, out: bitwright.generate(str(folder), "a", tokens=1)),
    "import": ("gptq", lambda folder, out: import_model(folder, out)),
}


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("command", COMMANDS)
def test_names_are_refused(folders: dict[str, Path], tmp_path: Path, command: str, name: str) -> None:
    kind, run = COMMANDS[command]
    folder = damaged(folders[kind], tmp_path, name)
    with pytest.raises((CheckpointError, FormatError), match=NAMES[name]):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("has_dtype", [True, False])
def test_transformers_is_stopped_as_well(
    folders: dict[str, Path], tmp_path: Path, has_manifest: bool, has_dtype: bool
) -> None:
    folder = damaged(folders["native"], tmp_path, "pytorch_model.bin")
    if not has_manifest:
        (folder / MANIFEST).unlink()
        with pytest.raises(CheckpointError, match="needed files that end in"):
            load_model(str(folder))
    config = json.loads((folder / "config.json").read_text())
    if not has_dtype:
        config.pop("dtype")  # transformers would open the first shard to find one
    (folder / "config.json").write_text(json.dumps(config))
    register()
    with pytest.raises(FormatError, match="needed files that end in"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["float", "native"])
def test_what_would_redirect_transformers_is_refused(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(folders[kind], folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(CheckpointError, match=r"an adapter .* merge it"):
        load_model(str(folder))
    (folder / "adapter_config.json").unlink()
    if kind == "native":
        return  # its quantizer says where the index is
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with pytest.raises(CheckpointError, match=r"transformers_weights names other files.*remove the key"):
        load_model(str(folder))


def test_both_kinds_of_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(folders["float"], folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"both model\.safetensors\.index\.json and model\.safetensors"):
        bitwright.plan(str(folder), "rtn", "w4a16g32")
