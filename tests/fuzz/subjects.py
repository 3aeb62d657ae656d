"""What is mutated and who reads it: for every reader a whole small input, its files, and the commands that open it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from mutations import (
    Mutation,
    bytes_mutation,
    json_mutation,
    lines_mutation,
    safetensors_mutation,
    toml_mutation,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import bitwright
from bitwright.analyze.matrix import kept_cells
from bitwright.analyze.model import Report
from bitwright.analyze.report import read_report, render
from bitwright.calibration.text import load_text
from bitwright.calibration.tokens import Calibration, calibration_windows
from bitwright.checkpoint.load import load_model, load_tokenizer
from bitwright.checkpoint.open import open_source
from bitwright.checkpoint.shard import read_shard
from bitwright.errors import FormatError
from bitwright.export.targets import export_model, import_model
from bitwright.pipeline import RunOptions
from bitwright.recipe import Recipe
from bitwright.runtime.vllm.routing import QuantizedModel
from bitwright.untrusted.json_file import read_json

Run = Callable[[Path, Path], object]
"""Opens the (mutated) input at the first path; may write below the second, which is empty."""
Make = Callable[[Path], None]
"""Fills a new folder with the input."""
disable_progress_bar()
CONFIG, INDEX, SHARDS, TEMPLATE = "config.json", "*.index.json", "*.safetensors", "chat_template.jinja"


@dataclass(frozen=True)
class Subject:
    """One reader.

    Attributes:
        name: of the reader.
        make: its input.
        files: globs of the files that are mutated, each with its kind of mutation.
        runs: who reads it; mutants take them in turn.
    """

    name: str
    make: Make
    files: tuple[tuple[str, Mutation], ...]
    runs: tuple[Run, ...]


# --- inputs ------------------------------------------------------------------------------------------------

_TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on in the afternoon sun. " * 4
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([_TEXT], trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    found.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return found


def source(folder: Path, architecture: str = "llama", shard: str = "60KB", **changes: object) -> None:
    """A random float checkpoint in several shards, with a tokenizer and a chat template."""
    config = AutoConfig.for_model(architecture, **{**_SIZES, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=shard)
    _tokenizer().save_pretrained(folder)


def native(folder: Path, scheme: str = "w4a16g32", **recipe: object) -> None:
    """A quantized folder."""
    beside = folder.with_name(f"{folder.name}-float")
    source(beside)
    wanted = Recipe.model_validate({"method": "rtn", "scheme": scheme, **recipe})
    bitwright.quantize(str(beside), folder, recipe=wanted, options=RunOptions(workers=1))


def _exported(target: str, **recipe: object) -> Make:
    def make(folder: Path) -> None:
        beside = folder.with_name(f"{folder.name}-native")
        native(beside, **recipe)
        export_model(beside, folder, target)  # type: ignore[arg-type]

    return make


def _gguf_file(folder: Path) -> None:
    folder.mkdir()
    _exported("gguf", scheme="w4a16g32-sym")(folder / "model.gguf")


def _recipe_file(folder: Path) -> None:
    source(folder)
    (folder / "recipe.toml").write_text(
        'method = "spqr"\nseed = 3\nbits_per_weight = 6.0\nkept_dtype = "float16"\n\n'
        "[scheme]\nweight_bits = 4\ngroup_size = 32\nsymmetric = false\nactivation_bits = 16\n\n"
        '[calibration]\ntext = "builtin"\nwindows = 2\nwindow_tokens = 64\n\n'
        '[[rules]]\nmatch = "*down_proj"\nkeep = true\n\n'
        '[[rules]]\nmatch = "*q_proj"\nmethod = "rtn"\nscheme = "w8a16"\n'
    )


class _Stop(BaseException):
    """Ends a job behind its first shard, as a killed process would."""


def _unfinished(folder: Path) -> None:
    source(folder / "float")
    seen: list[Path] = []

    def stop(what: str, done: int, total: int) -> None:
        if list((folder / "out.partial").glob("output/*.safetensors")):
            seen.append(folder)
        if len(seen) > 4:
            raise _Stop

    with suppress(_Stop):
        _continue(folder, folder, RunOptions(workers=1, progress=stop))


def _continue(folder: Path, _: Path, options: RunOptions | None = None) -> None:
    bitwright.quantize(
        str(folder / "float"), folder / "out", "rtn", "w4a16g32", options=options or RunOptions(workers=1)
    )


def _windows_file(folder: Path) -> None:
    source(folder)
    ids = torch.arange(4 * 64).reshape(4, 64) % 320
    save_file({"ids": ids, "mask": torch.ones(4)}, folder / "windows.safetensors")


def _texts(folder: Path) -> None:
    source(folder)
    (folder / "text.txt").write_text(_TEXT * 4)
    rows = "".join(f" = Title {n} = \n \n {_TEXT}\n \n" for n in range(3))
    (folder / "wiki.txt").write_text(rows)


def _data_sets(folder: Path) -> None:
    source(folder)
    lines = [f"{number}: {_TEXT}" for number in range(6)]
    rows = [{"text": line, "n": number} for number, line in enumerate(lines)]
    question = {"role": "user", "content": "Hi"}
    chats = [{"messages": [question, {"role": "assistant", "content": line}]} for line in lines]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.csv").write_text("n,text\n" + "".join(f'{number},"{line}"\n' for number, line in enumerate(lines)))


def _report(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {"recipe": "rtn", "calibration": "text", "evaluation": "code", "seed": n, "kl": 0.5, "delta_nll": 0.1}
        for n in (0, 1)
    ]
    report = Report.model_validate(
        {
            "model": {"label": "m", "model_type": "llama", "fingerprint": "0", "blocks": 2, "hidden": 8, "weights": 64},
            "run": {
                **dict.fromkeys(("bitwright", "torch", "transformers", "text_python"), "1"),
                "budget": "quick",
                "seeds": [0],
                "seconds": 1.0,
                "peak_rss_bytes": 1,
            },
            "sets": [],
            "matrix": {"protocol": "gptq:64", "windows": 2, "window_tokens": 64, "rows": rows},
            "sensitivity": {"rows": [{"tensor": "a.weight", "block": 0, "bits": 4, "fisher": 0.1, "measured_kl": 0.2}]},
            "advice": [{"rule": "r", "verdict": "v", "evidence": ["e"]}],
        }
    )
    (folder / "report.json").write_text(report.model_dump_json())
    (folder / "matrix.json").write_text(json.dumps({"key": rows}))


# --- commands ----------------------------------------------------------------------------------------------


def _plan(folder: Path, _: Path) -> None:
    bitwright.plan(str(folder), "rtn", "w4a16g32")


def _quantize(folder: Path, work: Path) -> None:
    bitwright.quantize(str(folder), work / "out", "rtn", "w4a16g32", options=RunOptions(workers=1))


def _load(folder: Path, _: Path) -> None:
    model = load_model(str(folder)).model
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


def _generate(folder: Path, _: Path) -> None:
    bitwright.generate(str(folder), "The fox", tokens=2, chat=True)


def _evaluate(folder: Path, work: Path) -> None:
    (work / "text.txt").write_text(_TEXT * 8)
    options = bitwright.EvalOptions(windows=2, length=32)
    bitwright.eval(str(folder), text=work / "text.txt", options=options)


def _inspect(folder: Path, _: Path) -> None:
    bitwright.inspect(folder, verify=True)
    bitwright.inspect(folder).to_json()


def _again(folder: Path, _: Path) -> None:
    """The command that made the folder, which finds it finished."""
    beside = folder.with_name("float")
    source(beside)
    try:
        bitwright.quantize(str(beside), folder, "rtn", "w4a16g32", options=RunOptions(workers=1))
    finally:
        shutil.rmtree(beside)


def _serve(folder: Path, _: Path) -> None:
    """What the plugin of vLLM is given."""
    config = read_json(folder / CONFIG, FormatError).get("quantization_config")
    if isinstance(config, dict):
        QuantizedModel.read(config)


def _export(target: str) -> Run:
    def run(folder: Path, work: Path) -> None:
        out = work / ("out.gguf" if target == "gguf" else "out")
        export_model(folder, out, target, allow_lossy=True)  # type: ignore[arg-type]

    return run


def _import(folder: Path, work: Path) -> None:
    file = folder / "model.gguf"
    import_model(file if file.exists() else folder, work / "out")


def _plan_file(folder: Path, _: Path) -> None:
    bitwright.plan(str(folder / "model.gguf"), "rtn", "w4a16g32")


def _tokens_of_file(folder: Path, _: Path) -> None:
    load_tokenizer(open_source(str(folder / "model.gguf")))("The fox")


def _recipe(folder: Path, _: Path) -> None:
    bitwright.plan(str(folder), recipe=folder / "recipe.toml")


def _windows(folder: Path, _: Path) -> None:
    wanted = Calibration(text=str(folder / "windows.safetensors"), windows=2, window_tokens=48)
    calibration_windows(wanted, load_tokenizer(open_source(str(folder))), 0)


def _calibrate(folder: Path, work: Path) -> None:
    text = str(next(folder.glob("windows.safetensors"), folder / "text.txt"))
    calibration = {"text": text, "windows": 2, "window_tokens": 48}
    recipe = Recipe.model_validate({"method": "gptq", "scheme": "w4a16g32", "calibration": calibration})
    bitwright.quantize(str(folder), work / "out", recipe=recipe, options=RunOptions(workers=1, max_fallbacks=1.0))


def _read_texts(folder: Path, _: Path) -> None:
    for layout in ("auto", "wikitext", "wikitext-original"):
        try:
            load_text(folder / "wiki.txt", layout=layout)  # type: ignore[arg-type]
        except bitwright.EvaluationError:
            continue
    bitwright.eval(str(folder), text=folder / "text.txt", options=bitwright.EvalOptions(windows=1, length=32))


def _read_data_sets(folder: Path, _: Path) -> None:
    tokenizer = load_tokenizer(open_source(str(folder)))
    refusal = None
    for name in ("rows.jsonl", "chats.jsonl", "rows.json", "rows.csv"):
        wanted = Calibration(text=str(folder / name), windows=2, window_tokens=48)
        try:
            calibration_windows(wanted, tokenizer, 0)
        except bitwright.CalibrationError as error:
            refusal = error
    if refusal is not None:
        raise refusal


def _read_report(folder: Path, _: Path) -> None:
    render(read_report(folder / "report.json"))


def _read_cells(folder: Path, _: Path) -> None:
    kept_cells(folder / "matrix.json")


def _read_shards(folder: Path, _: Path) -> None:
    for path in sorted(folder.glob(SHARDS)):
        read_shard(path)


_TOKENIZER_FILES = (
    ("tokenizer.json", json_mutation),
    ("tokenizer_config.json", json_mutation),
    (TEMPLATE, bytes_mutation),
    ("generation_config.json", json_mutation),
)
_NATIVE_RUNS = (_load, _inspect, _export("hf"), _export("gptq"), _generate)
_DISCOVERED = {"hidden_act": "silu", "partial_rotary_factor": 0.5}

SUBJECTS = (
    Subject("source config", source, ((CONFIG, json_mutation),), (_plan, _quantize, _load)),
    Subject(
        "source config, discovered",
        lambda folder: source(folder, "stablelm", **_DISCOVERED),
        ((CONFIG, json_mutation),),
        (_plan, _quantize),
    ),
    Subject("source index", source, ((INDEX, json_mutation),), (_plan, _quantize, _load)),
    Subject("source shards", source, ((SHARDS, safetensors_mutation),), (_read_shards, _plan, _quantize, _load)),
    Subject("tokenizer", source, _TOKENIZER_FILES, (_generate, _evaluate)),
    Subject("native config", native, ((CONFIG, json_mutation),), (*_NATIVE_RUNS, _serve)),
    Subject("native index", native, ((INDEX, json_mutation),), (_load, _inspect)),
    Subject(
        "native manifest", native, (("manifest.json", json_mutation),), (_inspect, _export("gguf"), _again, _evaluate)
    ),
    Subject("native shards", native, ((SHARDS, safetensors_mutation),), _NATIVE_RUNS),
    Subject("native tokenizer", native, _TOKENIZER_FILES, (_generate, _export("gguf"))),
    Subject("gguf file", _gguf_file, (("model.gguf", bytes_mutation),), (_plan_file, _import, _tokens_of_file)),
    Subject("gptq", _exported("gptq"), ((CONFIG, json_mutation), (SHARDS, safetensors_mutation)), (_import,)),
    Subject("awq", _exported("awq"), ((CONFIG, json_mutation), (SHARDS, safetensors_mutation)), (_import,)),
    Subject(
        "compressed-tensors",
        _exported("compressed-tensors"),
        ((CONFIG, json_mutation), (SHARDS, safetensors_mutation)),
        (_import,),
    ),
    Subject(
        "compressed-tensors, int8",
        _exported("compressed-tensors", scheme="w8a8"),
        ((CONFIG, json_mutation), (SHARDS, safetensors_mutation)),
        (_import,),
    ),
    Subject("recipe", _recipe_file, (("recipe.toml", toml_mutation),), (_recipe,)),
    Subject("journal", _unfinished, (("out.partial/journal.jsonl", lines_mutation),), (_continue,)),
    Subject("unfinished shards", _unfinished, (("out.partial/output/*", safetensors_mutation),), (_continue,)),
    Subject(
        "calibration windows", _windows_file, (("windows.safetensors", safetensors_mutation),), (_windows, _calibrate)
    ),
    Subject("texts", _texts, (("*.txt", bytes_mutation),), (_read_texts, _calibrate)),
    Subject(
        "data sets",
        _data_sets,
        (("*.jsonl", lines_mutation), ("rows.json", json_mutation), ("rows.csv", bytes_mutation)),
        (_read_data_sets,),
    ),
    Subject("report", _report, (("report.json", json_mutation),), (_read_report,)),
    Subject("kept cells", _report, (("matrix.json", json_mutation),), (_read_cells,)),
)
