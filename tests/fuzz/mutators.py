"""Mutators of bytes and of text: each takes what a file holds and a generator, and gives what it shall hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

Mutator = Callable[[bytes, Random], bytes]

# What may stand in a file's place; `running` makes it.
PLACES = ("directory", "fifo", "missing", "loop", "device")

NUMBERS = (
    "-1", "0", "1", "-0.0", "0.5", "255", "1e999", "-1e999", "nan", "NaN", "Infinity", "-Infinity", "1e-400", "0x10",
    "1_0", "٣", "1:30", "true", "null", str(2**31), str(2**32), str(-(2**63)), str(2**64), "1e18",
    "9" * 400, "9" * 4000, "-" + "9" * 4000, "9" * 5000, "1." + "3" * 4000,
)  # fmt: skip
ODD_TEXTS = (
    "\0", "\x1b[31m", "\ud800", "\u202e", "é", "\ufeff", "\u2028", "\r", "..", "/dev/zero", "~", "%s{}", "'", '"',
    "\t", ",", ";", "=", "#", "x" * 5000,
)  # fmt: skip


# --- bytes ------------------------------------------------------------------------------------------------------------


def _span(data: bytes, rng: Random, most: int) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.randint(1, most))


def flip_bits(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice((rng.randrange(len(data) + 1), max(0, len(data) - rng.randint(1, 16))))]


def insert_bytes(data: bytes, rng: Random) -> bytes:
    start, _ = _span(data, rng, 1)
    return data[:start] + rng.randbytes(rng.choice((1, 4, 64, 4096))) + data[start:]


def delete_bytes(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng, rng.choice((1, 8, 512)))
    return data[:start] + data[end:]


def duplicate_bytes(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng, rng.choice((8, 512, 4096)))
    return data[:end] + data[start:end] * rng.choice((1, 1, 50)) + data[end:]


def zero_bytes(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng, rng.choice((1, 8, 512)))
    return data[:start] + bytes(end - start) + data[end:]


def set_extreme(data: bytes, rng: Random) -> bytes:
    """A whole number of 1 to 8 bytes becomes the largest or a very negative one."""
    size = rng.choice((1, 2, 4, 8))
    start, _ = _span(data, rng, 1)
    value = rng.choice((b"\xff" * size, b"\x7f" + b"\xff" * (size - 1), b"\xff" * (size - 1) + b"\x7f", b"\x80" * size))
    return data[:start] + value + data[start + size :]


def swap_halves(data: bytes, rng: Random) -> bytes:
    start, _ = _span(data, rng, 1)
    return data[start:] + data[:start]


def make_empty(data: bytes, rng: Random) -> bytes:
    return rng.choice((b"", b"\0", b"\n", bytes(4096)))


def make_noise(data: bytes, rng: Random) -> bytes:
    return rng.randbytes(rng.choice((1, 16, 5000)))


BYTES: tuple[Mutator, ...] = (
    flip_bits, flip_bits, truncate, insert_bytes, delete_bytes, duplicate_bytes, zero_bytes, set_extreme, swap_halves,
    make_empty, make_noise,
)  # fmt: skip


# --- text -------------------------------------------------------------------------------------------------------------


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def replace_number(data: bytes, rng: Random) -> bytes:
    text = _text(data)
    found = list(re.finditer(r"-?\d+(\.\d+)?", text))
    if not found:
        return data
    match = rng.choice(found)
    return _encoded(text[: match.start()] + rng.choice(NUMBERS) + text[match.end() :])


def insert_odd_text(data: bytes, rng: Random) -> bytes:
    text = _text(data)
    start = rng.randrange(len(text) + 1)
    return _encoded(text[:start] + rng.choice(ODD_TEXTS) + text[start:])


def reencode(data: bytes, rng: Random) -> bytes:
    text = _text(data)
    return rng.choice((
        text.encode("utf-16"), text.encode("utf-32-le", "replace"), text.encode("latin-1", "replace") + b"\xe9\xff",
        b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data.replace(b"\n", b"\r"),
    ))  # fmt: skip


def change_lines(data: bytes, rng: Random) -> bytes:
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    how = rng.choice(("double", "drop", "swap", "indent", "join"))
    if how == "double":
        lines.insert(j, lines[i])
    elif how == "drop":
        del lines[i]
    elif how == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    elif how == "indent":
        lines[i] = rng.choice((b" ", b"\t", b"    ")) + lines[i]
    else:
        lines[i : i + 2] = [b"".join(lines[i : i + 2])]
    return b"\n".join(lines)


def nest(data: bytes, rng: Random) -> bytes:
    """Brackets of any depth before, inside or in place of the text; closed or not."""
    depth = rng.choice((30, 70, 900, 5000, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ("{a: ", "}"), ("- ", ""), ("a:\n", ""), ("(", ")")))
    nested = opening * depth + rng.choice(("", "1")) + closing * rng.choice((0, depth))
    text = _text(data)
    start = rng.choice((0, rng.randrange(len(text) + 1)))
    return _encoded(rng.choice((nested, text[:start] + nested + text[start:])))


def lengthen(data: bytes, rng: Random) -> bytes:
    """One word a hundred thousand times."""
    text = _text(data)
    words = re.findall(r"[^\s:,\"']+", text) or ["x"]
    word = rng.choice(words)
    return _encoded(text.replace(word, word * (100_000 // len(word)), 1))


TEXT: tuple[Mutator, ...] = (
    replace_number, replace_number, insert_odd_text, insert_odd_text, reencode, change_lines, change_lines, nest,
    lengthen,
)  # fmt: skip


# --- YAML as text -----------------------------------------------------------------------------------------------------

BOMB = "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" if i else "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for i in range(12)
)
YAML_VALUES = (
    "!!int ''", "!!int x", "!!int -", "!!float ''", "!!float x", "!!timestamp x", "!!timestamp 2001-99-99",
    "2001-99-99", "!!bool x", "!!null x", "!!binary x", "!!binary é", "!!omap 3", "!!omap [3]", "!!set {a, b}",
    "!!set 3", "!!pairs 3", "!!str [a]", "!!seq a", "!!map a", "!!map [a]", "!unknown a",
    "!!python/object/apply:os.system [exit]", "!!python/name:os.system", "!!python/tuple [1]", "&a [*a]",
    "&a {b: *a}", "*nowhere", "? [a]\n: b", "{[a]: b}", "{? {a: b} : c}", "{<<: 3}", "{<<: [1]}", "{<<: &b {<<: *b}}",
    "=", "0o17", "0b", "0x", "1:99:99:99", "1:" * 2000 + "1", "-", ".inf", ".nan", "!!int 1:x", "!!float 1:x",
    "{a: 1, a: 2}", "|", ">9", "|+\n x", "'", '"\\x"', '"\\ud800"', "%YAML 9.9", "--- a\n--- b", "@", "`",
)  # fmt: skip


def insert_yaml(data: bytes, rng: Random) -> bytes:
    """A hostile value in place of one that is there, or a bomb of aliases behind the text."""
    text = _text(data)
    places = list(re.finditer(r"(?<=[:=]).*", text))
    if not places or rng.random() < 0.05:
        return _encoded(text + "\n" + BOMB)
    match = rng.choice(places)
    return _encoded(f"{text[: match.start()]} {rng.choice(YAML_VALUES)}{text[match.end() :]}")


YAML_TEXT: tuple[Mutator, ...] = (insert_yaml, insert_yaml, insert_yaml)
