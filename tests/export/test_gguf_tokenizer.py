"""Tokenizers as GGUF metadata; where llama-cpp-python is installed, it must cut text into the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitwright.errors import CheckpointError, FormatError
from bitwright.export.gguf import _add
from bitwright.export.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer
from bitwright.export.gguf_tokenizer_import import write_tokenizer
from bitwright.export.gguf_tokenizer_json import KEY, merges_of

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


def vocabulary_file(place: Path, metadata: dict[str, Any]) -> Path:
    """A file that holds a tokenizer and no tensors."""
    writer = gguf.GGUFWriter(place / "vocabulary.gguf", "llama")
    for key, value in metadata.items():
        _add(writer, key, value)
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 32)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place / "vocabulary.gguf"


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


# --- and back ----------------------------------------------------------------------------------------------


def rebuilt(place: Path, metadata: dict[str, Any], vocab_size: int = 400) -> Any:
    """The tokenizer of a file with these keys."""
    folder = place / "rebuilt"
    folder.mkdir()
    write_tokenizer(vocabulary_file(place, metadata), {"vocab_size": vocab_size, "eos_token_id": 1}, folder)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1
    assert str(place) not in (folder / "tokenizer_config.json").read_text()
    return AutoTokenizer.from_pretrained(folder)


def uncommon(folder: Path) -> Path:
    """What GGUF has no words for: NFC and stripping, words taken whole, a template around two texts."""
    byte_level(folder, PRE["gpt-2"])
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    content = json.loads(backend.to_str())
    content["model"]["ignore_merges"] = True
    backend = Tokenizer.from_str(json.dumps(content))
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<think>", lstrip=True, rstrip=True, normalized=False)])
    backend.add_special_tokens([AddedToken("｜end｜", single_word=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return saved(folder, backend, chat_template="{{ messages }}", model_max_length=77, padding_side="left")


KINDS = {
    **{name: lambda folder, name=name: byte_level(folder, PRE[name]) for name in PRE},
    "sentencepiece": lambda folder: sentencepiece(folder, True),
    "sentencepiece without space": lambda folder: sentencepiece(folder, False),
    "uncommon": uncommon,
}
TEXTS = [SAMPLE, "  two </s> spaces<s>", "naïve cafe\u0301 <think>  the dog ｜end｜", "", "\n\n12\n"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_exported_comes_back(tmp_path: Path, kind: str) -> None:
    ours = AutoTokenizer.from_pretrained(KINDS[kind](tmp_path / "float"))
    metadata = read_tokenizer(tmp_path / "float", 400, None if kind != "uncommon" else "gpt-2")
    theirs = rebuilt(tmp_path, metadata)
    assert theirs.backend_tokenizer.to_str() == ours.backend_tokenizer.to_str()
    assert theirs.get_vocab() == ours.get_vocab()
    for name in ("special_tokens_map", "chat_template", "model_max_length", "padding_side"):
        assert getattr(theirs, name) == getattr(ours, name), name
    for text in TEXTS:
        assert theirs(text, SAMPLE) == ours(text, SAMPLE)
        assert theirs.decode(theirs(text).input_ids) == ours.decode(ours(text).input_ids)


def test_vocabulary_and_merges_are_not_stored_twice(tmp_path: Path) -> None:
    metadata = read_tokenizer(byte_level(tmp_path, WORDS), 400)
    model = json.loads(metadata[KEY])["tokenizer"]["model"]
    assert (model["vocab"], model["merges"]) == (None, None)


@pytest.mark.parametrize("implied", [True, False])
def test_merges_are_stored_unless_scores_imply_them(tmp_path: Path, implied: bool) -> None:
    """Scores imply every way to cut a token into two known ones, as converters of SentencePiece models make merges."""
    folder = sentencepiece(tmp_path, True)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    if not implied:
        # a second way to "the", long after the first one
        content["model"]["vocab"]["th"] = len(content["model"]["vocab"])
        content["model"]["merges"] += [["t", "h"], ["th", "e"]]
    path.write_text(json.dumps(content))
    metadata = read_tokenizer(folder, 400)
    stored = json.loads(metadata[KEY])["tokenizer"]["model"]
    assert stored["vocab"] is None
    assert stored["merges"] == (None if implied else content["model"]["merges"])
    assert (merges_of(metadata) == content["model"]["merges"]) == implied
    theirs = rebuilt(tmp_path, metadata)
    assert theirs.backend_tokenizer.to_str() == AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()


@pytest.mark.parametrize("name", PRE)
def test_files_of_others_are_cut_as_they_say(tmp_path: Path, name: str) -> None:
    folder = byte_level(tmp_path / "float", PRE[name])
    metadata = read_tokenizer(folder, 400)
    del metadata[KEY]
    ours, theirs = AutoTokenizer.from_pretrained(folder), rebuilt(tmp_path, metadata)
    for text in (SAMPLE, "  two </s> spaces<s>", "12\n"):
        assert theirs(text).input_ids == ours(text).input_ids
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    assert theirs.decode(ours(SAMPLE).input_ids) == SAMPLE


def test_first_and_last_tokens_of_others(tmp_path: Path) -> None:
    metadata = read_tokenizer(byte_level(tmp_path, PRE["llama-bpe"]), 400)
    del metadata[KEY]
    metadata |= {
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.pre": "llama3",
    }
    theirs = rebuilt(tmp_path, metadata)
    assert theirs("a").input_ids == [0, *theirs("a", add_special_tokens=False).input_ids, 1]
    assert theirs.backend_tokenizer.model.ignore_merges


def test_words_that_transformers_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = read_tokenizer(byte_level(tmp_path, WORDS), 400, "tekken")
    del metadata[KEY]
    assert rebuilt(tmp_path, metadata)("THEdog").input_ids
    # where transformers does not know a name, it takes GPT-2's words
    monkeypatch.setattr("bitwright.export.gguf_tokenizer_import._READ_BY_TRANSFORMERS", {"viking"})
    path = vocabulary_file(tmp_path, {**metadata, "tokenizer.ggml.pre": "viking"})
    with pytest.raises(CheckpointError, match="pre is 'viking', which the installed transformers does not cut"):
        write_tokenizer(path, {"vocab_size": 400}, tmp_path)


def test_sentencepiece_of_others_is_left_to_transformers(tmp_path: Path) -> None:
    metadata = read_tokenizer(sentencepiece(tmp_path, True), 400)
    del metadata[KEY]
    theirs = rebuilt(tmp_path, metadata)
    text = "The quick brown fox"
    assert theirs(text).input_ids == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids


@pytest.mark.parametrize("name", [*PRE, "sentencepiece", "sentencepiece without space"])
def test_llama_cpp_cuts_text_alike(tmp_path: Path, name: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    if name in PRE:
        folder = byte_level(tmp_path, PRE[name])
    else:
        folder = sentencepiece(tmp_path, name == "sentencepiece")
    path = vocabulary_file(tmp_path, read_tokenizer(folder, 400))
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert model.tokenize(SAMPLE.encode(), add_bos=False) == tokenizer.encode(SAMPLE, add_special_tokens=False)
