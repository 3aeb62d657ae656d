"""A tokenizer as GGUF metadata: byte-level BPE ("gpt2"), and SentencePiece's BPE with byte fallback ("llama").

llama.cpp cuts text into words by rules of its own, which a file can only name (`tokenizer.ggml.pre`). The name is found
by comparing the pre-tokenizer with those that the names stand for; one that is not among them is refused, since the
model would be shown other tokens than it was trained with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from bitwright.checkpoint.quiet import quiet_transformers
from bitwright.checkpoint.side_files import check_regular
from bitwright.errors import CheckpointError, FormatError
from bitwright.export.gguf_tokenizer_json import KEY, NEVER_MERGED, remainder
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.ids import TOKENIZER_REMEDY

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_WORDS, SINGLE_DIGITS = "gpt2 words", "single digits"
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (GPT2_WORDS,): "gpt-2",
    (SINGLE_DIGITS, GPT2_WORDS): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST, "bytes"): "qwen2",
}
"""Names that llama.cpp knows, by the steps of the pre-tokenizer that they stand for."""
_SPECIAL = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "unk_token_id": "tokenizer.ggml.unknown_token_id",
    "sep_token_id": "tokenizer.ggml.seperator_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
    "mask_token_id": "tokenizer.ggml.mask_token_id",
}
_SPACE = "▁"


def read_tokenizer(folder: Path, vocab_size: int, pre: str | None = None) -> dict[str, Any]:
    """The tokenizer of a Hugging Face folder as keys and values, lists for arrays.

    `pre` is taken for `tokenizer.ggml.pre` without comparing anything.

    Raises:
        CheckpointError: the folder has no tokenizer, or one that transformers cannot read.
        FormatError: one that llama.cpp does not have, or with more tokens than `vocab_size`.
    """
    with reading(f"{folder}, its tokenizer", FormatError, TOKENIZER_REMEDY):
        return _read_tokenizer(folder, vocab_size, pre)


def _read_tokenizer(folder: Path, vocab_size: int, pre: str | None) -> dict[str, Any]:
    tokenizer = _load(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if (kind := content["model"]["type"]) != "BPE":
        raise FormatError(f"{folder}: a tokenizer of type {kind}, needed BPE; export to another format")
    # Without a row in the embedding, a token that was added can never be used.
    added = {entry["id"]: entry for entry in content["added_tokens"] if entry["id"] < vocab_size}
    tokens = _tokens(folder, content["model"]["vocab"], added, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if content["model"].get("byte_fallback"):
        metadata = _sentencepiece(content, tokens, added, merges)
    else:
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre or _pre_name(folder, content),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": _types(tokens, added),
            "tokenizer.ggml.merges": merges,
        }
    metadata[KEY] = remainder(content, _config(tokenizer), metadata)
    return metadata | _special_tokens(tokenizer, vocab_size)


def _load(folder: Path) -> Any:
    # importing transformers takes seconds
    from transformers import AutoTokenizer

    check_regular(folder)
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise FormatError(f"{folder}: {type(tokenizer).__name__} has no fast tokenizer; save one as tokenizer.json")
    return tokenizer


def _config(tokenizer: Any) -> dict[str, Any]:
    """`tokenizer_config.json` as transformers writes it, without the chat template, which has a key of its own."""
    with tempfile.TemporaryDirectory() as place, quiet_transformers():
        tokenizer.save_pretrained(place)
        config: dict[str, Any] = json.loads((Path(place) / "tokenizer_config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key not in ("chat_template", "name_or_path")}


def _tokens(folder: Path, vocabulary: Mapping[str, int], added: Mapping[int, Any], vocab_size: int) -> list[str]:
    """Every token by id; ids that the model has and the tokenizer has not are padded."""
    by_id = {number: token for token, number in vocabulary.items()}
    by_id |= {number: entry["content"] for number, entry in added.items()}
    if max(by_id) >= vocab_size:
        raise FormatError(
            f"{folder}: the tokenizer has a token {max(by_id)}, and the model's vocabulary {vocab_size} tokens; "
            "they do not belong together"
        )
    return [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]


def _types(tokens: list[str], added: Mapping[int, Any]) -> list[int]:
    """What each token is; added ones are found in text before it is cut into words."""
    return [_type(number, token, added) for number, token in enumerate(tokens)]


def _type(number: int, token: str, added: Mapping[int, Any]) -> int:
    if number in added:
        return int(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
    return int(TokenType.UNUSED if token == f"[PAD{number}]" else TokenType.NORMAL)


def _special_tokens(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Ids of special tokens, which of them are added to every text, and the chat template."""
    found = {key: getattr(tokenizer, name, None) for name, key in _SPECIAL.items()}
    metadata: dict[str, Any] = {
        key: number for key, number in found.items() if number is not None and number < vocab_size
    }
    plain, full = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    metadata["tokenizer.ggml.add_bos_token"] = full[0] != plain[0] and full[0] == tokenizer.bos_token_id
    metadata["tokenizer.ggml.add_eos_token"] = full[-1] != plain[-1] and full[-1] == tokenizer.eos_token_id
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


# --- byte-level BPE ----------------------------------------------------------------------------------------


def _pre_name(folder: Path, content: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which the tokenizer cuts text into words."""
    normalizer = content["normalizer"]
    steps = _steps(content["pre_tokenizer"])
    # NFC is what Qwen's tokenizers do first; llama.cpp leaves it out for them as well.
    known = normalizer is None or normalizer["type"] == "NFC"
    name = PRE_TOKENIZERS.get(tuple(steps)) if known else None
    if name is None:
        shown = ", ".join([*([] if known else [normalizer["type"]]), *steps])
        raise FormatError(
            f"{folder}: the tokenizer cuts text in a way without a known name in llama.cpp ({shown[:200]}); "
            "give its tokenizer.ggml.pre by hand"
        )
    return name


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[str]:
    """The pre-tokenizer as the steps of `PRE_TOKENIZERS`."""
    if pre_tokenizer is None:
        return ["none"]
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [step for inner in pre_tokenizer["pretokenizers"] for step in _steps(inner)]
    if kind == "Digits" and pre_tokenizer["individual_digits"]:
        return [SINGLE_DIGITS]
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return [GPT2_WORDS if pre_tokenizer["use_regex"] else "bytes"]
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        return [pre_tokenizer["pattern"].get("Regex", "a string")]
    return [kind]


# --- SentencePiece -----------------------------------------------------------------------------------------


def _sentencepiece(
    content: Mapping[str, Any], tokens: list[str], added: Mapping[int, Any], merges: list[str]
) -> dict[str, Any]:
    """BPE with byte fallback. llama.cpp joins the pair whose token has the best score: the ranks of the merges."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    types = _types(tokens, added)
    unknown = content["model"].get("unk_token")
    for number, token in enumerate(tokens):
        if token == unknown:
            types[number] = int(TokenType.UNKNOWN)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = int(TokenType.BYTE)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-rank[token]) if token in rank else NEVER_MERGED for token in tokens],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": _adds_space(content),
    }


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text, by the normalizer or the pre-tokenizer."""
    normalizer = content["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    prepended = any(step.get("type") == "Prepend" and step.get("prepend") == _SPACE for step in steps)
    pre_tokenizer = content["pre_tokenizer"] or {}
    return prepended or pre_tokenizer.get("prepend_scheme", "never") != "never"
