"""Structured mutations: a file stays nearly what it was, and is wrong in one to three places.

Everything is drawn from the random numbers that a caller seeds, so a mutant is the same on every machine.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Mutation = Callable[[Path, Random], None]
"""Changes the file at a path."""

_LENGTH_BYTES = 8
_DEEP = 100_000
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, -(2**31), 2**53, 2**63, 2**64, 10**9, 10**15, 10**30,
    0.0, -0.5, 1.5, 1e-320, 1e400, -1e400, math.nan,
    "", "a", "auto", "llama", "bitwright", "float64", "../../etc/passwd", "/etc/passwd", "model.safetensors",
    "pytorch_model.bin", "\x00", "\x1b[31mred", "[/bold]", "=1+1", "\u202e", "\ud800", "é" * 300, "0" * 5000,
    [], [None], [0], [1, 1], [[]], [10**12, 10**12], ["x"] * 1000,
    {}, {"a": 1}, {"": {}}, {"name": "x"}, {"0": [{}]},
]  # fmt: skip
_KEYS = ("x", "", "auto_map", "quantization_config", "transformers_weights", "text_config", "rope_scaling")
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4")


def json_mutation(path: Path, random: Random) -> None:
    """Of a JSON file: values, keys and nesting; now and then its bytes."""
    path.write_bytes(_mutated_json(path.read_bytes(), random))


def lines_mutation(path: Path, random: Random) -> None:
    """Of a file of JSON lines: one line, or their order."""
    lines = path.read_bytes().splitlines(keepends=True)
    index = random.randrange(len(lines))
    kind = random.choice(("line", "line", "line", "swap", "twice", "drop", "bytes"))
    if kind == "line":
        lines[index] = _mutated_json(lines[index], random) + b"\n"
    elif kind == "swap":
        random.shuffle(lines)
    elif kind == "twice":
        lines.append(lines[index])
    elif kind == "drop":
        del lines[index]
    data = b"".join(lines)
    path.write_bytes(_mutated_bytes(data, random) if kind == "bytes" else data)


def toml_mutation(path: Path, random: Random) -> None:
    """Of a TOML file: values, keys, tables; now and then its bytes."""
    text = path.read_text(encoding="utf-8")
    for _ in range(random.choice((1, 1, 2))):
        lines = text.split("\n")
        index = random.randrange(len(lines))
        kind = random.choice(("value", "value", "value", "key", "drop", "twice", "table", "deep", "bytes"))
        key, _, value = lines[index].partition(" = ")
        if kind == "value" and value:
            lines[index] = f"{key} = {_toml_literal(random)}"
        elif kind == "key":
            other = random.choice((f"{key}x", "", "name", r'"\u0000"'))
            lines[index] = f"{other} = {value or 1}"
        elif kind == "drop":
            del lines[index]
        elif kind == "twice":
            lines.insert(index, lines[index])
        elif kind == "table":
            lines.insert(index, random.choice(("[method]", "[[rules]]", "[scheme]", "[x.y]", "[]", "[a.", "[[]]")))
        elif kind == "deep":
            lines[index] = (
                f"{key or 'a'} = {'[' * 50_000}" if random.random() < 0.5 else ".".join("a" * 50_000) + " = 1"
            )
        text = "\n".join(lines)
        if kind == "bytes":
            path.write_bytes(_mutated_bytes(text.encode(), random))
            return
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def safetensors_mutation(path: Path, random: Random) -> None:
    """Of a safetensors file: its header, the length of it, or its data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    header, body = data[_LENGTH_BYTES : _LENGTH_BYTES + length], data[_LENGTH_BYTES + length :]
    kind = random.choice(("header", "header", "header", "swap", "swap", "length", "data", "data", "bytes"))
    if kind == "header":
        header = _mutated_json(header, random)
    elif kind == "swap":
        header = _swapped(header, random)
    elif kind == "data":
        path.write_bytes(data[: _LENGTH_BYTES + length] + _mutated_numbers(body, random))
        return
    elif kind == "bytes":
        path.write_bytes(_mutated_bytes(data, random))
        return
    said = random.choice((0, 1, length - 1, 2**40, 2**63, 2**64 - 1)) if kind == "length" else len(header)
    path.write_bytes(said.to_bytes(_LENGTH_BYTES, "little") + header + body)


def bytes_mutation(path: Path, random: Random) -> None:
    """Of any file: bits, runs of bytes, its end; more often where a header would be."""
    path.write_bytes(_mutated_bytes(path.read_bytes(), random))


# --- JSON --------------------------------------------------------------------------------------------------


def _mutated_json(data: bytes, random: Random) -> bytes:
    if random.random() < 0.08:
        return _mutated_bytes(data, random)
    content = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = _changed(content, random)
    text = json.dumps(content)
    extra = random.random()
    if extra < 0.06:
        text = _key_twice(text, random)
    elif extra < 0.09:
        text = text.replace("null", "[" * random.choice((100, _DEEP)), 1)
    return text.encode("utf-8", "surrogatepass")


