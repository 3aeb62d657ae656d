"""HQQ (Badri and Shaji 2023) from the package hqq: data-free, half-quadratic refinement of the zeros.

Its recommended settings but for one: groups run along the input axis (`axis=1`), as in every other row of the
table and as the fast kernels need it. The arithmetic is float32; zeros are not rounded, so they are stored in float16.
"""

from __future__ import annotations

from typing import Any

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor, nn

from peers.contract import Coded, Job, main


def quantize(model: Any, ids: Tensor, job: Job) -> Any:
    """Every linear of the blocks; `ids` are not looked at."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed, meta = Quantizer.quantize(
                module.weight.data, nbits=job.bits, group_size=job.group_size, axis=1, optimize=True,
                round_zero=False, device="cpu", compute_dtype=torch.float32,
            )  # fmt: skip
            meta["compute_dtype"] = torch.float32
            module.weight.data = Quantizer.dequantize(packed, meta)
            module.packed, module.meta = packed, meta
    return model


def extract(module: Any, job: Job) -> Coded:
    """The codes that the package packed."""
    rows, columns = module.weight.shape
    meta = module.meta
    codes = Quantizer.unpack[meta["packing"]](module.packed, dtype=torch.float32)
    groups = rows * columns // job.group_size
    codes = codes[:groups]  # three bits: ten codes to a word, the last one padded
    shape = (rows, columns // job.group_size)
    return Coded(
        codes=codes.reshape(rows, columns),
        scale=meta["scale"].reshape(shape),
        zero=meta["zero"].reshape(shape),
        float_zero=True,
    )


if __name__ == "__main__":
    main("hqq", "hqq", quantize, extract)
