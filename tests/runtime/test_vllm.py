"""Serving with vLLM, without vLLM: which shards a layer has, its matrices, and the plugin against a fake of vLLM."""

from __future__ import annotations

import copy
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.errors import FormatError, PlanError
from bitwright.formats.native import QUANT_METHOD, Sites, TensorEntry, pack, quantization_config
from bitwright.numeric.activation import ActivationSpec, InputSite, KvSpec
from bitwright.numeric.fp8 import KvScales
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.runtime import ops
from bitwright.runtime.reference import PackedWeight
from bitwright.runtime.vllm.matrices import Matrices
from bitwright.runtime.vllm.routing import QuantizedModel, Shard, Stash

Make = Callable[..., QTensor]

W4 = WeightSpec(bits=4, group_size=16)
W3 = WeightSpec(bits=3, group_size=16, zero="float", scale_dtype="bfloat16")
SPQR = W3.model_copy(
    update={"bilevel": Bilevel(axis="row", size=16, scale_bits=3, zero_bits=3), "scale_dtype": "float16"}
)
SPECS = {"one level": W4, "two levels": SPQR, "symmetric": W4.model_copy(update={"symmetric": True})}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
QKV = ["layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"]
A8 = InputSite(activation=ActivationSpec(bits=8))
ROTATED = InputSite(transform="hadamard", activation=ActivationSpec(bits=4))
CPU = torch.device("cpu")


def shard_of(name: str, q: QTensor, site: InputSite | None = None) -> Shard:
    return Shard(name, q.shape, TensorEntry.of(q), site)


def expected(q: QTensor | Tensor, x: Tensor, site: InputSite | None = None) -> Tensor:
    """The slow way, in float64."""
    weight = q if isinstance(q, Tensor) else q.dequantize()
    return functional.linear((x if site is None else site.apply(x)).double(), weight.double())


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


# --- matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("rows", [(32, 16, 16), (32, 7, 16)], ids=["even", "ragged"])
def test_matrices_multiply_as_their_shards(make_qtensor: Make, spec: WeightSpec, rows: tuple[int, ...]) -> None:
    qs = [make_qtensor((count, 64), spec, share, seed=count) for count, share in zip(rows, (0.05, 0, 0.1), strict=True)]
    x, bias = torch.randn(3, 64), torch.randn(sum(rows))
    matrices = Matrices([shard_of(name, q) for name, q in zip("qkv", qs, strict=True)], [pack(q) for q in qs])
    joined = spec.bilevel is None or rows[1] % 16 == 0
    assert len(matrices.groups[0]) == (1 if joined else 3)
    close(matrices(x, bias), torch.cat([expected(q, x) for q in qs], dim=-1) + bias)
    close(matrices(x), torch.cat([expected(q, x) for q in qs], dim=-1))


def test_shards_may_differ_in_everything(make_qtensor: Make) -> None:
    a, b, c, d = (make_qtensor((16, 64), spec, seed=n) for n, spec in enumerate((W4, W3, W4, W4)))
    plain, x = torch.randn(5, 64), torch.randn(2, 3, 64)
    shards = [shard_of("a", a), shard_of("b", b, A8), Shard("plain", (5, 64), None, None)]
    shards += [shard_of("c", c, ROTATED), shard_of("d", d, ROTATED)]
    stored = [pack(a), pack(b), {"weight": plain}, pack(c), pack(d)]
    matrices = Matrices(shards, stored)
    assert [len(group) for group in matrices.groups] == [1, 1, 1, 1]
    wanted = [expected(a, x), expected(b, x, A8), expected(plain, x), expected(c, x, ROTATED), expected(d, x, ROTATED)]
    close(matrices(x), torch.cat(wanted, dim=-1))


