"""The plan: recipe x checkpoint headers -> one row per tensor, and every refusal, before any weight is read.

A row says which rule claimed the tensor, what it becomes and how many bytes that takes. Rows are grouped in
units: the embeddings, each block, and the rest. A unit is written as one shard, is the step of resume, and
bounds memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bitwright.budget import within_budget
from bitwright.checkpoint.open import open_source
from bitwright.checkpoint.shard import TensorInfo
from bitwright.checkpoint.source import Source
from bitwright.errors import FormatError, PlanError
from bitwright.execute.shown import Shown
from bitwright.formats.gguf import gguf_grid
from bitwright.formats.native import TensorEntry, packed_bytes
from bitwright.method import Inputs, Method, activation_spec, kv_refusal, kv_spec, weight_spec
from bitwright.models import adapter_for
from bitwright.models.adapter import Adapter, block_count
from bitwright.numeric.activation import ActivationSpec, KvSpec
from bitwright.numeric.spec import WeightSpec
from bitwright.recipe import Recipe, Rule, as_recipe
from bitwright.rounding.sensitivity import Obs
from bitwright.rows import FLOATS, Refusals, Row, Unit, expected_outlier_share, kept_dtype, some_of
from bitwright.scheme import Scheme
from bitwright.transforms.rotate import Rotate, online_hadamards, rotated


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What `quantize` will do."""

    source: str
    recipe: Recipe
    adapter: Adapter
    units: tuple[Unit, ...]
    tied_head: str | None
    """The head that shares a quantized embedding, if any."""
    kv_cache: KvSpec | None = None
    """How the KV cache is quantized; None: it stays in float."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Of the float model: the content of its config.json."""
    left_out: tuple[str, ...] = ()
    """Tensors of its files that the model has no use for."""

    def rows(self) -> Iterator[Row]:
        """Every row, in the order of travel."""
        for unit in self.units:
            yield from unit.rows

    @property
    def calibrated_method(self) -> Method | None:
        """A method of calibrated rows, which all agree in what they do to whole blocks; None without such rows."""
        return next((row.method for row in self.rows() if row.calibrated), None)

    @property
    def inputs(self) -> Inputs | None:
        """What calibrated rows, all of them alike, need to know of their inputs; None when no row is calibrated."""
        return None if self.calibrated_method is None else self.calibrated_method.inputs

    def shard_name(self, index: int) -> str:
        """File name of unit `index`."""
        return f"model-{index + 1:05d}-of-{len(self.units):05d}.safetensors"

    @property
    def bytes(self) -> int:
        """Expected bytes of all weights on disk."""
        return sum(row.bytes for row in self.rows())

    @property
    def source_bytes(self) -> int:
        """Bytes of all weights in the source."""
        return sum(row.source_bytes for row in self.rows())

    @property
    def quantized_weights(self) -> int:
        """Number of weights that become codes."""
        return sum(row.weights for row in self.rows() if row.action == "quantize")

    @property
    def bits_per_weight(self) -> float:
        """Expected bits per quantized weight, scales, zeros and outliers included."""
        packed = sum(row.bytes for row in self.rows() if row.action == "quantize")
        return 8 * packed / self.quantized_weights if self.quantized_weights else math.nan

    def facts(self) -> dict[str, str]:
        """See `Shown.facts`."""
        quantized = sum(row.action == "quantize" for row in self.rows())
        return {
            "source": self.source,
            "tensors": f"{quantized} of {sum(len(unit.rows) for unit in self.units)} to quantize",
            "bits per weight": f"{self.bits_per_weight:.3f} expected",
            "bytes": f"{self.source_bytes:,} become about {self.bytes:,}",
        }

    def to_json(self) -> dict[str, Any]:
        """The plan for `plan --json`."""
        return {
            "source": self.source,
            "left_out": list(self.left_out),
            "recipe": self.recipe.model_dump(mode="json"),
            "bytes": self.bytes,
            "source_bytes": self.source_bytes,
            "quantized_weights": self.quantized_weights,
            "bits_per_weight": self.bits_per_weight,
            "kv_cache": None if self.kv_cache is None else self.kv_cache.model_dump(mode="json"),
            "tensors": [row.to_json() for row in self.rows()],
        }


