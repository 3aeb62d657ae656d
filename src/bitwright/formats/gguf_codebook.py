"""GGUF's types whose codes point into a table of integers: IQ4_NL and IQ4_XS, to native grids of 8 bits.

Every entry of the table fits a signed byte, so `scale * entry` is `scale * (code - 128)` of a symmetric grid of 8 bits:
the values are the same to the last bit, at 8 bits per code where the file has 4. There is no way back to the blocks.

    IQ4_NL  blocks of 32:   fp16 d, 32 nibbles                              w = d * table[nibble]
    IQ4_XS  blocks of 256:  fp16 d, 8 scale codes of 6 bits, 256 nibbles    w = d * (s - 32) * table[nibble]

Of IQ4_XS's scale codes, 16 bits hold the two high bits of each and 4 bytes the low four.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL

from bitwright.errors import FormatError
from bitwright.formats.gguf_blocks import Bytes
from bitwright.numeric.bilevel import SecondLevel, code_offset
from bitwright.numeric.grid import Grid, expand_groups
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec

CODEBOOK_TYPES = ("IQ4_NL", "IQ4_XS")
_GROUP = 32
_SPEC = WeightSpec(bits=8, group_size=_GROUP, symmetric=True)
_SUPERBLOCKS = _SPEC.model_copy(update={"bilevel": Bilevel(axis="column", size=8, scale_bits=6)})
_CODES = (np.array(IQ4_NL.kvalues, np.int16) + _SPEC.centre).astype(np.uint8)


@dataclass(frozen=True)
class _Blocks:
    """`n` blocks: d float32 [n], nibbles uint8 [n, weights], scale codes uint8 [n, 8] or None."""

    d: np.ndarray
    nibbles: Bytes
    scale_codes: Bytes | None


def decode_codebook(name: str, raw: Bytes, in_features: int, label: str) -> QTensor:
    """The matrix whose rows are the blocks `raw`, uint8 [out, bytes of a row], of the type called `name`.

    Scales of 0 become 1 with codes that stand for 0, as in `formats.gguf.decode`. `label` goes into messages.

    Raises:
        FormatError: a scale is NaN or Inf.
    """
    out_features = raw.shape[0]
    blocks = _unpack(name, raw.reshape(-1, GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]))
    if not np.isfinite(blocks.d).all():
        raise FormatError(f"{label}: a scale of a {name} block is NaN or Inf; the file is damaged: download it again")
    d = torch.from_numpy(blocks.d).reshape(out_features, -1)
    codes = torch.from_numpy(_CODES[blocks.nibbles]).reshape(out_features, in_features)
    groups = in_features // _GROUP
    empty = (d == 0).repeat_interleave(groups // d.shape[1], dim=1)
    d = torch.where(d == 0, 1.0, d)
    zero = torch.full((out_features, groups), float(_SPEC.centre))
    if blocks.scale_codes is None:
        spec, grid = _SPEC, Grid(d, zero, _SPEC)
    else:
        spec = _SUPERBLOCKS
        scale_codes = torch.from_numpy(blocks.scale_codes).reshape(out_features, groups)
        empty |= scale_codes == code_offset(spec)
        scale_codes[empty] = 1 + code_offset(spec)
        grid = Grid.of_levels(SecondLevel(scale_codes, None, d[..., None]), zero, spec)
    return QTensor(torch.where(expand_groups(empty, spec, in_features), spec.centre, codes).to(torch.uint8), grid)


def _unpack(name: str, raw: Bytes) -> _Blocks:
    d = np.ascontiguousarray(raw[:, :2]).view("<f2")[:, 0].astype(np.float32)
    if name == "IQ4_NL":
        return _Blocks(d, _nibbles(raw[:, 2:]), None)
    high = np.ascontiguousarray(raw[:, 2:4]).view("<u2")
    high = (high >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & np.uint8(3)
    low = np.stack([raw[:, 4:8] & np.uint8(15), raw[:, 4:8] >> np.uint8(4)], axis=2).reshape(len(raw), 8)
    return _Blocks(d, _nibbles(raw[:, 8:]), low | high << np.uint8(4))


def _nibbles(raw: Bytes) -> Bytes:
    """Codes [n, 2 * bytes]: of each 16 bytes, all low halves before all high ones."""
    runs = raw.reshape(len(raw), -1, 1, 16)
    halves: Bytes = np.concatenate([runs & np.uint8(15), runs >> np.uint8(4)], axis=2)
    return halves.reshape(len(raw), -1)
