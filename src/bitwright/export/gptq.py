"""Export to GPTQ and AWQ checkpoints: codes, scales and zeros move, nothing is rounded again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright import __about__
from bitwright.errors import FormatError
from bitwright.export.float_folder import float_dtype, float_row
from bitwright.export.folder import (
    Conversion,
    ExportResult,
    ExportRow,
    NativeFolder,
    Progress,
    Say,
    refuse,
    silent,
    unseen,
    write_export,
)
from bitwright.formats import gptq as layout
from bitwright.formats.gptq import Version
from bitwright.formats.native import TensorEntry, packed_bytes
from bitwright.numeric.qtensor import QTensor

KV_CACHE = "the KV cache"


def export_gptq(
    folder: str | Path,
    out: str | Path,
    *,
    version: Version = 1,
    allow_lossy: bool = False,
    say: Say = silent,
    progress: Progress = unseen,
) -> ExportResult:
    """Write the native `folder` as a GPTQ checkpoint `out`, with `quantize_config.json`.

    Args:
        folder: what `quantize` made.
        out: must not exist.
        version: 1 ("gptq"), which every reader knows, or 2 ("gptq_v2"), which can hold a zero of 0.
        allow_lossy: write what the format cannot hold as 16-bit floats.
        say: is told of every tensor that is not exact, and of every note.
        progress: is told of every tensor.

    Raises:
        FormatError: before anything is written, `folder` is damaged, or holds what the format cannot, and
            `allow_lossy` is false; later, a decoded weight does not fit its 16-bit type.
        ResumeError: `out` exists.
    """
    if version not in (1, 2):
        raise FormatError(f"GPTQ version {version!r}: needed 1 or 2")
    native = NativeFolder.open(folder)
    problems = _problems(native, version)
    refuse("gptq", problems, allow_lossy)
    quantization = _gptq_config(native, problems, version)
    files = {"quantize_config.json": quantization}
    return _write(native, Path(out), (version, quantization, files), problems, say, progress)


def export_awq(
    folder: str | Path,
    out: str | Path,
    *,
    allow_lossy: bool = False,
    say: Say = silent,
    progress: Progress = unseen,
) -> ExportResult:
    """Write the native `folder` as an AWQ checkpoint `out` (`gemm`): 4 bits and one group size for all linears.

    Args:
        folder: what `quantize` made.
        out: must not exist.
        allow_lossy: write what the format cannot hold as 16-bit floats.
        say: is told of every tensor that is not exact, and of every note.
        progress: is told of every tensor.

    Raises:
        FormatError, ResumeError: as `export_gptq`.
    """
    native = NativeFolder.open(folder)
    problems = _problems(native, None)
    sizes = Counter(_group_size(entry) for name, entry in native.entries.items() if name not in problems)
    common = sizes.most_common(1)[0][0] if sizes else -1
    for module, entry in native.entries.items():
        # one group per row is the same under any name
        alone = entry.spec.groups(entry.shape[1]) == 1 and common in (-1, entry.shape[1])
        if module not in problems and _group_size(entry) != common and not alone:
            problems[module] = (
                f"has groups of {_group_size(entry)}, needed {common} as in most linears; quantize all with one size"
            )
    refuse("awq", problems, allow_lossy)
    floats = sorted({*native.unquantized(), *native.tied, *(problems.keys() - {KV_CACHE})})
    quantization = {
        "bits": 4,
        "group_size": common,
        "modules_to_not_convert": floats,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    return _write(native, Path(out), (None, quantization, {}), problems, say, progress)


def _write(
    native: NativeFolder,
    out: Path,
    form: tuple[Version | None, dict[str, Any], Mapping[str, Mapping[str, Any]]],
    problems: Mapping[str, str],
    say: Say,
    progress: Progress,
) -> ExportResult:
    """Write the folder; `form` is the version (None: AWQ), `quantization_config`, and further JSON files."""
    version, quantization, files = form
    dtype = float_dtype(native)

    def convert(module: str) -> tuple[dict[str, Tensor], ExportRow]:
        if module in problems:
            stored, row = float_row(native, module, dtype, problems[module])
            return {row.tensor: stored}, row
        parts = _exact(module, native.unpack(module), version)
        nbytes = sum(part.numel() * part.dtype.itemsize for part in parts.values())
        row = ExportRow(f"{module}.weight", "exact", packed_bytes(native.entries[module]), nbytes)
        return {f"{module}.{part}": tensor for part, tensor in parts.items()}, row

    config = native.config | {"quantization_config": quantization}
    if native.tied:
        config["tie_word_embeddings"] = True
    target = str(quantization["quant_method"])
    notes = (f"{KV_CACHE} {problems[KV_CACHE]}: it stays in float",) if KV_CACHE in problems else ()
    return write_export(native, out, Conversion(target, convert, config, files=files), notes, say, progress)


def _problems(native: NativeFolder, version: Version | None) -> dict[str, str]:
    """Why modules, and the KV cache, cannot be exported, by name; `version` None for AWQ."""
    problems = {}
    embedding = native.embedding()
    for module, entry in native.entries.items():
        problem = layout.refusal(entry, awq=version is None)
        if module in native.sites.inputs:
            problem = problem or (
                "has a rotated or quantized input, needed inputs as they come; quantize with a16 in the scheme and "
                "--set rotate=none"
            )
        if module == embedding:
            problem = problem or (
                f"is an embedding, needed a linear; quantize without the rule for it, or with --set keep={module}"
            )
        if problem is None:
            problem = layout.grid_refusal(native.grid(module), version)
        if problem is not None:
            problems[module] = problem
    if native.sites.kv_cache is not None:
        problems[KV_CACHE] = "is quantized, needed floats; quantize without kv in the scheme"
    return problems


def _exact(module: str, q: QTensor, version: Version | None) -> dict[str, Tensor]:
    """The tensors of a module by local name, read back and compared."""
    size = q.spec.group_size if q.spec.groups(q.shape[1]) > 1 else None
    if version is None:
        parts = layout.pack_awq(q)
        again = layout.unpack_awq(module, parts, size)
    else:
        parts = layout.pack_gptq(q, version)
        again = layout.unpack_gptq(module, parts, q.spec.bits, size, version)
    same = torch.equal(again.codes, q.codes) and torch.equal(again.grid.zero, q.grid.zero)
    if not same or not torch.equal(again.grid.scale, q.grid.scale):
        raise FormatError(f"{module}: what was packed does not unpack to itself; this is a bug in bitwright")
    return parts


def _group_size(entry: TensorEntry) -> int:
    """As config files say it: -1 for one group per row."""
    size = entry.spec.group_size
    return -1 if size is None or entry.spec.groups(entry.shape[1]) == 1 else size


def _gptq_config(native: NativeFolder, problems: Mapping[str, str], version: Version) -> dict[str, Any]:
    """`quantization_config`: the commonest settings, and `dynamic` for modules with others and those in float."""
    settings = {
        module: (entry.spec.bits, _group_size(entry), entry.spec.symmetric)
        for module, entry in native.entries.items()
        if module not in problems
    }
    bits, group_size, symmetric = Counter(settings.values()).most_common(1)[0][0] if settings else (4, 128, True)
    heads = {name.removesuffix(".weight") for name in native.tied_weights} | set(native.tied)
    dynamic: dict[str, dict[str, Any]] = {}
    for module, (own_bits, own_size, own_symmetric) in settings.items():
        if (own_bits, own_size, own_symmetric) != (bits, group_size, symmetric):
            own = {"bits": own_bits, "group_size": own_size, "sym": own_symmetric}
            dynamic[f"+:^{re.escape(module)}$"] = own
    for module in sorted({*native.unquantized(), *(problems.keys() - {KV_CACHE})} - heads):
        dynamic[f"-:^{re.escape(module)}$"] = {}
    config: dict[str, Any] = {
        "bits": bits,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "desc_act": False,
        "group_size": group_size,
        "lm_head": "lm_head" in settings,
        "meta": {"quantizer": [f"bitwright:{__about__.__version__}"]},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": symmetric,
    }
    return config | ({"dynamic": dynamic} if dynamic else {})
