"""What a MODEL may be: names and paths, no objects; and what a folder that is quantized already is good for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import bitwright
from bitwright.bench import bench
from bitwright.checkpoint.open import open_source
from bitwright.errors import CheckpointError
from bitwright.export.targets import export_model, import_model

TAKING_A_MODEL: dict[str, Callable[[Any], object]] = {
    "plan": lambda model: bitwright.plan(model, "rtn", "w4a16"),
    "quantize": lambda model: bitwright.quantize(model, "out", "rtn", "w4a16"),
    "eval": lambda model: bitwright.eval(model),
    "against": lambda model: bitwright.eval(model, against=model),
    "generate": lambda model: bitwright.generate(model, "Paris"),
    "inspect": lambda model: bitwright.inspect(model),
    "bench": lambda model: bench(model),
    "export": lambda model: export_model(model, "out", "hf"),
    "import": lambda model: import_model(model, "out"),
}


@pytest.mark.parametrize("name", TAKING_A_MODEL)
def test_a_model_in_memory_is_told_to_be_saved_first(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"class Linear.*save_pretrained\(FOLDER\)"):
        TAKING_A_MODEL[name](nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_a_path_names_a_model(tiny_llama_folder: Path) -> None:
    assert open_source(tiny_llama_folder).label == str(tiny_llama_folder)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("gptq", "bitwright import FOLDER -o OUT"),
        ("awq", "bitwright import FOLDER -o OUT"),
        ("compressed-tensors", "bitwright import FOLDER -o OUT"),
        ("bitsandbytes", "start from the float checkpoint"),
        ("bitwright", "needs the float model"),
    ],
)
def test_a_quantized_folder_is_no_source(method: str, said: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(tiny_llama_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(CheckpointError) as refused:
        bitwright.plan(str(folder), "rtn", "w4a16")
    assert said.replace("FOLDER", str(folder)) in str(refused.value)
