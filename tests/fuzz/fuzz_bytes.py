"""Changes of bytes, texts and JSON that know nothing of formats."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 7, 64, 127, 128, 255, 256, 4096, 32767, 32768, 65535, 65536, 10**6, 2**31 - 1, 2**31, 2**32 - 1,
    2**32, 10**12, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63),
)  # fmt: skip
TEXTS = (
    "", " ", "0", "-1", "1e999", "nan", "NaN", "inf", "-inf", "true", "null", "None", "[]", "{}", "[", "{", "'", '"',
    "\n", "a\nb", "\r\n", "\t", "\0", "\x1b[31m", "\u2028", "\ufeff", "\ud800", "é", "日本", "🙂", "\u202eabc",
    "x" * 300, "../../x", "/", "~", "-", "--", "%s", "%n", "$(id)", "`id`", "__class__", "10" * 200, "0x10", "1_000",
    "٣", "²", "config", "metadata", "model", "kind", "FCMAEConfig",
)  # fmt: skip
JSON = (
    None, True, False, 0, 1, -1, 2, 1.5, 1e308, float("nan"), float("inf"), -0.0, 10**6, 10**12, 10**25, 2**63, 10**400,
    "", "a\nb", "x" * 300, "NaN", "3", [], {}, [[]], [None], [0], [1] * 4, [1, 2, 2, 3], [10**6] * 4, [0.5],
    {"": 0}, {"a": {}}, ["\ud800"], [True] * 4, [-1, -1], [32, 32], [1e9, 1e9],
)  # fmt: skip


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def put_number(rng: random.Random, data: bytearray) -> None:
    size, order = rng.choice("BHIQ"), rng.choice("<>")
    packed = struct.pack(order + size, rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(size)))
    place = rng.randrange(len(data))
    data[place : place + len(packed)] = packed


def put_byte(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def remove(rng: random.Random, data: bytearray) -> None:
    place = rng.randrange(len(data))
    del data[place : place + _length(rng)]


def double(rng: random.Random, data: bytearray) -> None:
    place = rng.randrange(len(data))
    other = rng.choice((place, rng.randrange(len(data))))
    data[other:other] = data[place : place + _length(rng)]


def copy_over(rng: random.Random, data: bytearray) -> None:
    place, other, length = rng.randrange(len(data)), rng.randrange(len(data)), _length(rng)
    block = data[place : place + length]
    data[other : other + len(block)] = block


def fill(rng: random.Random, data: bytearray) -> None:
    place, value = rng.randrange(len(data)), rng.choice((0, 0, 255, 32, rng.randrange(256)))
    length = min(_length(rng), len(data) - place)
    data[place : place + length] = bytes([value]) * length


def insert(rng: random.Random, data: bytearray) -> None:
    place = rng.randrange(len(data))
    data[place:place] = rng.randbytes(rng.choice((1, 2, 4, 16)))


def _length(rng: random.Random) -> int:
    return rng.choice((1, 2, 4, 8, 16, 64, 64, 256, 1024, 4096))


CHANGES: Sequence[Callable[[random.Random, bytearray], None]] = (
    flip, flip, flip, put_number, put_number, put_byte, truncate, remove, double, copy_over, fill, insert,
)  # fmt: skip


def splice(rng: random.Random, one: bytes, other: bytes) -> bytes:
    """The head of one and the tail of the other, cut at the same share or anywhere."""
    share = rng.random()
    cut = int(len(one) * share)
    return one[:cut] + other[int(len(other) * (share if rng.random() < 0.5 else rng.random())) :]


def changed(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> tuple[bytes, str]:
    """The bytes with a few changes, and their names."""
    names = []
    if others and rng.random() < 0.1:
        data = splice(rng, data, rng.choice(others))
        names.append("splice")
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if result:
            change = rng.choice(CHANGES)
            # Headers are short and decide most: half of the changes go to the first or last bytes.
            part = rng.random()
            size = rng.choice((64, 256, 1024))
            if part < 0.3:
                window = result[:size]
                change(rng, window)
                result[:size] = window
            elif part < 0.5:
                window = result[-size:]
                change(rng, window)
                result[-size:] = window
            else:
                change(rng, result)
            names.append(change.__name__)
    return bytes(result), " ".join(names)


def changed_text(rng: random.Random, text: str, others: Sequence[str] = ()) -> str:
    """A text with words, letters or lines changed."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(text) + 1)
        end = min(len(text), place + rng.choice((0, 0, 1, 3, 10)))
        kind = rng.random()
        if kind < 0.5:
            text = text[:place] + rng.choice(TEXTS) + text[end:]
        elif kind < 0.7:
            lines = text.splitlines(keepends=True) or [""]
            line = rng.randrange(len(lines))
            lines[line : line + rng.choice((0, 1))] = [rng.choice([*lines, *others, "\n"])] * rng.choice((0, 1, 2))
            text = "".join(lines)
        elif kind < 0.8:
            text = text[:place] + text[end:]
        elif kind < 0.9:
            text = text[:place] + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), 0x1F600))) + text[place:]
        else:
            text = text[:place] + text[place:end] * rng.choice((2, 3, 50)) + text[end:]
    return text


def changed_json(rng: random.Random, value: Any) -> Any:
    """A copy of JSON with a node replaced, removed, doubled or renamed."""
    if isinstance(value, dict) and value:
        result = dict(value)
        key = rng.choice(list(result))
        kind = rng.random()
        if kind < 0.55:
            result[key] = changed_json(rng, result[key])
        elif kind < 0.7:
            result[key] = rng.choice(JSON)
        elif kind < 0.8:
            del result[key]
        elif kind < 0.9:
            result[rng.choice(TEXTS)] = result.pop(key)
        else:
            result[rng.choice([*result, *TEXTS])] = result[key]
        return result
    if isinstance(value, list) and value:
        result = list(value)
        place = rng.randrange(len(result))
        kind = rng.random()
        if kind < 0.6:
            result[place] = changed_json(rng, result[place])
        elif kind < 0.75:
            del result[place]
        else:
            result.insert(place, rng.choice((result[place], rng.choice(JSON))))
        return result
    return rng.choice((rng.choice(JSON), rng.choice(NUMBERS)))
