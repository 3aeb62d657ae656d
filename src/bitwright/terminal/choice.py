"""Options that take one of a few words: in capitals or not, and with the word that was perhaps meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import typer

from bitwright.numeric.settings import known_name, nearest_name


def one_of(kind: Any, flag: str, help: str) -> Any:
    """The option `flag`, whose values are those of the Literal `kind`."""
    words = get_args(kind)
    return typer.Option(flag, parser=_parser(words), metavar=f"[{'|'.join(words)}]", help=help)


def _parser(words: tuple[str, ...]) -> Callable[[str], str]:
    def parse(given: str) -> str:
        found = known_name(given, words)
        if found is None:
            raise typer.BadParameter(f"{given!r} is unknown{nearest_name(given, words)}")
        return found

    return parse
