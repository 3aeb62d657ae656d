"""The arithmetic of edges on numbers that can be checked by eye."""

from __future__ import annotations

import pytest
import torch

from bitwright.errors import PlanError
from bitwright.models.edges import (
    BlockShape,
    Edge,
    ExpertEdge,
    Factors,
    LinearEdge,
    NormEdge,
    RotaryEdge,
    apply_factors,
    merge_factors,
)

SHAPE = BlockShape(hidden=3, intermediate=5, heads=4, kv_heads=2, head_dim=4)


def test_norm_edge() -> None:
    scale = torch.tensor([1.0, 2.0, 4.0])
    factors = NormEdge("norm", ("q", "k")).factors(scale, SHAPE)
    assert list(factors) == ["norm.weight", "norm.bias", "q.weight", "k.weight"]
    assert factors["norm.bias"].rows is not None
    assert factors["norm.bias"].rows.tolist() == [1.0, 0.5, 0.25]
    assert factors["k.weight"].columns is scale
    assert factors["k.weight"].rows is None


def test_value_edge_repeats_each_kv_head_for_its_queries() -> None:
    edge = LinearEdge("v", "o", attention=True)
    assert edge.width(SHAPE) == 8
    columns = edge.factors(torch.arange(1.0, 9.0), SHAPE)["o.weight"].columns
    assert columns is not None
    assert columns.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]


def test_norm_edge_over_a_stack_of_experts() -> None:
    edge = NormEdge("norm", ("router",), stacks=("experts",))
    scale = torch.tensor([1.0, 2.0, 4.0])
    assert edge.consumers == {"router": "router.weight", "experts": "experts"}
    assert edge.modules == ("norm", "router", "experts")
    stack = torch.arange(12.0).reshape(2, 2, 3)
    assert apply_factors(stack, edge.factors(scale, SHAPE)["experts"]).equal(stack * scale)


def test_expert_edge_scales_the_up_half_of_every_expert() -> None:
    shape = BlockShape(hidden=3, intermediate=2, heads=4, kv_heads=2, head_dim=4)
    edge = ExpertEdge("gate_up", "down", experts=2)
    assert edge.width(shape) == 4
    factors = edge.factors(torch.tensor([1.0, 2.0, 4.0, 8.0]), shape)
    gate_up = apply_factors(torch.ones(2, 4, 3), factors["gate_up"])
    assert gate_up[:, :, 0].tolist() == [[1, 1, 1, 0.5], [1, 1, 0.25, 0.125]]
    assert gate_up.eq(gate_up[:, :, :1]).all()
    down = apply_factors(torch.ones(2, 3, 2), factors["down"])
    assert down[:, 0].tolist() == [[1, 2], [4, 8]]
    assert down.eq(down[:, :1]).all()


def test_linear_edge_is_as_wide_as_the_feed_forward() -> None:
    assert LinearEdge("up", "down").width(SHAPE) == 5


@pytest.mark.parametrize(
    ("edge", "width", "queries"),
    [
        (RotaryEdge("q", "k"), 4, [1, 2, 1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4, 3, 4]),
        (RotaryEdge("q", "k", pairing="interleaved"), 4, [1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4]),
        (RotaryEdge("q", "k", rotary=2), 6, [1, 1, 2, 3, 1, 1, 2, 3, 4, 4, 5, 6, 4, 4, 5, 6]),
        (RotaryEdge("q", "k", rotary=0), 8, [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]),
        (RotaryEdge("q", "k", shared=True), 2, [1, 2, 1, 2]),
    ],
)
def test_rotary_edge_gives_pairs_one_scale(edge: RotaryEdge, width: int, queries: list[int]) -> None:
    assert edge.width(SHAPE) == width
    factors = edge.factors(torch.arange(1.0, width + 1), SHAPE)
    query, key = factors["q.weight"].rows, factors["k.bias"].rows
    assert query is not None
    assert key is not None
    assert query.tolist() == queries
    one_per_group = query if edge.shared else query.reshape(2, 2, 4)[:, 0].flatten()
    torch.testing.assert_close(key, 1 / one_per_group)


def test_offset_scales_what_the_model_multiplies_by() -> None:
    stored, rows = torch.tensor([0.5, -0.25]), torch.tensor([2.0, 4.0])
    result = apply_factors(stored, Factors(rows=rows, offset=1.0))
    torch.testing.assert_close(1 + result, (1 + stored) * rows)


def test_apply_factors_on_weights_and_biases() -> None:
    weight, rows, columns = torch.ones(2, 3), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0, 100.0])
    result = apply_factors(weight, Factors(rows=rows, columns=columns))
    assert result.tolist() == [[1, 10, 100], [2, 20, 200]]
    assert apply_factors(torch.ones(2), Factors(rows=rows)).tolist() == [1, 2]
    assert weight.eq(1).all()
    assert apply_factors(weight.bfloat16(), Factors(rows=rows)).dtype == torch.float32


@pytest.mark.parametrize(
    ("tensor", "factors"),
    [
        (torch.ones(2, 3), Factors(rows=torch.ones(3))),
        (torch.ones(2, 3), Factors(columns=torch.ones(1))),
        (torch.ones(2), Factors(columns=torch.ones(2))),
        (torch.ones(2, 3), Factors(columns=torch.ones(2, 3))),
        (torch.ones(2, 3, 4), Factors(rows=torch.ones(2))),
        (torch.ones(2, 3, 4), Factors(columns=torch.ones(3, 4))),
    ],
)
def test_apply_factors_refuses_sizes_that_would_broadcast(tensor: torch.Tensor, factors: Factors) -> None:
    with pytest.raises(ValueError, match="do not fit axis"):
        apply_factors(tensor, factors)


@pytest.mark.parametrize(
    "edge", [NormEdge("n", ("q",)), LinearEdge("v", "o", True), RotaryEdge("q", "k"), ExpertEdge("u", "d", 3)]
)
def test_factors_refuse_a_scale_of_the_wrong_size(edge: Edge) -> None:
    with pytest.raises(ValueError, match="takes a scale of shape"):
        edge.factors(torch.ones(7), SHAPE)


def test_merge_refuses_two_offsets() -> None:
    rows = torch.ones(2)
    with pytest.raises(ValueError, match="offsets"):
        merge_factors([{"n.weight": Factors(rows=rows)}, {"n.weight": Factors(rows=rows, offset=1.0)}])


def test_shape_from_config_knows_the_families_names() -> None:
    assert BlockShape.from_config({"n_embd": 8, "n_head": 2}) == BlockShape(8, 32, 2, 2, 4)
    modern = {
        "hidden_size": 8,
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    assert BlockShape.from_config(modern) == BlockShape(8, 20, 4, 2, 16)
    assert BlockShape.from_config({**modern, "head_dim": None}).head_dim == 2
    assert BlockShape.from_config({**modern, "num_key_value_heads": None}).kv_heads == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 2}, "no hidden_size"),
        ({"hidden_size": 8}, "no num_attention_heads"),
        ({"hidden_size": 8, "num_attention_heads": 0}, "heads=0"),
        ({"hidden_size": "8", "num_attention_heads": 2, "head_dim": 4, "intermediate_size": 4}, "hidden='8'"),
        ({"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 3}, "multiple"),
        ({"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 0}, "kv_heads=0"),
    ],
)
def test_shape_from_config_refuses(config: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        BlockShape.from_config(config)
