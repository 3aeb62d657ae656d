"""The walk over the blocks of a calibrated job: streams that advance, and each block's linears rounded on the way.

    per block:  read it in float -> Hessians of a stage's linears -> round, pack, verify -> decode into the block
                -> next stage ... -> run the decoded block to make the next block's inputs

What runs on is exactly what was stored: decoded from the packed parts, kept tensors in their stored type. A block
that an earlier run has finished is replayed from its shard, so a resumed job sees the very same inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

from torch import Tensor, nn

from bitwright.calibration.blocks import BlockRunner
from bitwright.calibration.gradients import TokenWeights, token_weights
from bitwright.calibration.hessians import HessianPass, Reference
from bitwright.calibration.stream import Stream
from bitwright.checkpoint.shard import read_shard, write_shard, write_text
from bitwright.checkpoint.source import Source
from bitwright.execute.stopwatch import Stopwatch
from bitwright.formats import layout
from bitwright.formats.native import unpack
from bitwright.journey import Outcome, Record, process_row, stored_entry
from bitwright.plan import Plan
from bitwright.recipe import Inputs
from bitwright.rows import Row, Unit
from bitwright.shares import model_wide_shares, spends_model_wide, with_share

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
        if self._float is not None:
            runner.advance(unit.block, block, self._float)
        self._install(block, unit, decoded_tensors(unit.rows, parts, records))
        runner.advance(unit.block, block, stream)

    def process(self, unit: Unit, values: Values) -> Iterator[tuple[Row, Outcome]]:
        """Round a block's linears in order of execution, then see to its other tensors; gives every row's outcome."""
        assert unit.block is not None
        runner, stream = self._start()
        block = runner.block(unit.block)
        reference = None if self._float is None else Reference(deepcopy(block), self._float)
        tensors = {row.tensor: next(values) for row in unit.rows}
        prefix = self.plan.adapter.block_prefix(unit.block)
        rows = {row.tensor.removeprefix(prefix): row for row in unit.rows}
        gathering = HessianPass(runner, self._weights)
        for stage in self._stages():
            linears = [name for name in stage if rows[f"{name}.weight"].calibrated]
            if linears:
                self.say(f"Hessians of block {unit.block}: {', '.join(name.rpartition('.')[2] for name in linears)}")
            with self.watch.phase("Hessians and forwards"):
                evidence = gathering.gather(unit.block, block, stream, linears, reference)
            for name in stage:
                row = self._with_own_share(rows.pop(f"{name}.weight"))
                outcome = process_row(row, *tensors.pop(row.tensor), evidence.get(name))
                self.watch.add(outcome.seconds)
                self._install(block, unit, decoded_tensors([row], outcome.parts, [outcome.record]))
                yield row, outcome
        for row in rows.values():
            outcome = process_row(row, *tensors.pop(row.tensor))
            self._install(block, unit, decoded_tensors([row], outcome.parts, [outcome.record]))
            yield row, outcome
        with self.watch.phase("forwards to the next block"):
            runner.advance(unit.block, block, stream)
            if reference is not None:
                runner.advance(unit.block, reference.block, reference.stream)

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
            runner = BlockRunner(self.source, adapter, self.ids)
            if self.inputs.weighting == "gradient":
                with self.watch.phase("gradients"):
                    self._weights = self._token_weights(runner)
            if any(spends_model_wide(row) for row in self.plan.rows()):
                with self.watch.phase("outliers of the whole model"):
                    self._shares = self._outlier_shares(runner)
            self.say("running what precedes the blocks")
            if self.inputs.correction:
                self._float = runner.first_inputs(folder=self.folder)
            stored = self._stored if self.inputs.stream == "quantized" else {}
            self._runner = BlockRunner(_Overlay(self.source, stored), adapter, self.ids)
            self._stream = self._runner.first_inputs(folder=self.folder)
        return self._runner, self._stream

    def _token_weights(self, runner: BlockRunner) -> TokenWeights:
        """Read those of an interrupted run, or make and keep them."""
        path = self.folder / "token_weights.safetensors"
        if path.exists():
            return {
                (int(name.partition(".")[0]), name.partition(".")[2]): value for name, value in read_shard(path).items()
            }
        weights = token_weights(runner, folder=self.folder, progress=self.say)
        named = {f"{index}.{name}": value for (index, name), value in weights.items()}
        write_shard(path, named, {"format": "pt"})
        return weights

    def _outlier_shares(self, runner: BlockRunner) -> dict[str, float]:
        """Read those of an interrupted run, or find and keep them."""
        path = self.folder / "outlier_shares.json"
        if path.exists():
            return {str(name): float(share) for name, share in json.loads(path.read_text(encoding="utf-8")).items()}
        shares = model_wide_shares(runner, self.plan, self._weights, self.folder, self.say)
        write_text(path, json.dumps(shares, indent=1))
        return shares

    def _with_own_share(self, row: Row) -> Row:
        """The row with the share of outliers that was found for it, where one was."""
        return with_share(row, self._shares[row.tensor]) if row.tensor in self._shares else row

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

    def write_side_files(self, folder: Path) -> None:
        self._source.write_side_files(folder)
