"""Golden bytes of the native format: what version 3 wrote once, it writes and reads for ever.

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
from torch import Tensor

from bitwright.formats.native import (
    Sites,
    TensorEntry,
    pack,
    quantization_config,
    read_quantization_config,
    read_sites,
    unpack,
)
from bitwright.numeric.activation import ActivationSpec, InputSite, KvSpec, fake_quantize
from bitwright.numeric.bilevel import SecondLevel, code_offset
from bitwright.numeric.fp8 import KvScales, fake_quantize_fp8
from bitwright.numeric.grid import Grid, stored_zero
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec

GOLDEN = Path(__file__).with_name("native.json")
SPECIFICATION = Path(__file__).parents[2] / "docs" / "formats" / "native.md"
ROWS, COLUMNS, GROUP = 3, 13, 5


def level(axis: str, scale_bits: int, zero_bits: int | None = None) -> dict[str, Any]:
    return {"axis": axis, "size": 2, "scale_bits": scale_bits, "zero_bits": zero_bits}


CASES: dict[str, dict[str, Any]] = {
    **{f"int{bits}": {"bits": bits, "group_size": GROUP} for bits in range(2, 9)},
    **{f"float{bits}": {"bits": bits, "group_size": GROUP, "zero": "float"} for bits in (2, 3, 8)},
    **{f"symmetric{bits}": {"bits": bits, "symmetric": True} for bits in (3, 4, 8)},
    "bfloat16": {"bits": 4, "group_size": GROUP, "zero": "float", "scale_dtype": "bfloat16"},
    "float32": {"bits": 4, "group_size": GROUP, "zero": "float", "scale_dtype": "float32"},
    "row": {"bits": 4, "group_size": GROUP, "zero": "float", "bilevel": level("row", 3, 3)},
    "row int": {"bits": 3, "group_size": GROUP, "bilevel": level("row", 5)},
    "row symmetric": {"bits": 3, "group_size": GROUP, "symmetric": True, "bilevel": level("row", 4)},
    "column": {"bits": 4, "group_size": GROUP, "zero": "float", "bilevel": level("column", 6, 4)},
    "column float": {"bits": 4, "group_size": GROUP, "zero": "float", "bilevel": level("column", 2)},
    "column symmetric": {"bits": 6, "group_size": GROUP, "symmetric": True, "bilevel": level("column", 8)},
}
# Cases whose outliers have 8 bits.
SMALL_VALUES = ("int3", "row", "column")


def sample(name: str) -> QTensor:
    """Codes, scales, zeros and four outliers by formula; row 1 has no outlier."""
    spec = WeightSpec.model_validate(CASES[name])
    index = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    codes = ((index * 89 + 41) % (spec.max_code + 1)).to(torch.uint8)
    group = torch.arange(ROWS * spec.groups(COLUMNS)).reshape(ROWS, -1)
    scale = (group + 1) * 2.0**-6 * torch.where(group % 4 == 3, -1.0, 1.0)
    zero = stored_zero((group * 5 % (spec.max_code + 1)) + 0.25 * (group % 3), spec)
    mask = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    mask[0, [2, 12]] = mask[2, [0, 7]] = True
    grid = Grid(scale, zero, spec) if spec.bilevel is None else two_level_grid(group, zero, spec)
    return QTensor(codes, grid, Outliers.gather(mask, 1.5 - index * 0.125, 8 if name in SMALL_VALUES else 16))


def two_level_grid(group: Tensor, zero: Tensor, spec: WeightSpec) -> Grid:
    """Second-level codes and statistics by formula; `group` [out, groups] counts from 0."""
    bilevel = spec.bilevel
    assert bilevel is not None
    shape = (*bilevel.superblocks(*group.shape), bilevel.statistics)
    statistics = (torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape) + 1) * 2.0**-7
    scale_codes = group * 7 % ((1 << bilevel.scale_bits) - 1) + 1
    if bilevel.axis == "column":
        scale_codes = torch.where(scale_codes == code_offset(spec), scale_codes - 1, scale_codes)
    zero_codes = None if bilevel.zero_bits is None else (group * 5 % (1 << bilevel.zero_bits)).to(torch.uint8)
    levels = SecondLevel(scale_codes.to(torch.uint8), zero_codes, statistics)
    return Grid.of_levels(levels, zero if zero_codes is None else None, spec)


def hexdump(name: str) -> dict[str, str]:
    return {part: t.contiguous().view(torch.uint8).numpy().tobytes().hex() for part, t in pack(sample(name)).items()}


def build() -> dict[str, Any]:
    """The whole golden file."""
    golden = {}
    for name in CASES:
        config = quantization_config({"weight": TensorEntry.of(sample(name))})
        golden[name] = {"config": config, "tensors": hexdump(name)}
    return golden


def test_every_case_is_recorded() -> None:
    assert json.loads(GOLDEN.read_text()).keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_golden_bytes(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    q = sample(name)
    entry = TensorEntry.of(q)
    assert quantization_config({"weight": entry}) == golden["config"]
    assert hexdump(name) == golden["tensors"]

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


def test_worked_example_of_outliers() -> None:
    """The example of docs/formats/native.md: one row of 600 columns, outliers in columns 3, 250 and 513."""
    mask = torch.zeros(1, 600, dtype=torch.bool)
    mask[0, [3, 250, 513]] = True
    grid = Grid(torch.ones(1, 1), torch.full((1, 1), 4.0), WeightSpec(bits=3, symmetric=True))
    q = QTensor(torch.zeros(1, 600, dtype=torch.uint8), grid, Outliers.gather(mask, torch.ones(1, 600)))
    packed = pack(q)
    assert packed["outlier_counts"].view(torch.uint8).numpy().tobytes().hex(" ") == "13 00 00 00"
    assert packed["outlier_idx"].tolist() == [3, 250, 1]


def test_worked_examples_of_second_levels() -> None:
    """The examples of docs/formats/native.md."""
    row = WeightSpec.model_validate(CASES["row"] | {"bilevel": level("row", 3, 3)})
    codes = torch.tensor([[5]], dtype=torch.uint8)
    levels = SecondLevel(codes, torch.tensor([[2]], dtype=torch.uint8), torch.tensor([[[0.25, 0.125, 6.0, 0.5]]]))
    assert [t.item() for t in levels.decode(row) if t is not None] == [0.875, 7.0]
    column = WeightSpec.model_validate(CASES["column"] | {"bilevel": level("column", 6, 6)})
    levels = SecondLevel(codes, torch.tensor([[20]], dtype=torch.uint8), torch.tensor([[[0.25, 0.5]]]))
    assert [t.item() for t in levels.decode(column) if t is not None] == [1.25, 8.0]


def test_example_of_quantization_config() -> None:
    """What docs/formats/native.md shows is read, and written again to the letter (but for unused specs)."""
    example = json.loads(SPECIFICATION.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0])
    sites = read_sites(example)
    assert sites.kv_cache == KvSpec(bits=4)
    static = ActivationSpec(bits=8, granularity="tensor")
    expected = InputSite(transform="hadamard", activation=static, scale=0.03125, zero=113)
    assert sites.inputs["model.layers.0.mlp.down_proj"] == expected
    written = quantization_config(read_quantization_config(example), example["tied"], sites)
    assert written == {**example, "specs": example["specs"][:1]}


def test_example_of_an_fp8_kv_cache() -> None:
    """The table that docs/formats/native.md shows, and the numbers that it means."""
    text = SPECIFICATION.read_text(encoding="utf-8").split('"kv_cache": {"bits": 8')[1].split("```")[0]
    example = json.loads('{"kv_cache": {"bits": 8' + text + "}")["kv_cache"]
    scales = {"model.layers.0.self_attn": KvScales(k=0.0625, v=0.001953125)}
    sites = Sites({}, KvSpec(bits=8, grid="fp8"), scales)
    config = quantization_config({"weight": TensorEntry.of(sample("int4"))}, sites=sites)
    assert config["kv_cache"] == example
    assert read_sites({**config, "kv_cache": example}) == sites
    keys = torch.tensor([0.0625, -0.65, 1.0625, 1.1875, 27.5, 29.0, -1e9, 0.00006, 0.00007])
    # Over 1/16: 1, -10.4, 17 (a tie, to the even 16), 19 (a tie, to the even 20), 440 (past the tie, 432), beyond 448,
    # and around half of the least value.
    expected = [0.0625, -0.625, 1.0, 1.25, 28.0, 28.0, -28.0, 0.0, 2.0**-13]
    assert fake_quantize_fp8(keys, 0.0625).tolist() == expected


def test_codes_of_activations() -> None:
    """Grids and values by hand, in numbers that are exact."""
    x = torch.tensor([[-1.0, 0.0, 0.4, 2.75], [0.5, 1.0, 3.75, 3.6]])
    # Scales 3.75 / 15; zeros 4, and 0 for a token without a negative value.
    assert fake_quantize(x, ActivationSpec(bits=4)).tolist() == [[-1.0, 0.0, 0.5, 2.75], [0.5, 1.0, 3.75, 3.5]]
    # The greatest magnitude, 3, over three codes on each side: scale 1.
    y = torch.tensor([[-1.2, 0.0, 0.4, 3.0]])
    assert fake_quantize(y, KvSpec(bits=3, symmetric=True)).tolist() == [[-1.0, 0.0, 0.0, 3.0]]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(build(), indent=1) + "\n")
