"""One tensor's journey: read, check, range + round, pack, verify, measure.

Data-free recipes need nothing but the tensor itself, so this is all of their work; the spine only decides which
tensor is next and where its bytes go. Calibrated ones bring the Hessian of the tensor's inputs (see `walk`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.hessians import Evidence
from bitwright.checkpoint.finite import check_finite, finite_tensors
from bitwright.checkpoint.shard import tensor_sha256
from bitwright.checkpoint.source import Source
from bitwright.errors import FormatError, WeightError
from bitwright.execute.local import spread
from bitwright.formats.native import TensorEntry, check_part, pack, unpack
from bitwright.formats.native import parts as layout_of
from bitwright.numeric.fp8 import KvScales
from bitwright.numeric.measure import sqnr_db, squared_error
from bitwright.numeric.outliers import NoOutliers, NSigma
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.underflow import lost_in_half, underflow
from bitwright.ranges import Clipping, Ranging
from bitwright.rounding.correction import corrected
from bitwright.rounding.gptq import Gptq, Rounded, quantize_gptq
from bitwright.rounding.nearest import quantize_nearest, row_chunks
from bitwright.rows import Row

Record = dict[str, Any]
"""What the manifest says of one tensor."""

_LEAST_SIGNAL = 1e-20
"""Sum of squared weights below which it is taken in float64."""

KEYS = ".k_proj.weight"
"""End of the tensor that stands for its attention."""


@dataclass(frozen=True)
class Outcome:
    """What is stored of one tensor, by whole name, and its finished record."""

    parts: dict[str, Tensor]
    record: Record
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time went, by phase."""


