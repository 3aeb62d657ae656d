"""The seam to vLLM: a quantization config, and the methods of its linears, embeddings, heads and KV caches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from bitwright.errors import FormatError
from bitwright.formats.folder import check_for_engine
from bitwright.formats.native import QUANT_METHOD
from bitwright.numeric.fp8 import KvScales
from bitwright.runtime.linear import QuantizedEmbedding
from bitwright.runtime.vllm.matrices import Matrices
from bitwright.runtime.vllm.routing import QuantizedModel, Shard, Stash
from bitwright.words import CpuMode


def register() -> None:
    """See `bitwright.runtime.vllm.register`."""
    register_quantization_config(QUANT_METHOD)(BitwrightConfig)


class BitwrightConfig(QuantizationConfig):
    """The `quantization_config` of a native folder."""

    def __init__(self, model: QuantizedModel) -> None:
        """Serve what `model` says, under the names that the checkpoint has."""
        super().__init__()
        self.model = model
        self.embeddings = Embeddings()
        self._checked = False
        # vLLM looks here: its KV cache becomes fp8 unless the user names another type.
        self.kv_cache_scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"} if model.kv_scales else None

    @classmethod
    def get_name(cls) -> str:
        """As config.json writes it."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Types of the model's floats."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPUs that Triton compiles for: Turing."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Files besides config.json: none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitwrightConfig:
        """Read the JSON object `config`.

        Raises:
            FormatError: see `QuantizedModel.read`.
        """
        return cls(QuantizedModel.read(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names of vLLM's model for those of the checkpoint."""

        def rename(name: str) -> str | None:
            # Its rules are those for tensors.
            found: list[str] = hf_to_vllm_mapper.apply_list([f"{name}.weight"])
            return found[0].removesuffix(".weight") if found else None

        self.model = self.model.renamed(rename)

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """The method for `layer`; None for what vLLM then leaves in float.

        Raises:
            FormatError: a quantized module of a kind that is not served, a layer split between processes, or a folder
                whose weights are not safetensors.
        """
        self._check_folder()
        if isinstance(layer, ParallelLMHead) and prefix in self.model.tied:
            return TiedHeadMethod(self.embeddings, self.model.tied[prefix])
        if isinstance(layer, VocabParallelEmbedding):
            shard = self.model.embedding(prefix, (layer.org_vocab_size, layer.embedding_dim))
            if shard is None:
                return None
            _refuse_tensor_parallel(shard.name)
            return HeadMethod(shard) if isinstance(layer, ParallelLMHead) else EmbeddingMethod(shard, self.embeddings)
        if isinstance(layer, LinearBase):
            names = self.model.names(prefix, self.packed_modules_mapping)
            if not names:
                return UnquantizedLinearMethod()
            _refuse_tensor_parallel(prefix)
            return LinearMethod(self.model, names)
        if isinstance(layer, Attention):
            scales = self.model.scales_of(prefix)
            return None if scales is None else KvCacheMethod(self, scales)
        inside = self.model.inside(prefix)
        if inside is not None and "expert" in prefix:
            raise FormatError(f"{inside}: vLLM computes {prefix} at once; keep experts in float, or run transformers")
        return None

    def _check_folder(self) -> None:
        """Once, before vLLM reads any weights."""
        model = getattr(getattr(get_current_vllm_config(), "model_config", None), "model", None)
        if not self._checked and isinstance(model, str) and Path(model).is_dir():
            check_for_engine(Path(model))
        self._checked = True


class KvCacheMethod(BaseKVCacheMethod):
    """Of an attention whose KV cache has fixed scales."""

    def __init__(self, config: BitwrightConfig, scales: KvScales) -> None:
        """With `scales`, which config.json holds and no tensor brings."""
        super().__init__(config)
        self.scales = scales

    def create_weights(self, layer: Any) -> None:
        """Give `layer` the scales; vLLM takes them over after loading."""
        super().create_weights(layer)
        layer.k_scale.data.fill_(self.scales.k)
        layer.v_scale.data.fill_(self.scales.v)


class Embeddings:
    """The quantized embeddings of a model by name, for heads that share them; copies and pickles start empty."""

    def __init__(self) -> None:
        """No embedding is known yet."""
        self.layers: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()

    def __reduce__(self) -> tuple[type[Embeddings], tuple[()]]:
        """Without the layers, which belong to one model."""
        return Embeddings, ()


class LinearMethod(LinearMethodBase):
    """Of linears whose shards are quantized, all or some."""

    def __init__(self, model: QuantizedModel, names: list[str]) -> None:
        """Of the shards that `model` calls `names`."""
        self.model, self.names = model, names

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *sizes: Any,
        **extra: Any,
    ) -> None:
        """Prepare `layer` for the stored tensors of its shards."""
        _expect(layer, self.model.shards(self.names, output_partition_sizes, input_size_per_partition))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the matrices; see `Matrices`."""
        _make_matrices(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., in] times the transposed weight, plus `bias`."""
        return cast(Tensor, layer.matrices(x, bias))


class HeadMethod(QuantizeMethodBase):
    """Of a quantized head, whose rows vLLM pads: its logits are those of the vocabulary alone."""

    def __init__(self, shard: Shard) -> None:
        """Of the head `shard`."""
        self.shard = shard

    def create_weights(self, layer: Any, *sizes: Any, **extra: Any) -> None:
        """Prepare `layer` for the stored tensors of the head."""
        _expect(layer, [self.shard])

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the matrix."""
        _make_matrices(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [..., vocabulary] of `x`."""
        return cast(Tensor, layer.matrices(x, bias))


class EmbeddingMethod(HeadMethod):
    """Of a quantized token embedding, which the head may share."""

    def __init__(self, shard: Shard, embeddings: Embeddings) -> None:
        """Of the embedding `shard`, which tied heads find in `embeddings`."""
        super().__init__(shard)
        self.embeddings = embeddings

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the packed embedding."""
        stash = _arrived(layer)
        if stash is None:
            return
        assert self.shard.entry is not None
        (stored,) = stash.take()
        embedding = QuantizedEmbedding(self.shard.entry, layer.params_dtype, device="meta")
        embedding.output_like = torch.empty(0, dtype=layer.params_dtype)
        embedding.load_parts(self.shard.name, stored)
        layer.matrices = embedding
        self.embeddings.layers[self.shard.name] = layer

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """Rows `ids` (any shape), [*ids.shape, in]."""
        return cast(Tensor, layer.matrices(ids))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of a head that shares this embedding."""
        shift = None if bias is None else bias[: layer.matrices.out_features]
        return cast(Tensor, layer.matrices.product(x, shift, layer.cpu_mode))


class TiedHeadMethod(QuantizeMethodBase):
    """Of a head without tensors of its own."""

    def __init__(self, embeddings: Embeddings, name: str) -> None:
        """Of the head that shares the embedding `name` of `embeddings`."""
        self.embeddings, self.name = embeddings, name

    def create_weights(self, layer: Any, *sizes: Any, **extra: Any) -> None:
        """Nothing is stored."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [..., vocabulary] of `x`."""
        owner: Any = self.embeddings.layers.get(self.name)
        if owner is None:
            raise FormatError(f"{layer.prefix}: shares {self.name}, which this process does not have")
        return cast(Tensor, owner.quant_method.apply(owner, x, bias))


def _expect(layer: Any, shards: list[Shard]) -> None:
    """Give `layer` an empty parameter for every tensor of `shards`; its loader puts what arrives into a stash."""
    stash = Stash(shards, layer.params_dtype)
    for part in stash.part_names():
        parameter: Any = nn.Parameter(torch.empty(0, dtype=stash.dtype(part)), requires_grad=False)
        parameter.weight_loader = partial(_load, stash, part)
        layer.register_parameter(part, parameter)
    layer.stash, layer.cpu_mode = stash, _cpu_mode()


def _load(stash: Stash, part: str, parameter: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
    """A weight loader of vLLM: `loaded` is the tensor `part` of `shard`."""
    stash.put(part, loaded, shard, parameter.device)


def _arrived(layer: Any) -> Stash | None:
    """The stash of `layer`, which loses it and the parameters in its place; None where it has none any more."""
    stash: Stash | None = layer.__dict__.pop("stash", None)
    for part in () if stash is None else stash.part_names():
        delattr(layer, part)
    return stash


def _make_matrices(layer: Any) -> None:
    stash = _arrived(layer)
    if stash is not None:
        layer.matrices = Matrices(stash.shards, stash.take(), layer.cpu_mode)


def _cpu_mode() -> CpuMode:
    """The arithmetic that `additional_config={"bitwright_cpu_mode": ...}` asks for."""
    config = get_current_vllm_config().additional_config
    mode = config.get("bitwright_cpu_mode", "exact") if isinstance(config, dict) else "exact"
    if mode not in get_args(CpuMode):
        raise ValueError(f"bitwright_cpu_mode is {mode!r}, needed one of {', '.join(get_args(CpuMode))}")
    return cast(CpuMode, mode)


def _refuse_tensor_parallel(name: str) -> None:
    size = get_tensor_model_parallel_world_size()
    if size > 1:
        raise FormatError(
            f"{name}: tensor_parallel_size is {size}, needed 1: packed matrices are not split; "
            "use pipeline_parallel_size or data_parallel_size"
        )
