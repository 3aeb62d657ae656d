"""Packed matrices that take the same inputs as one matrix: one call of a kernel instead of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitwright.formats.bits import pack_rows, unpack_rows
from bitwright.formats.native import TensorEntry
from bitwright.formats.sparse import pack_outliers
from bitwright.numeric.outliers import Outliers
from bitwright.runtime.linear import PackedModule, QuantizedLinear
from bitwright.runtime.reference import PackedWeight

# Children of one module that all families of transformers give the same input.
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def concatenate(linears: Sequence[PackedModule]) -> PackedWeight | None:
    """The matrix whose rows are those of all `linears` (of the same inputs); None where their layouts do not agree:
    other specs, outliers of other types, or a superblock of rows that would hold those of two matrices.
    """
    joined = joined_parts(linears)
    return None if joined is None else PackedWeight.of(joined[1], linears[0].entry.spec, linears[0].in_features)


def joined_parts(linears: Sequence[PackedModule]) -> tuple[TensorEntry, dict[str, Tensor]] | None:
    """The entry of that matrix, and what the format stores of it."""
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
    count = sum(linear.entry.outliers for linear in linears)
    entry = TensorEntry(spec, (sum(rows), in_features), count, *(value_bits or {16}))
    return entry, {name: part.contiguous() for name, part in joined.items()}


def joined_bias(linears: Sequence[QuantizedLinear]) -> Tensor | None:
    """The biases of `linears` one below the other, zeros where there is none; None where none has one."""
    like = next((linear.bias for linear in linears if linear.bias is not None), None)
    if like is None:
        return None
    biases = [like.new_zeros(one.out_features) if one.bias is None else one.bias.detach() for one in linears]
    return torch.cat(biases)


def _outliers(linear: PackedModule, steps: bool) -> Outliers:
    """The outliers of a linear, perhaps none, with a step for each row if `steps`."""
    found = linear.packed().outliers()
    if found is not None:
        return found
    rows = linear.out_features
    none = torch.zeros(0)
    return Outliers(torch.zeros(rows + 1, dtype=torch.int64), none.long(), none, torch.zeros(rows) if steps else None)


# --- in a model ----------------------------------------------------------------------------------------------------


def join_shared_inputs(model: nn.Module) -> int:
    """Make one matrix of each block's q, k and v, and of gate and up, wherever layout and site agree.

    For serving: one launch of a kernel where there were three or two. The parts of the single linears are dropped, so
    the state dict is no longer that of the format: save before. `model` computes the same; where a kernel adds in
    another order for more rows, to rounding.

    Returns:
        Matrices that were made.
    """
    found = 0
    for parent in [module for module in model.modules() if not isinstance(module, PackedModule)]:
        for names in _SHARED_INPUTS:
            linears = [module for name in names if isinstance(module := getattr(parent, name, None), QuantizedLinear)]
            whole = _whole(linears) if len(linears) == len(names) else None
            if whole is None:
                continue
            joined = JoinedLinear(whole, [linear.out_features for linear in linears])
            for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
                setattr(parent, name, JoinedPiece(joined, index, linear))
            found += 1
    return found


class JoinedLinear(nn.Module):
    """Linears of one input as one, `whole`: multiplied when the first of them is asked, kept until the last."""

    def __init__(self, whole: QuantizedLinear, sizes: list[int]) -> None:
        """`sizes`: outputs of each linear, in the order of the rows."""
        super().__init__()
        self.whole, self.sizes = whole, sizes
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def piece(self, index: int, x: Tensor) -> Tensor:
        """The output of linear `index` for `x`; of the very tensor that was multiplied last, if it is that."""
        if x is not self._input or index not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(self.whole(x).split(self.sizes, dim=-1)))
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output


class JoinedPiece(nn.Module):
    """One of the linears of a `JoinedLinear`, in its old place; the first of them owns it."""

    def __init__(self, joined: JoinedLinear, index: int, linear: QuantizedLinear) -> None:
        """In the place of `linear`."""
        super().__init__()
        self.in_features, self.out_features, self.index = linear.in_features, linear.out_features, index
        if index == 0:
            self.joined = joined
        # In a tuple it is no submodule: its buffers appear once in the model.
        self._shared = (joined,)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out] of the type of `x`."""
        return self._shared[0].piece(self.index, x)

    def extra_repr(self) -> str:
        """Sizes, as printed in the model."""
        return f"{self.in_features}, {self.out_features}, piece {self.index}"


def _whole(linears: Sequence[QuantizedLinear]) -> QuantizedLinear | None:
    """All `linears` as one; None where layouts, sites or types of biases do not agree."""
    first = linears[0]
    types = {linear.bias.dtype for linear in linears if linear.bias is not None}
    if any(linear.site != first.site for linear in linears) or len(types) > 1:
        return None
    joined = joined_parts(linears)
    if joined is None:
        return None
    entry, parts = joined
    whole = QuantizedLinear(entry, device="meta", site=first.site)
    whole.cpu_mode = first.cpu_mode
    whole.load_parts("joined linears", parts)
    bias = joined_bias(linears)
    whole.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return whole
