"""Some mutants of every reader, the same in every run; `python tests/fuzz --mutants 5000` tries more."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from harness import Bench, Verdict
from mutations import bytes_mutation, json_mutation, lines_mutation, safetensors_mutation, toml_mutation
from subjects import SUBJECTS, Subject

MUTANTS = 16
"""Of each reader."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_damage_is_refused_by_errors_of_ours(bench: Bench, subject: Subject) -> None:
    verdicts = [bench.judge(subject, number) for number in range(MUTANTS)]
    assert [verdict for verdict in verdicts if not verdict.sound] == []


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_sound_inputs_are_read(bench: Bench, subject: Subject, tmp_path: Path) -> None:
    """Otherwise mutants would tell nothing."""
    for number in range(len(subject.runs)):
        assert bench.judge_sound(subject, number) == Verdict(subject.name, number, "accepted")


@pytest.mark.parametrize(
    ("mutation", "content"),
    [
        (json_mutation, json.dumps({"a": [1, 2.5, "x", None], "b": {"c": True}}).encode()),
        (lines_mutation, b'{"a": 1}\n{"b": [2]}\n'),
        (toml_mutation, b'method = "rtn"\n\n[scheme]\nbits = 4\n'),
        (bytes_mutation, bytes(range(256))),
        (safetensors_mutation, b""),
    ],
)
def test_mutations_are_drawn_by_their_seed(tmp_path: Path, mutation: object, content: bytes) -> None:
    if not content:
        header = json.dumps({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
        content = len(header).to_bytes(8, "little") + header + b"abcd"
    path = tmp_path / "file"
    found = []
    for seed in (*range(40), *range(40)):
        path.write_bytes(content)
        mutation(path, Random(seed))  # type: ignore[operator]
        found.append(path.read_bytes())
    assert found[:40] == found[40:]
    assert sum(one != content for one in found[:40]) > 30
