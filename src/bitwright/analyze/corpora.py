"""Texts of many kinds for calibration sets, none of them shipped: from the standard library, from packages with
translations, or made up.

Each kind has a calibration half and an evaluation half, told apart by hash: files of code, docstrings and translated
messages are in one of them. Docstrings fall into the same half as in `calibration.text.builtin`. Code comes without
its docstrings, so that no half of the code holds text of the other half of the documentation.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import random
import re
import string
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from bitwright.calibration.text import Split, Text
from bitwright.errors import CalibrationError

CODE_CHARACTERS = 800_000
"""Of standard-library code in each half: some 250,000 tokens."""
TRANSLATED = ("Django", "wagtail")
"""Packages that carry translations of short interface texts into about a hundred languages."""
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "ensurepip", "__pycache__"}
_LONGEST_FILE = 200_000  # bytes; longer files are tables
_PLACEHOLDER = re.compile(r"%\([^)]*\)[srd]|%[srd]|\{[^}]*\}|<[^>]*>|&\w+;")
_MESSAGE = re.compile(r'^msgstr(?:\[\d+\])?((?:\s+"(?:[^"\\\n]|\\.)*")+)', re.MULTILINE)
_NOISE = string.punctuation + string.whitespace
_NAMES = ("Mara", "Jonas", "Aiko", "Tomas", "Leila", "Samuel", "Priya", "Oskar", "Nadia", "Felix")
_THINGS = ("apples", "books", "stamps", "bottles", "tickets", "pencils", "shells", "coins", "bricks", "cards")


@dataclass(frozen=True)
class _Module:
    """A standard-library file: its code without docstrings, and (function, first line, half) of its docstrings."""

    name: str
    code: str
    half: Split
    described: tuple[tuple[str, str, Split], ...]


def code(split: Split) -> Text:
    """Source code of the standard library."""
    parts = [module.code for module in _modules() if module.half == split]
    return Text(f"stdlib-code-{split}-py{platform.python_version()}", "\n\n".join(parts))


@lru_cache(maxsize=2)
def task(split: Split) -> Text:
    """Multiple-choice questions with their answers: what a documented function is for, and small sums in words."""
    generator = random.Random(f"task {split}")
    found = []
    for module in _modules():
        names = sorted({name for name, _, _ in module.described})
        if len(names) < 4:
            continue
        for name, summary, half in module.described:
            if half == split:
                wrong = generator.sample([other for other in names if other != name], 3)
                question = f"Which name in the Python module {module.name} fits this description? {summary}"
                found += [_question(question, name, wrong, generator), _sum_in_words(generator)]
    generator.shuffle(found)
    return Text(f"task-{split}-py{platform.python_version()}", "\n\n".join(found))


@lru_cache(maxsize=4)
def language(locale: str, split: Split) -> Text:
    """Translated messages of the installed packages in `TRANSLATED`; `locale` as they name it: `de`, `zh_Hans`.

    Raises:
        CalibrationError: none of the packages is installed, or they lack the language.
    """
    known: set[str] = set()
    versions, messages = [], set()
    for package in TRANSLATED:
        try:
            found = distribution(package)
        except PackageNotFoundError:
            continue
        versions.append(f"{package} {found.version}")
        for file in found.files or ():
            if file.suffix == ".po" and "locale" in file.parts:
                place = file.parts[file.parts.index("locale") + 1]
                known.add(place)
                if place == locale:
                    messages |= set(_messages(Path(str(file.locate())).read_text(encoding="utf-8")))
    if not messages:
        have = f"{', '.join(versions)} have {', '.join(sorted(known))}" if versions else "neither is installed"
        raise CalibrationError(
            f"calibration text language:{locale}: needed translations from {' or '.join(TRANSLATED)}, and {have}; "
            "install one of them, choose a language that it has, or give the path of a text file"
        )
    ordered = sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in messages)
    kept = [text for digest, text in ordered if _half(digest) == split]
    return Text(f"language-{locale}-{split}-{'-'.join(versions).replace(' ', '-')}", "\n".join(kept))


def noise(characters: int, seed: int) -> Text:
    """Uniformly random ASCII punctuation and white space."""
    generator = random.Random(seed)
    return Text(f"nonsense-seed{seed}", "".join(generator.choices(_NOISE, k=characters)))


def _half(digest: str) -> Split:
    # the last digit, as calibration.text does it
    return "calibration" if int(digest[-1], 16) % 2 else "evaluation"


@lru_cache(maxsize=1)
def _modules() -> tuple[_Module, ...]:
    """Files of the standard library in an order of their own, until both halves have enough code."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    # names are hashed, not contents, so that only as many files as needed are read
    ordered = sorted(
        (hashlib.sha256(name.as_posix().encode()).hexdigest(), name) for name in names if not _SKIPPED & set(name.parts)
    )
    sizes: dict[Split, int] = {"calibration": 0, "evaluation": 0}
    found = []
    for digest, name in ordered:
        half = _half(digest)
        if sizes[half] < CODE_CHARACTERS and (module := _parse(root / name, name, half)) is not None:
            sizes[half] += len(module.code)
            found.append(module)
    if not min(sizes.values()):
        raise CalibrationError(
            f"calibration texts code and task: {root} has no Python sources; install the full standard library, or "
            "give text files"
        )
    return tuple(found)


def _parse(path: Path, name: Path, half: Split) -> _Module | None:
    """The file, or None where it cannot be read as Python text or is a table."""
    try:
        if path.stat().st_size > _LONGEST_FILE:
            return None
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError):
        return None
    lines = source.splitlines()
    described = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        expression = node.body[0]
        for line in range(expression.lineno - 1, expression.end_lineno or expression.lineno):
            lines[line] = ""
        summary = " ".join(text.partition("\n\n")[0].split())
        named = isinstance(node, ast.Module) or node.name.startswith("_")
        if not named and 40 <= len(summary) <= 300:
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
            described.append((node.name, summary, _half(digest)))  # type: ignore[union-attr]
    code = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
    return _Module(module, code, half, tuple(described))


def _question(question: str, right: str, wrong: list[str], generator: random.Random) -> str:
    choices = [right, *wrong]
    generator.shuffle(choices)
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    return "\n".join([f"Question: {question}", *lines, f"Answer: {'ABCD'[choices.index(right)]}"])


def _sum_in_words(generator: random.Random) -> str:
    name, thing = generator.choice(_NAMES), generator.choice(_THINGS)
    start, more = generator.randint(12, 98), generator.randint(3, 60)
    less = generator.randint(2, start + more - 5)
    question = f"{name} has {start} {thing}, finds {more} more and gives {less} away. How many {thing} are left?"
    right = start + more - less
    wrong = generator.sample([right + step for step in (-10, -3, -2, -1, 1, 2, 3, 10) if right + step >= 0], 3)
    return _question(question, str(right), [str(number) for number in wrong], generator)


def _messages(catalogue: str) -> Iterator[str]:
    """Translated messages of a gettext catalogue, without placeholders and markup."""
    for match in _MESSAGE.finditer(catalogue):
        text = "".join(ast.literal_eval(line.strip()) for line in match[1].splitlines() if line.strip())
        plain = " ".join(_PLACEHOLDER.sub("", text).split())
        if len(plain) >= 8 and "Content-Type:" not in text:
            yield plain
