"""Side files: every kind that loaders and licences need is carried; links out of the folder and pipes are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bitwright.checkpoint.side_files import copy_side_files

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "spiece.model",
    "qwen.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "modeling_x.py",
    "LICENSE",
    "License.md",
    "MODEL_LICENSE",
    "LICENCE.txt",
    "NOTICE",
    "Notice.txt",
    "USE_POLICY.md",
    "COPYING",
)
LEFT = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "tokenizer.gguf",
    "README.md",
    "additional_chat_templates/notes.txt",
    "additional_chat_templates/deeper/x.jinja",
    "docs/LICENSE",
)


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def carried(source: Path, target: Path) -> tuple[set[str], list[str]]:
    target.mkdir()
    left_out = copy_side_files(source, target)
    return {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}, left_out


def test_what_loaders_and_licences_need_is_carried(tmp_path: Path) -> None:
    source = write(tmp_path / "source", *CARRIED, *LEFT)
    found, left_out = carried(source, tmp_path / "target")
    assert found == set(CARRIED)
    assert left_out == []
    assert all((tmp_path / "target" / name).read_text() == name for name in CARRIED)


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "additional_chat_templates/tool_use.jinja", "x.py"])
def test_a_link_out_of_the_folder_is_left_out_and_told_of(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    source = write(tmp_path / "source", "vocab.txt", "additional_chat_templates/one.jinja")
    (source / name).symlink_to(secret)
    found, left_out = carried(source, tmp_path / "target")
    assert found == {"vocab.txt", "additional_chat_templates/one.jinja"}
    assert len(left_out) == 1
    assert str(source / name) in left_out[0]
    assert f"a link out of the folder, to {secret}" in left_out[0]


def test_a_folder_of_templates_that_is_a_link_is_left_out(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", "secret.jinja")
    source = write(tmp_path / "source", "vocab.txt")
    (source / "additional_chat_templates").symlink_to(elsewhere)
    found, left_out = carried(source, tmp_path / "target")
    assert found == {"vocab.txt"}
    assert "link out of the folder" in left_out[0]


def test_links_within_the_folder_and_hard_links_are_files_like_any_other(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "store/one")
    (source / "tokenizer.json").symlink_to("store/one")
    os.link(source / "store" / "one", source / "LICENSE")
    (tmp_path / "link").symlink_to(source)
    found, left_out = carried(tmp_path / "link", tmp_path / "target")
    assert (found, left_out) == ({"tokenizer.json", "LICENSE"}, [])
    assert not (tmp_path / "target" / "tokenizer.json").is_symlink()


def test_the_links_of_a_hub_cache_work(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = write(repository, "blobs/a", "blobs/b", "snapshots/1234/placeholder") / "snapshots" / "1234"
    (snapshot / "tokenizer.json").symlink_to("../../blobs/a")
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "x.jinja").symlink_to("../../../blobs/b")
    other = write(tmp_path / "models--owner--other", "blobs/c")
    (snapshot / "LICENSE").symlink_to(other / "blobs" / "c")
    found, left_out = carried(snapshot, tmp_path / "target")
    assert found == {"tokenizer.json", "additional_chat_templates/x.jinja"}
    assert len(left_out) == 1
    assert "LICENSE" in left_out[0]


def test_pipes_devices_and_links_to_nothing_are_not_opened(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "vocab.txt")
    os.mkfifo(source / "tokenizer.json")
    (source / "LICENSE").symlink_to("nothing")
    (source / "NOTICE").symlink_to("/dev/zero")
    (source / "chat_template\n.jinja").write_text("a name that a manifest cannot hold")
    found, left_out = carried(source, tmp_path / "target")
    assert found == {"vocab.txt"}
    assert len(left_out) == 4
    assert all(line.isprintable() for line in left_out)
