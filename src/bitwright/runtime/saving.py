"""`model.save_pretrained(folder)` of a packed model, so that the new folder too refuses programs without bitwright.

Transformers writes the weights under the names that any program looks for, and drops from `config.json` the name that
it was told. So every packed model gets a method of its own, which saves as usual and then gives the index the name
that the format has (see `formats.folder`).
"""

from __future__ import annotations

import inspect
import json
import os
from contextvars import ContextVar
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from bitwright.errors import FormatError
from bitwright.formats.folder import INDEX, PLAIN_INDEX, native_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Whether transformers is saving at the behest of the `save_pretrained` below.
_OURS: ContextVar[bool] = ContextVar("_OURS", default=False)
_SINGLE, _SHARD = "model.safetensors", "model-00001-of-00001.safetensors"


def save_packed(model: PreTrainedModel) -> None:
    """Let `model` save itself by `save_pretrained`."""
    model.save_pretrained = MethodType(save_pretrained, model)


def save_as_usual(model: PreTrainedModel) -> None:
    """Undo `save_packed`, for a model that is packed no longer."""
    model.__dict__.pop("save_pretrained", None)


def refuse_other_savers() -> None:
    """Refuse to save a packed model by another way than `save_packed` has given it.

    Raises:
        FormatError: the model was pickled since, or the method of its class is called.
    """
    if not _OURS.get():
        raise FormatError("a packed model is saved by the save_pretrained that loading gave it; load its folder again")


def save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """As `PreTrainedModel.save_pretrained`, with the same arguments but `variant`.

    Raises:
        FormatError: `variant` is given.
    """
    bound = inspect.signature(type(model).save_pretrained).bind(model, save_directory, *args, **kwargs)
    if bound.arguments.get("variant") is not None:
        raise FormatError("variant: the native format has none; leave it out")
    pushed = bound.arguments.pop("push_to_hub", False)
    ours = _OURS.set(True)
    try:
        type(model).save_pretrained(*bound.args, **bound.kwargs)
    finally:
        _OURS.reset(ours)
    if bound.arguments.get("is_main_process", True):
        _rename(Path(save_directory))
    if pushed:
        options = bound.arguments.get("kwargs", {})
        repository = options.pop("repo_id", Path(save_directory).name)
        model.push_to_hub(repository, token=bound.arguments.get("token"), **options)


def _rename(folder: Path) -> None:
    """Give the weights of `folder` their native names; nothing to do where only an adapter was saved."""
    if (folder / PLAIN_INDEX).exists():
        (folder / PLAIN_INDEX).replace(folder / INDEX)
    elif (folder / _SINGLE).exists():
        with safe_open(folder / _SINGLE, framework="pt") as opened:
            names = list(opened.keys())
        (folder / _SINGLE).replace(folder / _SHARD)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, _SHARD)}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = native_config(config, config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(named, indent=2, sort_keys=True) + "\n", encoding="utf-8")
