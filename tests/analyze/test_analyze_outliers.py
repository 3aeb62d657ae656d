"""The streaming pass: blind hooks, the whole model's own activations, planted outliers found and nothing else."""

from __future__ import annotations

import warnings

import pytest
import torch

with warnings.catch_warnings():
    # packages that transformers imports where they are installed may warn of their own deprecations
    warnings.simplefilter("ignore")
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bitwright.analyze import outliers
from bitwright.analyze.outliers import KEYS, RESIDUAL, VALUES, Collector, Site, observe
from bitwright.analyze.summary import Summary
from bitwright.checkpoint.quiet import quiet_transformers
from bitwright.checkpoint.source import HuggingFaceSource
from bitwright.errors import CalibrationError
from bitwright.models import adapter_for

VOCABULARY, HIDDEN, TOKENS = 96, 32, 20
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "model_type": "llama"},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "model_type": "opt"},
    "falcon": {**SIZES, "ffn_hidden_size": 128, "model_type": "falcon"},
    "gpt_neox": {**SIZES, "intermediate_size": 48, "model_type": "gpt_neox"},
}
Q_INPUT = Site("linear_input", "self_attn.q_proj")


def make(folder, name="llama", change=None):
    """A tiny model of a family in `folder`, after `change(model)`."""
    config = CONFIG_MAPPING[CONFIGS[name]["model_type"]].from_dict(CONFIGS[name])
    with quiet_transformers():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
            if change is not None:
                change(model)
        model.save_pretrained(folder)
    return HuggingFaceSource(folder), model


def windows(count=4, seed=0):
    return torch.randint(3, VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(seed))


def collector(source, *draws):
    return Collector(source, adapter_for(source.config), draws)


@pytest.mark.parametrize("name", CONFIGS)
def test_looking_changes_no_bit(tmp_path, name):
    source, _ = make(tmp_path, name)
    found = collector(source, windows())
    runner = found.runner
    with runner.first_inputs() as stream, torch.no_grad():
        hidden = stream.read(0)
        for index in range(runner.blocks):
            block = runner.block(index)
            expected = runner.run(index, block, hidden)
            found._find_cache(block, hidden)
            seen = observe(runner, index, block, hidden, found._cache_name)
            assert torch.equal(seen.output, expected)
            assert {RESIDUAL, KEYS, VALUES} <= seen.sites.keys()
            assert not any(m._forward_pre_hooks or m._forward_hooks for m in block.modules())
            hidden = expected
    assert found.note is None


def test_hooks_go_even_when_a_block_fails(tmp_path):
    source, _ = make(tmp_path)
    runner = collector(source, windows()).runner
    block = runner.block(0)
    block.mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with runner.first_inputs() as stream, pytest.raises(RuntimeError, match="shape"):
        observe(runner, 0, block, stream.read(0), "past_key_values")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in block.modules())


