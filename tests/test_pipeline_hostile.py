"""The spine among others: what was planted is not continued, what was changed is not published, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitwright
from bitwright import cli, pipeline
from bitwright.checkpoint.journal import Journal
from bitwright.checkpoint.load import load_model, load_tokenizer
from bitwright.checkpoint.open import find_source
from bitwright.checkpoint.place import MARK
from bitwright.checkpoint.shard import file_sha256
from bitwright.errors import CheckpointError, ResumeError, WeightError

RECIPE = {"method": "rtn", "scheme": "w4a16g32"}
SHARD = "model-00002-of-00004.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    bitwright.quantize(str(tiny_llama_folder), out, **RECIPE)
    return out


@pytest.fixture
def source(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model that may be changed."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "source"))


class Stop(Exception):
    """Raised in a test to end a run in the middle."""


def at_shard(number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something before shard `number` (from 1) is written."""
    real, count = pipeline.write_shard, 0

    def write(*arguments: Any, **keywords: Any) -> str:
        nonlocal count
        count += 1
        if count == number:
            action()
        return real(*arguments, **keywords)

    monkeypatch.setattr(pipeline, "write_shard", write)


def stop() -> None:
    raise Stop


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, shards: int = 3) -> Path:
    """The unfinished folder of a run that has finished so many shards."""
    with monkeypatch.context() as patch:
        at_shard(shards + 1, stop, patch)
        with pytest.raises(Stop):
            bitwright.quantize(str(source), out, **RECIPE)
    return out.with_name(out.name + ".partial")


def rewrite(partial: Path, change: Callable[[dict[str, torch.Tensor], list[dict[str, Any]]], None]) -> None:
    """Change a finished shard and its records, and let the journal agree with both."""
    path, journal = partial / "output" / SHARD, partial / "journal.jsonl"
    tensors = load_file(path)
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    (entry,) = [entry for entry in entries if entry.get("shard") == SHARD]
    change(tensors, entry["records"])
    save_file(tensors, path, {"format": "pt"})
    entry["sha256"] = file_sha256(path)
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


# --- what is planted ---------------------------------------------------------------------------------------


def test_a_planted_folder_is_refused_and_stays(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = interrupted(source, tmp_path / "out", monkeypatch)
    (partial / MARK).unlink()
    before = contents(partial)
    for options in (bitwright.RunOptions(), bitwright.RunOptions(restart=True)):
        with pytest.raises(ResumeError, match=r"out\.partial.*move it away, or choose another output folder"):
            bitwright.quantize(str(source), tmp_path / "out", **RECIPE, options=options)
    assert contents(partial) == before
    partial.rename(tmp_path / "away")
    bitwright.quantize(str(source), tmp_path / "out", **RECIPE)


def test_another_users_folder_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = interrupted(source, tmp_path / "out", monkeypatch)
    before, real = contents(partial), os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: real + 1)
        with pytest.raises(ResumeError, match="belongs to another user"):
            bitwright.quantize(str(source), tmp_path / "out", **RECIPE)
    assert contents(partial) == before


def scale_of_nan(tensors: dict[str, torch.Tensor], records: list[dict[str, Any]]) -> None:
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name][0, 0] = torch.nan


def kept_of_nan(tensors: dict[str, torch.Tensor], records: list[dict[str, Any]]) -> None:
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name][0] = torch.nan


def other_shape(tensors: dict[str, torch.Tensor], records: list[dict[str, Any]]) -> None:
    name = next(name for name in tensors if name.endswith("weight_packed"))
    tensors[name] = tensors[name][:-1].contiguous()


def other_type(tensors: dict[str, torch.Tensor], records: list[dict[str, Any]]) -> None:
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] = tensors[name].double()


def missing(tensors: dict[str, torch.Tensor], records: list[dict[str, Any]]) -> None:
    del tensors[next(iter(tensors))]


def unknown(tensors: dict[str, torch.Tensor], records: list[dict[str, Any]]) -> None:
    tensors["model.layers.0.backdoor"] = torch.zeros(1)


def fewer_records(tensors: dict[str, torch.Tensor], records: list[dict[str, Any]]) -> None:
    records.pop()


def record_without_keys(tensors: dict[str, torch.Tensor], records: list[dict[str, Any]]) -> None:
    records[0].pop("bytes")


