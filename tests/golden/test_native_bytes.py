"""Golden bytes of the native format: what version 1 wrote once, it writes and reads for ever.

`native.json` holds, per case, the spec and the hex dump of every tensor. The samples come from integer
formulas, not from a random generator, so they can be rebuilt anywhere. A test that fails here means that the
format has changed: that needs a new version, not new golden bytes. To add cases, run this file as a script.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.formats.native import TensorEntry, pack, quantization_config, unpack
from bitwright.numeric.grid import Grid, stored_zero
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec

GOLDEN = Path(__file__).with_name("native.json")
ROWS, COLUMNS, GROUP = 3, 13, 5

CASES: dict[str, dict[str, Any]] = {
    **{f"int{bits}": {"bits": bits, "group_size": GROUP} for bits in range(2, 9)},
    **{f"float{bits}": {"bits": bits, "group_size": GROUP, "zero": "float"} for bits in (2, 3, 8)},
    **{f"symmetric{bits}": {"bits": bits, "symmetric": True} for bits in (3, 4, 8)},
    "bfloat16": {"bits": 4, "group_size": GROUP, "zero": "float", "scale_dtype": "bfloat16"},
    "float32": {"bits": 4, "group_size": GROUP, "zero": "float", "scale_dtype": "float32"},
}


def sample(spec: WeightSpec) -> QTensor:
    """Codes, scales, zeros and four outliers by formula; row 1 has no outlier."""
    index = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    codes = ((index * 89 + 41) % (spec.max_code + 1)).to(torch.uint8)
    group = torch.arange(ROWS * spec.groups(COLUMNS)).reshape(ROWS, -1)
    scale = (group + 1) * 2.0**-6 * torch.where(group % 4 == 3, -1.0, 1.0)
    zero = stored_zero((group * 5 % (spec.max_code + 1)) + 0.25 * (group % 3), spec)
    mask = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    mask[0, [2, 12]] = mask[2, [0, 7]] = True
    return QTensor(codes, Grid(scale, zero, spec), Outliers.gather(mask, 1.5 - index * 0.125))


def hexdump(spec: WeightSpec) -> dict[str, str]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes().hex() for name, t in pack(sample(spec)).items()}


def build() -> dict[str, Any]:
    """The whole golden file."""
    golden = {}
    for name, case in CASES.items():
        spec = WeightSpec(**case)
        config = quantization_config({"weight": TensorEntry.of(sample(spec))})
        golden[name] = {"config": config, "tensors": hexdump(spec)}
    return golden


def test_every_case_is_recorded() -> None:
    assert json.loads(GOLDEN.read_text()).keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_golden_bytes(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    spec = WeightSpec(**CASES[name])
    q = sample(spec)
    entry = TensorEntry.of(q)
    assert quantization_config({"weight": entry}) == golden["config"]
    assert hexdump(spec) == golden["tensors"]

    like = pack(q)
    stored = {
        part: torch.frombuffer(bytearray.fromhex(dump), dtype=like[part].dtype).reshape(like[part].shape)
        for part, dump in golden["tensors"].items()
    }
    restored = unpack("weight", stored, entry)
    assert torch.equal(restored.codes, q.codes)
    assert torch.equal(restored.dequantize(), q.dequantize())


def test_worked_example_of_the_specification() -> None:
    """The example of docs/formats/native.md: codes 1 2 3 4 5 6 7 0 1 2 7 in 3 bits."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 7]], dtype=torch.uint8)
    grid = Grid(torch.ones(1, 1), torch.full((1, 1), 4.0), WeightSpec(bits=3, symmetric=True))
    packed = pack(QTensor(codes, grid))["weight_packed"]
    assert packed.view(torch.uint8).numpy().tobytes().hex(" ") == "d1 58 1f d1 01 00 00 00"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(build(), indent=1) + "\n")