def test_kernels_that_quantize_inputs_are_asked_to(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (make_qtensor((16, 64), W4, seed=n) for n in (1, 2))
    matrices = Matrices([shard_of("a", a, A8), shard_of("b", b)], [pack(a), pack(b)])
    x, asked = torch.randn(3, 64), []
    simulated = matrices(x)

    def kernel(x: Tensor, weight: PackedWeight, bias: Tensor | None, site: InputSite) -> Tensor:
        asked.append(site)
        return ops.linear(site.apply(x), weight, bias)

    monkeypatch.setattr(ops, "quantizes_inputs", lambda device: True)
    monkeypatch.setattr(ops, "site_linear", kernel)
    close(matrices(x), simulated.double())
    assert asked == [A8]


def test_matrices_compile_to_one_graph(make_qtensor: Make) -> None:
    a, b = (make_qtensor((16, 64), W4, 0.05, seed=n) for n in (1, 2))
    matrices = Matrices([shard_of("a", a, ROTATED), shard_of("b", b)], [pack(a), pack(b)])
    x, bias = torch.randn(3, 64), torch.randn(32)
    compiled = torch.compile(matrices, fullgraph=True, backend="eager")
    close(compiled(x, bias), torch.cat([expected(a, x, ROTATED), expected(b, x)], dim=-1) + bias)


def test_damaged_tensors_are_refused(make_qtensor: Make) -> None:
    q = make_qtensor((16, 64), W4, 0.05)
    stored = pack(q)
    stored["outlier_idx"] = torch.full_like(stored["outlier_idx"], 64)
    with pytest.raises(FormatError, match=r"q_proj\.outlier_idx"):
        Matrices([shard_of("q_proj", q)], [stored])


# --- which shards a layer has --------------------------------------------------------------------------------------


def config_of(entries: dict[str, QTensor], **extra: Any) -> dict[str, Any]:
    return quantization_config({name: TensorEntry.of(q) for name, q in entries.items()}, **extra)


@pytest.fixture
def model(make_qtensor: Make) -> QuantizedModel:
    entries = {"model.layers.0.q_proj": (32, 64), "model.layers.0.v_proj": (16, 64), "model.embed_tokens": (40, 64)}
    qs = {name: make_qtensor(shape, W4) for name, shape in entries.items()}
    config = config_of(qs, tied={"lm_head": "model.embed_tokens"}, sites=Sites({"model.layers.0.q_proj": A8}))
    return QuantizedModel.read(config)


def test_names_and_shards(model: QuantizedModel) -> None:
    names = model.names("model.layers.0.qkv_proj", FUSED)
    assert names == [f"model.layers.0.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    shards = model.shards(names, [32, 16, 16], 64)
    assert [(shard.entry is not None, shard.site, shard.shape) for shard in shards] == [
        (True, A8, (32, 64)),
        (False, None, (16, 64)),
        (True, None, (16, 64)),
    ]
    assert model.names("model.layers.0.o_proj", FUSED) == model.names("o_proj", {}) == []
    # Joined in the folder, too.
    assert model.shards(["model.layers.0.q_proj"], [16, 8, 8], 64)[0].shape == (32, 64)
    with pytest.raises(FormatError, match="vLLM joins these into 2 parts"):
        model.shards(names, [32, 32], 64)
    with pytest.raises(FormatError, match=r"q_proj: vLLM needs \[16, 64\], config.json says \[32, 64\]"):
        model.shards(names, [16, 16, 16], 64)


def test_embeddings(model: QuantizedModel, make_qtensor: Make) -> None:
    for name in ("model.embed_tokens", ""):
        found = model.embedding(name, (40, 64))
        assert found is not None
        assert found.name == "model.embed_tokens"
    assert model.embedding("lm_head", (40, 64)) is None
    assert model.embedding("", (41, 64)) is None
    two = QuantizedModel.read(config_of({name: make_qtensor((40, 64), W4) for name in ("a.wte", "a.emb", "b.emb")}))
    with pytest.raises(FormatError, match=r"a\.emb, b\.emb: several"):
        two.embedding("", (40, 64))


def test_renaming(model: QuantizedModel) -> None:
    def rename(name: str) -> str | None:
        return None if name.endswith("v_proj") else f"language.{name}"

    other = model.renamed(rename)
    assert other.entries.keys() == {"language.model.layers.0.q_proj", "language.model.embed_tokens"}
    assert other.sites == {"language.model.layers.0.q_proj": A8}
    assert other.tied == {"language.lm_head": "language.model.embed_tokens"}
    assert other.inside("language.model.layers") == "language.model.layers.0.q_proj"
    assert other.inside("language.model.lay") is None


def test_quantized_kv_cache_is_refused(make_qtensor: Make) -> None:
    config = config_of({"a": make_qtensor((16, 64), W4)}, sites=Sites(kv_cache=KvSpec(bits=8)))
    with pytest.raises(FormatError, match=r"kv_cache: 8 bits .* needed none: vLLM keeps its own"):
        QuantizedModel.read(config)


FP8 = Sites(kv_cache=KvSpec(bits=8, grid="fp8"), kv_scales={"model.layers.0.self_attn": KvScales.of(3.0, 0.1)})


def test_scales_of_the_kv_cache_are_found(make_qtensor: Make) -> None:
    model = QuantizedModel.read(config_of({"a": make_qtensor((16, 64), W4)}, sites=FP8))
    assert model.scales_of("model.layers.0.self_attn.attn") == KvScales.of(3.0, 0.1)
    assert model.renamed(lambda name: f"language.{name}").scales_of("language.model.layers.0.self_attn.attn")
    with pytest.raises(FormatError, match=r"scales: none for model\.layers\.1\.self_attn\.attn"):
        model.scales_of("model.layers.1.self_attn.attn")
    assert QuantizedModel({}, {}, {}).scales_of("model.layers.0.self_attn.attn") is None


# --- tensors on their way ------------------------------------------------------------------------------------------


def test_stash_routes_by_shard(make_qtensor: Make) -> None:
    q, v = make_qtensor((32, 64), W4, 0.1), make_qtensor((16, 64), W4)
    shards = [shard_of("q_proj", q), Shard("k_proj", (16, 64), None), shard_of("v_proj", v)]
    stash, k = Stash(shards, torch.float32), torch.randn(16, 64)
    assert stash.part_names() == ["weight", *pack(q)]
    assert stash.dtype("weight_packed") == torch.int32
    for part in pack(q):  # in any order
        if part in pack(v):
            stash.put(part, pack(v)[part], "v", CPU)
        stash.put(part, pack(q)[part], "q", CPU)
    with pytest.raises(FormatError, match=r"k_proj\.weight: missing"):
        stash.take()
    stash.put("weight", k.half(), "k", CPU)
    for found, wanted in zip(stash.take(), (pack(q), {"weight": k.half().float()}, pack(v)), strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[part], wanted[part]) for part in wanted)
    with pytest.raises(FormatError, match="missing"):
        stash.take()


def test_stash_copies(make_qtensor: Make) -> None:
    q = make_qtensor((16, 64), W4)
    stash, stored = Stash([shard_of("up", q)], torch.float32), pack(q)
    for part, tensor in stored.items():
        stash.put(part, tensor, None, CPU)
        tensor.zero_()  # a loader's buffer, used again
    assert torch.equal(stash.take()[0]["weight_packed"], pack(q)["weight_packed"])


def test_stash_refuses(make_qtensor: Make) -> None:
    q = make_qtensor((16, 64), W4)
    stash = Stash([shard_of("gate", q), shard_of("up", q)], torch.float32)
    packed = pack(q)["weight_packed"]
    for shard in (None, 2, -1, "q2", (0, 1)):
        with pytest.raises(FormatError, match="vLLM joined gate, up in another way"):
            stash.put("weight_packed", packed, shard, CPU)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"up\.outlier_val: unknown"):
        stash.put("outlier_val", packed, 1, CPU)
    with pytest.raises(FormatError, match=r"up\.weight_packed: found torch.int32 \[8, 8\]"):
        stash.put("weight_packed", packed[:8], 1, CPU)


