"""Packed matrices that take the same inputs as one matrix: one call of a kernel instead of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitwright.formats.bits import pack_rows, unpack_rows
from bitwright.formats.sparse import pack_outliers
from bitwright.numeric.outliers import Outliers
from bitwright.runtime.linear import PackedModule
from bitwright.runtime.reference import PackedWeight


def concatenate(linears: Sequence[PackedModule]) -> PackedWeight | None:
    """The matrix whose rows are those of all `linears` (of the same inputs); None where their layouts do not agree:
    other specs, outliers of other types, or a superblock of rows that would hold those of two matrices.
    """
    spec, in_features = linears[0].entry.spec, linears[0].in_features
    rows = [linear.out_features for linear in linears]
    value_bits = {linear.entry.value_bits for linear in linears if linear.entry.outliers}
    agree = all(linear.entry.spec == spec and linear.in_features == in_features for linear in linears)
    if not agree or len(value_bits) > 1 or any(count % spec.row_multiple for count in rows[:-1]):
        return None
    stream_bits = {"weight_zero": spec.bits}
    if spec.bilevel is not None:
        stream_bits |= {"scale_codes": spec.bilevel.scale_bits, "zero_codes": spec.bilevel.zero_bits or 0}
    groups = spec.groups(in_features)
    stored = [linear.stored() for linear in linears]
    joined = {}
    for name in (name for name in stored[0] if not name.startswith("outlier")):
        parts = [parts[name] for parts in stored]
        if parts[0].dim() == 1 and name in stream_bits:
            # Streams of all rows end anywhere in a word.
            bits = stream_bits[name]
            codes = [unpack_rows(part[None], bits, count * groups) for part, count in zip(parts, rows, strict=True)]
            joined[name] = pack_rows(torch.cat(codes, dim=1), bits)[0]
        else:
            joined[name] = torch.cat(parts)
    if value_bits:
        outliers = [_outliers(linear, 8 in value_bits) for linear in linears]
        joined |= pack_outliers(Outliers.concatenate(outliers), (sum(rows), in_features))
    return PackedWeight.of({name: part.contiguous() for name, part in joined.items()}, spec, in_features)


def _outliers(linear: PackedModule, steps: bool) -> Outliers:
    """The outliers of a linear, perhaps none, with a step for each row if `steps`."""
    found = linear.packed().outliers()
    if found is not None:
        return found
    rows = linear.out_features
    none = torch.zeros(0)
    return Outliers(torch.zeros(rows + 1, dtype=torch.int64), none.long(), none, torch.zeros(rows) if steps else None)
