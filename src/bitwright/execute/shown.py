"""How results and names show themselves: short in a prompt, as a small table in a notebook, never as control codes.

Names of tensors, folders and models, and text from files, may hold anything. `visible` is what makes them harmless
on a terminal; whatever prints a text that others wrote puts it through that.
"""

from __future__ import annotations

import unicodedata
from html import escape

# Control and format characters (bidirectional overrides among them), lone surrogates, separators of lines.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: object, keep: str = "") -> str:
    r"""`text` in which characters that act on a terminal instead of being seen are spelled out, such as `\x1b`.

    Args:
        text: anything; what `str` makes of it counts.
        keep: characters that stay as they are, such as newlines.
    """
    found = str(text)
    if found.isprintable():
        return found
    return "".join(one if one in keep or _seen(one) else one.encode("unicode_escape").decode() for one in found)


def _seen(character: str) -> bool:
    return unicodedata.category(character) not in _UNSEEN


class Shown:
    """A result that says in one line what it is, and in a notebook in one small table.

    Dataclasses that derive from it need `repr=False`, or they would show every field of every tensor.
    """

    def facts(self) -> dict[str, str]:
        """The few things to know, by what they are called."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """One line."""
        return f"<{type(self).__name__} {', '.join(f'{name}: {visible(text)}' for name, text in self.facts().items())}>"

    def __str__(self) -> str:
        """The same line."""
        return repr(self)

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = (
            f"<tr><th>{escape(name)}</th><td>{escape(visible(text))}</td></tr>" for name, text in self.facts().items()
        )
        return f"<table><caption>{escape(type(self).__name__)}</caption>{''.join(rows)}</table>"
