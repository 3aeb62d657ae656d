"""Rotated sources: what they say of themselves, what they refuse, and rotated tensors against plain algebra."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bitwright.checkpoint.shard import TensorInfo
from bitwright.checkpoint.source import Source
from bitwright.errors import CheckpointError, PlanError
from bitwright.models import adapter_for
from bitwright.models.edges import LinearEdge, NormEdge
from bitwright.numeric.hadamard import hadamard_blocks, random_rotation
from bitwright.transforms.rotate import Rotate, online_hadamards, rotated

HIDDEN, HEADS, KV, DIM, WIDE, WORDS = 24, 4, 2, 6, 40, 11
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "tie_word_embeddings": True,
}
OPT = {
    "model_type": "opt",
    "hidden_size": HIDDEN,
    "ffn_dim": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "tie_word_embeddings": True,
}
BLOCK = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (HEADS * DIM, HIDDEN),
    "self_attn.k_proj.weight": (KV * DIM, HIDDEN),
    "self_attn.v_proj.weight": (KV * DIM, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_proj.weight": (WIDE, HIDDEN),
    "mlp.up_proj.weight": (WIDE, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, WIDE),
}
OPT_BLOCK = {
    "self_attn_layer_norm": (HIDDEN,),
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "out")},
    "final_layer_norm": (HIDDEN,),
    "fc1": (WIDE, HIDDEN),
    "fc2": (HIDDEN, WIDE),
}


class Memory(Source):
    """A checkpoint in memory."""

    label = "memory"

    def __init__(self, config: dict[str, Any], values: dict[str, Tensor]):
        self.config, self.values = config, values
        self.tensors = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in values.items()}

    def read(self, name: str) -> Tensor:
        return self.values[name].clone()

    def files(self) -> list[Path]:
        return [Path(__file__)]

    def write_side_files(self, folder: Path) -> None:
        (folder / "side").touch()


def llama(dtype: torch.dtype = torch.float64, **more: tuple[int, ...]) -> Memory:
    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= {f"model.layers.{index}.{name}": shape for index in range(2) for name, shape in BLOCK.items()}
    return Memory(dict(CONFIG), {name: torch.randn(shape, dtype=dtype) for name, shape in {**shapes, **more}.items()})


def opt(biased_norms_only: bool = False) -> Memory:
    decoder = "model.decoder"
    shapes = {
        f"{decoder}.embed_tokens.weight": (WORDS, HIDDEN),
        f"{decoder}.embed_positions.weight": (9, HIDDEN),
        f"{decoder}.final_layer_norm.weight": (HIDDEN,),
        f"{decoder}.final_layer_norm.bias": (HIDDEN,),
    }
    for index in range(2):
        for module, shape in OPT_BLOCK.items():
            shapes[f"{decoder}.layers.{index}.{module}.weight"] = shape
            if "norm" in module or not biased_norms_only:
                shapes[f"{decoder}.layers.{index}.{module}.bias"] = shape[:1]
    return Memory(dict(OPT), {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()})


def rotate(source: Source, settings: Rotate | None = None, seed: int = 0, dtype: torch.dtype = torch.float64) -> Source:
    return rotated(source, adapter_for(source.config), settings or Rotate(), seed, dtype)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def heads(count: int, seed: int = 0) -> Tensor:
    """The rotation of the values of `count` heads, written out."""
    return torch.block_diag(*[random_rotation(DIM, seed + 1)] * count)


def test_tensors_are_plain_algebra():
    source = llama()
    result = rotate(source, Rotate(online_down=True))
    rotation = random_rotation(HIDDEN, 0, fixes_ones=True)
    old, prefix = source.values, "model.layers.1."
    first, second = (
        torch.diag(old[f"{prefix}{name}.weight"]) for name in ("input_layernorm", "post_attention_layernorm")
    )
    expected = {
        "self_attn.q_proj": old[f"{prefix}self_attn.q_proj.weight"] @ first @ rotation,
        "self_attn.v_proj": heads(KV).T @ old[f"{prefix}self_attn.v_proj.weight"] @ first @ rotation,
        "self_attn.o_proj": rotation.T @ old[f"{prefix}self_attn.o_proj.weight"] @ heads(HEADS),
        "mlp.up_proj": old[f"{prefix}mlp.up_proj.weight"] @ second @ rotation,
        "mlp.down_proj": hadamard_blocks(rotation.T @ old[f"{prefix}mlp.down_proj.weight"]),
        "input_layernorm": torch.ones(HIDDEN, dtype=torch.float64),
    }
    for name, value in expected.items():
        close(result.read(f"{prefix}{name}.weight"), value)
    close(result.read("model.embed_tokens.weight"), old["model.embed_tokens.weight"] @ rotation)
    head = old["model.embed_tokens.weight"] @ torch.diag(old["model.norm.weight"]) @ rotation
    close(result.read("lm_head.weight"), head)
    close(result.read("model.norm.weight"), torch.ones(HIDDEN, dtype=torch.float64))


def test_long_embeddings_are_rotated_in_pieces():
    source = llama(**{"model.embed_tokens.weight": (8192 * 2 + 5, HIDDEN)})
    expected = source.values["model.embed_tokens.weight"] @ random_rotation(HIDDEN, 0, fixes_ones=True)
    close(rotate(source).read("model.embed_tokens.weight"), expected)


def test_values_are_rounded_once():
    source = llama(torch.bfloat16)
    single, double = rotate(source, dtype=torch.float32), rotate(source)
    for name, info in single.tensors.items():
        assert info.dtype == torch.float32
        assert torch.equal(single.read(name), double.read(name).float())


def test_headers_are_those_of_the_values():
    for settings in (Rotate(), Rotate(residual=False), Rotate(values=False, online_down=True)):
        for source in (llama(torch.bfloat16), opt()):
            result = rotate(source, settings, dtype=torch.float32)
            for name, info in result.tensors.items():
                value = result.read(name)
                assert (tuple(value.shape), value.dtype) == (info.shape, info.dtype), name


def test_tied_head_is_untied_only_when_the_norm_is_folded_into_it():
    source = llama()
    result = rotate(source)
    assert source.config["tie_word_embeddings"] is True
    assert result.config == {**CONFIG, "tie_word_embeddings": False}
    assert set(result.tensors) == {*source.tensors, "lm_head.weight"}
    assert not adapter_for(result.config).tied_head
    other = rotate(source, Rotate(residual=False))
    assert other.config == CONFIG
    assert set(other.tensors) == set(source.tensors)


def test_stored_copy_of_a_tied_head_does_not_matter():
    source = llama(**{"lm_head.weight": (WORDS, HIDDEN)})
    without = Memory(source.config, {name: value for name, value in source.values.items() if name != "lm_head.weight"})
    close(rotate(source).read("lm_head.weight"), rotate(without).read("lm_head.weight"))


def test_tensors_that_are_not_rewritten_stay_as_they_are():
    source = llama(torch.bfloat16, **{"model.layers.0.self_attn.rotary_emb.inv_freq": (3,)})
    alone = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert torch.equal(rotate(source).read(alone), source.values[alone])
    result = rotate(source, Rotate(residual=False), dtype=torch.float32)
    changed = {name.split(".")[-2] for name in source.tensors if result.tensors[name].dtype == torch.float32}
    assert changed == {"v_proj", "o_proj"}
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(result.read(name), source.values[name])


def test_offset_of_norms_is_part_of_their_weight():
    source, adapter = llama(), adapter_for(CONFIG)
    edges = tuple(replace(edge, offset=1.0) if isinstance(edge, NormEdge) else edge for edge in adapter.edges)
    offset = rotated(source, replace(adapter, edges=edges), Rotate(), 0, torch.float64)
    plain = rotate(Memory(CONFIG, {k: v + ("norm" in k) for k, v in source.values.items()}))
    for name in plain.tensors:
        close(offset.read(name), plain.read(name) - float("norm" in name))


def test_biases_of_norms_move_into_the_linears_that_read_them():
    source = opt()
    result, block = rotate(source, Rotate(values=False)), "model.decoder.layers.1."
    old = {name.removeprefix(block): value for name, value in source.values.items()}
    close(result.read(f"{block}final_layer_norm.bias"), torch.zeros(HIDDEN, dtype=torch.float64))
    close(result.read(f"{block}fc1.bias"), old["fc1.bias"] + old["fc1.weight"] @ old["final_layer_norm.bias"])
    rotation = random_rotation(HIDDEN, 0, fixes_ones=True)
    close(result.read(f"{block}fc2.bias"), old["fc2.bias"] @ rotation)


def test_bias_without_a_reader_that_takes_it_stays_in_the_norm():
    source = opt(biased_norms_only=True)
    result, rotation = rotate(source), random_rotation(HIDDEN, 0, fixes_ones=True)
    for name in ("model.decoder.final_layer_norm", "model.decoder.layers.0.final_layer_norm"):
        ratio = source.values[f"{name}.bias"] / source.values[f"{name}.weight"]
        close(result.read(f"{name}.bias"), ratio @ rotation)


def test_bias_that_nothing_can_take_is_refused():
    source = opt()
    weight, bias = (source.values[f"model.decoder.final_layer_norm.{leaf}"] for leaf in ("weight", "bias"))
    weight[3] = bias[3] = 0
    assert rotate(source).read("model.decoder.final_layer_norm.bias").isfinite().all()
    bias[3] = 1
    with pytest.raises(PlanError, match=r"model\.decoder\.final_layer_norm\.bias .* 1 of its channels"):
        rotate(source)
    rotate(source, Rotate(residual=False))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.1.mlp.extra.weight", (HIDDEN, HIDDEN), r"model\.layers\.1\.mlp\.extra\.weight is in no linear"),
        ("model.embed_tokens.weight", (WORDS, 16), r"model\.embed_tokens\.weight \[11, 16\] is not 24 wide"),
        ("model.other.weight", (HIDDEN, HIDDEN), r"model\.other\.weight is in no linear"),
    ],
)
def test_tensors_that_the_stream_would_meet_unprepared_are_refused(name, shape, message):
    with pytest.raises(PlanError, match=message):
        rotate(llama(**{name: shape}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_layer_norm_before": False}, "self_attn_layer_norm of opt does not stand between"),
        ({"layer_norm_elementwise_affine": False}, "no norm edge of opt says what self_attn.q_proj reads"),
        ({"_remove_final_layer_norm": True}, "opt has no norm before its head"),
    ],
)
def test_architectures_that_cannot_be_rotated_are_refused(config, message):
    source = opt()
    source.config |= config
    with pytest.raises(PlanError, match=message):
        rotate(source)
    assert rotate(source, Rotate(residual=False)).tensors.keys() == source.tensors.keys()


def test_discovered_architectures_are_refused():
    source = llama()
    adapter = replace(adapter_for(CONFIG), model_type="gemma")
    with pytest.raises(PlanError, match="gemma is a discovered architecture"):
        rotated(source, adapter, Rotate(), 0)


def test_values_need_their_edge():
    adapter = adapter_for(CONFIG)
    without = replace(adapter, edges=tuple(e for e in adapter.edges if not isinstance(e, LinearEdge)))
    with pytest.raises(PlanError, match=r"use --set rotate\.values=false"):
        rotated(llama(), without, Rotate(), 0)


def test_identity_and_fingerprint_tell_rotations_apart():
    source = llama()
    several = [
        source,
        rotate(source),
        rotate(source, seed=1),
        rotate(source, Rotate(values=False)),
        rotate(source, Rotate(online_down=True)),
    ]
    assert len({one.fingerprint() for one in several}) == len(several)
    assert len({str(one.identity()) for one in several}) == len(several)
    assert rotate(source).fingerprint() == several[1].fingerprint()
    assert rotate(source).identity() == several[1].identity()


def test_same_seed_same_values():
    source = llama()
    for name in rotate(source).tensors:
        assert torch.equal(rotate(source).read(name), rotate(source).read(name))
    assert not torch.equal(
        rotate(source).read("model.embed_tokens.weight"), rotate(source, seed=1).read("model.embed_tokens.weight")
    )


def test_the_rest_is_that_of_the_source(tmp_path):
    source = llama()
    result = rotate(source)
    assert (result.label, result.files()) == (source.label, source.files())
    result.write_side_files(tmp_path)
    assert (tmp_path / "side").exists()
    with pytest.raises(CheckpointError, match=r"no tensor model\.nothing"):
        result.read("model.nothing")


def test_online_hadamards_are_declared():
    assert online_hadamards(adapter_for(CONFIG), Rotate()) == ()
    assert online_hadamards(adapter_for(CONFIG), Rotate(online_down=True)) == ("mlp.down_proj",)
    assert online_hadamards(adapter_for(OPT), Rotate(online_down=True)) == ("fc2",)


def test_settings_that_do_nothing_are_refused():
    with pytest.raises(ValidationError, match="does nothing"):
        Rotate(residual=False, values=False)
