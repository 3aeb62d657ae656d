"""Conversations as the model reads them: messages through the chat template of its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitwright.errors import EvaluationError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
_KEYS = (("role", "content"), ("from", "value"))
"""How data sets name the speaker and the words of a message: that of OpenAI, and of ShareGPT."""


def chosen_template(tokenizer: Any) -> str | None:
    """Which of several chat templates is used, in words; None where the tokenizer has just one.

    Raises:
        EvaluationError: it has none, or several of which none is called `default`.
    """
    templates = getattr(tokenizer, "chat_template", None)
    if not templates:
        raise EvaluationError(
            "the tokenizer has no chat template; needed chat_template.jinja in the model's folder, or chat_template in "
            "its tokenizer_config.json, as instruction-tuned models have it; put there the one of the model's "
            "instruction-tuned version"
        )
    if not isinstance(templates, Mapping):
        return None
    if "default" not in templates:
        raise EvaluationError(
            f"the tokenizer has the chat templates {', '.join(sorted(templates))}, none of them called default; "
            "rename the one to use to default in tokenizer_config.json"
        )
    return f"chat template default of {', '.join(sorted(templates))}"


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, answer: bool = False) -> str:
    """A conversation as text, special tokens included; with `answer` it ends where the model's turn begins.

    Raises:
        EvaluationError: the tokenizer has no chat template, or the template does not take these messages.
    """
    chosen_template(tokenizer)
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer))
    except Exception as error:  # a template is a program and raises what it likes
        raise EvaluationError(
            f"the tokenizer's chat template fails with {type(error).__name__}: {error}; the roles of the messages are "
            f"{', '.join(message['role'] for message in messages[:6])}; mend the template or the messages"
        ) from error


def as_messages(value: Any) -> list[dict[str, str]] | None:
    """The messages of a conversation, `role` and `content` each; None where `value` is none."""
    if not isinstance(value, list) or not value:
        return None
    found = []
    for message in value:
        pair = next((keys for keys in _KEYS if isinstance(message, Mapping) and keys[0] in message), None)
        if pair is None or not isinstance(message[pair[0]], str):
            return None
        content = _content(message.get(pair[1]))
        if content is None:
            return None
        role = message[pair[0]]
        found.append({"role": _ROLES.get(role.lower(), role), "content": content})
    return found


def _content(value: Any) -> str | None:
    """The words of a message: a string, or the parts of type text of a list."""
    if value is None:
        return ""  # a call of a tool has no words
    if isinstance(value, list):
        parts = [part.get("text") for part in value if isinstance(part, Mapping) and part.get("type") == "text"]
        return "\n".join(part for part in parts if isinstance(part, str)) if parts else None
    return value if isinstance(value, str) else None
