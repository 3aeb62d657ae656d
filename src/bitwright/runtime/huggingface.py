"""Loading native folders with transformers: `AutoModelForCausalLM.from_pretrained(folder)`.

`register()` makes transformers know the method "bitwright". Weights stay packed: linears and embeddings
named in config.json are replaced, while the model is still on the meta device, by the modules of
`runtime.linear`, whose buffers then receive the stored tensors unchanged whatever `dtype` was asked for. A
checkpoint is checked twice before any kernel may read it: names, shapes and types from the headers, and the
contents after loading. What config.json says of inputs and of the KV cache is simulated while the model runs; an
attention implementation set afterwards (`set_attn_implementation`) would leave the KV cache in float.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitwright.errors import FormatError
from bitwright.formats.folder import INDEX, PLAIN_INDEX, WEIGHTS_KEY, check_index
from bitwright.formats.native import (
    QUANT_METHOD,
    TensorEntry,
    check_part,
    check_parts,
    parts,
    quantization_config,
    read_quantization_config,
    read_sites,
    read_tied,
)
from bitwright.numeric.activation import InputSite
from bitwright.numeric.hadamard import hadamard_blocks
from bitwright.numeric.measure import not_finite
from bitwright.runtime.attention import KvQuantization, quantize_kv
from bitwright.runtime.linear import PackedModule, QuantizedEmbedding, QuantizedLinear, TiedLinear
from bitwright.runtime.saving import refuse_other_savers, save_as_usual, save_packed
from bitwright.untrusted.names import shards_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of types in safetensors headers, as far as the native format uses them.
_HEADER_DTYPES = {
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


def register() -> None:
    """Teach transformers to load folders of the native format; calling it again changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(BitwrightConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(BitwrightQuantizer)


class BitwrightConfig(QuantizationConfigMixin):
    """The `quantization_config` of a native folder: `entries` by module name, `tied` heads, and `sites`."""

    def __init__(self, **config: Any) -> None:
        """Read the JSON object `config`.

        Raises:
            FormatError: another version, an unknown key or a wrong value.
        """
        self.quant_method = QUANT_METHOD
        self.entries = read_quantization_config(config)
        self.tied = read_tied(config)
        self.sites = read_sites(config)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, as `save_pretrained` writes it."""
        return quantization_config(self.entries, self.tied, self.sites)


class BitwrightQuantizer(HfQuantizer):
    """Puts packed modules into a model before its weights are loaded, and checks what was loaded."""

    requires_calibration = True

    def __init__(self, quantization_config: BitwrightConfig, **kwargs: Any) -> None:
        """Called by transformers."""
        super().__init__(quantization_config, **kwargs)
        # Full names of the tensors that packed modules need, and of those the checkpoint has had so far.
        self._needed: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {}
        self._found: set[str] = set()
        self._kv_cache: KvQuantization | None = None

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the index instead of the note that keeps others away; attention stays as it is.

        Called by transformers before it looks for the files of weights, as nothing else here is that gets the config.

        Raises:
            FormatError: the index names files that are no safetensors of the folder.
        """
        if getattr(config, WEIGHTS_KEY, None) is not None:
            setattr(config, WEIGHTS_KEY, INDEX)
        name = getattr(config, WEIGHTS_KEY, None) or PLAIN_INDEX
        check_index(Path(str(getattr(config, "name_or_path", ""))) / name)
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        _refuse_tied_weights(model, {*config.entries, *config.tied})
        for name, entry in config.entries.items():
            module = _packed_module(name, _find(model, name), entry, config.sites.inputs.get(name))
            model.set_submodule(name, module)
            self._needed |= {f"{name}.{part}": layout for part, layout in parts(entry).items()}
            if getattr(module, "bias", None) is not None:
                self._needed[f"{name}.bias"] = None
        for head, embedding in config.tied.items():
            model.set_submodule(head, _tied_head(head, _find(model, head), _find(model, embedding)))
        files = kwargs.get("checkpoint_files") or []
        _refuse_pickles(files)
        _refuse_unknown_parts(files, config.entries)
        self._check_headers(files, model.base_model_prefix)
        return model

    def _check_headers(self, files: list[str], prefix: str) -> None:
        """What `get_new_dtype` checks, for versions of transformers before 5.20, which do not call it.

        These leave a stored tensor as it is where it has the type of the buffer, so what is checked is not cast.
        """
        for file in (file for file in files if file.endswith(".safetensors")):
            with safe_open(file, framework="pt") as opened:
                for stored in opened.keys():  # noqa: SIM118 (it is no mapping)
                    # A head's checkpoint may be opened without the head, and the other way round.
                    names = {stored, stored.removeprefix(f"{prefix}."), f"{prefix}.{stored}"}
                    for name in names & self._needed.keys():
                        self._check(name, opened.get_slice(stored))

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Type to which a stored tensor is cast: None, as it is, for the parts of packed modules.

        Called by transformers for every tensor of the checkpoint, before it is read.

        Raises:
            FormatError: a part has another shape or type than config.json says.
        """
        name = converter.target_patterns[0]
        packed = self._check(name, param)
        return None if packed else super().get_new_dtype(converter, param, dtype)

    def _check(self, name: str, param: Any) -> bool:
        """Note that the tensor is there; True, after a look at its header, if it is a part of a packed module."""
        self._found.add(name)
        layout = self._needed.get(name)
        if layout is None:
            return False
        if isinstance(param, torch.Tensor):
            found = (tuple(param.shape), param.dtype)
        else:
            found = (tuple(param.get_shape()), _HEADER_DTYPES.get(param.get_dtype(), param.get_dtype()))
        check_part(name, *found, layout)
        return True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        missing = sorted(self._needed.keys() - self._found)
        if missing:
            raise FormatError(
                f"{missing[0]}: missing, and {len(missing) - 1} more; the checkpoint is incomplete or damaged"
            )
        for name, module in model.named_modules():
            if not isinstance(module, PackedModule):
                continue
            stored = module.stored()
            if any(tensor.is_meta for tensor in stored.values()):
                raise FormatError(f"{name}: its packed weights were offloaded; load with offload_buffers=False")
            check_parts(name, stored, module.entry)
        for name, parameter in model.named_parameters():
            if not_finite(parameter):
                raise FormatError(f"{name}: holds NaN or Inf, needed finite values; the file is damaged")
        sites = self.quantization_config.sites
        if sites.kv_cache is not None:
            try:
                self._kv_cache = quantize_kv(model, sites.kv_cache, sites.kv_scales)
            except ValueError as error:
                raise FormatError(f"quantization_config.kv_cache: {error}") from error
        save_packed(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        """Plain modules with the decoded weights, for inputs as they come; nothing else is quantized any more."""
        save_as_usual(model)
        if self._kv_cache is not None:
            self._kv_cache.remove()
        heads = {name: module for name, module in model.named_modules() if isinstance(module, TiedLinear)}
        packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
        for name, module in packed.items():
            model.set_submodule(name, _plain_module(module, dtype))
        for name, head in heads.items():
            linear = nn.Linear(head.in_features, head.out_features, bias=False, device="meta", dtype=dtype)
            linear.weight = model.get_submodule(self.quantization_config.tied[name]).weight
            model.set_submodule(name, linear)
        if heads:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        return model.to(dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, Any]]:
        """Called by transformers when the model is saved: as it is, by its own way."""
        refuse_other_savers()
        return None, {}

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the parts as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The operators have no backward."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The operators have shape-only versions for torch.compile."""
        return True


def _find(model: PreTrainedModel, name: str) -> nn.Module:
    """The module called `name` in config.json."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise FormatError(
            f"quantization_config.tensors.{name}: {type(model).__name__} has no such module; "
            "load with the class in config.json's architectures, such as AutoModelForCausalLM"
        ) from None


def _refuse_pickles(files: list[str]) -> None:
    """Refuse files of weights that are no safetensors, which transformers would unpickle."""
    for path in map(Path, files):
        shards_of(path.parent, [path.name], f"the index in {path.parent}", FormatError)


def _refuse_unknown_parts(files: list[str], entries: dict[str, TensorEntry]) -> None:
    """Refuse tensors of quantized modules that their entries do not have; transformers would only warn."""
    for file in (file for file in files if file.endswith(".safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                module, _, part = name.rpartition(".")
                if module in entries and part != "bias" and part not in parts(entries[module]):
                    raise FormatError(f"{name}: unknown; {file} does not belong to this quantization_config")


def _refuse_tied_weights(model: PreTrainedModel, quantized: set[str]) -> None:
    """Refuse a config by which transformers would tie a weight that exists only in packed form."""
    for pair in model.all_tied_weights_keys.items():
        for name in (weight.removesuffix(".weight") for weight in pair):
            if name in quantized:
                raise FormatError(f"config.json: tie_word_embeddings is true, needed false: {name} is quantized")


def _packed_module(name: str, module: nn.Module, entry: TensorEntry, site: InputSite | None) -> PackedModule:
    """The packed stand-in, on the meta device, for `module`."""
    # Subclasses compute something else besides (Gemma scales its embedding): replacing them would lose it.
    if not isinstance(module, nn.Linear | nn.Embedding) or type(module) not in (nn.Linear, nn.Embedding):
        raise FormatError(f"{name}: is a {type(module).__name__}, needed nn.Linear or nn.Embedding")
    weight = module.weight
    if tuple(weight.shape) != entry.shape:
        raise FormatError(f"{name}: the model needs {list(weight.shape)}, config.json says {list(entry.shape)}")
    if isinstance(module, nn.Embedding):
        if site is not None:
            raise FormatError(f"quantization_config.tensors.{name}.input: {name} is an embedding, needed a linear")
        return QuantizedEmbedding(entry, weight.dtype, device="meta")
    return QuantizedLinear(entry, module.bias is not None, weight.dtype, "meta", site)


def _tied_head(name: str, head: nn.Module, embedding: nn.Module) -> TiedLinear:
    """The head that shares `embedding`, in place of the float `head`."""
    if type(head) is not nn.Linear or head.bias is not None or not isinstance(embedding, QuantizedEmbedding):
        raise FormatError(f"quantization_config.tied.{name}: needed a linear without bias -> a quantized embedding")
    if (head.out_features, head.in_features) != embedding.entry.shape:
        raise FormatError(
            f"quantization_config.tied.{name}: is [{head.out_features}, {head.in_features}], "
            f"but the embedding is {list(embedding.entry.shape)}"
        )
    return TiedLinear(embedding)


def _plain_module(module: PackedModule, dtype: torch.dtype) -> nn.Module:
    """nn.Linear or nn.Embedding with the decoded weights of `module`."""
    site = module.site if isinstance(module, QuantizedLinear) else None
    if site is None or site.transform is None:
        decoded = module.dequantize(dtype)
    else:
        # The transform is its own transpose: what it did to inputs, it does to the rows of the weight.
        decoded = hadamard_blocks(module.dequantize()).to(dtype)
    weight = nn.Parameter(decoded, requires_grad=False)
    if isinstance(module, QuantizedEmbedding):
        embedding = nn.Embedding(*module.entry.shape, device="meta", dtype=dtype)
        embedding.weight = weight
        return embedding
    bias = module.bias if isinstance(module, QuantizedLinear) else None
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta", dtype=dtype)
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear
