"""Export to compressed-tensors, which vLLM and transformers load: codes, scales and zeros move, nothing is rounded.

Linears whose inputs stay in float become `pack-quantized`, those with quantized inputs `int-quantized`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from bitwright.formats.compressed_tensors import (
    INT8,
    OLDEST_READER,
    PACKED,
    QUANT_METHOD,
    WeightArgs,
    pack,
    refusal,
    unpack,
)
from bitwright.formats.compressed_tensors_config import (
    Scheme,
    activation_refusal,
    kv_refusal,
    kv_tensors,
    quantization_config,
)
from bitwright.formats.native import packed_bytes
from bitwright.numeric.activation import InputSite

KV_CACHE = "the KV cache"


def export_compressed_tensors(
    folder: str | Path,
    out: str | Path,
    *,
    allow_lossy: bool = False,
    odd_bits: bool = False,
    say: Say = silent,
    progress: Progress = unseen,
) -> ExportResult:
    """Write the native `folder` as a compressed-tensors folder `out`.

    Args:
        folder: what `quantize` made.
        out: must not exist.
        allow_lossy: write what the format cannot hold as 16-bit floats, listed in `ignore`, with float inputs; leave
            the KV cache in float.
        odd_bits: admit 3, 5, 6 and 7 bits, which versions of the library before 0.18 misread without an error.
        say: is told of every tensor that is not exact, and of every note.
        progress: is told of every tensor.

    Raises:
        FormatError: before anything is written, `folder` is damaged, or holds what the format cannot, and
            `allow_lossy` is false; later, a decoded weight does not fit its 16-bit type.
        ResumeError: `out` exists.
    """
    native = NativeFolder.open(folder)
    problems = _problems(native, odd_bits)
    refuse(QUANT_METHOD, problems, allow_lossy)
    modules = {module: _scheme(native, module) for module in native.entries if module not in problems}
    dtype = float_dtype(native)

    def convert(module: str) -> tuple[dict[str, Tensor], ExportRow]:
        if module in problems:
            stored, row = float_row(native, module, dtype, problems[module])
            return {row.tensor: stored}, row
        parts = _exact(native, module, modules[module])
        nbytes = sum(tensor.numel() * tensor.dtype.itemsize for tensor in parts.values())
        row = ExportRow(f"{module}.weight", "exact", packed_bytes(native.entries[module]), nbytes)
        return {f"{module}.{part}": tensor for part, tensor in parts.items()}, row

    kv_cache = None if KV_CACHE in problems else native.sites.kv_cache
    config = _config(native, quantization_config(modules, _floats(native, modules), kv_cache))
    conversion = Conversion(QUANT_METHOD, convert, config, added=kv_tensors(native.sites.kv_scales))
    return write_export(native, Path(out), conversion, _notes(native, modules, problems), say, progress)


def _problems(native: NativeFolder, odd_bits: bool) -> dict[str, str]:
    """Why modules, and the KV cache, cannot be exported, by name."""
    problems, embedding = {}, native.embedding()
    for module, entry in native.entries.items():
        site = native.sites.inputs.get(module)
        problem = refusal(entry, odd_bits) or _input_refusal(site)
        if module == embedding:
            # The library can pack one, but transformers (5.23) fails to load it.
            problem = (
                "is an embedding, which readers expect in floats; quantize without the rule for it, or with "
                f"--set keep={module}"
            )
        if problem is not None:
            problems[module] = problem
    if native.sites.kv_cache is not None and (problem := kv_refusal(native.sites.kv_cache)) is not None:
        problems[KV_CACHE] = problem
    return problems


def _input_refusal(site: InputSite | None) -> str | None:
    if site is None:
        return None
    if site.transform is not None:
        return (
            "has its input rotated at run time, needed inputs as they come; quantize with "
            "--set rotate.online_down=false"
        )
    return None if site.activation is None else activation_refusal(site.activation)


def _scheme(native: NativeFolder, module: str) -> Scheme:
    site = native.sites.inputs.get(module)
    activation = None if site is None else site.activation
    return Scheme(WeightArgs.of(native.entries[module], PACKED if activation is None else INT8), activation)


def _exact(native: NativeFolder, module: str, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a module by local name, read back and compared."""
    q = native.unpack(module)
    parts = pack(q, scheme.weights.format)
    again = unpack(module, parts, scheme.weights, OLDEST_READER)
    same = torch.equal(again.codes, q.codes) and torch.equal(again.grid.zero, q.grid.zero)
    if not same or not torch.equal(again.grid.scale, q.grid.scale):
        raise FormatError(f"{module}: what was packed does not unpack to itself; this is a bug in bitwright")
    site = native.sites.inputs.get(module)
    if site is not None and site.scale is not None and site.zero is not None and scheme.activation is not None:
        parts["input_scale"] = torch.tensor([site.scale], dtype=torch.float32)
        if not scheme.activation.symmetric:
            parts["input_zero_point"] = torch.tensor([site.zero - (1 << (scheme.activation.bits - 1))]).to(torch.int8)
    return parts


def _floats(native: NativeFolder, modules: dict[str, Scheme]) -> set[str]:
    """Every linear that stays in float, to be ignored by name."""
    return {*native.unquantized(), *native.entries, *native.tied} - modules.keys()


def _config(native: NativeFolder, quantization: dict[str, Any]) -> dict[str, Any]:
    """`config.json`."""
    config = native.config | {"quantization_config": quantization}
    if native.tied:
        config["tie_word_embeddings"] = True
    return config


def _notes(native: NativeFolder, modules: dict[str, Scheme], problems: dict[str, str]) -> tuple[str, ...]:
    notes = []
    scales = {native.entries[module].spec.scale_dtype for module in modules}
    runs_in = native.config.get("dtype", native.config.get("torch_dtype"))
    if scales and scales != {runs_in}:
        notes.append(
            f"scales are {' and '.join(sorted(scales))}, config.json says dtype {runs_in}: engines round scales to the "
            f"type they run in; exact where that is {' or '.join(sorted(scales))}, or float32"
        )
    if any(scheme.activation is not None for scheme in modules.values()):
        notes.append(
            "inputs are quantized by the engine: it chooses dynamic ranges itself, and symmetric ones reach to "
            "-2**(bits-1), one step further than in bitwright"
        )
    if native.sites.kv_cache is not None and KV_CACHE not in problems:
        notes.append(
            "the KV cache is quantized by the engine: vLLM chooses kv_cache_dtype=fp8 by itself, and some of its "
            "kernels quantize queries as well"
        )
    if KV_CACHE in problems:
        notes.append(f"{KV_CACHE} {problems[KV_CACHE]}: it stays in float")
    return tuple(notes)
