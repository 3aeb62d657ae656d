"""The walk over the blocks of a calibrated job: streams that advance, and each block's linears rounded on the way.

    per block:  read it in float -> transform, learn -> Hessians of a stage's linears -> round, pack, verify
                -> decode into the block -> next stage ... -> run the decoded block to make the next block's inputs

What runs on is exactly what was stored: decoded from the packed parts, kept tensors in their stored type. A block
that an earlier run has finished is replayed from its shard, so a resumed job sees the very same inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.capture import input_extremes
from bitwright.calibration.gradients import TokenWeights, token_weights
from bitwright.calibration.hessians import HessianPass, Reference
from bitwright.calibration.stream import Stream
from bitwright.checkpoint.shard import read_shard, write_shard, write_text
from bitwright.checkpoint.source import Source
from bitwright.errors import CalibrationError, ResumeError
from bitwright.execute.stopwatch import Stopwatch
from bitwright.formats import layout
from bitwright.formats.native import unpack
from bitwright.journey import KEYS, Outcome, Record, process_row, recorded_kv_scales, stored_entry
from bitwright.method import Inputs
from bitwright.numeric.activation import InputSite
from bitwright.numeric.fp8 import KvScales
from bitwright.plan import Plan
from bitwright.prepare import Block, Preparation, Prepared
from bitwright.rows import Row, Unit
from bitwright.runtime.attention import watched_kv
from bitwright.runtime.sites import input_sites, quantized_activations
from bitwright.shares import model_wide_shares, spends_model_wide
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.json_file import read_json

Values = Iterator[tuple[Tensor | None, Record]]


class Walk:
    """The state of one calibrated job between blocks."""

    def __init__(self, source: Source, plan: Plan, ids: Tensor, folder: Path, say: Callable[[str], None]):
        """Nothing is run yet.

        Args:
            source: of the float weights.
            plan: of the job; at least one row is calibrated.
            ids: calibration windows, int64 [windows, tokens].
            folder: where large streams and the token weights are kept.
            say: called with what is being done, for the progress bar.
        """
        self.source, self.plan, self.ids, self.folder, self.say = source, plan, ids, folder, say
        self.inputs = plan.inputs or Inputs()
        self._stored: dict[str, Tensor] = {}
        self._runner: BlockRunner | None = None
        self._stream: Stream | None = None
        self._float: Stream | None = None
        self._weights: TokenWeights | None = None
        self._shares: dict[str, float] = {}
        self.watch = Stopwatch()

    def before_blocks(self, unit: Unit, parts: Mapping[str, Tensor], records: Iterable[Record]) -> None:
        """Take note of what is stored of the tensors before the blocks."""
        self._stored |= decoded_tensors(unit.rows, parts, records)

    def replay(self, unit: Unit, parts: Mapping[str, Tensor], records: Iterable[Record]) -> None:
        """Run a block that is already stored."""
        assert unit.block is not None
        runner, stream = self._start()
        self.say(f"replaying {unit.label}")
        block = runner.block(unit.block)
        self._advance_float(self._outputs(unit.block, block))
        self._install(block, unit, decoded_tensors(unit.rows, parts, records))
        prefix = self.plan.adapter.block_prefix(unit.block)
        rows = {row.tensor.removeprefix(prefix): row for row in unit.rows}
        ranges = {record["tensor"].removeprefix(prefix): record.get("input_range") for record in records}
        scales = {name.removeprefix(prefix): pair for name, pair in recorded_kv_scales(records).items()}
        with self._quantized(block, rows, ranges, scales):
            runner.advance(unit.block, block, stream)

    def process(self, unit: Unit, values: Values) -> Iterator[tuple[Row, Outcome]]:
        """Prepare a block, round its linears in order of execution, see to its other tensors; every row's outcome."""
        assert unit.block is not None
        runner, stream = self._start()
        block = runner.block(unit.block)
        prefix = self.plan.adapter.block_prefix(unit.block)
        rows = {row.tensor.removeprefix(prefix): row for row in unit.rows}
        tensors = {row.tensor.removeprefix(prefix): next(values) for row in unit.rows}
        prepared, outputs = self._prepare(unit.block, block, rows)
        for name, value in prepared.tensors.items():
            block.get_parameter(name).data = value
            tensor, record = tensors[name]
            if tensor is None or not torch.equal(value, tensor.float()):
                tensors[name] = (value, record | {"rewritten": True})
        ranges = self._input_ranges(unit.block, block, rows)
        for name, extremes in ranges.items():
            tensors[name][1]["input_range"] = list(extremes)
        absmax = self._kv_absmax(unit.block, block)
        for attention, pair in absmax.items():
            tensors[attention + KEYS][1]["kv_absmax"] = pair
        scales = {attention: KvScales.of(*pair) for attention, pair in absmax.items()}
        reference = self._reference(unit.block, block)
        with self._quantized(block, rows, ranges, scales):
            for row, outcome in self._rounded(unit, block, rows, tensors, prepared, reference):
                self._install(block, unit, decoded_tensors([row], outcome.parts, [outcome.record]))
                yield row, outcome
            with self.watch.phase("forwards to the next block"):
                runner.advance(unit.block, block, stream)
        if reference is not None:
            reference.close()
            outputs = outputs or reference.outputs
        self._advance_float(outputs)

    def _quantized(
        self,
        block: nn.Module,
        rows: Mapping[str, Row],
        ranges: Mapping[str, tuple[float, float] | None],
        scales: Mapping[str, KvScales],
    ) -> AbstractContextManager[None]:
        """Within, `block` computes as the finished model will, unless the stream is that of the float model."""
        if self.inputs.stream == "float":
            return nullcontext()
        return quantized_activations(block, _sites(rows, ranges), self.plan.kv_cache, scales)

    def _rounded(
        self,
        unit: Unit,
        block: nn.Module,
        rows: dict[str, Row],
        tensors: dict[str, tuple[Tensor | None, Record]],
        prepared: Prepared,
        reference: Reference | None,
    ) -> Iterator[tuple[Row, Outcome]]:
        """The outcome of every row, linears first; the caller installs each before it asks for the next."""
        assert unit.block is not None
        assert self._runner is not None
        assert self._stream is not None
        gathering, left = HessianPass(self._runner, self._weights), dict(rows)
        for stage in self._stages():
            linears = [name for name in stage if left[f"{name}.weight"].needs_hessian]
            if linears:
                self.say(f"Hessians of block {unit.block}: {', '.join(name.rpartition('.')[2] for name in linears)}")
            with self.watch.phase("Hessians and forwards"):
                evidence = gathering.gather(unit.block, block, self._stream, linears, reference)
            for name in stage:
                row = self._with_own_share(left.pop(f"{name}.weight"))
                tensor, record = tensors[f"{name}.weight"]
                if row.calibrated:
                    record = record | prepared.report
                outcome = process_row(row, tensor, record, evidence.get(name), prepared.clipping.get(name))
                self.watch.add(outcome.seconds)
                yield row, outcome
        for name, row in left.items():
            yield row, process_row(row, *tensors[name])

    def _prepare(self, index: int, block: nn.Module, rows: Mapping[str, Row]) -> tuple[Prepared, Stream | None]:
        """Transform and learning, where the recipe has any; and the float model's outputs where learning needs them."""
        linears = {name: rows[f"{name}.weight"] for name in self.plan.adapter.linears}
        specs = {name: row.spec for name, row in linears.items() if row.calibrated and row.spec is not None}
        method = self.plan.calibrated_method
        outputs = self._outputs(index, block) if method is not None and method.learn is not None else None
        if not specs or method is None or not method.prepares:
            return Prepared({}), outputs
        assert self._runner is not None
        assert self._stream is not None
        preparation = Preparation(self._runner, method, self.plan.recipe.seed, self.say)
        with self.watch.phase("transforms and learning"):
            sites = _sites(rows, {}, learning=True)
            task = Block(index, block, specs, self._stream, outputs, sites, self.plan.kv_cache)
            return preparation.run(task, self._weights), outputs

    def _input_ranges(self, index: int, block: nn.Module, rows: Mapping[str, Row]) -> dict[str, tuple[float, float]]:
        """Least and greatest input of each linear whose activations have a static range, by weight."""
        static = {name: row for name, row in rows.items() if row.static_input}
        if not static:
            return {}
        assert self._runner is not None
        assert self._stream is not None
        self.say(f"ranges of the inputs of block {index}")
        linears = [name.removesuffix(".weight") for name in static]
        with self.watch.phase("ranges of inputs"), input_sites(block, _sites(static, {}, learning=True)):
            found = input_extremes(self._runner, index, block, self._stream, linears)
        return {f"{name}.weight": extremes for name, extremes in found.items()}

    @torch.no_grad()
    def _kv_absmax(self, index: int, block: nn.Module) -> dict[str, list[float]]:
        """Greatest magnitudes of keys and values by attention, where the KV cache has fixed scales, else none."""
        if self.plan.kv_cache is None or self.plan.kv_cache.grid != "fp8":
            return {}
        assert self._runner is not None
        assert self._stream is not None
        self.say(f"ranges of the keys and values of block {index}")
        with self.watch.phase("ranges of keys and values"), watched_kv(block) as seen:
            for hidden in self._stream:
                self._runner.run(index, block, hidden)
        for attention, absmax in seen.items():
            if not all(map(math.isfinite, absmax)):
                raise CalibrationError(
                    f"{attention} of block {index}: keys and values reach {absmax}, needed finite magnitudes; check "
                    "the checkpoint's weights, or leave kv out of the scheme"
                )
        return seen

    def _outputs(self, index: int, block: nn.Module) -> Stream | None:
        """The float model's outputs of `block`, whose weights are still the float ones; None where nobody asks."""
        if self._float is None or self._runner is None:
            return None
        outputs = self._float.copy()
        with self.watch.phase("forwards of the float model"):
            self._runner.advance(index, block, outputs)
        return outputs

    def _reference(self, index: int, block: nn.Module) -> Reference | None:
        """What the float model gives the linears of `block`, rewritten but not yet rounded, where targets need it."""
        if self._float is None or self._runner is None or not self.inputs.correction:
            return None
        with self.watch.phase("forwards of the float model"):
            return Reference(self._runner, index, block, self._float, self.folder)

    def _advance_float(self, outputs: Stream | None) -> None:
        """Let the float model's outputs be its inputs of the next block."""
        if self._float is not None and outputs is not None:
            self._float.close()
            self._float = outputs

    def __enter__(self) -> Walk:
        """Itself; leaving frees the stream."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the streams."""
        for stream in (self._stream, self._float):
            if stream is not None:
                stream.close()

    def _start(self) -> tuple[BlockRunner, Stream]:
        """The runner and the inputs of the next block, made when the first block is reached."""
        if self._runner is None or self._stream is None:
            adapter = self.plan.adapter
            rotated = self._rotated()
            runner = BlockRunner(self.source, adapter, self.ids, rotated=rotated)
            if self.inputs.weighting == "gradient":
                with self.watch.phase("gradients"):
                    self._weights = self._token_weights(runner)
            if any(spends_model_wide(row) for row in self.plan.rows()):
                with self.watch.phase("outliers of the whole model"):
                    self._shares = self._outlier_shares(runner)
            self.say("running what precedes the blocks")
            method = self.plan.calibrated_method
            if self.inputs.correction or (method is not None and method.learn is not None):
                self._float = runner.first_inputs(folder=self.folder)
            stored = self._stored if self.inputs.stream == "quantized" else {}
            self._runner = BlockRunner(_Overlay(self.source, stored), adapter, self.ids, rotated=rotated)
            self._stream = self._runner.first_inputs(folder=self.folder)
        return self._runner, self._stream

    def _rotated(self) -> list[str]:
        """The linears of blocks whose inputs the runtime rotates."""
        modules = [row.module for row in self.plan.rows() if row.hadamard]
        return [name for name in self.plan.adapter.linears if any(module.endswith(f".{name}") for module in modules)]

    def _token_weights(self, runner: BlockRunner) -> TokenWeights:
        """Read those of an interrupted run, or make and keep them."""
        path = self.folder / "token_weights.safetensors"
        if path.exists():
            with reading(path, ResumeError, "run again with --restart"):
                found = ((name.partition("."), value) for name, value in read_shard(path).items())
                return {(int(index), name): value for (index, _, name), value in found}
        weights = token_weights(runner, folder=self.folder, progress=self.say)
        named = {f"{index}.{name}": value for (index, name), value in weights.items()}
        write_shard(path, named, {"format": "pt"})
        return weights

    def _outlier_shares(self, runner: BlockRunner) -> dict[str, float]:
        """Read those of an interrupted run, or find and keep them."""
        path = self.folder / "outlier_shares.json"
        if path.exists():
            with reading(path, ResumeError, "run again with --restart"):
                return {name: float(share) for name, share in read_json(path, ResumeError).items()}
        shares = model_wide_shares(runner, self.plan, self._weights, self.folder, self.say)
        write_text(path, json.dumps(shares, indent=1))
        return shares

    def _with_own_share(self, row: Row) -> Row:
        """The row with the share of outliers that was found for it, where one was."""
        return row.with_share(self._shares[row.tensor]) if row.tensor in self._shares else row

    def _stages(self) -> Sequence[Sequence[str]]:
        adapter = self.plan.adapter
        return adapter.shared_inputs if self.inputs.sequential else (adapter.linears,)

    def _install(self, block: nn.Module, unit: Unit, values: Mapping[str, Tensor]) -> None:
        """Put stored values in the place of the block's own, unless the stream is that of the float model."""
        assert unit.block is not None
        if self.inputs.stream == "float":
            return
        prefix = self.plan.adapter.block_prefix(unit.block)
        own = dict(block.named_parameters()) | dict(block.named_buffers())
        for tensor, value in values.items():
            place = own.get(tensor.removeprefix(prefix))
            if place is not None:
                place.data = value.to(place.dtype)