# --- the plugin ----------------------------------------------------------------------------------------------------


def test_vllm_finds_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    point = project["entry-points"]["vllm.general_plugins"]["bitwright"]
    assert callable(EntryPoint("bitwright", point, "vllm.general_plugins").load())


class Linear(nn.Module):
    """A fake of vLLM's LinearBase."""

    def __init__(self, config: Any, prefix: str, rows: list[int], in_features: int) -> None:
        super().__init__()
        self.params_dtype, self.prefix = torch.float32, prefix
        self.quant_method = config.get_quant_method(self, prefix)
        if hasattr(self.quant_method, "model"):
            self.quant_method.create_weights(self, in_features, rows, in_features, sum(rows), torch.float32)


class Embedding(nn.Module):
    """A fake of vLLM's VocabParallelEmbedding: 40 rows of the vocabulary, padded to 64."""

    org_vocab_size, embedding_dim, params_dtype = 40, 64, torch.float32

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.quant_method = config.get_quant_method(self, prefix)
        if self.quant_method is not None:
            self.quant_method.create_weights(self, 64, [64], 64, 64, params_dtype=torch.float32, weight_loader=None)


class Head(Embedding):
    """A fake of vLLM's ParallelLMHead."""


class BaseKVCacheMethod:
    """A fake of vLLM's method of caches with scales."""

    def __init__(self, config: Any) -> None:
        self.quant_config = config

    def create_weights(self, layer: nn.Module) -> None:
        for name in ("q_scale", "k_scale", "v_scale"):
            layer.register_parameter(name, nn.Parameter(torch.tensor(-1.0), requires_grad=False))


