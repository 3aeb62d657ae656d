"""Rows: what becomes of each tensor of a checkpoint, and the units in which tensors travel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from bitwright.checkpoint.shard import NAMES, TensorInfo
from bitwright.method import Method
from bitwright.numeric.activation import ActivationSpec, InputSite
from bitwright.numeric.outliers import NoOutliers, NSigma
from bitwright.numeric.spec import WeightSpec
from bitwright.rounding.gptq import Gptq
from bitwright.rounding.sensitivity import Obs

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Row:
    """One tensor of the checkpoint and what becomes of it."""

    tensor: str
    shape: tuple[int, ...]
    source_dtype: torch.dtype
    action: Literal["quantize", "keep", "tied"]
    rule: str
    bytes: int
    """Bytes on disk: exact for kept tensors and without outliers, else expected."""
    stored_dtype: torch.dtype | None = None
    """Of a kept tensor."""
    spec: WeightSpec | None = None
    method: Method | None = None
    activation: ActivationSpec | None = None
    """Of the inputs of a quantized linear; None: they stay in float."""

    hadamard: bool = False
    """Whether the runtime applies `hadamard_blocks` to the linear's input."""

    def input_site(self, extremes: tuple[float, float] | None = None) -> InputSite | None:
        """What happens to the linear's input; `extremes`, its least and greatest value, for a static range."""
        transform: Literal["hadamard"] | None = "hadamard" if self.hadamard else None
        if self.activation is None:
            return None if transform is None else InputSite(transform=transform)
        if self.activation.granularity == "token":
            return InputSite(transform=transform, activation=self.activation)
        if extremes is None:
            raise ValueError(f"{self.tensor}: its static range needs the extremes of its input")
        return InputSite.static(self.activation, *extremes, transform)

    @property
    def module(self) -> str:
        """The module that owns the tensor, which is what rules match."""
        return self.tensor.rpartition(".")[0]

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def calibrated(self) -> bool:
        """Whether its method needs to see the inputs of the linear."""
        return self.method is not None and self.method.calibrated

    @property
    def static_input(self) -> bool:
        """Whether its input is quantized on one range for all tokens."""
        return self.activation is not None and self.activation.granularity == "tensor"

    @property
    def needs_hessian(self) -> bool:
        """Whether its rounding needs the Hessian of the linear's inputs."""
        return self.method is not None and isinstance(self.method.rounding, Gptq)

    @property
    def keeps_a_share(self) -> bool:
        """Whether its outliers are a share of its weights, chosen by sensitivity, rather than those above a limit."""
        policy = None if self.method is None else self.method.outliers
        return isinstance(policy, Obs) and policy.keeps_a_share

    def with_share(self, share: float) -> Row:
        """The row, which keeps a share, with another one; `bytes` stays."""
        assert self.method is not None
        policy = self.method.outliers.model_copy(update={"share": share})
        return replace(self, method=self.method.model_copy(update={"outliers": policy}))

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensor in the source."""
        return self.weights * self.source_dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """The row for `plan --json`."""
        return {
            "tensor": self.tensor,
            "shape": list(self.shape),
            "source_dtype": NAMES[self.source_dtype],
            "action": self.action,
            "rule": self.rule,
            "bytes": self.bytes,
            "stored_dtype": None if self.stored_dtype is None else NAMES[self.stored_dtype],
            "spec": None if self.spec is None else self.spec.model_dump(mode="json"),
            "method": None if self.method is None else self.method.name,
            "activation": None if self.activation is None else self.activation.model_dump(mode="json"),
            "bits_per_weight": 8 * self.bytes / self.weights if self.weights else None,
        }


class Refusals:
    """Why a recipe cannot be applied to a checkpoint: every reason, once, with the tensors that it is of."""

    def __init__(self) -> None:
        """None so far."""
        self._tensors: dict[str, list[str]] = {}

    def add(self, reason: str, tensor: str | None = None) -> None:
        """Take note of `reason`, why `tensor` is refused, or without one, the whole recipe."""
        named = self._tensors.setdefault(reason, [])
        if tensor is not None and tensor not in named:
            named.append(tensor)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._tensors)

    def __str__(self) -> str:
        """All of them in one line; of many tensors with one reason the first few, and how many there are."""
        return "; ".join(f"{some_of(names)}{': ' if names else ''}{reason}" for reason, names in self._tensors.items())


def some_of(names: Sequence[str]) -> str:
    """All of a few names; of many the first three and their number, such as `a, b, c and others (14 such)`."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and others ({len(names)} such)"


@dataclass(frozen=True)
class Unit:
    """Tensors that travel together into one shard."""

    label: str
    rows: tuple[Row, ...]
    block: int | None = None
    """Number of the decoder block that these are the tensors of."""


def kept_dtype(info: TensorInfo, setting: str) -> torch.dtype:
    """The type in which a kept tensor is stored; see `Recipe.kept_dtype`."""
    if info.dtype not in FLOATS or setting == "source":
        return info.dtype
    if setting == "auto":
        if info.dtype.itemsize <= 2:
            return info.dtype
        return torch.float16 if len(info.shape) >= 2 else torch.float32
    return torch.float16 if setting == "float16" else torch.bfloat16


def expected_outlier_share(policy: NoOutliers | NSigma | Obs) -> float:
    """Share of weights that a policy is expected to keep apart.

    Of `nsigma` twice a Gaussian's tail, at most the cap: the tails of trained weights are heavier; EasyQuant
    reports 0.3-0.8 % at 3 sigma, a Gaussian has 0.27 %. Of `obs` its own share; a threshold keeps what SpQR
    reports, 0.2-0.5 %.
    """
    if isinstance(policy, NoOutliers):
        return 0.0
    if isinstance(policy, Obs):
        return policy.share if policy.keeps_a_share else 0.003
    return min(policy.max_share, 2 * math.erfc(policy.n / math.sqrt(2)))