def plan(
    model: str,
    method: str | None = None,
    scheme: str | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
) -> Plan:
    """What quantizing `model` would do, from its headers alone.

    Args:
        model: a Hugging Face folder, a hub id, a `.gguf` file, or `demo`.
        method: a preset, such as `easyquant`; needs `scheme`, such as `w4a16g64`.
        scheme: see `method`.
        recipe: a Recipe (see `load_recipe`) or the name of a TOML file, instead of the two.

    Raises:
        RecipeError: the recipe cannot mean anything.
        CheckpointError: the model cannot be read.
        PlanError: the recipe cannot be applied to the model; every reason is listed.
    """
    resolved = as_recipe(recipe, method, scheme)
    return make_plan(rotated_as_asked(open_source(model), resolved), resolved)


def rotated_as_asked(source: Source, recipe: Recipe) -> Source:
    """`source`, or with the rotation that the recipe's methods ask for.

    Raises:
        PlanError: they ask for different ones, or the rotation would not be exact.
    """
    asked = _rotations(recipe)
    if len(asked) > 1:
        raise PlanError(f"methods ask for the rotations {asked}; the model has one: let the methods of all rules agree")
    return rotated(source, adapter_for(source.config), asked[0], recipe.seed) if asked else source


def _rotations(recipe: Recipe) -> list[Rotate]:
    methods = [recipe.method, *(rule.method for rule in recipe.rules)]
    return list(dict.fromkeys(m.rotate for m in methods if m is not None and m.rotate is not None))


def make_plan(source: Source, recipe: Recipe) -> Plan:
    """`plan` for an open source, rotated as the recipe asks, and a resolved recipe."""
    adapter = adapter_for(source.config)
    if adapter.stacks:
        raise PlanError(
            f"{source.label}: {adapter.model_type} holds its experts in stacks such as {adapter.stacks[0]}, which "
            "cannot be quantized yet; choose a dense model"
        )
    planner = _Planner(source, recipe, adapter)
    units = planner.units()
    if recipe.bits_per_weight is not None and not planner.refusals:
        try:
            units = within_budget(units, recipe.bits_per_weight)
        except PlanError as error:
            planner.refusals.add(str(error))
    if planner.refusals:
        raise PlanError(f"{source.label}: {planner.refusals}")
    return Plan(
        source.label, recipe, adapter, units, planner.tied_head, planner.kv_cache, source.config, source.left_out
    )