class Attention(nn.Module):
    """A fake of vLLM's layer that keeps the KV cache."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        if self.quant_method is not None:
            self.quant_method.create_weights(self)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A fake of what the plugin imports from vLLM; `plugin` is the module that sees it."""
    seen = SimpleNamespace(configs={}, processes=1, additional_config={})

    class Base:
        def __init__(self) -> None:
            self.packed_modules_mapping: dict[str, list[str]] = {}

    def register(name: str) -> Callable[[type], type]:
        return lambda config: seen.configs.setdefault(name, config)

    layers = "vllm.model_executor.layers"
    modules: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": lambda: seen},
        "vllm.distributed": {"get_tensor_model_parallel_world_size": lambda: seen.processes},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.attention": {"Attention": Attention},
        f"{layers}.quantization.kv_cache": {"BaseKVCacheMethod": BaseKVCacheMethod},
        f"{layers}.linear": {
            "LinearBase": Linear,
            "LinearMethodBase": object,
            "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (), {}),
        },
        f"{layers}.quantization": {"register_quantization_config": register},
        f"{layers}.quantization.base_config": {"QuantizationConfig": Base, "QuantizeMethodBase": object},
        f"{layers}.vocab_parallel_embedding": {"VocabParallelEmbedding": Embedding, "ParallelLMHead": Head},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "bitwright.runtime.vllm.plugin", raising=False)
    from bitwright.runtime.vllm import register as register_plugin

    register_plugin()
    register_plugin()
    seen.plugin = sys.modules.pop("bitwright.runtime.vllm.plugin")
    return seen


def load(layer: Any, stored: dict[str, Tensor], shard: str | int | None = None) -> None:
    """As vLLM's models load weights, old and new."""
    parameters = dict(layer.named_parameters())
    for part, tensor in stored.items():
        arguments = (tensor,) if shard is None else (tensor, shard)
        parameters[part].weight_loader(parameters[part], *arguments)


def test_a_linear_from_loading_to_applying(vllm: SimpleNamespace, make_qtensor: Make) -> None:
    qs = {f"layers.0.{s}_proj": make_qtensor((16, 64), W4, 0.05 if s == "q" else 0, seed=ord(s)) for s in "qkv"}
    config = vllm.configs[QUANT_METHOD].from_config(config_of(qs))
    config.packed_modules_mapping.update(FUSED)
    layer = Linear(config, "layers.0.qkv_proj", [16, 16, 16], 64)
    for q, shard in zip(qs.values(), "qkv", strict=True):
        load(layer, pack(q), shard)
    layer.quant_method.process_weights_after_loading(layer)
    assert not list(layer.parameters())
    x, bias = torch.randn(3, 64), torch.randn(48)
    close(layer.quant_method.apply(layer, x, bias), torch.cat([expected(q, x) for q in qs.values()], dim=-1) + bias)
    layer.quant_method.process_weights_after_loading(layer)  # nothing is left to do
    assert len(layer.matrices.groups[0]) == 1
    plain = Linear(config, "layers.0.o_proj", [16], 64)
    assert type(plain.quant_method).__name__ == "UnquantizedLinearMethod"


def test_tied_embedding(vllm: SimpleNamespace, make_qtensor: Make) -> None:
    q = make_qtensor((40, 64), W4)
    config = vllm.configs[QUANT_METHOD].from_config(config_of({"model.emb": q}, tied={"lm_head": "model.emb"}))
    embedding, head = Embedding(config, ""), Head(config, "lm_head")
    assert not list(head.parameters())
    x, ids, bias = torch.randn(3, 64), torch.tensor([[0, 39]]), torch.randn(64)
    with pytest.raises(FormatError, match=r"lm_head: shares model\.emb, which this process does not have"):
        head.quant_method.apply(head, x)
    load(embedding, pack(q))
    for layer in (embedding, head):
        getattr(layer.quant_method, "process_weights_after_loading", lambda _: None)(layer)
    assert torch.equal(embedding.quant_method.embedding(embedding, ids), q.dequantize()[ids])
    close(head.quant_method.apply(head, x, bias), expected(q, x) + bias[:40])
    # Configs are sent to other processes and copied for other models, without the layers of this one.
    assert not copy.deepcopy(config).embeddings.layers


