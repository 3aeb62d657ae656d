"""A checkpoint larger than the memory it may use: peak memory, speed and processor use of the data-free recipes.

    python benchmarks/large_checkpoint.py [--folder DIR] [--blocks 14] [--method rtn --method easyquant ...]

Makes a random-weight Llama-shaped bfloat16 checkpoint (14 blocks of hidden 4096, 6.6 GB) once, then quantizes
it with each method in a fresh process whose peak resident memory and processor seconds the operating system
reports. Random weights say nothing about quality; this is about size and speed only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from bitwright.checkpoint.shard import write_shard

HIDDEN, INTERMEDIATE, KV, VOCABULARY = 4096, 14336, 1024, 32000
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def make_checkpoint(folder: Path, blocks: int) -> int:
    """Write the checkpoint unless it is there; returns its bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": blocks, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": VOCABULARY, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        block = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in LINEARS.items()}
        norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
        weight_map: dict[str, str] = {}
        for index in range(blocks):
            prefix = f"model.layers.{index}."
            tensors = {f"{prefix}{name}.weight": weight for name, weight in block.items()}
            tensors |= {f"{prefix}{n}.weight": norm for n in ("input_layernorm", "post_attention_layernorm")}
            write(folder, f"block-{index:03d}.safetensors", tensors, weight_map)
        table = (torch.randn(VOCABULARY, HIDDEN) * 0.02).bfloat16()
        outside = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": norm}
        write(folder, "outside.safetensors", outside, weight_map)
        index_file = folder / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor], weight_map: dict[str, str]) -> None:
    """Write one shard and note where its tensors are."""
    write_shard(folder / name, tensors, {"format": "pt"})
    weight_map.update(dict.fromkeys(tensors, name))


def measure(folder: Path, method: str, scheme: str) -> str:
    """One table row of quantizing `folder` in a fresh process."""
    out = folder.with_name(f"{folder.name}-{method}")
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "bitwright",
        "quantize",
        str(folder),
        "-m",
        method,
        "-s",
        scheme,
        "-o",
        str(out),
    ]
    report = folder.with_name("report.json")
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--json", str(report)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{method} failed with status {status}")
    summary = json.loads(report.read_text())
    busy = (usage.ru_utime + usage.ru_stime) / wall
    speed = summary["quantized_weights"] / summary["seconds"] / 1e6
    shutil.rmtree(out)
    return (
        f"{method:18s} {scheme:10s} {wall:7.1f} s {speed:7.1f} Mw/s {busy:5.2f} processors busy "
        f"peak {summary['peak_rss_bytes'] / 1e9:5.2f} GB  {summary['bits_per_weight']:.3f} bits/weight"
    )


def main() -> None:
    """Make the checkpoint, measure every method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("large-checkpoint"))
    parser.add_argument("--blocks", type=int, default=14)
    parser.add_argument("--method", action="append")
    parser.add_argument("--scheme", default="w4a16g64")
    arguments = parser.parse_args()
    nbytes = make_checkpoint(arguments.folder, arguments.blocks)
    print(f"{nbytes / 1e9:.2f} GB in {arguments.folder}")
    for method in arguments.method or ["rtn", "easyquant", "hqq"]:
        print(measure(arguments.folder, method, arguments.scheme), flush=True)


if __name__ == "__main__":
    main()
