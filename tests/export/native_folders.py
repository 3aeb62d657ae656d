"""Native folders of a tiny Llama, written without a quantizer: any spec, site or tie is one argument away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bitwright.checkpoint.manifest import read_manifest, write_manifest
from bitwright.checkpoint.shard import write_shard
from bitwright.formats.folder import INDEX, native_config
from bitwright.formats.native import Sites, TensorEntry, pack, quantization_config
from bitwright.numeric.activation import InputSite, KvSpec
from bitwright.numeric.fp8 import KvScales
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.runtime.huggingface import register

IDS = torch.tensor([[1, 5, 9, 2, 30, 7, 8, 3]])
SPEC = WeightSpec(bits=4, group_size=32)
EMBEDDING = "model.embed_tokens"
KV_SCALES = {f"model.layers.{n}.self_attn": KvScales.of(0.9 + n, 0.1 * (n + 1)) for n in (0, 1)}


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    """Every linear's sizes are multiples of 32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=39,
        pad_token_id=39,
    )
    return LlamaForCausalLM(config).eval()


class NativeFolders:
    """Writes native folders below a temporary one."""

    def __init__(self, place: Path, quantize: Callable[..., QTensor]):
        self.place = place
        self.quantize = quantize

    def __call__(
        self,
        specs: Callable[[str], WeightSpec | None] = lambda name: SPEC,
        sites: Callable[[str], InputSite | None] = lambda name: None,
        kv_cache: KvSpec | None = None,
        outlier_share: float = 0.0,
        tied: bool = False,
    ) -> Path:
        """`specs` and `sites` are asked for every linear in the blocks, the head and, when `tied`, the embedding; an
        fp8 `kv_cache` gets KV_SCALES.
        """
        folder = self.place / f"native-{len(list(self.place.iterdir()))}"
        folder.mkdir()
        model = tiny_llama(tied)
        entries, inputs, tensors, records = {}, {}, {}, []
        for name, module in model.named_modules():
            linear = type(module) is torch.nn.Linear and not (tied and name == "lm_head")
            spec = specs(name) if linear or (tied and name == EMBEDDING) else None
            if spec is None:
                continue
            q = self.quantize(module.weight, spec, outlier_share)
            entries[name] = TensorEntry.of(q)
            if (site := sites(name)) is not None:
                inputs[name] = site
            tensors |= {f"{name}.{part}": tensor for part, tensor in pack(q).items()}
            records.append(record(f"{name}.weight", "quantize", module.weight, outliers=0, sqnr_db=None))
        shared = tied and EMBEDDING in entries
        for name, tensor in model.state_dict().items():
            if tied and name == "lm_head.weight":
                records.append(record(name, "tied", tensor))
            elif name.removesuffix(".weight") not in entries:
                tensors[name] = tensor.half()
                records.append(record(name, "keep", tensor))
        ties = {"lm_head": EMBEDDING} if shared else None
        scales = KV_SCALES if kv_cache is not None and kv_cache.grid == "fp8" else {}
        plain = model.config.to_dict() | {
            "architectures": ["LlamaForCausalLM"],
            "dtype": "float16",
            "tie_word_embeddings": tied and not shared,
        }
        config = native_config(plain, quantization_config(entries, ties, Sites(inputs, kv_cache, scales)))
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text("{}")
        half = len(tensors) // 2
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        items = list(tensors.items())
        for shard, content in zip(names, (dict(items[:half]), dict(items[half:])), strict=True):
            write_shard(folder / shard, content, {"format": "pt"})
        weight_map = {name: names[number >= half] for number, name in enumerate(tensors)}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        content = {"job": {}, "source_label": "tiny", "recipe": {}, "shards": names, "tensors": records}
        write_manifest(folder, content, {})
        return folder


def resealed(folder: Path) -> Path:
    """`folder`, whose files were changed on purpose, with a manifest of what they are now."""
    content = read_manifest(folder)
    content.pop("files")
    write_manifest(folder, content, {})
    return folder


def load(folder: Path, **arguments: Any) -> PreTrainedModel:
    """The model of a folder in float32, with nothing missing or unexpected."""
    register()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **arguments
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder)(IDS).logits


def record(name: str, action: str, tensor: torch.Tensor, **more: object) -> dict[str, object]:
    """What the manifest says of a tensor."""
    return {"tensor": name, "action": action, "shape": list(tensor.shape), "bytes": 2 * tensor.numel(), **more}
