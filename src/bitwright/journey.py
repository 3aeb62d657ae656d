"""One tensor's journey: read, check, range + round, pack, verify, measure.

Data-free recipes need nothing but the tensor itself, so this is all of their work; the spine only decides which
tensor is next and where its bytes go.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitwright.checkpoint.shard import tensor_sha256
from bitwright.checkpoint.source import Source
from bitwright.errors import FormatError, WeightError
from bitwright.formats.native import TensorEntry, pack, unpack
from bitwright.numeric.measure import sqnr_db, squared_error
from bitwright.numeric.qtensor import QTensor
from bitwright.plan import Row
from bitwright.rounding.nearest import CHUNK_WEIGHTS, quantize_nearest, row_chunks


def read_row(source: Source, row: Row) -> tuple[Tensor | None, dict[str, Any]]:
    """A tensor's values (None when it is tied) and the beginning of its record for the manifest.

    Raises:
        CheckpointError: the tensor cannot be read.
    """
    record: dict[str, Any] = {
        "tensor": row.tensor,
        "shape": list(row.shape),
        "action": row.action,
        "rule": row.rule,
        "bytes": 0,
    }
    if row.action == "tied":
        return None, record
    tensor = source.read(row.tensor)
    return tensor, record | {"source_sha256": tensor_sha256(tensor)}


def process_row(row: Row, tensor: Tensor | None, record: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One tensor from its values to what is stored, and its finished record.

    Raises:
        WeightError: it holds NaN or Inf, or does not fit its stored types.
    """
    if tensor is None:
        return {}, record
    _check_finite(tensor, row.tensor)
    try:
        parts, details = _keep(tensor, row) if row.action == "keep" else _quantize(tensor, row)
    except WeightError as error:
        raise WeightError(f"{row.tensor}: {error}") from error
    nbytes = sum(part.numel() * part.dtype.itemsize for part in parts.values())
    return parts, record | {"bytes": nbytes} | details


def _check_finite(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        return
    # In pieces: torch.isfinite makes three temporaries as large as its input.
    flat, starts = tensor.reshape(-1), range(0, tensor.numel(), CHUNK_WEIGHTS)
    bad = sum(int((~torch.isfinite(flat[start : start + CHUNK_WEIGHTS])).sum().item()) for start in starts)
    if bad:
        raise WeightError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or Inf, needed finite weights; "
            "the checkpoint is damaged or diverged"
        )


def _keep(tensor: Tensor, row: Row) -> tuple[dict[str, Tensor], dict[str, Any]]:
    assert row.stored_dtype is not None
    stored = tensor.to(row.stored_dtype)
    if stored.dtype == torch.float16 and tensor.dtype != torch.float16 and tensor.numel():
        low, high = torch.aminmax(tensor)
        if max(-low.item(), high.item()) > torch.finfo(torch.float16).max:
            raise WeightError(
                f"values from {low.item():.3g} to {high.item():.3g} do not fit float16; "
                "set kept_dtype=bfloat16 or kept_dtype=source"
            )
    return {row.tensor: stored}, {"dtype": str(row.stored_dtype).removeprefix("torch.")}


def _quantize(weight: Tensor, row: Row) -> tuple[dict[str, Tensor], dict[str, Any]]:
    assert row.spec is not None
    assert row.method is not None
    result = quantize_nearest(weight, None, row.spec, row.method.range, row.method.outliers)
    count = 0 if result.outliers is None else result.outliers.count
    entry = TensorEntry(spec=row.spec, shape=result.shape, outliers=count)
    parts = pack(result)
    decoded = unpack(row.tensor, parts, entry)
    if not torch.equal(decoded.codes, result.codes):
        raise FormatError(f"{row.tensor}: packed codes do not unpack to themselves; this is a bug in bitwright")
    details = {
        "method": row.method.name,
        "spec": row.spec.model_dump(mode="json"),
        "outliers": count,
        "sqnr_db": _measure(weight, decoded),
        "fallbacks": [],
    }
    return {f"{row.module}.{name}": part for name, part in parts.items()}, details


def _measure(weight: Tensor, decoded: QTensor) -> float | None:
    """SQNR in dB of what was packed, chunk by chunk; None when it is exact."""
    error = signal = 0.0
    for rows in row_chunks(decoded.shape):
        chunk_error, chunk_signal = squared_error(weight[rows].float(), decoded.rows(rows).dequantize())
        error, signal = error + chunk_error, signal + chunk_signal
    value = sqnr_db(error, signal)
    return round(value, 4) if math.isfinite(value) else None
