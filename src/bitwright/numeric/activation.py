"""Quantized activations, simulated: values are rounded to a grid and stay floats.

The grid is that of weights: `value = scale * (code - zero)`, with `code` in `0 .. 2**bits - 1` and an integer zero
in the same range, all in float32. Dynamic ranges are the least and the greatest value of one token (of one head, in
the KV cache) and always hold 0, so that 0 stays 0; static ones belong to a whole tensor and were seen beforehand.

Source: OmniQuant (Shao et al. 2024), section 3.1, and its code: min-max per token. Departures: zeros lie inside the
code range, since a token of one sign would else have a zero that no integer kernel can hold; symmetric codes and
clipped ranges (Atom, Zhao et al. 2024) are settings.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bitwright.numeric.hadamard import hadamard_blocks
from bitwright.numeric.settings import Settings


class ActivationSettings(Settings):
    """How the inputs of linears are quantized, whatever the bits.

    - `granularity`: `token`, a range for each token, taken from its own values (dynamic); `tensor`, one range for
      all, known beforehand (static).
    - `symmetric`: the zero is `2**(bits-1)`, and codes go from 1: `code - zero` is `-m .. m`, `m = 2**(bits-1) - 1`.
    - `clip`: share of a dynamic range that is kept; what lies beyond is clamped.
    """

    granularity: Literal["token", "tensor"] = "token"
    symmetric: bool = False
    clip: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _static_ranges_are_given(self) -> ActivationSettings:
        if self.granularity == "tensor" and self.clip != 1:
            raise ValueError(
                "a static range is given as it is to be; use --set activations.clip=1 or "
                "--set activations.granularity=token"
            )
        return self


class ActivationSpec(ActivationSettings):
    """How the inputs of a linear are quantized: ActivationSettings with `bits`."""

    bits: int = Field(ge=2, le=8)

    def label(self) -> str:
        """Bits, granularity and symmetry, such as `a4-token-asym`."""
        return f"a{self.bits}-{self.granularity}-{'sym' if self.symmetric else 'asym'}"


class KvSettings(Settings):
    """How keys and values are quantized, whatever the bits.

    - `grid`: `int`, integers over a dynamic range for each token and head; `fp8`, 8-bit floats (e4m3) over one fixed
      scale for the keys and one for the values of each block, which calibration finds: what engines serve.
    - `rope`: keys are quantized `after` their rotation by RoPE, or `before` it; the same where there is none.
    - `symmetric`: as in ActivationSettings.
    - `past_only`: each token attends to its own key and value in float, and to those of the tokens before it
      quantized (WKVQuant, Yue et al. 2024, section 3.1). Needs `rope="after"`.

    The last three are settings of `int` alone.
    """

    grid: Literal["int", "fp8"] = "int"
    rope: Literal["after", "before"] = "after"
    symmetric: bool = False
    past_only: bool = False

    @model_validator(mode="after")
    def _own_key_is_rotated(self) -> KvSettings:
        if self.past_only and self.rope == "before":
            raise ValueError(
                "a key quantized before RoPE has no float form after it; use --set activations.kv.rope=after or "
                "--set activations.kv.past_only=false"
            )
        return self

    @model_validator(mode="after")
    def _floats_have_no_integer_settings(self) -> KvSettings:
        if self.grid == "int":
            return self
        if self.rope == "before":
            raise ValueError(
                "fixed scales are those of keys as attention reads them; use --set activations.kv.rope=after"
            )
        if self.past_only:
            raise ValueError(
                "engines read every key and value from an fp8 cache; use --set activations.kv.past_only=false"
            )
        if self.symmetric:
            raise ValueError(
                "symmetric says where the zero of integers is, and floats have none; use "
                "--set activations.kv.symmetric=false"
            )
        return self


class KvSpec(KvSettings):
    """How the KV cache is quantized: KvSettings with `bits`."""

    bits: int = Field(ge=2, le=8)

    @model_validator(mode="after")
    def _floats_have_8_bits(self) -> KvSpec:
        if self.grid == "fp8" and self.bits != 8:
            raise ValueError(f"grid 'fp8' has 8 bits, got {self.bits}; needs kv8")
        return self

    def label(self) -> str:
        """Bits, kind of numbers and where keys are caught, such as `kv4-asym-after` or `kv8-fp8`."""
        if self.grid == "fp8":
            return "kv8-fp8"
        past = "-past" if self.past_only else ""
        return f"kv{self.bits}-{'sym' if self.symmetric else 'asym'}-{self.rope}{past}"


class InputSite(Settings):
    """What happens to the input of a linear before it is multiplied: first `transform`, then `activation`.

    - `transform`: `hadamard` is `numeric.hadamard.hadamard_blocks`; the weight was rounded for inputs so rotated.
    - `activation`: how the input is quantized; None leaves it in float.
    - `scale`, `zero`: the static range, where `activation.granularity` is `tensor`; `scale` is a float32.
    """

    transform: Literal["hadamard"] | None = None
    activation: ActivationSpec | None = None
    scale: float | None = Field(default=None, gt=0)
    zero: int | None = Field(default=None, ge=0, le=255)

    @model_validator(mode="after")
    def _range_goes_with_the_spec(self) -> InputSite:
        if self.transform is None and self.activation is None:
            raise ValueError("nothing happens to the input; leave the site out")
        spec = self.activation
        static = spec is not None and spec.granularity == "tensor"
        if (self.scale is not None, self.zero is not None) != (static, static):
            raise ValueError("scale and zero are given exactly where activation.granularity is 'tensor'")
        if self.scale is not None and torch.tensor(self.scale, dtype=torch.float32).item() != self.scale:
            raise ValueError(f"scale {self.scale!r} is not a float32")
        if spec is not None and self.zero is not None:
            allowed = [_centre(spec.bits)] if spec.symmetric else range(1 << spec.bits)
            if self.zero not in allowed:
                raise ValueError(f"zero {self.zero} is outside {allowed[0]}..{allowed[-1]}")
        return self

    @staticmethod
    def static(
        spec: ActivationSpec, low: float, high: float, transform: Literal["hadamard"] | None = None
    ) -> InputSite:
        """The site whose inputs, transformed, were seen between `low` and `high`.

        Raises:
            ValueError: `spec` is dynamic, or the range is not finite or upside down.
        """
        scale, zero = static_range(low, high, spec)
        return InputSite(transform=transform, activation=spec, scale=scale, zero=zero)

    def apply(self, x: Tensor) -> Tensor:
        """`x` [..., features] as the matrix product sees it, in its own dtype."""
        if self.transform is not None:
            x = hadamard_blocks(x)
        return x if self.activation is None else fake_quantize(x, self.activation, self.scale, self.zero)

    def label(self) -> str:
        """The site in short, such as `hadamard-a4-token-asym`."""
        steps = (self.transform, None if self.activation is None else self.activation.label())
        return "-".join(step for step in steps if step is not None)


def fake_quantize(
    x: Tensor,
    spec: ActivationSpec | KvSpec,
    scale: Tensor | float | None = None,
    zero: Tensor | int | None = None,
) -> Tensor:
    """`x` [..., features] rounded to the grid of `spec`, in the dtype of `x`; computed in float32.

    The last axis is what shares a dynamic range. Rounding passes gradients on as if it were not there; what a range
    clamps gets none. The zero is rounded without passing any on, so ranges learn through their scale (as OmniQuant's).

    Args:
        x: floats.
        spec: of the grid.
        scale: of a static range, or one that broadcasts against `x`; None: dynamic.
        zero: integers that go with `scale`.

    Raises:
        ValueError: `spec` asks for a static range, and there is none; or only one of `scale` and `zero` is given.
    """
    if (scale is None) != (zero is None):
        raise ValueError("scale and zero go together; give both or neither")
    values = x.float()
    if scale is None or zero is None:
        scale, zero = dynamic_range(values, spec)
    steps = values / scale + zero
    codes = torch.clamp(steps + (steps.round() - steps).detach(), _least_code(spec), _greatest_code(spec))
    return (scale * (codes - zero)).to(x.dtype)


def dynamic_range(x: Tensor, spec: ActivationSpec | KvSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero of every row of `x` [..., features], both float32 [..., 1].

    Raises:
        ValueError: `spec` asks for a static range.
    """
    clip = 1.0
    if isinstance(spec, ActivationSpec):
        if spec.granularity == "tensor":
            raise ValueError("granularity 'tensor' needs the scale and zero of a static range; see static_range")
        clip = spec.clip
    values = x.float()
    return _grid(values.amin(-1, keepdim=True) * clip, values.amax(-1, keepdim=True) * clip, spec)


def static_range(low: float, high: float, spec: ActivationSpec) -> tuple[float, int]:
    """Scale (a float32) and zero of a tensor whose values were seen between `low` and `high`.

    Raises:
        ValueError: `spec` is dynamic, or the range is not finite or upside down.
    """
    if spec.granularity != "tensor":
        raise ValueError("granularity 'token' takes its ranges from each token; static_range needs 'tensor'")
    bounds = torch.tensor([low, high], dtype=torch.float32)
    if not bool(torch.isfinite(bounds).all()) or low > high:
        raise ValueError(f"a static range from {low} to {high}; needed finite bounds in order")
    scale, zero = _grid(bounds[0], bounds[1], spec)
    return scale.item(), int(zero.item())


def _grid(low: Tensor, high: Tensor, spec: ActivationSpec | KvSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero of the ranges `low` to `high`, which are widened to hold 0."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    # The least normal number stands for the step of a token that is 0 throughout, or next to it.
    tiny = torch.finfo(torch.float32).tiny
    if spec.symmetric:
        centre = _centre(spec.bits)
        scale = (torch.maximum(-low, high) / (centre - 1)).clamp_min(tiny)
        return scale, torch.full_like(scale, centre)
    greatest = _greatest_code(spec)
    # Not (high - low) / greatest, whose difference can overflow.
    scale = (high / greatest - low / greatest).clamp_min(tiny)
    return scale, torch.clamp(torch.round(-low / scale), 0, greatest).detach()


def _greatest_code(spec: ActivationSpec | KvSpec) -> int:
    return (1 << spec.bits) - 1


def _least_code(spec: ActivationSpec | KvSpec) -> int:
    return 1 if spec.symmetric else 0


def _centre(bits: int) -> int:
    return 1 << (bits - 1)
