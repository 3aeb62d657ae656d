"""One table: format x client -> does it load, are its tokens ours, perplexity, tokens per second.

Quantizes the demo model in every format, exports it, lets bitwright itself run each folder (the reference), then each
client in its own environment, one after the other. Folders are kept in the work folder and used again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
from transformers import AutoTokenizer

import bitwright
from bitwright.calibration.text import load_text
from bitwright.errors import BitwrightError
from bitwright.evaluate.perplexity import token_windows
from bitwright.export.targets import export_model, obstacles
from clients.contract import Answer, Job

HERE = Path(__file__).parent
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):",
    "The laws of thermodynamics state that",
)
# The same weights in float32: llama.cpp rounds inputs of quantized matrices to 8 bits, those of floats it does not.
FLOATS = "gguf, decoded"
# What each client opens. Native folders need bitwright beside the client.
OPENS = {
    "vllm": ("native", "compressed-tensors", "gptq"),
    "openai": ("native", "compressed-tensors"),
    "transformers": ("native", "compressed-tensors"),
    "llama": ("gguf", FLOATS),
}
# Environment variables that name the clients' Pythons; clients.sh sets them.
PYTHONS = {client: f"CLIENTS_{client.upper()}_PYTHON" for client in OPENS}
_SUFFIX = {"gguf": ".gguf"}


@dataclass(frozen=True)
class Format:
    """The demo model quantized one way."""

    method: str
    scheme: str
    exports: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As users choose it."""
        return "-".join((self.method, self.scheme, *(setting.partition("=")[2] for setting in self.settings)))


FORMATS = (
    Format("rtn", "w4a16g64", ("compressed-tensors",)),
    Format("rtn", "w4a16g64-sym", ("compressed-tensors", "gptq")),
    Format("rtn", "w4a16g32-sym", ("compressed-tensors", "gguf")),
    Format("rtn", "w8a8-sym", ("compressed-tensors",)),
    Format("rtn", "w8a16g64-sym", ("compressed-tensors",)),
    Format("easyquant", "w4a16g128"),
    Format("gptq", "w4a16g64", ("compressed-tensors",)),
    Format("spqr", "w3a16"),
    Format("gptq", "w4a16", ("gguf",), ("grid=gguf",)),
    Format("gptq", "w3a16", ("gguf",), ("grid=gguf",)),
)


def main() -> None:
    """Parse, quantize, run, print."""
    chosen = _arguments()
    text = load_text(chosen.text, "evaluation")
    chosen.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for form in FORMATS:
        if chosen.formats and form.name not in chosen.formats:
            continue
        native = _quantized(form, chosen)
        tokenizer = AutoTokenizer.from_pretrained(native)
        windows = token_windows(tokenizer, text, chosen.length, chosen.windows).ids.tolist()
        job = Job(str(native), [tokenizer(prompt)["input_ids"] for prompt in PROMPTS], chosen.tokens, windows)
        reference = run_client("bitwright", sys.executable, job, chosen.work)
        rows.append(_row(form, "native", "bitwright", reference, reference, ""))
        for kind, path in _artefacts(form, native):
            for client in (client for client in chosen.clients if kind in OPENS[client]):
                plan = _planned(form) if (kind, client) == ("compressed-tensors", "vllm") else ""
                if isinstance(path, str):
                    found = Answer(error=path)
                else:
                    python = os.environ.get(PYTHONS[client], sys.executable)
                    found = run_client(
                        client, python, Job(str(path), job.prompts, job.new_tokens, windows), chosen.work
                    )
                rows.append(_row(form, kind, client, found, reference, plan))
                print("\t".join(rows[-1]), file=sys.stderr, flush=True)
    _print(rows, f"{chosen.windows} windows of {chosen.length} tokens of {text.name}, {chosen.tokens} tokens a prompt")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/clients"), help="where everything is kept")
    parser.add_argument("--clients", nargs="+", choices=OPENS, default=list(OPENS))
    parser.add_argument("--formats", nargs="+", choices=[form.name for form in FORMATS], default=None)
    parser.add_argument("--text", default=None, help="a file; default: the built-in text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens for each of the prompts")
    parser.add_argument("--calibration-windows", type=int, default=8)
    return parser.parse_args()


