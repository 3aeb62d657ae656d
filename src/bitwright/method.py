"""Methods: a choice at each step of a weight's journey, under a name.

The presets are the TOML files in `bitwright/recipes/`, named as users type them. Where a method's authors list other
settings for some bit widths, its file has them as `[[cases]]`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bitwright.errors import RecipeError
from bitwright.learning.reconstruct import Learn
from bitwright.numeric.activation import ActivationSettings, ActivationSpec, KvSettings, KvSpec
from bitwright.numeric.outliers import NoOutliers, NSigma
from bitwright.numeric.settings import Settings
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.ranges import Clip, RangeSettings
from bitwright.recipes.presets import read_preset
from bitwright.rounding.gptq import Gptq
from bitwright.rounding.nearest import Nearest
from bitwright.rounding.sensitivity import Obs
from bitwright.scheme import Scheme
from bitwright.transforms.awq import Awq
from bitwright.transforms.rotate import Rotate
from bitwright.transforms.smooth import Smooth


class NoTransform(Settings):
    """Blocks stay as they are."""

    name: Literal["none"] = "none"


TransformSettings = Annotated[NoTransform | Smooth | Awq, Field(discriminator="name")]
RoundingSettings = Annotated[Nearest | Gptq, Field(discriminator="name")]
OutlierPolicy = Annotated[NoOutliers | NSigma | Obs, Field(discriminator="name")]


class Inputs(Settings):
    """What a calibrated method knows of the inputs of the linears it rounds.

    - `stream`: `quantized` inputs are what the blocks before, already rounded, give; `float` ones are those of
      the model as it was.
    - `sequential`: the linears of a block are rounded in order of execution, each seeing what rounding those
      before it has done; else all of them see the block as it was.
    - `weighting`: `gradient` weighs each token by what the model's loss cares about the linear's output there
      (see `calibration.gradients`), `uniform` counts tokens alike, as GPTQ and SpQR do.
    - `correction`: the share, 0 to 1, by which targets are corrected for the difference between the inputs that
      linears get and those of the float model (see `rounding.correction`); takes a second stream.
    """

    stream: Literal["quantized", "float"] = "quantized"
    sequential: bool = True
    weighting: Literal["uniform", "gradient"] = "uniform"
    correction: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _float_inputs_do_not_change(self) -> Inputs:
        if self.stream == "float" and self.correction:
            raise ValueError(
                "float inputs have nothing to correct; use --set inputs.correction=0 or --set inputs.stream=quantized"
            )
        if self.stream == "float" and self.sequential:
            raise ValueError(
                "float inputs do not depend on what was rounded before; use --set inputs.sequential=false or "
                "--set inputs.stream=quantized"
            )
        return self


class Activations(ActivationSettings):
    """How a scheme's bits of activations are carried out, and, in `kv`, those of the KV cache."""

    kv: KvSettings = KvSettings()


class Method(Settings):
    """A choice at each step: transform, learning, range, rounding, outliers; and the grid it prefers."""

    name: str = "custom"
    summary: str = ""
    paper: str = ""
    rotate: Rotate | None = None
    transform: TransformSettings = NoTransform()
    learn: Learn | None = None
    range: RangeSettings
    rounding: RoundingSettings = Nearest()
    outliers: OutlierPolicy = NoOutliers()
    symmetric: bool = False
    zero: Literal["int", "float"] = "int"
    bilevel: Bilevel | None = None
    group_size: int | None = Field(default=None, ge=1)
    """Of groups, where the scheme names none; schemes without g otherwise mean one group per channel."""
    grid: Literal["native", "gguf"] = "native"
    """`gguf`: the grid of every matrix is that of a GGUF type for the scheme's bits (see `formats.gguf.gguf_grid`)."""
    inputs: Inputs = Inputs()
    activations: Activations = Activations()

    @property
    def calibrated(self) -> bool:
        """Whether the method needs to see the inputs of the linears, or keys and values."""
        fixed = self.activations.granularity == "tensor" or self.activations.kv.grid == "fp8"
        return self.prepares or isinstance(self.rounding, Gptq) or fixed

    @property
    def prepares(self) -> bool:
        """Whether the method does anything to a block before rounding it."""
        return self.transform.name != "none" or self.learn is not None or self.searches_clipping

    @property
    def searches_clipping(self) -> bool:
        """Whether the shares of groups' ranges are searched for."""
        return isinstance(self.range, Clip) and self.range.search

    @property
    def _learns_something(self) -> bool:
        assert self.learn is not None
        shares = self.learn.clip and isinstance(self.range, Clip)
        scales = self.learn.scales and (self.transform.name != "none" or self.learn.query_key)
        return shares or scales or self.learn.shifts or self.learn.weights

    @property
    def of_blocks(self) -> tuple[Any, ...]:
        """What is done to a whole block, or the model: linears of one block cannot differ in it."""
        learned_range = self.range if isinstance(self.range, Clip) else None
        return self.inputs, self.rotate, self.transform, self.learn, learned_range

    @model_validator(mode="after")
    def _steps_fit_together(self) -> Method:
        if isinstance(self.outliers, Obs) and not isinstance(self.rounding, Gptq):
            raise ValueError("outliers 'obs' are chosen by the Hessian; use --set rounding.name=gptq")
        if self.learn is not None and self.inputs.stream == "float":
            raise ValueError("learning takes its inputs from quantized blocks; use --set inputs.stream=quantized")
        if self.learn is not None and self.activations.granularity == "tensor":
            raise ValueError("static ranges of inputs are not learned; use --set activations.granularity=token")
        if self.learn is not None and not self._learns_something:
            raise ValueError(
                "learn has nothing to learn; use --set learn.weights=true, or --set learn.clip=true with "
                "--set range.name=clip, or --set learn.scales=true with --set transform.name=awq"
            )
        if self.learn is not None and self.learn.weights and not isinstance(self.rounding, Nearest):
            raise ValueError(
                "learned weights decide the nearest codes, which error feedback would move; use "
                "--set rounding.name=nearest"
            )
        if self.rotate is not None and self.rotate.online_down and "down" in getattr(self.transform, "sites", ()):
            raise ValueError(
                "rotate.online_down mixes the channels of down; leave down out of transform.sites, or use "
                "--set rotate.online_down=false"
            )
        if self.grid == "gguf" and (self.bilevel is not None or self.group_size is not None):
            raise ValueError(
                "grid 'gguf' has groups and levels of its own; use --set bilevel=none --set group_size=none"
            )
        updated = isinstance(self.rounding, Gptq) and self.rounding.groups == "updated"
        if isinstance(self.rounding, Gptq) and self.rounding.refit and self.bilevel is not None:
            raise ValueError("two-level scales are refined before rounding; use --set rounding.refit=false")
        if updated and self.bilevel is not None and self.bilevel.axis == "column":
            raise ValueError(
                "rounding.groups=updated fits group by group, and columns of superblocks need whole rows; use "
                "--set rounding.groups=static or --set bilevel=none"
            )
        return self


