"""The demo model in float32 as a plain Hugging Face folder: python -m clients.float_folder OUT."""

from __future__ import annotations

import sys
from pathlib import Path

from bitwright.checkpoint.load import load_model


def main() -> None:
    """Write it, under its name only once it is whole."""
    out = Path(sys.argv[1])
    unfinished = out.with_name(f"{out.name}.unfinished")
    loaded = load_model("demo")
    loaded.model.save_pretrained(unfinished)
    loaded.tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)


if __name__ == "__main__":
    main()
