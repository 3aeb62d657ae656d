"""SmoothQuant from llm-compressor: `SmoothQuantModifier` at its defaults, then nearest codes.

Weights symmetric per output channel, activations symmetric with a range for every token: its W8A8, also with fewer
bits. Activations are not part of the result; the benchmark rounds them.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch import Tensor

from peers.contract import Coded, Job, main


def quantize(model: Any, ids: Tensor, job: Job) -> Any:
    """Every linear but the head, on all of `ids` [windows, tokens], one window at a time."""
    weights = QuantizationArgs(num_bits=job.bits, symmetric=True, strategy=QuantizationStrategy.CHANNEL)
    inputs = QuantizationArgs(num_bits=job.bits, symmetric=True, strategy=QuantizationStrategy.TOKEN, dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=[SmoothQuantModifier(), QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])],
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):  # until it is saved, the library leaves weights unrounded
            rounded = fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, weights)
            module.weight.data.copy_(rounded)
    return model


def extract(module: Any, job: Job) -> Coded:
    """Codes from the weights, which lie on the grid already."""
    weight, scale = module.weight.detach().float(), module.weight_scale.detach().float()
    centre = 2 ** (job.bits - 1)
    codes = (weight / scale).round().clamp(-centre, centre - 1) + centre
    return Coded(codes=codes, scale=scale, zero=torch.full_like(scale, centre), symmetric=True)


if __name__ == "__main__":
    main("smoothquant", "llmcompressor", quantize, extract)
