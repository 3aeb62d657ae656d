"""Regular expressions of foreign configs, matched in linear time.

Python's own matcher backtracks: an expression of 20 characters can take longer than the universe lasts. Here
expressions run on the finite automata of Rust's regex crate, which come with pydantic. They have no lookaround and
no references; what configs use of these, assertions at the very beginning (`^(?!.*experts).*`), is taken apart.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping

from pydantic_core import SchemaError, SchemaValidator, core_schema

from bitwright.errors import FormatError

LONGEST_PATTERN = 1000
MOST_PATTERNS = 1000
_LARGEST_REPEAT = 1000
_COUNTED = re.compile(r"\{(\d*),?(\d*)\}")


class Pattern:
    """An expression that is matched at the beginning of a name, as `re.match` does it."""

    def __init__(self, expression: str, where: str):
        """Compile `expression`; `where` it is goes into messages.

        Raises:
            FormatError: it is no regular expression, or one that cannot be matched in linear time.
        """
        self._where, self._shown = where, expression[:80]
        if len(expression) > LONGEST_PATTERN:
            raise self._refusal(f"has {len(expression)} characters, at most {LONGEST_PATTERN} are read")
        if _repeats(expression) > _LARGEST_REPEAT:
            raise self._refusal(f"repeats more than {_LARGEST_REPEAT} times")
        with warnings.catch_warnings():
            # what Python is going to read otherwise one day, Rust does read otherwise
            warnings.simplefilter("error")
            try:
                re.compile(expression)
            except (re.error, RecursionError, OverflowError, Warning) as error:
                raise self._refusal(f"is no expression ({error})") from None
        self._assertions: list[tuple[bool, SchemaValidator]] = []
        rest = expression.removeprefix("^")
        # With alternatives, an assertion would be one of the first alone.
        while rest.startswith(("(?!", "(?=")) and not _has_alternatives(rest):
            end = _closing(rest)
            self._assertions.append((rest[2] == "=", self._compiled(rest[3:end])))
            rest = rest[end + 1 :]
        self._rest = self._compiled(rest)

    def matches(self, name: str) -> bool:
        """Whether it matches at the beginning of `name`."""
        wanted = all(inner.isinstance_python(name) is holds for holds, inner in self._assertions)
        return wanted and self._rest.isinstance_python(name)

    def _compiled(self, expression: str) -> SchemaValidator:
        # \Z is spelled \z there
        spelled = re.sub(r"(?<!\\)((?:\\\\)*)\\Z", r"\1\\z", expression)
        try:
            return SchemaValidator(core_schema.str_schema(pattern=rf"\A(?:{spelled})", regex_engine="rust-regex"))
        except SchemaError as error:
            reason = " ".join(str(error).split())[-200:]
            raise self._refusal(
                f"cannot be matched in linear time ({reason}); write it without lookaround and references"
            ) from None

    def _refusal(self, problem: str) -> FormatError:
        return FormatError(f"{self._where}: {self._shown!r} {problem}")


def compiled(expressions: Mapping[str, str], where: str) -> dict[str, Pattern]:
    """Key -> pattern for key -> expression.

    Raises:
        FormatError: one is refused, see `Pattern`, or there are more than `MOST_PATTERNS`.
    """
    if len(expressions) > MOST_PATTERNS:
        raise FormatError(f"{where}: {len(expressions)} expressions, at most {MOST_PATTERNS} are read")
    return {key: Pattern(expression, where) for key, expression in expressions.items()}


def _repeats(expression: str) -> int:
    """How often counts may repeat a part of `expression`, at most: by so much does what it is compiled to grow."""
    return math.prod(max(int(number or 1) for number in pair) or 1 for pair in _COUNTED.findall(expression))


def _closing(text: str) -> int:
    """Where the bracket closes with which `text`, a regular expression, starts."""
    return next(position for position, mark, depth in _structure(text) if mark == ")" and depth == 0)


def _has_alternatives(text: str) -> bool:
    """Whether `text` is several expressions with `|` between them."""
    return any(mark == "|" and depth == 0 for _, mark, depth in _structure(text))


def _structure(text: str) -> Iterator[tuple[int, str, int]]:
    """Position and character of what is neither escaped nor in a class, and how many groups are open behind it."""
    depth, in_class, position = 0, False, 0
    while position < len(text):
        mark = text[position]
        if mark == "\\":
            position += 1
        elif in_class:
            in_class = mark != "]"
        elif mark == "[":
            in_class = True
            # a bracket that closes is itself a member where it comes first
            position += text[position + 1 : position + 2] == "^"
            position += text[position + 1 : position + 2] == "]"
        else:
            depth += {"(": 1, ")": -1}.get(mark, 0)
            yield position, mark, depth
        position += 1