def _changed(content: Any, random: Random) -> Any:
    """`content` with one place changed."""
    content = copy.deepcopy(content)
    places = [(parent, key) for parent in _containers(content) for key in _keys(parent)]
    if not places:
        return random.choice(_VALUES)
    # Files have long lists of like entries: a place is drawn by depth first, so that short tables are hit, too.
    parent, key = random.choice(places) if random.random() < 0.5 else _descended(content, random)
    kind = random.choice(("value", "value", "value", "near", "near", "drop", "rename", "move", "wrap", "add"))
    value = parent[key]
    if kind == "value":
        parent[key] = copy.deepcopy(random.choice(_VALUES))
    elif kind == "near":
        parent[key] = _near(value, random)
    elif kind == "drop":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[str(key) + random.choice(("x", ".", "\x00", "/../"))] = parent.pop(key)
    elif kind == "move":
        other, place = random.choice(places)
        parent[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(value)
    elif kind == "wrap":
        depth = random.choice((1, 1, 2, 70, 2000))
        for _ in range(depth if depth < 2000 else 300):
            value = [value] if random.random() < 0.5 else {"a": value}
        parent[key] = value
    elif isinstance(parent, dict):
        parent[random.choice(("x", "", "auto_map", "quantization_config", "transformers_weights", "text_config"))] = (
            value
        )
    else:
        parent.insert(random.randrange(len(parent) + 1), value)
    return content


def _containers(content: Any) -> list[Any]:
    found, waiting = [], [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list) and one:
            found.append(one)
            waiting += one.values() if isinstance(one, dict) else one
    return found


def _keys(parent: Any) -> list[Any]:
    return list(parent) if isinstance(parent, dict) else list(range(len(parent)))


def _descended(content: Any, random: Random) -> tuple[Any, Any]:
    while True:
        key = random.choice(_keys(content))
        inner = content[key]
        if not isinstance(inner, dict | list) or not inner or random.random() < 0.3:
            return content, key
        content = inner


def _near(value: Any, random: Random) -> Any:
    """Something that a value might have been."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice(
            (value + 1, value - 1, -value, value * 2, value // 2, value * 10**6, float(value), str(value))
        )
    if isinstance(value, float):
        return random.choice((-value, value * 1e30, 0.0, int(value) if math.isfinite(value) else 0, str(value)))
    if isinstance(value, str):
        longer = value + random.choice(("x", "\n", "\x1b[2J", " ", ".bin"))
        return random.choice((longer, value[:-1], value.upper(), f"../{value}", value.encode()[::-1].decode("latin-1")))
    if isinstance(value, list):
        return random.choice((value[::-1], value + value, value[1:], dict.fromkeys(map(str, value))))
    if isinstance(value, dict):
        return random.choice((list(value), list(value.items()), {**value, "x": 1}, dict.fromkeys(value)))
    return random.choice((0, "", [], {}))


def _key_twice(text: str, random: Random) -> str:
    keys = list(re.finditer(r'"(?:[^"\\]|\\.)*": ', text))
    if not keys:
        return text
    found = random.choice(keys)
    return f"{text[: found.start()]}{found[0]}{random.choice(('1', 'null', '[]'))}, {text[found.start() :]}"


# --- other formats -----------------------------------------------------------------------------------------


def _toml_literal(random: Random) -> str:
    value = random.choice(_VALUES)
    if value is None or isinstance(value, list | dict):
        return random.choice(("[]", "{}", "nan", "inf", "1979-05-27", "[[1], {a = 1}]", "'''", "1__0", "0x"))
    return json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan")


def _swapped(header: bytes, random: Random) -> bytes:
    """A header two tensors of which have changed places, shapes or types."""
    content = json.loads(header)
    names = [name for name in content if name != "__metadata__"]
    one, other = random.choice(names), random.choice(names)
    kind = random.choice(("name", "shape", "dtype", "data_offsets"))
    if kind == "name":
        content[one], content[other] = content[other], content[one]
    else:
        content[one][kind], content[other][kind] = content[other][kind], content[one][kind]
    if random.random() < 0.3:
        content[one]["dtype"] = random.choice(
            ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4")
        )
    if random.random() < 0.3:
        content[one]["shape"] = random.choice(([], content[one]["shape"][::-1], [*content[one]["shape"], 1], [0]))
    return json.dumps(content).encode()


def _mutated_numbers(data: bytes, random: Random) -> bytes:
    """Tensor data with some bytes at random, all ones (NaN in every float type), or zero."""
    start = random.randrange(max(1, len(data)))
    length = random.choice((1, 2, 8, 64, 4096, len(data)))
    new = {0: b"\xff", 1: b"\x00", 2: b"\x7f"}.get(random.randrange(4), random.randbytes(1))
    return data[:start] + (new * length)[: len(data) - start] + data[start + length :]


def _mutated_bytes(data: bytes, random: Random) -> bytes:
    for _ in range(random.choice((1, 1, 2, 8))):
        start = random.randrange(len(data) + 1) if random.random() < 0.5 else random.randrange(min(len(data), 512) + 1)
        length = random.choice((1, 1, 4, 8, 100))
        kind = random.choice(("flip", "flip", "set", "insert", "cut", "drop", "repeat"))
        if kind == "flip" and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << random.randrange(8)]) + data[start + 1 :]
        elif kind == "set":
            new = random.choice((random.randbytes(length), b"\xff" * length, b"\x00" * length))
            data = data[:start] + new + data[start + length :]
        elif kind == "insert":
            data = data[:start] + random.randbytes(length) + data[start:]
        elif kind == "cut":
            data = data[:start]
        elif kind == "drop":
            data = data[:start] + data[start + length :]
        elif kind == "repeat":
            data = data[:start] + data[max(0, start - length) : start] * 3 + data[start:]
    return data
