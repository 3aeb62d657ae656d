"""The tokenizer of a GGUF file as the files of a Hugging Face folder.

What `export.gguf` wrote comes back as it was. Byte-level BPE of other programs is built here where the file names its
way of cutting text into words with a name of `PRE_TOKENIZERS`: transformers' own reader takes GPT-2's way for some of
these. Other names that it knows, and SentencePiece, are left to transformers. Unknown names are refused, since the
model would be shown other tokens than it was trained with.
"""

from __future__ import annotations

import json
import mmap
import struct
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bitwright.checkpoint.gguf_config import TOKEN_IDS
from bitwright.checkpoint.gguf_file import read_gguf_header
from bitwright.checkpoint.quiet import quiet_transformers
from bitwright.checkpoint.shard import write_text
from bitwright.errors import CheckpointError
from bitwright.export.gguf_tokenizer import GPT2_WORDS, PRE_TOKENIZERS, SINGLE_DIGITS
from bitwright.export.gguf_tokenizer_json import KEY, restored

_LIKE = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2"}
_WITH_BOS = _WITH_WHOLE_WORDS = "llama-bpe"
_WITH_NFC = "qwen2"
_READ_BY_TRANSFORMERS = frozenset(
    ("deepseek-r1-qwen", "falcon-h1", "falcon3", "gpt-4o", "kanana2", "lfm2", "llama4", "megrez", "smaug-bpe", "tekken")
)
_REMEDY = "start from the Hugging Face checkpoint instead"
_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_ARRAYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")


