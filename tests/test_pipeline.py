"""The spine: same bytes whatever the workers or interruptions; nothing lost on errors; artefacts load and run."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitwright
from bitwright import pipeline
from bitwright.checkpoint.journal import Journal
from bitwright.errors import CheckpointError, PlanError, ResumeError, WeightError
from bitwright.machine import Estimate, check_machine
from bitwright.numeric.grid import Grid
from bitwright.ranges import Ranging
from bitwright.rounding import nearest

RECIPE = {"method": "easyquant", "scheme": "w4a16g32"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    bitwright.quantize(str(tiny_llama_folder), out, **RECIPE, options=bitwright.RunOptions(workers=1))
    return out


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_do_not_change_a_byte(finished: Path, tiny_llama_folder: Path, tmp_path: Path, workers: int) -> None:
    bitwright.quantize(
        str(tiny_llama_folder), tmp_path / "out", **RECIPE, options=bitwright.RunOptions(workers=workers)
    )
    assert contents(tmp_path / "out") == contents(finished)


@pytest.mark.parametrize(("method", "scheme"), [("rtn", "w4a16"), ("easyquant", "w3a16g32-sym"), ("hqq", "w4a16g32")])
def test_rows_shared_by_several_threads_come_out_alike(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, scheme: str
) -> None:
    seen: set[tuple[bool, int]] = set()
    fit = Ranging.fit

    def spy(self: Ranging, *arguments: torch.Tensor | None) -> Grid:
        seen.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return fit(self, *arguments)

    monkeypatch.setattr(Ranging, "fit", spy)
    monkeypatch.setattr(nearest, "CHUNK_WEIGHTS", 1024)
    for workers in (1, 3):
        options = bitwright.RunOptions(workers=workers)
        bitwright.quantize(str(tiny_llama_folder), tmp_path / str(workers), method, scheme, options=options)
        # The estimate before the work runs in this thread.
        assert (False, 1) in seen or workers == 1
    # No small operation is spread over PyTorch's threads, which spin while they wait for each other.
    assert {threads for _, threads in seen} == {1}
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_the_artefact_is_complete_and_loads(finished: Path, tiny_llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert bitwright.inspect(finished, verify=True).complaints == []
    model = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = model(ids).logits, original(ids).logits
    assert 0 < (ours - theirs).norm() < 0.5 * theirs.norm()
    names = [name for name, _ in model.named_buffers()]
    assert "model.layers.0.self_attn.q_proj.weight_packed" in names
    manifest = json.loads((finished / "manifest.json").read_text())
    record = next(r for r in manifest["tensors"] if r["tensor"].endswith("0.mlp.up_proj.weight"))
    assert record["sqnr_db"] > 18
    assert record["fallbacks"] == []


def test_sqnr_rises_six_db_per_bit(tiny_llama_folder: Path, tmp_path: Path) -> None:
    previous = 0.0
    for bits in (2, 3, 4, 6, 8):
        summary = bitwright.quantize(
            str(tiny_llama_folder), tmp_path / str(bits), method="rtn", scheme=f"w{bits}a16g16"
        )
        worst = min(r["sqnr_db"] for r in summary.records if r["action"] == "quantize")
        assert worst > previous + 4
        previous = worst
    assert previous > 40


def test_a_finished_job_is_left_alone_and_another_is_refused(finished: Path, tiny_llama_folder: Path) -> None:
    before = contents(finished)
    again = bitwright.quantize(str(tiny_llama_folder), finished, **RECIPE)
    assert again.resumed_shards == 4
    with pytest.raises(ResumeError, match="recipe"):
        bitwright.quantize(str(tiny_llama_folder), finished, method="rtn", scheme="w4a16")
    assert contents(finished) == before


def test_a_finished_job_of_other_weights_is_refused(finished: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_folder, source)
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] += 1  # a fine-tuned sibling: same names, same shapes
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ResumeError, match=r"source tensor model\.norm\.weight"):
        bitwright.quantize(str(source), finished, **RECIPE)


class Stop(Exception):
    """Raised in a test to end a run in the middle."""


def interrupt_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = pipeline.write_shard, 0

    def write(*arguments, **keywords):
        nonlocal count
        count += 1
        if count > shards:
            raise Stop
        return real(*arguments, **keywords)

    monkeypatch.setattr(pipeline, "write_shard", write)


@pytest.mark.parametrize("shards", [1, 3])
def test_resume_gives_the_same_bytes(
    finished: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(shards, patch)
        with pytest.raises(Stop):
            bitwright.quantize(str(tiny_llama_folder), out, **RECIPE)
    assert not out.exists()
    # What a crash may leave: a torn journal line, a half-written file, a shard without a line.
    partial = tmp_path / "out.partial"
    with (partial / "journal.jsonl").open("a") as journal:
        journal.write('{"shard": "model-0000')
    (partial / "output" / "model-00003-of-00004.safetensors.tmp").write_bytes(b"half")
    summary = bitwright.quantize(str(tiny_llama_folder), out, **RECIPE)
    assert summary.resumed_shards == shards
    assert contents(out) == contents(finished)
    assert not partial.exists()


def test_a_damaged_finished_shard_is_made_again(
    finished: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(Stop):
            bitwright.quantize(str(tiny_llama_folder), out, **RECIPE)
    shard = tmp_path / "out.partial" / "output" / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert bitwright.quantize(str(tiny_llama_folder), out, **RECIPE).resumed_shards == 1
    assert contents(out) == contents(finished)


@pytest.mark.parametrize("change", ["recipe", "seed", "source"])
def test_a_changed_job_is_refused_not_mixed(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_folder, source)
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(Stop):
            bitwright.quantize(str(source), tmp_path / "out", **RECIPE)
    overrides = {"recipe": ["outliers.n=2.5"], "seed": ["seed=1"], "source": []}[change]
    recipe = bitwright.load_recipe(**RECIPE, overrides=overrides)
    if change == "source":
        weights = load_file(source / "model.safetensors")
        save_file({name: weight * 2 for name, weight in weights.items()}, source / "model.safetensors")
    with pytest.raises(ResumeError, match=f"{change}.*--restart"):
        bitwright.quantize(str(source), tmp_path / "out", recipe=recipe)
    bitwright.quantize(str(source), tmp_path / "out", recipe=recipe, options=bitwright.RunOptions(restart=True))
    assert bitwright.inspect(tmp_path / "out", verify=True).complaints == []


def test_kill_nine_at_random_points(finished: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Real processes, really killed: the journal and the published folder survive anything."""
    out = tmp_path / "out"
    script = (
        "import sys, time; from bitwright import pipeline, quantize; real = pipeline.process_row\n"
        "def slow(*a):\n    time.sleep(0.02)\n    return real(*a)\n"
        "pipeline.process_row = slow; print('ready', flush=True)\n"
        f"quantize({str(tiny_llama_folder)!r}, {str(out)!r}, method='easyquant', scheme='w4a16g32')"
    )
    chance = random.Random(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for attempt in range(4):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.readline()
            if attempt < 3:
                time.sleep(0.05 + 0.3 * chance.random())
                process.send_signal(signal.SIGKILL)
            process.wait()
        if attempt < 3 and out.exists():
            break
    assert contents(out) == contents(finished)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_and_inf_are_refused_with_the_tensors_name(
    tiny_llama_folder: Path, tmp_path: Path, bad: float, tensor: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_folder, source)
    weights = load_file(source / "model.safetensors")
    weights[tensor].view(-1)[3] = bad
    save_file(weights, source / "model.safetensors")
    with pytest.raises(WeightError, match=rf"{tensor}: 1 of \d+ values are NaN or Inf"):
        bitwright.quantize(str(source), tmp_path / "out", **RECIPE)
    assert not (tmp_path / "out").exists()


def test_truncated_shards_are_refused_before_any_work(tiny_llama_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_folder, source)
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        bitwright.quantize(str(source), tmp_path / "out", **RECIPE)
    assert not (tmp_path / "out.partial").exists()


def test_jobs_too_big_for_the_machine_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="of disk"):
        check_machine(Estimate(1.0, 0, 1 << 60, 1), tmp_path / "out")
    with pytest.raises(PlanError, match=r"of memory.*--workers"):
        check_machine(Estimate(1.0, 1 << 60, 0, 8), tmp_path / "out")


