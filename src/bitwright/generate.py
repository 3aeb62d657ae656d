"""Generate text with any MODEL, float or quantized."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from bitwright.checkpoint.load import load_model
from bitwright.errors import EvaluationError


@dataclass(frozen=True)
class Generation:
    """A continuation and how fast it came."""

    prompt: str
    text: str
    tokens: int
    seconds: float


def generate(model: str, prompt: str, *, tokens: int = 32, chat: bool = False) -> Generation:
    """The greedy continuation of `prompt`, at most `tokens` new tokens.

    With `chat` the prompt goes through the tokenizer's chat template as a user's message.

    Raises:
        CheckpointError, FormatError: the model cannot be loaded.
        EvaluationError: the prompt is empty, or `tokens` is not positive.
    """
    if not prompt or tokens < 1:
        raise EvaluationError(f"a prompt and a positive number of tokens are needed, got {prompt!r} and {tokens}")
    loaded = load_model(model)
    if chat and getattr(loaded.tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        text = loaded.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    else:
        text = prompt
    inputs = loaded.tokenizer(text, return_tensors="pt")
    started = time.perf_counter()
    with torch.no_grad():
        output = loaded.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
        )
    seconds = time.perf_counter() - started
    new = output[0, inputs["input_ids"].shape[1] :]
    return Generation(prompt, loaded.tokenizer.decode(new, skip_special_tokens=True), new.numel(), seconds)