def test_the_pass_sees_what_the_whole_model_does(tmp_path):
    source, model = make(tmp_path)
    ids = windows(5)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        answer = model(input_ids=ids, use_cache=True, output_hidden_states=True)
    for found in collector(source, ids).blocks():
        assert set(found.sites) == ({RESIDUAL} if found.block == 3 else set(found.sites))
        for site, (statistics,) in found.sites.items():
            if site == RESIDUAL:
                if found.block == 3:
                    continue  # transformers gives the normalised one
                expected = answer.hidden_states[found.block]
            elif site in (KEYS, VALUES):
                layer = answer.past_key_values.layers[found.block]
                expected = (layer.keys if site == KEYS else layer.values).transpose(1, 2).flatten(2)
            else:
                expected = seen[f"model.layers.{found.block}.{site.name}"]
            first, rest = expected[:, 0], expected[:, 1:].flatten(0, 1)
            for part, values in ((statistics.first, first), (statistics.rest, rest)):
                torch.testing.assert_close(part.absmax, values.abs().amax(0), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(part.rms, values.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)


def test_draws_are_kept_apart_and_do_not_depend_on_their_neighbours(tmp_path):
    source, _ = make(tmp_path)
    one, other = windows(4, seed=1), windows(4, seed=2)
    together = list(collector(source, one, other).blocks())
    for ids, index in ((one, 0), (other, 1)):
        for alone, both in zip(collector(source, ids).blocks(), together, strict=True):
            for site, (statistics,) in alone.sites.items():
                torch.testing.assert_close(both.sites[site][index].rest.rms, statistics.rest.rms, rtol=1e-5, atol=1e-7)


def test_draws_of_several_shapes_are_refused(tmp_path):
    source, _ = make(tmp_path)
    with pytest.raises(CalibrationError, match="one shape"):
        collector(source, windows(4), windows(3))
    with pytest.raises(CalibrationError, match="one shape"):
        collector(source)


def test_an_architecture_without_a_cache_gets_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(outliers, "_CACHE_NAMES", ())
    source, _ = make(tmp_path)
    found = collector(source, windows())
    sites = {site for block in found.blocks() for site in block.sites}
    assert not {KEYS, VALUES} & sites
    assert "takes no cache" in found.note


def summarise(source, *draws, names=None):
    found = collector(source, *draws)
    summary = Summary(names or [f"set{i}" for i in range(len(draws))], TOKENS)
    for block in found.blocks():
        summary.add(block)
    return summary


def test_a_planted_outlier_channel_is_found_and_nothing_else(tmp_path):
    def plant(model):
        for layer in model.model.layers:
            layer.input_layernorm.weight[11] *= 200
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight[:, 11] /= 200

    plain, before = make(tmp_path / "plain")
    planted, after = make(tmp_path / "planted", change=plant)
    with torch.no_grad():
        ids = windows()
        torch.testing.assert_close(after(input_ids=ids).logits, before(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    assert summarise(plain, windows()).outliers().int8_channels == ()
    found = summarise(planted, windows()).outliers()
    assert [row.channel for row in found.int8_channels] == [11]
    rows = [row for row in found.sites if row.site == "self_attn.q_proj"]
    assert all(row.top[0].channel == 11 and row.top[0].persistence > 0.9 for row in rows)
    assert all(row.top[0].rms_ratio > 50 and row.rest.channel_kurtosis > 20 for row in rows)


def test_a_spike_at_position_zero_shows_there_only(tmp_path):
    def plant(model):
        model.model.embed_tokens.weight[1, 7] = 5000.0

    source, _ = make(tmp_path, change=plant)
    ids = windows()
    ids[:, 0] = 1
    found = summarise(source, ids).outliers()
    residual = [row for row in found.sites if row.kind == "residual"]
    assert all(row.first.absmax > 4000 and row.rest.absmax < 100 for row in residual)
    assert [row.channel for row in found.massive] == [7]
    assert found.massive[0].first_position
    first, *others = [row for row in found.profiles if row.set == "set0"]
    assert (first.start, first.stop) == (0, 1)
    assert min(first.absmax) > 4000 > 100 > max(max(row.absmax) for row in others)


def test_transfer_is_nothing_to_oneself_and_clips_from_small_to_large(tmp_path):
    def plant(model):
        model.model.embed_tokens.weight[50:, 3] *= 50

    source, _ = make(tmp_path, change=plant)
    low = torch.randint(3, 50, (4, TOKENS), generator=torch.Generator().manual_seed(0))
    high = torch.randint(50, VOCABULARY, (4, TOKENS), generator=torch.Generator().manual_seed(0))
    summary = summarise(source, low, high, windows(), names=["low", "high", "high"])
    rows = {(row.calibration, row.evaluation): row for row in summary.transfer().rows}
    for name in ("low", "high"):
        same = rows[name, name]
        assert (same.clip_rate, same.worst_clip_rate, same.outlier_jaccard) == (0, 0, 1)
        assert same.hessian_rank_correlation == pytest.approx(1)
    assert rows["low", "high"].worst_clip_rate > 0
    assert rows["low", "high"].outlier_jaccard == rows["high", "low"].outlier_jaccard
    assert summarise(source, low).transfer() is None


def test_seeds_of_a_set_merge_and_tensors_are_kept_by_channel(tmp_path):
    source, _ = make(tmp_path)
    draws = [windows(2, seed=1), windows(2, seed=2)]
    apart = summarise(source, *draws, names=["a", "a"])
    whole = summarise(source, torch.cat(draws), names=["a"])
    for one, other in zip(apart.outliers().sites, whole.outliers().sites, strict=True):
        assert one.rest.tokens == other.rest.tokens == 4 * (TOKENS - 1)
        assert one.rest.absmax == pytest.approx(other.rest.absmax, rel=1e-4)
        assert len(one.absmax_by_seed) == 2
        assert max(one.absmax_by_seed) == pytest.approx(one.rest.absmax)
    torch.testing.assert_close(
        apart.tensors["a/1/mlp.down_proj/mean_square"],
        whole.tensors["a/1/mlp.down_proj/mean_square"],
        rtol=1e-4,
        atol=0,
    )
    assert apart.tensors["a/3/residual/absmax"].shape == (HIDDEN,)