def test_quantized_embeddings_and_heads(tiny_llama_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / "all.toml"
    path.write_text('method="rtn"\nscheme="w8a16g32"\nrules=[{match="lm_head"}, {match="model.embed_tokens"}]')
    bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", recipe=path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert (model(ids).logits - original(ids).logits).norm() < 0.02 * original(ids).logits.norm()


FAMILIES = {
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True}),
    "stablelm": ("StableLmConfig", {"num_key_value_heads": 2}),  # not hand-written: goes through discovery
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_makes_the_journey(family: str, tmp_path: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM

    kind, extra = FAMILIES[family]
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
    }
    gated = {} if family == "opt" else {"intermediate_size": 96}
    config = getattr(transformers, kind)(**sizes, **gated, **extra)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    bitwright.quantize(str(tmp_path / "float"), tmp_path / "out", "easyquant", "w8a16g32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    ids = torch.arange(2, 32).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = model(ids).logits, original(ids).logits
    assert 0 < (ours - theirs).norm() < 0.02 * theirs.norm()
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert generated.shape[1] == 32


def test_a_full_disk_loses_nothing(
    finished: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", os.fsync
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            bitwright.quantize(str(tiny_llama_folder), out, **RECIPE)
    assert not out.exists()
    assert bitwright.quantize(str(tiny_llama_folder), out, **RECIPE).resumed_shards > 0
    assert contents(out) == contents(finished)


def test_two_processes_do_not_share_a_folder(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with Journal(tmp_path / "out", {}), pytest.raises(ResumeError, match="another process"):
        bitwright.quantize(str(tiny_llama_folder), tmp_path / "out", **RECIPE)


@pytest.mark.parametrize("tail", ["", "g16", "g64-sym"])
@pytest.mark.parametrize("method", ["rtn", "easyquant", "easyquant-paper", "hqq"])
def test_every_preset_at_every_width(tiny_llama_folder: Path, tmp_path: Path, method: str, tail: str) -> None:
    steps = ["range.steps=20"] if method == "easyquant-paper" else []
    worst = []
    for bits in range(2, 9):
        recipe = bitwright.load_recipe(method, f"w{bits}a16{tail}", overrides=steps)
        out = tmp_path / f"out{bits}"
        summary = bitwright.quantize(str(tiny_llama_folder), out, recipe=recipe)
        assert bitwright.inspect(out).bits_per_weight == pytest.approx(summary.bits_per_weight)
        assert summary.bits_per_weight > bits
        worst.append(min(r["sqnr_db"] for r in summary.records if r["action"] == "quantize"))
    assert worst == sorted(worst)
    assert worst[0] > 3
    assert worst[2] > 15
