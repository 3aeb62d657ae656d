"""Loading: a MODEL as the user names it -> a `transformers` model in evaluation mode and its tokenizer.

Three ways lead there. A Hugging Face folder or hub id goes through `from_pretrained`. Any other float source
is read tensor by tensor into memory that the model then owns, so there is one copy of the weights. A folder
that bitwright wrote goes through `from_pretrained` as well, with bitwright's quantizer registered.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitwright.checkpoint.agreement import agree
from bitwright.checkpoint.finite import check_finite
from bitwright.checkpoint.manifest import MANIFEST
from bitwright.checkpoint.native_folder import check_saved, read_native
from bitwright.checkpoint.open import find_source, model_name
from bitwright.checkpoint.quiet import quiet_transformers
from bitwright.checkpoint.side_files import check_regular
from bitwright.checkpoint.source import HuggingFaceSource, Source, locate_tensors
from bitwright.errors import CheckpointError
from bitwright.formats.folder import WEIGHTS_KEY
from bitwright.formats.native import QUANT_METHOD
from bitwright.untrusted.boundary import brief, reading
from bitwright.untrusted.json_file import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


ADAPTER = "adapter_config.json"
_OTHER_TOKENIZER = "copy the tokenizer files of the original checkpoint into the folder"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: on the CPU, in evaluation mode.
        label: how the user named it.
        folder: the Hugging Face folder that it comes from; None for a GGUF file or the demo.
        quantized: bitwright quantized it.
    """

    model: PreTrainedModel
    label: str
    folder: Path | None
    quantized: bool

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, which those who bring token ids do without; CheckpointError where it has none."""
        return tokenizer_of(self.label)


def load_model(model: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model that `model` names: `demo`, a `.gguf` file, a folder (perhaps quantized) or a hub id.

    Args:
        model: as for `open_source`, or a folder that bitwright wrote.
        dtype: of all float weights. Products in bfloat16 are slow on most CPUs.

    Raises:
        CheckpointError: nothing of that name can be read, or its config, its tensors and the model contradict each
            other.
        FormatError: the same for a folder that bitwright wrote.
        WeightError: a tensor holds NaN or Inf.
    """
    model = model_name(model)
    folder = Path(model)
    if _is_quantized(folder):
        from bitwright.runtime.huggingface import register

        if (folder / MANIFEST).exists():
            read_native(folder)
        else:
            check_saved(folder)
        register()
        # Names and kinds of files, before transformers opens any: it would unpickle some of them.
        locate_tensors(folder)
        return LoadedModel(_from_folder(folder, dtype), model, folder, quantized=True)
    source = find_source(model)
    agree(source.label, source.config, source.tensors)
    if isinstance(source, HuggingFaceSource):
        folder = source.folder
        return LoadedModel(_from_folder(folder, dtype), model, folder, quantized=False)
    return LoadedModel(_from_source(source, dtype), model, None, quantized=False)


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of what `model` names, as `load_model` takes it, without its weights.

    Raises:
        CheckpointError: nothing of that name can be read, or its tokenizer cannot.
    """
    model = model_name(model)
    folder = Path(model)
    return _tokenizer(folder, model) if _is_quantized(folder) else load_tokenizer(find_source(model))


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a source.

    Raises:
        CheckpointError: it has none, or one that transformers cannot read.
    """
    with tempfile.TemporaryDirectory() as place:
        left_out = source.write_side_files(Path(place))
        try:
            return _tokenizer(Path(place), source.label)
        except CheckpointError as error:
            if not left_out:
                raise
            raise CheckpointError(f"{error}; {'; '.join(left_out)}") from error


def _is_quantized(folder: Path) -> bool:
    """Whether bitwright wrote the folder; any problem with the file is left to those who need it."""
    try:
        settings = read_json(folder / "config.json", CheckpointError).get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD


def _from_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    _refuse_redirection(folder)
    check_regular(folder)
    with quiet_transformers(), reading(folder, CheckpointError):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, by name
        )
    return _complete(model, report, str(folder))


def _refuse_redirection(folder: Path) -> None:
    """Refuse what makes transformers load other files than those that were checked."""
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder / ADAPTER}: an adapter (LoRA) lies beside the weights; merge it into them with PEFT's "
            "merge_and_unload, or remove its files"
        )
    config = read_json(folder / "config.json", CheckpointError)
    # Of a folder that bitwright wrote, its quantizer says where the index is, whatever stands there.
    if config.get(WEIGHTS_KEY) is not None and not _is_quantized(folder):
        raise CheckpointError(
            f"{folder / 'config.json'}: {WEIGHTS_KEY} names other files than model.safetensors; remove the key"
        )


def _from_source(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a source, which owns the tensors read here."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    weights = {name: source.read(name).to(dtype) for name in source.tensors}
    # from_pretrained builds on the meta device, ties weights and computes buffers (the RoPE frequencies)
    with quiet_transformers(), reading(source.label, CheckpointError):
        config = AutoConfig.for_model(**source.config)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, report = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    return _complete(model, report, source.label)


def _complete(model: Any, report: dict[str, Any], label: str) -> PreTrainedModel:
    """`model` in evaluation mode; transformers would leave weights that it did not find at random values."""
    wrong = dict.fromkeys(report["missing_keys"], "is missing")
    wrong |= {
        name: f"has shape {list(found)}, needed {list(needed)}" for name, found, needed in report["mismatched_keys"]
    }
    if wrong:
        name = min(wrong)
        raise CheckpointError(
            f"{label}: tensor {name} {wrong[name]} ({len(wrong)} such); "
            "the checkpoint is incomplete or its config.json belongs to another: download it again"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        check_finite(f"{label}: {name}", tensor)
    return model.eval()


def _tokenizer(folder: Path, label: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, of the model that the user calls `label`."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{label}: no tokenizer (needed one of {', '.join(TOKENIZER_FILES)}); "
            "copy the tokenizer files of the original checkpoint into its folder, or give token ids: a .safetensors "
            "file with the tensor ids [windows, tokens] as --calibration of quantize or --text of eval"
        )
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            # some settings are looked at when it is first used
            tokenizer("a")
            return tokenizer
        except Exception as error:  # the tokenizers library raises bare Exceptions
            # the files may lie in a temporary place, which means nothing to the user
            raise CheckpointError(
                f"{label}, its tokenizer: cannot be understood ({brief(error).replace(str(folder), label)}); "
                f"{_OTHER_TOKENIZER}"
            ) from error