def record_of_more_outliers(tensors: dict[str, torch.Tensor], records: list[dict[str, Any]]) -> None:
    next(record for record in records if record["action"] == "quantize")["outliers"] = 3


def record_of_other_bits(tensors: dict[str, torch.Tensor], records: list[dict[str, Any]]) -> None:
    next(record for record in records if record["action"] == "quantize")["spec"]["bits"] = 3


def record_of_nonsense(tensors: dict[str, torch.Tensor], records: list[dict[str, Any]]) -> None:
    next(record for record in records if record["action"] == "quantize")["sqnr_db"] = "high"


CHANGES = [
    scale_of_nan,
    kept_of_nan,
    other_shape,
    other_type,
    missing,
    unknown,
    fewer_records,
    record_without_keys,
    record_of_more_outliers,
    record_of_other_bits,
    record_of_nonsense,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_is_not_what_its_record_says_is_not_continued(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    partial = interrupted(source, tmp_path / "out", monkeypatch)
    rewrite(partial, change)
    with pytest.raises(ResumeError, match=rf"{SHARD}: does not hold what journal\.jsonl says of it.*--restart"):
        bitwright.quantize(str(source), tmp_path / "out", **RECIPE)


def test_a_shard_of_another_name_is_not_continued(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupted(source, tmp_path / "out", monkeypatch)
    (partial / "output" / SHARD).rename(partial / "output" / "model-00009-of-00004.safetensors")
    journal = partial / "journal.jsonl"
    journal.write_text(journal.read_text().replace(SHARD, "model-00009-of-00004.safetensors"))
    with pytest.raises(ResumeError, match="no shard of this job is called model-00009"):
        bitwright.quantize(str(source), tmp_path / "out", **RECIPE)


# --- what changes during the run ---------------------------------------------------------------------------


def test_a_finished_shard_that_is_overwritten_during_the_run_is_not_published(
    finished: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shard = tmp_path / "out.partial" / "output" / "model-00001-of-00004.safetensors"

    def overwrite() -> None:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)

    with monkeypatch.context() as patch:
        at_shard(3, overwrite, patch)
        with pytest.raises(
            ResumeError, match=r"model-00001-of-00004\.safetensors: SHA-256.*run the same command again"
        ):
            bitwright.quantize(str(source), out, **RECIPE)
    assert not out.exists()
    assert bitwright.quantize(str(source), out, **RECIPE).resumed_shards == 3
    shards = [name for name in contents(out) if name.endswith(".safetensors")]
    assert all(contents(out)[name] == contents(finished)[name] for name in shards)


def other_values(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, source / "model.safetensors", {"format": "pt"})


def other_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))


def gone(source: Path) -> None:
    (source / "config.json").unlink()


def other_headers_at_the_same_time(source: Path) -> None:
    """As a tool may that restores modification times."""
    path = source / "model.safetensors"
    before = path.stat()
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"model.norm.weight"', b'"model.mron.weight"', 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [other_values, other_config, gone, other_headers_at_the_same_time])
def test_a_source_that_changes_during_the_run_gives_no_result(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_shard(4, lambda: change(source), patch)
        with pytest.raises(CheckpointError, match=r"changed while it was being quantized.*--restart"):
            bitwright.quantize(str(source), out, **RECIPE)
    assert not out.exists()
    if change is not other_values:
        return
    with pytest.raises(ResumeError, match="--restart"):
        bitwright.quantize(str(source), out, **RECIPE)
    bitwright.quantize(str(source), out, **RECIPE, options=bitwright.RunOptions(restart=True))
    assert bitwright.inspect(out, verify=True).complaints == []


# --- what is finished --------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00003-of-00004.safetensors"])
@pytest.mark.parametrize("how", [damage, Path.unlink])
def test_a_finished_result_that_is_damaged_is_refused(
    finished: Path, tiny_llama_folder: Path, tmp_path: Path, name: str, how: Callable[[Path], None]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    how(out / name)
    with pytest.raises(ResumeError, match=rf"damaged: {name}.*remove the folder.*inspect {out} --verify"):
        bitwright.quantize(str(tiny_llama_folder), out, **RECIPE)


def test_the_status_of_a_damaged_result(
    finished: Path,
    tiny_llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    damage(out / "tokenizer.json")
    quantize = ["quantize", str(tiny_llama_folder), "-m", "rtn", "-s", "w4a16g32", "-o", str(out)]
    for arguments, status in ((quantize, 2), (["inspect", str(out), "--verify"], 3)):
        monkeypatch.setattr(sys, "argv", ["bitwright", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == status
        assert "tokenizer.json" in "".join(capsys.readouterr())


def test_a_link_to_nothing_is_not_written_through(tiny_llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResumeError, match="exists and is not a bitwright result"):
        bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", **RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_publishing_and_tidying_is_tidied_by_the_next_run(
    finished: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    script = (
        "import os, signal; from pathlib import Path; from bitwright import quantize\n"
        "real = Path.rename\n"
        "def killed(self, target):\n"
        "    real(self, target)\n"
        f"    if str(target) == {str(out)!r}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.rename = killed\n"
        f"quantize({str(tiny_llama_folder)!r}, {str(out)!r}, method='rtn', scheme='w4a16g32')"
    )
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]
    again = bitwright.quantize(str(tiny_llama_folder), out, **RECIPE)
    assert again.resumed_shards == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(out) == contents(finished)


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_refused_job_does_not_stand_in_the_way_of_its_remedy(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"][5] *= 1e7
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    out = tmp_path / "new" / "out"
    with pytest.raises(WeightError, match="kept_dtype=bfloat16"):
        bitwright.quantize(str(source), out, **RECIPE)
    assert not (tmp_path / "new").exists()
    bitwright.quantize(str(source), out, recipe=bitwright.load_recipe(**RECIPE, overrides=["kept_dtype=bfloat16"]))


def test_a_refusal_after_finished_shards_says_how_to_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise WeightError("model.layers.1: refused")

    with monkeypatch.context() as patch:
        at_shard(3, refuse, patch)
        with pytest.raises(
            WeightError, match=r"refused \(2 finished shards are kept.*another recipe needs --restart\)"
        ):
            bitwright.quantize(str(source), tmp_path / "out", **RECIPE)
    assert bitwright.quantize(str(source), tmp_path / "out", **RECIPE).resumed_shards == 2


def test_windows_longer_than_the_model_reads_are_refused_before_any_work(
    tiny_llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(pipeline, "Journal", lambda *arguments: made.append(arguments) or Journal(*arguments))
    settings = [f"calibration.text={json.dumps(str(text_file))}", "calibration.windows=2"]
    recipe = bitwright.load_recipe("gptq", "w4a16g32", overrides=[*settings, "calibration.window_tokens=512"])
    with pytest.raises(bitwright.CalibrationError, match="at most 256"):
        bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=recipe)
    assert made == []
    assert not list(tmp_path.iterdir())


# --- side files --------------------------------------------------------------------------------------------


def test_links_out_of_the_source_do_not_travel_and_are_told_of(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "passwd").write_text("root:x:0:0")
    (source / "NOTICE").symlink_to(tmp_path / "passwd")
    (source / "LICENSE").write_text("licence")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    summary = bitwright.quantize(str(source), tmp_path / "out", **RECIPE)
    assert [note for note in summary.notes if "NOTICE" in note and "link out of the folder" in note]
    assert summary.to_json()["notes"] == list(summary.notes)
    carried = contents(tmp_path / "out")
    assert {"LICENSE", "additional_chat_templates/tool_use.jinja"} <= carried.keys()
    assert "NOTICE" not in carried
    assert not any(b"root:x:0:0" in data for data in carried.values())
    assert bitwright.inspect(tmp_path / "out", verify=True).complaints == []
    again = ["quantize", str(source), "-m", "rtn", "-s", "w4a16g32", "-o", str(tmp_path / "other")]
    monkeypatch.setattr(sys, "argv", ["bitwright", *again])
    with pytest.raises(SystemExit):
        cli.main()
    assert "NOTICE: left out of the result" in " ".join(capsys.readouterr().out.split())


def test_a_pipe_in_the_place_of_a_file_does_not_hang(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    os.mkfifo(source / "tokenizer.json")
    summary = bitwright.quantize(str(source), tmp_path / "out", **RECIPE)
    assert "tokenizer.json" in summary.notes[0]
    for use in (load_model, lambda name: load_tokenizer(find_source(name))):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json.*not a regular file"):
            use(str(source))
    for name in ("model.safetensors", "config.json"):
        (source / name).unlink()
        os.mkfifo(source / name)
        with pytest.raises(CheckpointError, match=rf"{name}.*not a regular file"):
            bitwright.quantize(str(source), tmp_path / "other", **RECIPE)