def _quantized(form: Format, chosen: argparse.Namespace) -> Path:
    """The native folder, made where it is missing."""
    calibrated = form.method in ("gptq", "spqr")
    out = chosen.work / (form.name + (f"-{chosen.calibration_windows}" if calibrated else ""))
    if not out.exists():
        few = [f"calibration.windows={chosen.calibration_windows}"] if calibrated else []
        recipe = bitwright.load_recipe(form.method, form.scheme, overrides=[*form.settings, *few])
        bitwright.quantize("demo", out, recipe=recipe)
    return out


def _artefacts(form: Format, native: Path) -> Iterator[tuple[str, Path | str]]:
    """The kinds of files of `form`, the native one first; text says why there is none."""
    yield "native", native
    for kind in form.exports:
        path = native.with_name(f"{native.name}-{kind}{_SUFFIX.get(kind, '')}")
        try:
            if not path.exists():
                export_model(native, path, kind)
            yield kind, path
            if kind == "gguf":
                yield FLOATS, _decoded(path)
        except BitwrightError as error:
            yield kind, f"no export: {error}"


def _decoded(path: Path) -> Path:
    """A copy of the .gguf file `path` with every weight in float32, made where it is missing, by the gguf package."""
    out = path.with_name(f"{path.stem}-decoded.gguf")
    if out.exists():
        return out
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out.with_suffix(".partial"), reader.fields["general.architecture"].contents())
    for key, value in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, value.contents(), value.types[0], value.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out.with_suffix(".partial").rename(out)


def _planned(form: Format) -> str:
    """What `--for vllm` says of the format before any work."""
    found = obstacles(bitwright.plan("demo", form.method, form.scheme), "vllm")
    certain = [obstacle for obstacle in found if obstacle.certain]
    if certain:
        return f"no: {certain[0].reason}"
    return f"perhaps: {found[0].reason}" if found else "yes"


def run_client(client: str, python: str, job: Job, work: Path) -> Answer:
    """What the client in the environment of `python` answers."""
    asked, answered, log = (work / f"{client}.{part}" for part in ("job.json", "answer.json", "log"))
    asked.write_text(json.dumps(asdict(job)))
    answered.unlink(missing_ok=True)
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    command = [python, "-m", f"clients.run_{client}", str(asked), str(answered)]
    with log.open("w") as lines:
        # The clients' own threads and caches are theirs; PYTHONPATH finds nothing but this folder.
        environment = {**os.environ, **offline, "PYTHONPATH": str(HERE.parent)}
        status = subprocess.run(command, stdout=lines, stderr=subprocess.STDOUT, env=environment, check=False)
    if not answered.exists():
        remedy = "; try CLIENTS_LLAMA_PLAIN=1" if client == "llama" else ""
        return Answer(error=f"ended with status {status.returncode} and without an answer; see {log}{remedy}")
    return Answer(**json.loads(answered.read_text()))


def _row(form: Format, kind: str, client: str, found: Answer, reference: Answer, planned: str) -> list[str]:
    if found.error is not None or found.perplexity is None:
        return [form.name, kind, client, "no", "", "", "", planned, f"{found.error}"[:200]]
    same = ""
    if found.tokens is not None and reference.tokens is not None:
        pairs = [
            (ours, theirs)
            for a, b in zip(reference.tokens, found.tokens, strict=True)
            for ours, theirs in zip(a, b, strict=True)
        ]
        same = f"{sum(a == b for a, b in pairs)}/{len(pairs)}"
    change = "" if reference.perplexity is None else f" ({found.perplexity / reference.perplexity - 1:+.3%})"
    speed = f"{found.tokens_per_second:.1f}"
    return [form.name, kind, client, "yes", same, f"{found.perplexity:.4f}{change}", speed, planned, found.kernel]


def _print(rows: list[list[str]], protocol: str) -> None:
    heads = ["format", "files", "client", "loads", "tokens equal", "perplexity", "tokens/s", "--for vllm", "notes"]
    print(f"SmolLM2-135M (demo), {protocol}; bitwright on the same native folder is the reference.\n")
    for line in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
