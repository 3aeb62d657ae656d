"""What a native folder says to programs that do not know the format: nothing that they could mistake for plain weights.

Where bitwright was not imported, transformers skips a quantization method that it does not know and leaves every packed
linear at random values. So a native folder has no index under the name that such a program looks for, and
`config.json` names, where transformers reads the name of the weights file, what has to be done: it refuses any other
name than that of a safetensors file or index by quoting it. The quantizer of `runtime.huggingface` puts `INDEX` there
before transformers looks. Folders from before have the index under its usual name, and load where it is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.errors import FormatError
from bitwright.untrusted.json_file import read_json
from bitwright.untrusted.names import shards_of

INDEX = "bitwright.safetensors.index.json"
"""Names the shard of every tensor, as `PLAIN_INDEX` does in any Hugging Face folder."""
PLAIN_INDEX = "model.safetensors.index.json"
WEIGHTS_KEY = "transformers_weights"
"""The key of `config.json` by which transformers is told the name of the weights file."""
NOTE = (
    "these weights are packed by bitwright; run `import bitwright` in this program before loading them (pip install "
    'bitwright), or start a program of others, such as lm_eval, by: python -c "import bitwright, runpy; '
    "runpy.run_module('lm_eval', run_name='__main__')\" ARGUMENTS; or write floats by: bitwright export FOLDER --to hf "
    "-o OUT"
)


def native_config(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json`: that of the source, and how the weights are packed."""
    return {**config, "quantization_config": dict(quantization), WEIGHTS_KEY: NOTE}


def check_index(path: Path) -> None:
    """Refuse an index at `path` that names anything but safetensors files beside it; none at all is left to loaders.

    Raises:
        FormatError: naming the file.
    """
    if path.is_file():
        weight_map = read_json(path, FormatError).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
        shards_of(path.parent, names, path, FormatError)


def check_for_engine(folder: Path) -> None:
    """Refuse a native folder from which an engine that reads by itself would take other files than safetensors.

    Raises:
        FormatError: an index names such a file, or there are no others.
    """
    for name in (INDEX, PLAIN_INDEX):
        check_index(folder / name)
    if not any(folder.glob("*.safetensors")):
        raise FormatError(f"{folder}: no safetensors files; the folder is incomplete: quantize the model again")