class Case(Settings):
    """What a preset changes for some schemes: `change` is merged into it where all that is given holds.

    - `weight_bits`: of the scheme, one of these.
    - `activations`: whether the scheme quantizes them.
    """

    weight_bits: tuple[int, ...] | None = None
    activations: bool | None = None
    change: dict[str, Any]

    def holds(self, scheme: Scheme) -> bool:
        """Whether the case is that of `scheme`."""
        bits_agree = self.weight_bits is None or scheme.weight_bits in self.weight_bits
        return bits_agree and self.activations in (None, scheme.activation_bits < 16)


def load_method(name: str, scheme: Scheme | None = None) -> Method:
    """The preset called `name`, in capitals or not, with the settings that it has for `scheme`.

    Without a scheme, it has those for most schemes.

    Raises:
        RecipeError: there is no such preset.
    """
    raw = read_preset(name)
    for case in [Case.model_validate(case) for case in raw.pop("cases", [])]:
        if scheme is not None and case.holds(scheme):
            raw = _merged(raw, case.change)
    return Method.model_validate(raw)


def _merged(table: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with the values of `change` in their places; another `name` replaces its whole table."""
    merged = dict(table)
    for key, value in change.items():
        old = table.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(old, dict)
            and value.get("name", old.get("name")) == old.get("name")
        ):
            merged[key] = _merged(old, value)
        else:
            merged[key] = value
    return merged


def weight_spec(method: Method, scheme: Scheme, scale_dtype: Literal["float16", "bfloat16", "float32"]) -> WeightSpec:
    """How the codes look when `method` works in `scheme`; symmetry from the scheme, else the method.

    Raises:
        RecipeError: the method's zeros and levels do not go together.
    """
    symmetric = method.symmetric if scheme.symmetric is None else scheme.symmetric
    bilevel = method.bilevel
    if not symmetric and bilevel is not None and bilevel.zero_bits is not None and method.zero != "float":
        raise RecipeError(
            f"method {method.name}: zeros with a second level are no integers; use --set zero=float, --set "
            "bilevel.zero_bits=none or --set bilevel=none"
        )
    if symmetric and bilevel is not None:
        bilevel = bilevel.model_copy(update={"zero_bits": None})  # there are no zeros to store
    return WeightSpec(
        bits=scheme.weight_bits,
        group_size=method.group_size if scheme.group_size is None else scheme.group_size,
        symmetric=symmetric,
        zero="int" if symmetric else method.zero,
        scale_dtype=scale_dtype,
        bilevel=bilevel,
    )


def activation_spec(method: Method, scheme: Scheme) -> ActivationSpec | None:
    """How the inputs of linears are quantized when `method` works in `scheme`; None: they stay in float."""
    if scheme.activation_bits == 16:
        return None
    return ActivationSpec(bits=scheme.activation_bits, **method.activations.model_dump(exclude={"kv"}))


def kv_refusal(method: Method, schemes: Collection[Scheme]) -> str | None:
    """Why the KV cache of `schemes`, those that a recipe names, cannot be on the grid of `method`; None if it can."""
    bits = {scheme.kv_bits for scheme in schemes} - {16}
    if method.activations.kv.grid == "int" or bits == {8}:
        return None
    asked = "no kv" if not bits else ", ".join(f"kv{number}" for number in sorted(bits))
    return (
        f"activations.kv.grid=fp8 has 8 bits, and the scheme says {asked}; write kv8 in it, such as --scheme "
        "w4a16kv8g128, or use --set activations.kv.grid=int"
    )


def kv_spec(method: Method, scheme: Scheme) -> KvSpec | None:
    """How the KV cache is quantized when `method` works in `scheme`; None: it stays in float."""
    return None if scheme.kv_bits == 16 else KvSpec(bits=scheme.kv_bits, **method.activations.kv.model_dump())
