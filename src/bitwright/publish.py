"""The end of a job: what lies beside the shards, a last look at everything before it appears, and at what is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitwright.calibration.tokens import TokenWindows
from bitwright.checkpoint.journal import Journal, tidy_finished
from bitwright.checkpoint.manifest import read_manifest, verify_manifest, write_manifest
from bitwright.checkpoint.shard import read_header, tensor_sha256, write_text
from bitwright.checkpoint.source import Source
from bitwright.errors import FormatError, ResumeError
from bitwright.execute.local import ahead
from bitwright.formats.folder import INDEX, native_config
from bitwright.formats.native import Sites, quantization_config
from bitwright.journey import Record, recorded_kv_scales, stored_entry
from bitwright.plan import Plan

Say = Callable[[str, int, int], None]
"""Told what is being done, steps done, and steps in all."""


def silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


def finish(
    source: Source, plan: Plan, journal: Journal, job: dict[str, Any], windows: TokenWindows | None
) -> tuple[list[Record], tuple[str, ...]]:
    """Write config, index, side files and manifest beside the shards.

    Returns every tensor's record, and a line for each side file that was left out.
    """
    folder = journal.output
    journal.remove_strangers()
    shards = [journal.done[plan.shard_name(index)] for index in range(len(plan.units))]
    records = [record for shard in shards for record in shard["records"]]
    config = native_config(source.config, quantization_settings(plan, records))
    if plan.tied_head is not None:
        # transformers would otherwise tie the head to a float weight that no longer exists.
        config["tie_word_embeddings"] = False
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    weight_map = {name: shard["shard"] for shard in shards for name in read_header(folder / shard["shard"])[0]}
    index = {"metadata": {"total_size": sum(r["bytes"] for r in records)}, "weight_map": weight_map}
    write_text(folder / INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")
    notes = source.write_side_files(folder)
    content = {
        "job": {key: value for key, value in job.items() if key != "source_files"},
        "source_label": plan.source,
        "calibration": None if windows is None else windows.to_json(),
        "recipe": plan.recipe.model_dump(mode="json"),
        "shards": [shard["shard"] for shard in shards],
        "tensors": records,
    }
    write_manifest(folder, content, {shard["shard"]: shard["sha256"] for shard in shards})
    return records, tuple(notes)


def check_written(journal: Journal) -> None:
    """Read everything that is to be published once more.

    Raises:
        ResumeError: a file is not what was written.
    """
    complaints = verify_manifest(journal.output)
    if complaints:
        raise ResumeError(
            f"{journal.output}: {complaints[0]}{_more(complaints)}; it was changed after it had been written, and "
            "nothing was published: run the same command again, which makes what is damaged anew"
        )


def finished_manifest(out: Path, source: Source, job: dict[str, Any], say: Say) -> dict[str, Any]:
    """The manifest of a finished `out` that is this very job's, down to every value of the source and of the result.

    What a run of the job left that was killed at its very end is tidied.

    Raises:
        ResumeError: `out` is something else, or damaged.
    """
    try:
        manifest = read_manifest(out) if out.is_dir() else None
    except FormatError:
        manifest = None
    if manifest is None:
        raise ResumeError(f"{out}: exists and is not a bitwright result; choose another folder or remove it")
    complaints = verify_manifest(out, say)
    if complaints:
        raise ResumeError(
            f"{out}: a finished result, but damaged: {complaints[0]}{_more(complaints)}; remove the folder to make it "
            f"anew, or choose another; bitwright inspect {out} --verify lists what is wrong"
        )
    changed = [key for key in ("source", "recipe", "seed", "calibration") if manifest["job"].get(key) != job[key]]
    changed = changed or _changed_tensors(source, manifest["tensors"], say)
    if changed:
        raise ResumeError(
            f"{out}: already holds the result of another job (other {', '.join(changed[:3])}); "
            "choose another folder or remove it"
        )
    tidy_finished(out, job)
    return manifest


def _changed_tensors(source: Source, records: Sequence[Record], say: Say) -> list[str]:
    """Tensors of the source that are not those that were read."""
    read = [record for record in records if "source_sha256" in record]
    sums = ahead(lambda record: tensor_sha256(source.read(record["tensor"])), read)
    changed = []
    for done, (record, found) in enumerate(zip(read, sums, strict=True)):
        say(f"checking {record['tensor']} of the source", done, len(read))
        if found != record["source_sha256"]:
            changed.append(f"source tensor {record['tensor']}")
    return changed


def _more(complaints: Sequence[str]) -> str:
    return f" ({len(complaints)} such)" if len(complaints) > 1 else ""


def quantization_settings(plan: Plan, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What config.json says of the result."""
    details = {record["tensor"]: record for record in records}
    rows = [row for row in plan.rows() if row.action == "quantize"]
    entries = {row.module: stored_entry(row, dict(details[row.tensor])) for row in rows}
    sites = {row.module: row.input_site(details[row.tensor].get("input_range")) for row in rows}
    inputs = {module: site for module, site in sites.items() if site is not None}
    config = quantization_config(entries, sites=Sites(inputs, plan.kv_cache, recorded_kv_scales(records)))
    if plan.tied_head is not None:
        config["tied"] = {plan.tied_head: plan.adapter.embedding}
    return config
