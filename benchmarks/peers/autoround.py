"""AutoRound (Cheng et al., arXiv 2309.05516) from auto-round: rounding and ranges learned by signed gradients.

Its defaults but for three. Mixed precision is off: products in bfloat16 are slow on most processors. The number of
iterations is an option of the benchmark; the default of the package is 200, which its authors recommend where
there is a GPU. And a batch is never larger than the calibration.
"""

from __future__ import annotations

from typing import Any

from auto_round import AutoRound
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from peers.contract import Coded, Job, main

BATCH = 8


def quantize(model: Any, ids: Tensor, job: Job) -> Any:
    """Every linear of the blocks, on all of `ids` [windows, tokens]."""
    batch = min(BATCH, len(ids))
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model, local_files_only=True),
        scheme="W4A16",  # whole-number codes, activations left alone; the next three replace its numbers
        bits=job.bits,
        group_size=job.group_size,
        sym=False,
        iters=job.iterations,
        dataset=DataLoader(ids, batch_size=batch),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=batch,
        seed=job.seed,
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
        trust_remote_code=False,
    )
    return tuner.quantize()[0]


def extract(module: Any, job: Job) -> Coded:
    """Codes from the weights, which lie on the grid already."""
    rows, columns = module.weight.shape
    shape = (rows, columns // job.group_size)
    weight = module.weight.detach().float().reshape(*shape, -1)
    scale, zero = module.scale.float().reshape(shape), module.zp.float().reshape(shape)
    codes = (weight / scale[..., None]).round() + zero[..., None]
    return Coded(codes=codes.reshape(rows, columns), scale=scale, zero=zero)


if __name__ == "__main__":
    main("autoround", "auto-round", quantize, extract)