def test_untied_head(vllm: SimpleNamespace, make_qtensor: Make) -> None:
    q = make_qtensor((40, 64), W3, 0.02)
    config = vllm.configs[QUANT_METHOD].from_config(config_of({"lm_head": q}))
    head, embedding = Head(config, "lm_head"), Embedding(config, "")
    assert embedding.quant_method is None
    load(head, pack(q))
    head.quant_method.process_weights_after_loading(head)
    x = torch.randn(3, 64)
    close(head.quant_method.apply(head, x), expected(q, x))


def test_scales_of_the_kv_cache(vllm: SimpleNamespace, make_qtensor: Make) -> None:
    qs = {"up": make_qtensor((16, 64), W4)}
    config = vllm.configs[QUANT_METHOD].from_config(config_of(qs, sites=FP8))
    layer = Attention(config, "model.layers.0.self_attn.attn")
    found = KvScales(k=layer.k_scale.item(), v=layer.v_scale.item())
    assert found == KvScales.of(3.0, 0.1)
    assert layer.q_scale.item() == -1  # vLLM chooses
    assert config.kv_cache_scheme["type"] == "float"
    plain = vllm.configs[QUANT_METHOD].from_config(config_of(qs))
    assert Attention(plain, "model.layers.0.self_attn.attn").quant_method is None
    assert plain.kv_cache_scheme is None


def test_names_follow_vllms_model(vllm: SimpleNamespace, make_qtensor: Make) -> None:
    config = vllm.configs[QUANT_METHOD].from_config(config_of({"up": make_qtensor((16, 64), W4)}))
    mapper = SimpleNamespace(apply_list=lambda names: [f"language.{name}" for name in names])
    config.apply_vllm_mapper(mapper)
    assert config.model.entries.keys() == {"language.up"}


def test_the_plugin_refuses(vllm: SimpleNamespace, make_qtensor: Make) -> None:
    names = ("up", "layers.0.experts.0.up", "emb")
    config = vllm.configs[QUANT_METHOD].from_config(config_of({name: make_qtensor((40, 64), W4) for name in names}))
    with pytest.raises(FormatError, match=r"layers\.0\.experts\.0\.up: vLLM computes layers\.0\.experts at once"):
        config.get_quant_method(nn.Module(), "layers.0.experts")
    assert config.get_quant_method(nn.Module(), "layers.0.attn") is None
    vllm.additional_config = {"bitwright_cpu_mode": "quick"}
    with pytest.raises(ValueError, match="bitwright_cpu_mode is 'quick', needed one of exact, fast"):
        Linear(config, "up", [40], 64)
    vllm.additional_config = {"bitwright_cpu_mode": "fast"}
    assert Linear(config, "up", [40], 64).cpu_mode == "fast"
    vllm.processes = 2
    for make in (lambda: Linear(config, "up", [40], 64), lambda: Embedding(config, "emb")):
        with pytest.raises(FormatError, match="tensor_parallel_size is 2, needed 1"):
            make()


@pytest.mark.parametrize("index", ["bitwright.safetensors.index.json", "model.safetensors.index.json"])
def test_the_plugin_refuses_weights_that_are_no_safetensors(
    vllm: SimpleNamespace, make_qtensor: Make, tmp_path: Path, index: str
) -> None:
    def linear() -> Linear:
        config = vllm.configs[QUANT_METHOD].from_config(config_of({"up": make_qtensor((40, 64), W4)}))
        return Linear(config, "up", [40], 64)

    vllm.model_config = SimpleNamespace(model=str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FormatError, match="no safetensors files"):
        linear()
    (tmp_path / "model.safetensors").touch()
    assert linear()
    (tmp_path / index).write_text('{"weight_map": {"up.weight_packed": "pytorch_model.bin"}}')
    with pytest.raises(FormatError, match=r"names the file 'pytorch_model\.bin'"):
        linear()


def test_without_vllm_the_plugin_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.runtime.vllm import register

    monkeypatch.delitem(sys.modules, "bitwright.runtime.vllm.plugin", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.config", None)
    with pytest.raises(PlanError, match=r"needs the package vllm.*pip install 'bitwright\[vllm\]'"):
        register()
