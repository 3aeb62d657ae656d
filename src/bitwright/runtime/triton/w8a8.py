"""8-bit weights times 8-bit activations on tensor cores: int8 as the native format holds it, and e4m3.

Activations get a scale for each token (dynamic) or a static range, weights one scale for each output (per channel).
Differs from the reference, which multiplies `fake_quantize(x)` by decoded weights, in rounding alone: integers are
summed exactly, and activations are not rounded to the type of `x` on the way. `Int8Weight` serves quantized models;
e4m3 is arithmetic only, since the native format has integer codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.formats.bits import unpack_rows
from bitwright.formats.native import TensorEntry, check_parts
from bitwright.numeric.activation import ActivationSpec
from bitwright.runtime.reference import PackedWeight
from bitwright.runtime.triton import configs
from bitwright.runtime.triton.matmul8 import gemm8_kernel, gemv8_kernel
from bitwright.runtime.triton.quantize import quantize_e4m3_kernel, quantize_int8_kernel

# Rows of codes are padded to a multiple of it.
_COLUMNS = 64
_E4M3_MOST = 448.0
# Products that the tensor cores sum with some 14 bits before float32 takes over.
_EXACT = 128
_GROUP = 8
_MOST_BLOCK = 16384


@dataclass(frozen=True)
class Weight8:
    """A weight [out, in] in 8-bit codes, one scale for each output.

    Attributes:
        in_features: columns; what lies behind them in `codes` is 0.
        codes: int8, less the centre, or float8_e4m3fn, [out, in padded to a multiple of 64].
        scale: float32 [out].
        zero: int32, less the centre, or float32 (which that rounds), [out]; None: 0.
        sums: of int8 codes, int32 [out].
    """

    in_features: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    sums: Tensor | None = None

    @staticmethod
    def of(weight: PackedWeight) -> Weight8:
        """The int8 form of `weight`, which `layout.int8_refusal` has nothing against, on its device. Takes a copy.

        Waits for the device: do it before a CUDA graph is captured.

        Raises:
            FormatError: `weight` breaks any rule of the native format.
        """
        spec, stored = weight.spec, weight.stored()
        check_parts("weight", stored, TensorEntry(spec, weight.shape))
        codes = unpack_rows(weight.weight_packed, spec.bits, weight.in_features)
        codes = (codes.to(torch.int16) - spec.centre).to(torch.int8)
        sums = codes.sum(1, dtype=torch.int32)
        grid = weight.grid()
        zero = None
        if not spec.symmetric:
            zero = grid.zero[:, 0] - spec.centre
            zero = (zero.to(torch.int32) if spec.zero == "int" else zero.float()).contiguous()
        padded = functional.pad(codes, (0, -weight.in_features % _COLUMNS)).contiguous()
        return Weight8(weight.in_features, padded, grid.scale[:, 0].float().contiguous(), zero, sums)

    @staticmethod
    def e4m3(weight: Tensor) -> Weight8:
        """The float `weight` [out, in] rounded to e4m3, each row scaled so that its greatest magnitude is 448.

        Raises:
            ValueError: `weight` is not a matrix of finite floats.
        """
        if weight.dim() != 2 or not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
            raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}, needed finite floats [out, in]")
        values = weight.float()
        scale = (values.abs().amax(1, keepdim=True) / _E4M3_MOST).clamp_min(torch.finfo(torch.float32).tiny)
        codes = (values / scale).clamp(-_E4M3_MOST, _E4M3_MOST).to(torch.float8_e4m3fn)
        # There is no padding of this type.
        bytes_ = functional.pad(codes.view(torch.uint8), (0, -weight.shape[1] % _COLUMNS))
        return Weight8(weight.shape[1], bytes_.contiguous().view(torch.float8_e4m3fn), scale[:, 0].contiguous())

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.codes.shape[0]

    @property
    def padded(self) -> int:
        """Codes in a row."""
        return self.codes.shape[1]

    @property
    def bytes(self) -> int:
        """Memory."""
        tensors = (self.codes, self.scale, self.zero, self.sums)
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors if tensor is not None)

    def dequantize(self) -> Tensor:
        """The weight [out, in] in float32, in plain PyTorch."""
        codes = self.codes[:, : self.in_features].float()
        zero = 0.0 if self.zero is None else self.zero.float()[:, None]
        return (codes - zero) * self.scale[:, None]


@dataclass(frozen=True)
class Tokens8:
    """Activations [tokens, in] in 8-bit codes [tokens, padded], as `Weight8` has weights.

    `scale` float32 [tokens]; `zero` int32, less the centre (None: 0), and `sums` int32 of codes less zeros (None: not
    wanted), [tokens].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    sums: Tensor | None = None


