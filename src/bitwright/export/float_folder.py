"""Export to plain Hugging Face: every weight decoded and rounded to one float type, for any reader."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.export.folder import (
    Conversion,
    ExportResult,
    ExportRow,
    NativeFolder,
    Progress,
    Say,
    silent,
    unseen,
    write_export,
)
from bitwright.formats.native import packed_bytes
from bitwright.numeric.measure import sqnr_db, squared_error
from bitwright.numeric.spec import SCALE_DTYPES

FloatType = Literal["bfloat16", "float16", "float32"]


def float_dtype(native: NativeFolder) -> torch.dtype:
    """The 16-bit type for decoded weights: that of the model, and float16 for those of wider ones."""
    named = native.config.get("dtype", native.config.get("torch_dtype"))
    return torch.bfloat16 if named == "bfloat16" else torch.float16


def as_float(tensor: str, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, float | None]:
    """`weight` [out, in] rounded to `dtype`, and its SQNR in dB (None when exact).

    Raises:
        FormatError: a weight is beyond the largest finite value of `dtype`.
    """
    stored = weight.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise FormatError(
            f"{tensor}: a weight of {float(weight.abs().max()):.3g} does not fit {dtype}; "
            "set dtype in the folder's config.json to bfloat16, or export --to hf"
        )
    error, signal = squared_error(weight, stored.float())
    return stored, None if error == 0 else sqnr_db(error, signal)


def float_row(native: NativeFolder, module: str, dtype: torch.dtype, note: str) -> tuple[Tensor, ExportRow]:
    """The decoded weight of a quantized module, rounded to `dtype`, and its row."""
    name = f"{module}.weight"
    stored, quality = as_float(name, native.weight(module), dtype)
    nbytes = stored.numel() * stored.dtype.itemsize
    return stored, ExportRow(name, "float", packed_bytes(native.entries[module]), nbytes, note, quality)


def export_float(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: FloatType = "bfloat16",
    say: Say = silent,
    progress: Progress = unseen,
) -> ExportResult:
    """Write the native `folder` as an ordinary float folder `out`.

    Weights are decoded exactly and rounded to `dtype`; float32 keeps them as they are. Inputs and the KV cache stay in
    float, and rotations of inputs at run time are undone in the weights.

    Args:
        folder: what `quantize` made.
        out: must not exist.
        dtype: of every float tensor.
        say: is told every note.
        progress: is told of every tensor.

    Raises:
        FormatError: `folder` is damaged, or a value does not fit `dtype`; nothing is left of `out`.
        ResumeError: `out` exists.
    """
    if dtype not in SCALE_DTYPES:
        raise FormatError(f"dtype {dtype!r}: needed one of {', '.join(SCALE_DTYPES)}")
    native, kind = NativeFolder.open(folder), SCALE_DTYPES[dtype]

    def convert(module: str) -> tuple[dict[str, Tensor], ExportRow]:
        stored, row = float_row(native, module, kind, "")
        return {row.tensor: stored}, row

    def keep(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        stored = tensor.to(kind)
        if not torch.equal(torch.isfinite(stored), torch.isfinite(tensor)):
            raise FormatError(f"{name}: a value does not fit {dtype}; export with another dtype")
        return stored

    config = {key: value for key, value in native.config.items() if key != "torch_dtype"} | {"dtype": dtype}
    if native.tied:
        config["tie_word_embeddings"] = True
    return write_export(native, Path(out), Conversion("hf", convert, config, keep), _notes(native), say, progress)


def _notes(native: NativeFolder) -> tuple[str, ...]:
    notes = []
    if any(site.activation is not None for site in native.sites.inputs.values()):
        notes.append("inputs of linears are quantized in the source; they are floats in the export")
    if native.sites.kv_cache is not None:
        notes.append("the KV cache is quantized in the source; it is in float in the export")
    return tuple(notes)
