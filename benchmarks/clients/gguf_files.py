"""Whole .gguf files by bitwright and by llama.cpp's own quantizer, both run by llama.cpp: bytes, perplexity, top-1.

Theirs are made of the float model in 16 bits, plainly and with an importance matrix: mean squares of the inputs on the
very windows that bitwright calibrates on. Ours are gptq on the grids of GGUF's types, the embedding in 8 bits, which
theirs get too. Rows are ordered by bytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from gguf_quality import mean_squares
from transformers import AutoTokenizer

import bitwright
from bitwright.calibration.overlap import fingerprints, overlap
from bitwright.calibration.text import load_text
from bitwright.calibration.tokens import Calibration, calibration_windows
from bitwright.checkpoint.load import load_model
from bitwright.evaluate.perplexity import token_windows
from bitwright.export.targets import export_model
from clients.contract import Job
from clients.table import PYTHONS, run_client

EMBEDDING = {"match": "model.embed_tokens", "method": "rtn", "scheme": "w8a16g32-sym"}
TYPES = "Q2_K,Q3_K_M,Q4_0,Q4_K_M,Q6_K,Q8_0"


def main() -> None:
    """Make every file, have each run, print the table."""
    chosen = arguments()
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    files = [(f"bitwright {chosen.method} w{bits}a16", ours(bits, chosen, work)) for bits in chosen.bits]
    source = float_file(chosen.model, work)
    importance, calibration = importance_file(chosen, work)
    for kind in chosen.types:
        files.append((f"llama.cpp {kind}", theirs(source, kind, work)))
        files.append((f"llama.cpp {kind}, importance matrix", theirs(source, kind, work, importance)))
    files.append(("float16", source))
    tokenizer = AutoTokenizer.from_pretrained(work / "float")
    windows = token_windows(tokenizer, load_text(chosen.text, "evaluation"), chosen.length, chosen.windows).ids
    if count := overlap(windows, fingerprints(calibration)):
        raise SystemExit(f"{count} calibration windows are part of the text to measure on; give two different texts")
    job = Job("", [windows[0, :16].tolist()], 4, windows.tolist())
    print("| file | bytes | perplexity |\n|---|---|---|")
    for label, path in sorted(files, key=lambda file: file[1].stat().st_size):
        found = run_client("llama", python(), replace(job, model=str(path)), work)
        told = found.error if found.perplexity is None else f"{found.perplexity:.3f}"
        print(f"| {label} | {path.stat().st_size} | {told} |", flush=True)
    print(f"\n{chosen.windows} windows of {chosen.length} tokens; calibration {list(calibration.shape)}")


def arguments() -> argparse.Namespace:
    """The command line; lists are separated by commas."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="as `bitwright quantize` takes it")
    parser.add_argument("--work", type=Path, default=Path("build/clients/gguf"), help="where everything is kept")
    parser.add_argument("--method", default="gptq", help="of bitwright")
    parser.add_argument("--bits", type=lambda text: [int(part) for part in text.split(",")], default=[2, 3, 4, 6])
    parser.add_argument("--types", type=lambda text: text.split(","), default=TYPES.split(","), help="of llama.cpp")
    parser.add_argument("--calibration-text", default="builtin", help="a file; default: the built-in text")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--text", default=None, help="to measure on, a file; default: the built-in text")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    return parser.parse_args()


def python() -> str:
    """Of the environment that has llama.cpp."""
    return os.environ.get(PYTHONS["llama"], sys.executable)


def ours(bits: int, chosen: argparse.Namespace, work: Path) -> Path:
    """bitwright's file, made where it is missing."""
    name = f"{chosen.method}-w{bits}a16-{chosen.calibration_windows}"
    folder, path = work / name, work / f"{name}.gguf"
    if not path.exists():
        settings = [f"calibration.text={chosen.calibration_text}", f"calibration.windows={chosen.calibration_windows}"]
        recipe = bitwright.load_recipe(chosen.method, f"w{bits}a16", None, ["grid=gguf", *settings])
        recipe = bitwright.Recipe.model_validate(recipe.model_dump() | {"rules": [EMBEDDING]})
        if not folder.exists():
            bitwright.quantize(chosen.model, folder, recipe=recipe)
        export_model(folder, path, "gguf")
    return path


def float_file(model: str, work: Path) -> Path:
    """The model in 16 bits, which llama.cpp's quantizer starts from."""
    folder, path = work / "float", work / "float.gguf"
    if not path.exists():
        keep = bitwright.Recipe(method="rtn", scheme="w8a16", rules=[{"match": "*", "keep": True}])
        if not folder.exists():
            bitwright.quantize(model, folder, recipe=keep)
        export_model(folder, path, "gguf")
    return path


def importance_file(chosen: argparse.Namespace, work: Path) -> tuple[Path, np.ndarray]:
    """Mean squares of the inputs of all linears under GGUF's names, and the windows that they were taken on."""
    loaded = load_model(chosen.model)
    settings = Calibration(text=chosen.calibration_text, windows=chosen.calibration_windows)
    windows = calibration_windows(settings, loaded.tokenizer, seed=0).ids
    path = work / f"importance-{chosen.calibration_windows}.npz"
    if not path.exists():
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, loaded.model.config.num_hidden_layers)
        found = mean_squares(loaded.model, windows)
        np.savez(path, **{f"{names.get_name(name)}.weight": values.numpy() for name, values in found.items()})
    return path, windows


def theirs(source: Path, kind: str, work: Path, importance: Path | None = None) -> Path:
    """llama.cpp's file, made where it is missing."""
    path = work / f"llama-{kind}{'' if importance is None else f'-{importance.stem}'}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        command = [python(), "-m", "clients.llama_quantize", str(source), str(partial), kind]
        command += [] if importance is None else [str(importance)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{kind}: {done.stderr[-2000:]}")
        partial.rename(path)
    return path


if __name__ == "__main__":
    main()