def read_row(source: Source, row: Row) -> tuple[Tensor | None, Record]:
    """A tensor's values (None when it is tied) and the beginning of its record for the manifest.

    Raises:
        CheckpointError: the tensor cannot be read.
    """
    record: Record = {
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


def process_row(
    row: Row,
    tensor: Tensor | None,
    record: Record,
    evidence: Evidence | None = None,
    clipping: Clipping | None = None,
) -> Outcome:
    """One tensor from its values to what is stored.

    `evidence` is what calibration tells of its inputs, `clipping` the shares of ranges that were found for it.

    Raises:
        WeightError: it holds NaN or Inf, or does not fit its stored types.
    """
    if tensor is None:
        return Outcome({}, record)
    check_finite(row.tensor, tensor)
    if row.action == "keep":
        parts, details, seconds = *_keep(tensor, row), {}
    else:
        try:
            rounded = _round(tensor, row, evidence, clipping)
            parts, details = _pack(tensor, row, rounded)
        except WeightError as error:
            raise WeightError(f"{row.tensor}: {error}") from error
        seconds = rounded.seconds
    nbytes = sum(part.numel() * part.dtype.itemsize for part in parts.values())
    return Outcome(parts, record | {"bytes": nbytes} | details, seconds)


def check_values(source: Source, plan: Iterable[Row], calibrated: bool) -> None:
    """Check what can be told of weights before the work: they are finite, and what is kept fits its stored type.

    Args:
        source: as the files have it, before any rotation.
        plan: its rows. Those that a rotation adds are not in `source`.
        calibrated: the work takes long, so matrices that will be quantized are looked at as well.

    Raises:
        CheckpointError: a tensor cannot be read.
        WeightError: one holds NaN or Inf, or does not fit; it is named.
    """
    rows = {row.tensor: row for row in plan if row.tensor in source.tensors and row.action != "tied"}
    kept = [name for name, row in rows.items() if row.action == "keep"]
    for name, values in finite_tensors(source, kept):
        _fitting(values, rows[name])
    if calibrated:
        for _ in finite_tensors(source, rows.keys() - set(kept)):
            pass


def stored_entry(row: Row, record: Record) -> TensorEntry:
    """The layout of a quantized row, of which `record` tells how many outliers were kept."""
    assert row.spec is not None
    shape = (row.shape[0], row.shape[1])
    return TensorEntry(row.spec, shape, record["outliers"], record["outlier_value_bits"])


def check_finished(rows: Sequence[Row], parts: Mapping[str, Tensor], records: Sequence[Record]) -> None:
    """Refuse `parts` and `records` of a finished unit that are not what its `rows` give: names, layouts, values.

    Raises:
        FormatError: naming the tensor, what was found and what was needed.
    """
    if [record.get("tensor") for record in records] != [row.tensor for row in rows]:
        raise FormatError(f"records of {len(records)} tensors, needed those of {', '.join(row.tensor for row in rows)}")
    known: set[str] = set()
    for row, record in zip(rows, records, strict=True):
        try:
            known |= _check_row(row, parts, record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{row.tensor}: its record is not one that bitwright writes ({error!r})") from error
    if strangers := sorted(parts.keys() - known):
        raise FormatError(f"{strangers[0]}: unknown; no tensor of the plan has such a part")


def _check_row(row: Row, parts: Mapping[str, Tensor], record: Record) -> set[str]:
    """The names of the parts of a finished row, which are as they should be."""
    told = {key: record[key] for key in ("action", "shape", "rule")}
    planned: dict[str, Any] = {"action": row.action, "shape": list(row.shape), "rule": row.rule}
    if row.spec is not None:
        told["spec"], planned["spec"] = record["spec"], row.spec.model_dump(mode="json")
    if told != planned:
        raise FormatError(f"{row.tensor}: its record tells of {told}, needed {planned}")
    entry = stored_entry(row, record) if row.action == "quantize" else None
    layout = {} if entry is None else {f"{row.module}.{part}": needed for part, needed in layout_of(entry).items()}
    if row.action == "keep" and row.stored_dtype is not None:
        layout = {row.tensor: (row.shape, row.stored_dtype)}
    for name, needed in layout.items():
        if name not in parts:
            raise FormatError(f"{name}: missing, needed {needed[1]} {list(needed[0])}")
        check_part(name, tuple(parts[name].shape), parts[name].dtype, needed)
    if entry is not None:
        unpack(row.module, {name.removeprefix(f"{row.module}."): parts[name] for name in layout}, entry)
        _check_details(row, record)
    elif layout:
        check_finite(row.tensor, parts[row.tensor])
    nbytes = sum(parts[name].numel() * parts[name].dtype.itemsize for name in layout)
    if record["bytes"] != nbytes:
        raise FormatError(f"{row.tensor}: its record tells of {record['bytes']} bytes, and there are {nbytes}")
    return set(layout)


def _check_details(row: Row, record: Record) -> None:
    """What is shown of a finished matrix, and gone on with: its error, its fallbacks, what its inputs are."""
    numbers = [record["sqnr_db"] or 0.0, *(record.get("input_range") or ()), *record.get("kv_absmax", ())]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise FormatError(f"{row.tensor}: its record tells of {numbers}, needed finite numbers")
    if not all(isinstance(line, str) for line in record["fallbacks"]):
        raise FormatError(f"{row.tensor}: its record tells of fallbacks {record['fallbacks']}, needed texts")


def recorded_kv_scales(records: Iterable[Mapping[str, Any]]) -> dict[str, KvScales]:
    """The scales of an fp8 KV cache by attention, from the greatest magnitudes that keys' linears recorded."""
    found = {record["tensor"].removesuffix(KEYS): record["kv_absmax"] for record in records if "kv_absmax" in record}
    return {attention: KvScales.of(*absmax) for attention, absmax in found.items()}


def _keep(tensor: Tensor, row: Row) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {row.tensor: _fitting(tensor, row)}, {"dtype": str(row.stored_dtype).removeprefix("torch.")}


def _fitting(tensor: Tensor, row: Row) -> Tensor:
    """A kept tensor in its stored type, which holds its values."""
    assert row.stored_dtype is not None
    stored = tensor.to(row.stored_dtype)
    if stored.dtype == torch.float16 and tensor.dtype != torch.float16 and tensor.numel():
        low, high = torch.aminmax(tensor)
        largest, remedy = max(-low.item(), high.item()), "use --set kept_dtype=bfloat16 or --set kept_dtype=source"
        if largest > torch.finfo(torch.float16).max:
            raise WeightError(
                f"{row.tensor}: values from {low.item():.3g} to {high.item():.3g} do not fit float16; {remedy}"
            )
        # Below 6e-5 values are 2**-24 apart; most tensors are far above, and need no pass over them.
        if largest**2 < tensor.numel() * 2.0**-43 and lost_in_half(tensor, stored):
            raise WeightError(f"{row.tensor}: values up to {largest:.3g} are too small for float16; {remedy}")
    return stored


def _pack(weight: Tensor, row: Row, rounded: Rounded) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is stored of a rounded tensor, verified, and what the manifest says of it."""
    assert row.spec is not None
    assert row.method is not None
    entry = TensorEntry.of(rounded.q)
    parts = pack(rounded.q)
    decoded = unpack(row.tensor, parts, entry)
    if not torch.equal(decoded.codes, rounded.q.codes):
        raise FormatError(f"{row.tensor}: packed codes do not unpack to themselves; this is a bug in bitwright")
    quality = _measure(weight, decoded)
    keep = f"--set keep={row.module} --set kept_dtype=source"
    if (problem := underflow(weight, decoded)) is not None:
        wider = "" if row.method.grid != "native" or row.spec.scale_dtype != "float16" else "--set scale_dtype=bfloat16"
        if decoded.outliers is not None and wider:
            wider += " --set outliers=none"
        raise WeightError(f"{problem}; use {wider + ', or ' if wider else ''}{keep}")
    if quality == 0 and not bool(decoded.dequantize().any()):
        raise WeightError(f"all of it decodes to zero by method {row.method.name}; use another method, or {keep}")
    details = {
        "method": row.method.name,
        "spec": row.spec.model_dump(mode="json"),
        "outliers": entry.outliers,
        "outlier_value_bits": entry.value_bits,
        "sqnr_db": quality,
        "fallbacks": list(rounded.fallbacks),
    }
    return {f"{row.module}.{name}": part for name, part in parts.items()}, details | rounded.details


def _round(weight: Tensor, row: Row, evidence: Evidence | None, clipping: Clipping | None) -> Rounded:
    """Codes, grid and outliers as the row's method chooses them."""
    assert row.spec is not None
    assert row.method is not None
    method, ranging = row.method, Ranging(row.spec, row.method.range, clipping)
    if isinstance(method.rounding, Gptq):
        if evidence is None:
            raise ValueError(f"{row.tensor}: {method.name} needs to know its inputs")
        settings, correction = method.rounding, method.inputs.correction
        if evidence.cross is not None:
            weight = corrected(weight, evidence.hessian, evidence.cross, correction, settings.damping)
        rounded = quantize_gptq(weight, evidence.hessian, ranging, method.outliers, settings)
        return replace(rounded, details=rounded.details | {"calibration_tokens": evidence.tokens})
    assert isinstance(method.outliers, NoOutliers | NSigma)  # refused by the recipe
    return Rounded(quantize_nearest(weight, None, ranging, method.outliers))


def _measure(weight: Tensor, decoded: QTensor) -> float | None:
    """SQNR in dB of what was packed, chunk by chunk; None when it is exact."""

    def of_rows(rows: slice) -> tuple[float, float]:
        return squared_error(weight[rows].float(), decoded.rows(rows).dequantize())

    sums = spread(of_rows, row_chunks(decoded.shape))
    if math.fsum(signal for _, signal in sums) < _LEAST_SIGNAL:
        # squares of float32 below 1e-23 are zero
        sums = [squared_error(weight.double(), decoded.dequantize().double())]
    value = sqnr_db(math.fsum(error for error, _ in sums), math.fsum(signal for _, signal in sums))
    return round(value, 4) if math.isfinite(value) else None
