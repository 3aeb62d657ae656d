"""Generate text with any MODEL, float or quantized: on the lean decode path, or else in transformers' own loop."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.chat import chosen_template, render
from bitwright.checkpoint.load import LoadedModel, load_model, tokenizer_of
from bitwright.errors import CheckpointError, EvaluationError
from bitwright.execute.shown import Shown
from bitwright.runtime.decode import LeanDecoder, supports
from bitwright.untrusted.boundary import reading
from bitwright.untrusted.ids import check_ids, embedding_rows

# Settings of transformers that change greedy choices, and the values (besides None) that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "stop_strings": (),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "prompt_lookup_num_tokens": (),
    "dola_layers": (),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False, True),
}


@dataclass(frozen=True, repr=False)
class Generation(Shown):
    """A continuation and how fast it came.

    `fallback`: why transformers' own loop made it and not the lean decode path; None where that did.
    `template`: which chat template the prompt went through, where the tokenizer has several.
    """

    prompt: str
    text: str
    tokens: int
    seconds: float
    fallback: str | None = None
    template: str | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is worth knowing of the way that it came."""
        loop = None if self.fallback is None else f"in transformers' own loop: {self.fallback}"
        return tuple(filter(None, (loop, self.template)))

    def facts(self) -> dict[str, str]:
        """See `Shown.facts`."""
        return {"prompt": self.prompt, "text": self.text, "tokens": f"{self.tokens} in {self.seconds:.1f} s"}


def generate(model: str, prompt: str, *, tokens: int = 32, chat: bool = False) -> Generation:
    """The greedy continuation of `prompt`, at most `tokens` new tokens.

    With `chat` the prompt goes through the tokenizer's chat template as a user's message.

    Raises:
        CheckpointError, FormatError: the model cannot be loaded.
        EvaluationError: the prompt is empty, `tokens` is not positive, or `chat` is asked for and the tokenizer has no
            chat template, or one that fails.
    """
    if not prompt or tokens < 1:
        raise EvaluationError(f"a prompt and a positive number of tokens are needed, got {prompt!r} and {tokens}")
    tokenizer = tokenizer_of(model)
    template, text = _chat(tokenizer, model, prompt) if chat else (None, prompt)
    loaded = load_model(model)
    with reading(f"{model}, its tokenizer", CheckpointError):
        inputs = tokenizer(text, return_tensors="pt")
    ids = inputs["input_ids"]
    if not ids.numel():
        raise EvaluationError(f"{model}: its tokenizer makes no token of the prompt {prompt!r}; give another prompt")
    check_ids(ids, embedding_rows(loaded.model), f"{model}: the prompt", CheckpointError)
    with reading(f"{model}: running it", EvaluationError, "check its config.json and generation_config.json"):
        fallback = supports(loaded.model, ids.shape[1] + tokens) or _not_greedy(loaded.model.generation_config)
        started = time.perf_counter()
        new = _continued(loaded, inputs, tokens, fallback)
        seconds = time.perf_counter() - started
        said = tokenizer.decode(new, skip_special_tokens=True)
    return Generation(prompt, said, len(new), seconds, fallback, template)


def _continued(loaded: LoadedModel, inputs: Any, tokens: int, fallback: str | None) -> list[int]:
    """At most `tokens` new tokens behind `inputs`, by transformers' own loop where there is a `fallback`."""
    ids, settings = inputs["input_ids"], loaded.model.generation_config
    if fallback is None:
        return _lean(LeanDecoder(loaded.model, max_length=ids.shape[1] + tokens), ids[0], tokens, _ends(settings))
    with torch.no_grad():
        output = loaded.model.generate(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
        )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def _chat(tokenizer: Any, model: str, prompt: str) -> tuple[str | None, str]:
    """Which of several templates is used, and the prompt as a user's message in it."""
    try:
        message = [{"role": "user", "content": prompt}]
        return chosen_template(tokenizer), render(tokenizer, message, answer=True)
    except EvaluationError as error:
        raise EvaluationError(f"{model}: {error}; or leave --chat out to continue the prompt as it is") from error


def _lean(decoder: LeanDecoder, ids: Tensor, tokens: int, ends: set[int]) -> list[int]:
    """At most `tokens` new tokens behind `ids` [tokens]; one of `ends` is the last."""
    new = [int(decoder.prefill(ids).argmax())]
    while len(new) < tokens and new[-1] not in ends:
        new.append(int(decoder.step(new[-1]).argmax()))
    return new


def _ends(config: Any) -> set[int]:
    """The tokens that end a text."""
    ends = config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list) else {ends}


def _not_greedy(config: Any) -> str | None:
    """A setting of the model's generation_config by which transformers would not take the likeliest token."""
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            return f"generation_config.json sets {name} to {value}"
    return None
