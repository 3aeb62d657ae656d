"""SmoothQuant's scales: numbers by hand, grouped queries, experts, and channels that are dead."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from bitwright.models import Adapter, adapter_for
from bitwright.models.edges import LinearEdge, NormEdge
from bitwright.transforms.equivalence import apply
from bitwright.transforms.smooth import Smooth, smooth_scales

SIZES = {"hidden_size": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 2, "head_dim": 2}
EVERY = ("norm", "value", "down")


def llama() -> Adapter:
    return adapter_for({**SIZES, "model_type": "llama"})


def tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    shape = adapter.shape
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rows = {"q_proj": (queries, 4), "k_proj": (keys, 4), "v_proj": (keys, 4), "o_proj": (4, queries)}
    weights = {f"self_attn.{name}.weight": torch.randn(size) for name, size in rows.items()}
    feed_forward = {"gate_proj": (2, 4), "up_proj": (2, 4), "down_proj": (4, 2)}
    weights |= {f"mlp.{name}.weight": torch.randn(size) for name, size in feed_forward.items()}
    return weights | {f"{name}.weight": torch.rand(4) for name in adapter.norms}


def test_by_hand() -> None:
    adapter, weights = llama(), tensors(llama())
    for name in ("q_proj", "k_proj", "v_proj"):
        weights[f"self_attn.{name}.weight"].zero_()
    weights["self_attn.q_proj.weight"][:, 0] = -1.0
    weights["self_attn.k_proj.weight"][1, 0] = 4.0  # the largest over all three linears, not q's
    weights["self_attn.v_proj.weight"][2, 1] = -0.25
    weights["self_attn.v_proj.weight"][0, 2] = 1.0
    absmax = {"self_attn.k_proj": torch.tensor([16.0, 1.0, 9.0, 5.0]), "mlp.up_proj": torch.ones(4)}
    rewrite = smooth_scales(Smooth(), adapter, weights, absmax)
    assert rewrite.scales[0] is not None
    assert rewrite.scales[0].tolist() == [2.0, 2.0, 3.0, 1.0]  # sqrt(16 / 4), sqrt(1 / .25), sqrt(9 / 1), dead weight
    assert [scale is None for scale in rewrite.scales] == [False, True, True, False, True]
    assert rewrite.shifts == (None,) * 5

    quarter = smooth_scales(Smooth(alpha=0.25), adapter, weights, absmax).scales[0]
    torch.testing.assert_close(quarter, torch.tensor([2 / 4**0.75, 1 / 0.25**0.75, 3**0.5, 1.0]))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_even_out_weights_or_activations(alpha: float) -> None:
    adapter, weights = llama(), tensors(llama())
    absmax = torch.tensor([1.0, 20.0, 0.5, 3.0])
    rewrite = smooth_scales(
        Smooth(alpha=alpha), adapter, weights, {"mlp.gate_proj": absmax, "self_attn.q_proj": absmax}
    )
    smoothed, scale = apply(rewrite, adapter, weights), rewrite.scales[3]
    assert scale is not None
    columns = torch.cat([smoothed[f"mlp.{name}.weight"] for name in ("gate_proj", "up_proj")]).abs().amax(dim=0)
    even = columns if alpha == 0 else absmax / scale
    torch.testing.assert_close(even, torch.ones(4))


def test_grouped_queries_enter_by_their_largest() -> None:
    adapter, weights = llama(), tensors(llama())
    # channels of o_proj by head: 0 and 1 read key-value head 0, 2 and 3 read head 1; two dims each
    absmax = torch.tensor([1.0, 2.0, 4.0, 1.0, 9.0, 0.0, 3.0, 0.0])
    weights["self_attn.o_proj.weight"] = torch.tensor([[1.0, 0.5, 0.1, 0.2, 1.0, 1.0, 2.25, 1.0]] * 4)
    rewrite = smooth_scales(Smooth(sites=("value",)), adapter, weights, {"self_attn.o_proj": absmax})
    expected = torch.tensor([4 / 1.0, 2 / 0.5, 9 / 2.25, 1.0]).sqrt()  # the last channel is dead
    torch.testing.assert_close(rewrite.scales[2], expected)
    assert [scale is None for scale in rewrite.scales] == [True, True, False, True, True]


def test_experts_share_norm_scales_and_have_their_own_down_scales() -> None:
    adapter = adapter_for({**SIZES, "model_type": "mixtral", "num_local_experts": 3})
    weights = tensors(llama()) | {"mlp.gate.weight": torch.randn(3, 4)}
    weights |= {"mlp.experts.gate_up_proj": torch.randn(3, 4, 4), "mlp.experts.down_proj": torch.randn(3, 4, 2)}
    hidden, inner = torch.rand(4), torch.rand(3, 2)
    absmax = {"self_attn.q_proj": hidden, "mlp.experts.gate_up_proj": hidden, "mlp.experts.down_proj": inner}
    rewrite = smooth_scales(Smooth(sites=("norm", "down")), adapter, weights, absmax)
    readers = torch.cat([weights["mlp.gate.weight"], weights["mlp.experts.gate_up_proj"].reshape(-1, 4)])
    torch.testing.assert_close(rewrite.scales[3], (hidden / readers.abs().amax(dim=0)).sqrt())
    down = [(inner[e] / weights["mlp.experts.down_proj"][e].abs().amax(dim=0)).sqrt() for e in range(3)]
    torch.testing.assert_close(rewrite.scales[4], torch.cat(down))


def test_scales_stay_sane() -> None:
    adapter, weights = llama(), tensors(llama())
    absmax = {"self_attn.q_proj": torch.tensor([1e30, 1e-30, torch.inf, torch.nan]), "mlp.up_proj": torch.ones(4)}
    scale = smooth_scales(Smooth(), adapter, weights, absmax).scales[0]
    assert scale is not None
    torch.testing.assert_close(scale, torch.tensor([1e4, 1e-4, 1.0, 1.0]))
    assert scale.dtype == torch.float32


def test_refusals() -> None:
    adapter, weights = llama(), tensors(llama())
    with pytest.raises(ValueError, match=r"no statistic of \['self_attn.q_proj'"):
        smooth_scales(Smooth(), adapter, weights, {})
    with pytest.raises(ValueError, match="needed 8 channels"):
        smooth_scales(Smooth(sites=("value",)), adapter, weights, {"self_attn.o_proj": torch.ones(4)})
    del weights["mlp.up_proj.weight"]
    absmax = {"self_attn.q_proj": torch.ones(4), "mlp.gate_proj": torch.ones(4)}
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight.*not among the tensors"):
        smooth_scales(Smooth(), adapter, weights, absmax)
    for bad in ({"alpha": 1.1}, {"alpha": -0.1}, {"sites": ()}, {"sites": ("rotary",)}, {"beta": 1}):
        with pytest.raises(ValidationError):
            Smooth.model_validate(bad)


def test_sites_cover_every_edge_but_query_key() -> None:
    adapter, weights = llama(), tensors(llama())
    absmax = {name: torch.rand(weights[f"{name}.weight"].shape[1]) + 0.1 for name in adapter.linears}
    rewrite = smooth_scales(Smooth(sites=EVERY), adapter, weights, absmax)
    for edge, scale in zip(adapter.edges, rewrite.scales, strict=True):
        assert (scale is not None) == isinstance(edge, NormEdge | LinearEdge)
