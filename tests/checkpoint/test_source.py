"""Hugging Face folders and single shards: what is read is what was written; damage is refused by name."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitwright.checkpoint.open import find_source
from bitwright.checkpoint.shard import read_header, read_tensor, write_shard
from bitwright.checkpoint.source import HuggingFaceSource
from bitwright.errors import CheckpointError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.bias": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "c": torch.randn(5, 7, dtype=torch.float32).to(torch.bfloat16),
    "d": torch.zeros(0, 4),
    "e": torch.tensor(3, dtype=torch.int64),
    "f": torch.tensor([65535, 1], dtype=torch.uint16),
}


def test_shards_round_trip_with_the_safetensors_package(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    digest = write_shard(ours, TENSORS, {"format": "pt"})
    save_file(TENSORS, theirs)
    assert load_file(ours).keys() == TENSORS.keys()
    for name, tensor in load_file(ours).items():
        assert torch.equal(tensor, TENSORS[name])
    for path in (ours, theirs):
        for name, info in read_header(path)[0].items():
            found = read_tensor(path, name, info)
            assert found.dtype == TENSORS[name].dtype
            assert torch.equal(found, TENSORS[name])
    assert write_shard(tmp_path / "again.safetensors", dict(reversed(TENSORS.items())), {"format": "pt"}) == digest
    assert read_header(ours)[1] == {"format": "pt"}


def raw(tmp_path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, end: int, shape: list[int], dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "said"),
    [
        ({}, b"", 1 << 60, "does not fit a file"),
        (b"not json at all!", b"", None, "not JSON"),
        (b"[1, 2]", b"", None, "needed an object"),
        ({"a": entry(0, 4, [4])}, b"123", None, "truncated"),
        ({"a": entry(0, 4, [4])}, b"12345", None, "truncated or padded"),
        ({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, b"123456", None, "overlaps"),
        ({"a": entry(0, 4, [4]), "b": entry(6, 8, [2])}, b"12345678", None, "follows a hole"),
        ({"a": entry(0, 4, [5])}, b"1234", None, "needed 5"),
        ({"a": entry(0, 4, [-4])}, b"1234", None, "tensor a"),
        ({"a": entry(0, 4, [4], "F3")}, b"1234", None, "unusable header entry"),
        ({"a": {"dtype": "U8"}}, b"", None, "unusable header entry"),
        ({"a": [1]}, b"", None, "unusable header entry"),
    ],
)
def test_hostile_shards_are_refused(tmp_path: Path, header: object, data: bytes, length: int | None, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_header(raw(tmp_path, header, data, length))


def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    write_shard(folder / "one.safetensors", {"a": TENSORS["a"]}, {})
    write_shard(folder / "two.safetensors", {"c": TENSORS["c"]}, {})
    set_index(folder, {"a": "one.safetensors", "c": "two.safetensors"})
    return folder


def set_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_folders(tmp_path: Path) -> None:
    source = HuggingFaceSource(sharded(tmp_path))
    assert torch.equal(source.read("a"), TENSORS["a"])
    assert torch.equal(source.read("c"), TENSORS["c"])
    with pytest.raises(CheckpointError, match="no tensor z"):
        source.read("z")


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "three.safetensors"}, "three.safetensors: missing, but the index names it"),
        ({"b": "one.safetensors"}, "no tensor b, but the index places it there"),
        ({"a": "../outside.safetensors"}, "lies outside the folder"),
        ({}, "no weight_map"),
        ([1], "no weight_map"),
    ],
)
def test_indexes_that_do_not_agree_with_the_shards(tmp_path: Path, weight_map: object, said: str) -> None:
    folder = sharded(tmp_path)
    set_index(folder, weight_map)
    with pytest.raises(CheckpointError, match=said):
        HuggingFaceSource(folder)


def test_folders_that_cannot_be_a_source(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(CheckpointError, match=r"already quantized \(gptq\)"):
        HuggingFaceSource(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        HuggingFaceSource(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: missing"):
        HuggingFaceSource(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    (empty / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"convert older .bin weights"):
        HuggingFaceSource(empty)
    with pytest.raises(CheckpointError, match=r"not a .gguf"):
        find_source(str(empty / "config.json"))


def test_hub_ids_are_downloaded_and_failures_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = sharded(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, **_: str(folder))
    assert find_source("someone/something").label == "someone/something"

    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"someone/something: .*ConnectionError: no network"):
        find_source("someone/something")