def write_tokenizer(path: Path, config: Mapping[str, Any], folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, a chat template and `generation_config.json` into `folder`.

    Args:
        path: a GGUF file whose header is sound.
        config: `config.json` of its model.
        folder: exists.

    Raises:
        CheckpointError: the file has no tokenizer, a damaged one, or one of a kind that cannot be rebuilt.
    """
    metadata = {**read_gguf_header(path).metadata}
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or "tokenizer.ggml.tokens" not in metadata:
        missing = "model" if kind is None else "tokens"
        raise CheckpointError(f"{path}: tokenizer.ggml.{missing} is missing, needed for a tokenizer; {_REMEDY}")
    metadata |= _string_arrays(path, _ARRAYS)
    if (count := len(metadata["tokenizer.ggml.tokens"])) > config["vocab_size"]:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.tokens has {count} tokens, needed at most the {config['vocab_size']} rows of "
            f"token_embd.weight; the file is damaged: {_REMEDY}"
        )
    if KEY in metadata:
        _write_restored(path, metadata, folder)
    elif kind == "gpt2" and (name := _pre_name(path, metadata)) is not None:
        _write_byte_level(path, metadata, name, folder)
    else:
        _write_by_transformers(path, metadata, folder)
    ids = {key: config[key] for key in TOKEN_IDS if key in config}
    content = {"_from_model_config": True, **ids}
    write_text(folder / "generation_config.json", json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_restored(path: Path, metadata: Mapping[str, Any], folder: Path) -> None:
    """The files that `export.gguf` was given."""
    try:
        content, config = restored(json.loads(metadata[KEY]), metadata)
        text = json.dumps(content, ensure_ascii=False)
        Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(
            f"{path}: {KEY} gives no tokenizer ({type(error).__name__}: {error}); the file is damaged: export it again"
        ) from error
    write_text(folder / "tokenizer.json", text)
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        write_text(folder / "chat_template.jinja", template)


def _pre_name(path: Path, metadata: Mapping[str, Any]) -> str | None:
    """Of `PRE_TOKENIZERS`, the name that the file has or means; None where transformers builds the tokenizer."""
    name = metadata.get("tokenizer.ggml.pre")
    if name in _READ_BY_TRANSFORMERS:
        return None
    name = _LIKE.get(str(name), name)
    if name not in PRE_TOKENIZERS.values():
        found = "missing" if name is None else f"{str(name)[:60]!r}"
        known = ", ".join(sorted({*PRE_TOKENIZERS.values(), *_READ_BY_TRANSFORMERS}))
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre is {found}, needed one of {known}: text would be cut "
            f"into other words; {_REMEDY}"
        )
    return str(name)


def _write_byte_level(path: Path, metadata: Mapping[str, Any], name: str, folder: Path) -> None:
    """Byte-level BPE that cuts text as `name` says."""
    # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        backend = _byte_level(metadata, name)
        special = {key: tokens[metadata[id_]] for key, id_ in _SPECIAL.items() if id_ in metadata}
        _add_edges(backend, metadata, special, name)
        with quiet_transformers():
            PreTrainedTokenizerFast(
                tokenizer_object=backend, chat_template=metadata.get("tokenizer.chat_template"), **special
            ).save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exceptions, missing keys unrelated types
        raise CheckpointError(
            f"{path}: tokenizer.ggml.* give no tokenizer ({type(error).__name__}: {error}); the file is damaged: "
            f"{_REMEDY}"
        ) from error


def _byte_level(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    types = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    kinds = list(zip(tokens, types, strict=True))
    vocabulary = {token: number for number, (token, kind) in enumerate(kinds) if kind != TokenType.UNUSED}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=name == _WITH_WHOLE_WORDS))
    if name == _WITH_NFC:
        backend.normalizer = normalizers.NFC()
    steps = next(steps for steps, known in PRE_TOKENIZERS.items() if known == name)
    backend.pre_tokenizer = pre_tokenizers.Sequence([_step(step) for step in steps])
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [AddedToken(token, normalized=False, special=special) for token, found in kinds if found == kind]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    return backend


def _step(step: str) -> Any:
    """A step of `PRE_TOKENIZERS` as the tokenizers library has it."""
    if step == SINGLE_DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    if step in (GPT2_WORDS, "bytes"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == GPT2_WORDS)
    return pre_tokenizers.Split(Regex(step), "isolated")


def _add_edges(backend: Tokenizer, metadata: Mapping[str, Any], special: Mapping[str, str], name: str) -> None:
    """Put the first and the last token around every text, where the file says so."""
    edges = {}
    for edge, default in (("bos", name == _WITH_BOS), ("eos", False)):
        if metadata.get(f"tokenizer.ggml.add_{edge}_token", default):
            edges[edge] = special[f"{edge}_token"]
    if edges:
        text = " ".join(
            [*([edges["bos"]] if "bos" in edges else []), "$A", *([edges["eos"]] if "eos" in edges else [])]
        )
        ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys(edges.values())]
        backend.post_processor = processors.TemplateProcessing(single=text, special_tokens=ids)


def _write_by_transformers(path: Path, metadata: Mapping[str, Any], folder: Path) -> None:
    # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

    # A folder of its own, so that a stray tokenizer.json beside the file cannot take precedence.
    with tempfile.TemporaryDirectory() as place, quiet_transformers():
        (Path(place) / "model.gguf").symlink_to(path.resolve())
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(place, gguf_file="model.gguf")
        except Exception as error:  # missing keys and unknown kinds raise unrelated types
            raise CheckpointError(
                f"{path}: transformers cannot rebuild its tokenizer ({type(error).__name__}: {error}); {_REMEDY}"
            ) from error
        if metadata["tokenizer.ggml.model"] == "gpt2" and "Split(" not in repr(
            tokenizer.backend_tokenizer.pre_tokenizer
        ):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.pre is {metadata['tokenizer.ggml.pre']!r}, which the installed transformers "
                f"does not cut into words; upgrade it, or {_REMEDY}"
            )
        tokenizer.save_pretrained(folder)


# --- arrays of strings -------------------------------------------------------------------------------------

# bytes of a scalar by type number
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING = 8


def _string_arrays(path: Path, keys: Collection[str]) -> dict[str, list[str]]:
    """Arrays of strings of the metadata; `read_gguf_header`, which skips them, has found the header sound."""
    found: dict[str, list[str]] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (count,) = struct.unpack_from("<Q", data, 16)
        position = 24
        for _ in range(count):
            start, position = _text(data, position)
            key = data[start:position].decode()
            (kind,) = struct.unpack_from("<I", data, position)
            position += 4
            if kind in _WIDTHS:
                position += _WIDTHS[kind]
            elif kind == _STRING:
                _, position = _text(data, position)
            else:
                kind, length = struct.unpack_from("<IQ", data, position)
                position += 12
                if kind in _WIDTHS:
                    position += length * _WIDTHS[kind]
                    continue
                values = []
                for _ in range(length):
                    start, position = _text(data, position)
                    values.append(data[start:position])
                if key in keys:
                    found[key] = [_decoded(path, key, value) for value in values]
    return found


def _text(data: mmap.mmap, position: int) -> tuple[int, int]:
    """Where the string whose length is at `position` starts and ends."""
    (length,) = struct.unpack_from("<Q", data, position)
    return position + 8, position + 8 + length


def _decoded(path: Path, key: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: {key} holds {value[:40]!r}, needed UTF-8; the file is damaged") from error
