"""Bounds: what a config or a header asks for is compared with the file that must hold it, before anything is made."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from bitwright.checkpoint import gguf_file, shard, source
from bitwright.checkpoint.bounds import MOST_POSITIONS, check_bounds
from bitwright.checkpoint.gguf_file import read_gguf_header
from bitwright.checkpoint.shard import read_header
from bitwright.checkpoint.source import locate_tensors
from bitwright.errors import CheckpointError

SHAPES: dict[str, tuple[int, ...] | None] = {
    "model.embed_tokens.weight": (320, 64),
    "model.layers.0.mlp.up_proj.weight": (128, 64),
    "model.layers.1.mlp.up_proj.weight": (128, 64),
}
CONFIG = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 320}

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"num_hidden_layers": 10**9},
        "num_hidden_layers = 1000000000, and the files hold the tensors of at most 2 blocks",
    ),
    ({"num_hidden_layers": 200_000}, "num_hidden_layers = 200000"),
    ({"hidden_size": 40_000}, "hidden_size = 40000, and the largest size of any tensor in the files is 320"),
    ({"sub": {"intermediate_size": 10**6}}, "sub.intermediate_size = 1000000"),
    ({"num_experts": 5000}, "num_experts = 5000, and the tensors in the files count to 2"),
    ({"max_position_embeddings": 10**15}, "max_position_embeddings = 1000000000000000, more than"),
    ({"rope_scaling": {"original_max_position_embeddings": 10**10}}, "rope_scaling.original_max_position_embeddings"),
    ({"anything": 10**30}, "anything = 1000000000000000000000000000000, which no model has"),
    ({"anything": [-(10**19)]}, "anything = -10000000000000000000, which no model has"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_sizes_beyond_the_files(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"m: config.json says {said}.*download it again or correct"):
        check_bounds("m", CONFIG | change, SHAPES)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"max_position_embeddings": MOST_POSITIONS},
        {"sliding_window": 10**9, "pad_token_id": -1, "rope_theta": 10**12},
        {"num_hidden_layers": 3},  # what is missing is said by name
        {"num_experts": 128, "head_dim": 256},
    ],
)
def test_sizes_that_are_left_to_closer_checks(change: dict[str, Any]) -> None:
    check_bounds("m", CONFIG | change, SHAPES)


def test_experts_that_are_stored_as_a_stack() -> None:
    check_bounds("m", CONFIG | {"num_experts": 5000}, {**SHAPES, "model.layers.0.mlp.experts.up": (5000, 8, 8)})


def test_packed_tensors_tell_no_sizes() -> None:
    check_bounds("m", CONFIG | {"hidden_size": 40_000}, {**SHAPES, "model.layers.1.mlp.down_proj.weight": None})


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = {f"a{n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(3)}
    text = json.dumps(header).encode()
    path = tmp_path / "model-1.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(3))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(header, path.name)}))
    assert len(locate_tensors(tmp_path)) == 3
    monkeypatch.setattr(source, "_MOST_TENSORS", 2)
    with pytest.raises(CheckpointError, match=r"index\.json: 3 tensors, at most 2 are read"):
        locate_tensors(tmp_path)
    monkeypatch.setattr(shard, "_MOST_TENSORS", 2)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: 3 tensors, at most 2 are read"):
        read_header(path)


def gguf(path: Path, tensors: int, keys: int, body: bytes = b"") -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body)
    return path


def test_gguf_headers_have_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match=r"model\.gguf: 1099511627776 keys, at most"):
        read_gguf_header(gguf(path, 0, 1 << 40))
    with pytest.raises(CheckpointError, match=r"1099511627776 tensors, at most"):
        read_gguf_header(gguf(path, 1 << 40, 0))
    for kind in (0, 8):
        array = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, 1 << 40)
        with pytest.raises(CheckpointError, match=r"1099511627776 elements of arrays up to k, at most"):
            read_gguf_header(gguf(path, 0, 1, array))
    several = b"".join(struct.pack("<Q", 1) + key + struct.pack("<IIQ", 9, 0, 3) + b"abc" for key in (b"k", b"l"))
    assert read_gguf_header(gguf(path, 0, 2, several)).metadata == {"k": [97, 98, 99], "l": [97, 98, 99]}
    monkeypatch.setattr(gguf_file, "_MOST_ELEMENTS", 5)
    with pytest.raises(CheckpointError, match="6 elements of arrays up to l, at most 5"):
        read_gguf_header(gguf(path, 0, 2, several))
