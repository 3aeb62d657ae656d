"""Tokenizers as GGUF metadata; where llama-cpp-python is installed, it must cut text into the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bitwright.errors import CheckpointError, FormatError
from bitwright.export.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer

TEXT = (
    "The quick brown fox jumps over the lazy dog, and 1234 dogs sleep on in the   afternoon's sun.\n\nIt's 25 °C. " * 4
)
SAMPLE = "It's a lazy afternoon:  the fox, 1234 dogs\n and THE sun's 25 °C…"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


PRE = {
    "gpt-2": WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    **{name: split(steps[0]) for steps, name in PRE_TOKENIZERS.items() if steps[-1] == "bytes"},
}


def byte_level(folder: Path, pre: Any, **options: Any) -> Path:
    """A byte-level BPE tokenizer of 320 tokens with the pre-tokenizer `pre`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return saved(folder, backend, **options)


def sentencepiece(folder: Path, space: bool) -> Path:
    """BPE with byte fallback as converted SentencePiece models are: <unk>, <s>, </s>, 256 bytes, then pieces."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "merged_with_next")
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: number for number, token in enumerate(first)}
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    vocabulary |= {token: number for number, (token, _) in enumerate(pieces, len(first))}
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] * space + [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in first[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return saved(folder, backend, unk_token="<unk>")


def saved(folder: Path, backend: Tokenizer, **options: Any) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("name", PRE)
def test_pre_tokenizers_are_recognised(tmp_path: Path, name: str) -> None:
    folder = byte_level(tmp_path, PRE[name])
    count = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    metadata = read_tokenizer(folder, count + 10)
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.tokens"][count:] == [f"[PAD{number}]" for number in range(count, count + 10)]
    assert metadata["tokenizer.ggml.token_type"][count - 1 :] == [1] + [5] * 10
    assert all(merge.count(" ") == 1 for merge in metadata["tokenizer.ggml.merges"])


def test_unknown_pre_tokenizers_are_refused_unless_named(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, split(r"\w+|\s+"))
    with pytest.raises(FormatError, match=r"without a known name.*tokenizer.ggml.pre by hand"):
        read_tokenizer(folder, 320)
    assert read_tokenizer(folder, 320, "tekken")["tokenizer.ggml.pre"] == "tekken"
    lower = byte_level(tmp_path / "lower", WORDS)
    backend = Tokenizer.from_file(str(lower / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(FormatError, match="Lowercase"):
        read_tokenizer(saved(tmp_path / "lower", backend), 320)


def test_special_tokens_and_template(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, WORDS)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    saved(folder, backend, chat_template="{{ messages }}", extra_special_tokens=["<extra>"])
    metadata = read_tokenizer(folder, 400)
    assert metadata["tokenizer.ggml.add_bos_token"]
    assert not metadata["tokenizer.ggml.add_eos_token"]
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert metadata["tokenizer.ggml.token_type"][metadata["tokenizer.ggml.tokens"].index("<extra>")] == 3


@pytest.mark.parametrize("space", [False, True])
def test_sentencepiece(tmp_path: Path, space: bool) -> None:
    metadata = read_tokenizer(sentencepiece(tmp_path, space), 400)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] == space
    assert metadata["tokenizer.ggml.add_bos_token"]
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    assert scores["e"] == -1e6
    assert 0 >= scores["he"] > scores["▁the"] > -200


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        read_tokenizer(tmp_path, 320)
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}))
    with pytest.raises(FormatError, match="WordLevel, needed BPE"):
        read_tokenizer(saved(tmp_path / "words", backend), 320)
    with pytest.raises(FormatError, match="has a token"):
        read_tokenizer(byte_level(tmp_path / "bytes", WORDS), 300)


@pytest.mark.parametrize("name", [*PRE, "sentencepiece", "sentencepiece without space"])
def test_llama_cpp_cuts_text_alike(tmp_path: Path, name: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    import gguf

    from bitwright.export.gguf import _add

    if name in PRE:
        folder = byte_level(tmp_path, PRE[name])
    else:
        folder = sentencepiece(tmp_path, name == "sentencepiece")
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    for key, value in read_tokenizer(folder, 400).items():
        _add(writer, key, value)
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 32)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert model.tokenize(SAMPLE.encode(), add_bos=False) == tokenizer.encode(SAMPLE, add_special_tokens=False)