def quantize_int8(x: Tensor, activation: ActivationSpec, static: tuple[float, int] | None, weight: Weight8) -> Tokens8:
    """`x` [tokens, in], float, in codes of `activation` as `weight` needs them; `static`: scale and zero."""
    x, rows, count = x.contiguous(), x.shape[0], x.shape[1]
    codes = torch.empty(rows, weight.padded, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    zero = None if activation.symmetric else torch.empty(rows, dtype=torch.int32, device=x.device)
    sums = None if weight.zero is None else torch.empty(rows, dtype=torch.int32, device=x.device)
    number = (1.0, 0) if static is None else static
    block, warps = _block(weight.padded)
    least, greatest = 1 if activation.symmetric else 0, (1 << activation.bits) - 1
    quantize_int8_kernel[(rows,)](
        x, codes, scale, zero, sums, number[0], float(number[1]), activation.clip,
        COLUMNS=count, PADDED=weight.padded, LEAST=least, GREATEST=greatest, CENTRE=1 << (activation.bits - 1),
        STATIC=static is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return Tokens8(codes, scale, zero, sums)


def quantize_e4m3(x: Tensor, static_scale: float | None, padded: int) -> Tokens8:
    """`x` [tokens, in], float, rounded to e4m3, each token scaled to 448, or all by `static_scale`."""
    x = x.contiguous()
    codes = torch.empty(x.shape[0], padded, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    block, warps = _block(padded)
    quantize_e4m3_kernel[(x.shape[0],)](
        x, codes, scale, 1.0 if static_scale is None else static_scale,
        COLUMNS=x.shape[1], PADDED=padded, STATIC=static_scale is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return Tokens8(codes, scale)


def matmul(x: Tokens8, weight: Weight8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x` [tokens, in] times the transposed weight, plus `bias` [out]: [tokens, out] of `dtype`."""
    rows = x.codes.shape[0]
    result = torch.empty(rows, weight.out_features, dtype=dtype, device=x.codes.device)
    config = configs.gemm8_config(weight.out_features, weight.padded, rows)
    tensors = (weight.codes, x.codes, result, bias, weight.scale, weight.zero, weight.sums, x.scale, x.zero, x.sums)
    blocks = -(-weight.out_features // config.block_out)
    if config.block_rows == 0:
        gemv8_kernel[(blocks,)](
            *tensors, weight.out_features, PADDED=weight.padded,
            BLOCK_OUT=config.block_out, BLOCK_COLUMNS=config.block_columns, num_warps=config.warps,
        )  # fmt: skip
        return result
    gemm8_kernel[(blocks, -(-rows // config.block_rows))](
        *tensors, rows, weight.out_features, PADDED=weight.padded,
        BLOCK_OUT=config.block_out, BLOCK_ROWS=config.block_rows, BLOCK_COLUMNS=config.block_columns,
        GROUP=_GROUP, EXACT=min(_EXACT, config.block_columns), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return result


def int8_linear(
    x: Tensor, weight: Weight8, bias: Tensor | None, activation: ActivationSpec, static: tuple[float, int] | None
) -> Tensor:
    """`x` [..., in], quantized, times the transposed weight, plus `bias` [out]: [..., out] of the type of `x`.

    Args:
        x: float16, bfloat16 or float32.
        weight: in int8.
        bias: floats.
        activation: of a spec that `layout.int8_refusal` accepts.
        static: scale (a float32) and zero of a static range; None: each token's own.
    """
    rows = x.reshape(-1, weight.in_features)
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], weight.out_features)
    tokens = quantize_int8(rows, activation, static, weight)
    return matmul(tokens, weight, bias, x.dtype).view(*x.shape[:-1], weight.out_features)


def e4m3_linear(x: Tensor, weight: Weight8, bias: Tensor | None = None, static_scale: float | None = None) -> Tensor:
    """`int8_linear` with a weight and activations in e4m3; `static_scale` of activations, None: each token's own."""
    rows = x.reshape(-1, weight.in_features)
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], weight.out_features)
    tokens = quantize_e4m3(rows, static_scale, weight.padded)
    return matmul(tokens, weight, bias, x.dtype).view(*x.shape[:-1], weight.out_features)


def _block(padded: int) -> tuple[int, int]:
    """Columns at a time of a quantizing program, and its warps, each of whose threads takes up to 32."""
    block = min(1 << (padded - 1).bit_length(), _MOST_BLOCK)
    return block, max(1, min(16, block // 1024))
