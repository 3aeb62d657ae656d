"""GPTQ from llm-compressor: `oneshot` with `GPTQModifier`, everything at its defaults.

That is: damping 0.01, blocks of 128 columns, columns ordered by activation (`static`: groups stay as they are in
memory, so the order costs nothing at run time), min-max ranges, and one decoder block after the other, each under
the inputs that the quantized blocks before it give.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import Tensor

from peers.contract import Coded, Job, main


def quantize(model: Any, ids: Tensor, job: Job) -> Any:
    """Every linear but the head, on all of `ids` [windows, tokens], one window at a time."""
    arguments = QuantizationArgs(
        num_bits=job.bits, symmetric=False, strategy=QuantizationStrategy.GROUP, group_size=job.group_size
    )
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)}, ignore=["lm_head"]
    )
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    return model


def extract(module: Any, job: Job) -> Coded:
    """Codes from the weights, which lie on the grid already; the library counts from -2^(bits - 1)."""
    offset = 2 ** (job.bits - 1)
    weight, scale = module.weight.detach().float(), module.weight_scale.detach().float()
    zero = module.weight_zero_point.detach().float()
    steps = (weight.reshape(*scale.shape, -1) / scale[..., None]).round()
    codes = steps + zero[..., None] + offset
    return Coded(codes=codes.reshape(weight.shape), scale=scale, zero=zero + offset)


if __name__ == "__main__":
    main("llmcompressor", "llmcompressor", quantize, extract)