def _sites(
    rows: Mapping[str, Row], ranges: Mapping[str, tuple[float, float] | None], learning: bool = False
) -> dict[str, InputSite]:
    """What happens to the inputs of a block's linears, by name relative to the block, but for what blocks of the
    float model do to them as well.

    While `learning`, inputs of static ranges are left in float: the ranges are those of the finished transform.
    """
    found = {}
    for name, row in rows.items():
        row = replace(row, hadamard=False, activation=None if row.static_input and learning else row.activation)
        site = row.input_site(ranges.get(name))
        if site is not None:
            found[name.removesuffix(".weight")] = site
    return found


def decoded_tensors(rows: Iterable[Row], parts: Mapping[str, Tensor], records: Iterable[Record]) -> dict[str, Tensor]:
    """What a reader of `parts` would compute with, by tensor name; matrices of codes as float32."""
    details = {record["tensor"]: record for record in records}
    found = {}
    for row in rows:
        if row.action == "keep":
            found[row.tensor] = parts[row.tensor]
        elif row.action == "quantize":
            entry = stored_entry(row, details[row.tensor])
            own = {name: parts[f"{row.module}.{name}"] for name in layout.parts(entry)}
            found[row.tensor] = unpack(row.tensor, own, entry).dequantize()
    return found


class _Overlay(Source):
    """A source some of whose tensors are replaced by what was stored of them."""

    def __init__(self, source: Source, replaced: Mapping[str, Tensor]):
        self.label, self.config, self.tensors = source.label, source.config, source.tensors
        self._source, self._replaced = source, replaced

    def read(self, name: str) -> Tensor:
        return self._replaced[name] if name in self._replaced else self._source.read(name)

    def files(self) -> list[Path]:
        return self._source.files()

    def write_side_files(self, folder: Path) -> list[str]:
        return self._source.write_side_files(folder)