class _Planner:
    """Collects rows and refusals; refusals are raised together, so one run shows everything to mend."""

    def __init__(self, source: Source, recipe: Recipe, adapter: Adapter):
        self.source, self.recipe, self.adapter = source, recipe, adapter
        self.refusals = Refusals()
        self.tied_head: str | None = None
        self.calibrated_method: Method | None = None
        self.kv_cache: KvSpec | None = None
        self.blocks = block_count(source.config)
        self.block_linears = [
            adapter.block_prefix(block) + name for block in range(self.blocks) for name in adapter.linears
        ]
        found = [source.tensors[f"{m}.weight"].shape for m in self.block_linears if f"{m}.weight" in source.tensors]
        self.narrowest = min((shape[-1] for shape in found if shape), default=1)
        self.online_hadamards = [name for asked in _rotations(recipe) for name in online_hadamards(adapter, asked)]
        self.tied = adapter.tied_head
        self.candidates = {*self.block_linears, adapter.embedding} | (set() if self.tied else {adapter.head})

    def units(self) -> tuple[Unit, ...]:
        self._check_rules()
        self._check_presence()
        grouped: dict[int, list[Row]] = {}
        for name, info in self.source.tensors.items():
            grouped.setdefault(self._unit_index(name), []).append(self._row(name, info))
        labels = {0: "embeddings", self.blocks + 1: "head"}
        return tuple(
            Unit(
                labels.get(index, f"block {index - 1}"),
                tuple(sorted(grouped[index], key=lambda row: row.tensor)),
                index - 1 if 1 <= index <= self.blocks else None,
            )
            for index in sorted(grouped)
        )

    def _unit_index(self, name: str) -> int:
        prefix = self.adapter.blocks + "."
        if name.startswith(prefix):
            number = name[len(prefix) :].partition(".")[0]
            if number.isdigit() and int(number) < self.blocks:
                return int(number) + 1
            self.refusals.add(f"of a block beyond the {self.blocks} that config.json says", name)
        early = name.startswith(self.adapter.embedding) or name.rpartition(".")[0] in self.adapter.kept
        return 0 if early else self.blocks + 1

    def _check_rules(self) -> None:
        for rule in self.recipe.rules:
            if any(fnmatchcase(module, rule.match) for module in self.candidates):
                continue
            reason = "matches no linear or embedding"
            if self.tied and fnmatchcase(self.adapter.head, rule.match):
                reason = (
                    f"matches only {self.adapter.head}, which is tied to {self.adapter.embedding}: "
                    "write the rule for that one"
                )
            self.refusals.add(f"rule {rule.match!r} {reason}")

    def _check_presence(self) -> None:
        missing = [m for m in sorted(self.candidates) if m + ".weight" not in self.source.tensors]
        if missing:
            self.refusals.add(f"the checkpoint has no weight for {some_of(missing)}")

    def _row(self, name: str, info: TensorInfo) -> Row:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module == self.adapter.head and self.tied:
            return Row(name, info.shape, info.dtype, "tied", f"tied to {self.adapter.embedding}", 0)
        if leaf == "weight" and module in self.candidates:
            return self._claimed_row(module, name, info)
        if len(info.shape) >= 2 and self._inside_block(name) and info.dtype in FLOATS:
            self.refusals.add(
                f"{list(info.shape)} is a matrix that the {self.adapter.model_type} adapter does not know", name
            )
        return self._kept_row(name, info, "not a linear")

    def _inside_block(self, name: str) -> bool:
        return name.startswith(self.adapter.blocks + ".")

    def _claimed_row(self, module: str, name: str, info: TensorInfo) -> Row:
        for rule in self.recipe.rules:
            if fnmatchcase(module, rule.match):
                if rule.keep:
                    if self._hadamard(name):
                        self.refusals.add(
                            f"kept by rule {rule.match!r}, and rotate.online_down rotates the input at run time; "
                            "only quantized linears do that: quantize it, or use --set rotate.online_down=false",
                            name,
                        )
                    return self._kept_row(name, info, f"rule {rule.match!r}")
                return self._quantized_row(name, info, rule)
        if module in (self.adapter.embedding, self.adapter.head):
            return self._kept_row(name, info, "default: kept")
        if self.recipe.method is None:
            keep = f"--set 'keep=*.{module.rpartition('.')[2]}'"
            self.refusals.add(f"claimed by no rule; add a rule for it, or leave it in float with {keep}", module)
            return self._kept_row(name, info, "unclaimed")
        return self._quantized_row(name, info, Rule(match="*"))

    def _kept_row(self, name: str, info: TensorInfo, rule: str) -> Row:
        stored = kept_dtype(info, self.recipe.kept_dtype)
        return Row(name, info.shape, info.dtype, "keep", rule, info.numel * stored.itemsize, stored_dtype=stored)

    def _quantized_row(self, name: str, info: TensorInfo, rule: Rule) -> Row:
        method = rule.method or self.recipe.method
        scheme = rule.scheme or self.recipe.scheme
        if method is None or scheme is None:
            self.refusals.add(f"rule {rule.match!r} needs a method and a scheme; the recipe has no default")
            return self._kept_row(name, info, rule.match)
        spec = self._spec(name, info, method, scheme)
        self._check_matrix(name, info, scheme, spec)
        activation = self._check_scheme(name, scheme, method)
        if method.calibrated:
            self._check_calibrated(name, method)
        if name.rpartition(".")[0] == self.adapter.embedding and self.tied:
            self.tied_head = self.adapter.head
        nbytes = 0
        if len(info.shape) == 2:
            outliers = round(expected_outlier_share(method.outliers) * info.numel)
            value_bits = method.outliers.value_bits if isinstance(method.outliers, Obs) and outliers else 16
            nbytes = packed_bytes(TensorEntry(spec, (info.shape[0], info.shape[1]), outliers, value_bits))
        label = "default" if rule.match == "*" and rule not in self.recipe.rules else f"rule {rule.match!r}"
        row = Row(name, info.shape, info.dtype, "quantize", label, nbytes, spec=spec, method=method)
        return replace(row, activation=activation, hadamard=self._hadamard(name))

    def _spec(self, name: str, info: TensorInfo, method: Method, scheme: Scheme) -> WeightSpec:
        spec = weight_spec(method, scheme, self.recipe.scale_dtype)
        if method.grid == "native":
            return spec
        if scheme.group_size is not None or scheme.symmetric is not None or spec.scale_dtype != "float16":
            self.refusals.add(
                f"scheme {scheme} with {spec.scale_dtype} scales: grid gguf has groups, symmetry and float16 scales of "
                f"its own; use --scheme w{scheme.weight_bits}a{scheme.activation_bits} --set scale_dtype=float16"
            )
        try:
            return gguf_grid(scheme.weight_bits, info.shape[-1])
        except FormatError as error:
            self.refusals.add(str(error), name)
            return spec

    def _hadamard(self, name: str) -> bool:
        """Whether the runtime must rotate the input of the linear that owns tensor `name`."""
        return any(name.endswith(f".{linear}.weight") for linear in self.online_hadamards)

    def _check_matrix(self, name: str, info: TensorInfo, scheme: Scheme, spec: WeightSpec) -> None:
        if len(info.shape) != 2 or 0 in info.shape:
            self.refusals.add(f"shape {list(info.shape)}, needed a matrix [out, in]", name)
        elif spec.group_size is not None and spec.group_size > info.shape[1]:
            fitting = scheme.model_copy(update={"group_size": self.narrowest})
            self.refusals.add(
                f"groups of {spec.group_size} are wider than the {info.shape[1]} inputs; use --scheme {fitting}", name
            )
        if info.dtype not in FLOATS:
            self.refusals.add(f"{info.dtype}, needed float16, bfloat16, float32 or float64", name)

    def _check_calibrated(self, name: str, method: Method) -> None:
        if not self._inside_block(name):
            self.refusals.add(
                f"outside the blocks, where method {method.name} sees no inputs; give it a rule with method rtn, or "
                f"leave it in float with --set keep={name.rpartition('.')[0]}",
                name,
            )
        if self.calibrated_method is not None and self.calibrated_method.of_blocks != method.of_blocks:
            self.refusals.add(
                f"methods {self.calibrated_method.name} and {method.name} treat whole blocks differently (inputs, "
                "rotate, transform, learn, range clip); calibrated methods of one recipe must agree in these"
            )
        self.calibrated_method = method

    def _check_scheme(self, name: str, scheme: Scheme, method: Method) -> ActivationSpec | None:
        """How the inputs of `name` are quantized; takes note of how the KV cache is."""
        if not (4 <= scheme.activation_bits <= 8 or scheme.activation_bits == 16):
            self.refusals.add(
                f"scheme {scheme} asks for {scheme.activation_bits}-bit activations; needed a4 to a8, or a16 for none"
            )
            return None
        if not (2 <= scheme.kv_bits <= 8 or scheme.kv_bits == 16):
            self.refusals.add(f"scheme {scheme} asks for a {scheme.kv_bits}-bit KV cache; needed kv2 to kv8, or no kv")
            return None
        self._check_kv_cache(scheme, method)
        activation = activation_spec(method, scheme)
        # Embeddings look up rows, and what the head multiplies stays in float, as in all of the literature.
        if activation is None or not self._inside_block(name):
            return None
        return activation

    def _check_kv_cache(self, scheme: Scheme, method: Method) -> None:
        schemes = [scheme] if scheme.kv_bits < 16 else [*self._schemes(), scheme]
        if (problem := kv_refusal(method, schemes)) is not None:
            self.refusals.add(problem)
            return
        kv_cache = kv_spec(method, scheme)
        if kv_cache is None:
            return
        if not any(linear.endswith("k_proj") for linear in self.adapter.linears):
            self.refusals.add(
                f"scheme {scheme} asks for a quantized KV cache, but blocks of {self.adapter.model_type} have no "
                f"k_proj; leave kv out: --scheme {scheme.model_copy(update={'kv_bits': 16})}"
            )
        if self.kv_cache not in (None, kv_cache):
            self.refusals.add(
                f"scheme {scheme} asks for the KV cache {kv_cache}, another rule for {self.kv_cache}; "
                "the model has one: let the rules agree, or only one of them name it"
            )
        self.kv_cache = self.kv_cache or kv_cache

    def _schemes(self) -> list[Scheme]:
        """Those that the recipe names, whichever rule they are of."""
        return [scheme for scheme in (self.recipe.scheme, *(rule.scheme for rule in self.recipe.rules)) if scheme]
