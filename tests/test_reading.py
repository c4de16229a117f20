"""One reader of files, one of JSON, one of YAML: what they take, and the line in which they refuse the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from calibquant.errors import DataError
from calibquant.reading import MOST_DEPTH, MOST_RECIPE, parse_json, parse_whole, parse_yaml, read_file

BOMB = b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"a: &x {b: 1}\nc: {<<: *x, d: 2}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        (b"a: &x {b: 1}\nc: {<<: *x, b: 2}", {"a": {"b": 1}, "c": {"b": 2}}),
        (b"a: [0x10, 0o7, 1e3, 1_000, -9223372036854775808]", {"a": [16, "0o7", "1e3", 1000, -(2**63)]}),
        (b"\xef\xbb\xbfa: \xc3\xa9", {"a": "é"}),
        (b"", None),
        (b"[" * MOST_DEPTH + b"]" * MOST_DEPTH, None),
    ],
)
def test_yaml_is_read(text: bytes, value: object) -> None:
    found = parse_yaml(text)
    assert found == value or (value is None and text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: !!int ''", "line 1: a value is not a valid 'int'"),
        (b"a: 1\nb: !!float x", "line 2: a value is not a valid 'float'"),
        (b"a: !!bool x", "line 1: a value is not a valid 'bool'"),
        (b"a: !!timestamp x", "line 1: a value is not a valid 'timestamp'"),
        (b"a: 2001-99-99", "line 1: a value is not a valid 'timestamp'"),
        (b"a: !!python/object/apply:os.system [exit]", "line 1: could not determine a constructor"),
        (b"a: 1\nb: {c: 1, 'c': 2}", "line 2: the key 'c' is there twice"),
        (b"a: 1\na: 1", "line 2: the key 'a' is there twice"),
        (b"[" * 5000, "line 1: it is nested more than 100 deep"),
        (b"- " * 5000, "line 1: it is nested more than 100 deep"),
        (b"a: " + b"{b: " * 200 + b"}" * 200, "line 1: it is nested more than 100 deep"),
        (BOMB, "line 5: it holds more than 50,000 values"),
        (b"a: &a [*a]", "line 1: an alias stands inside what it names"),
        (b"a: 9223372036854775808", "line 1: a number has more than 64 bits"),
        (b"a: " + b"9" * 4000, "line 1: a number has more than 64 bits"),
        (b"a: " + b"9" * 5000, "line 1: a value is not a valid 'int'"),
        (b"a: 0x" + b"f" * 4000, "line 1: a number has more than 64 bits"),
        (b"a: \0", "it is not valid YAML"),
        (b"a: \xff", "it is not UTF-8 text"),
        ("a: 1".encode("utf-16"), "it is not UTF-8 text"),
        (b"#" * (MOST_RECIPE + 1), "it has 262,145 bytes"),
        (b"a: [1", "line 1: "),
        (b"--- 1\n--- 2", "line 2: "),
    ],
)
def test_other_yaml_is_refused_with_its_reason(text: bytes, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (its text is checked)
        parse_yaml(text)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": [1, -2.5e3, null, true, "\xc3\xa9"]}', {"a": [1, -2500.0, None, True, "é"]}),
        ("9223372036854775807", 2**63 - 1),
        ("[" * MOST_DEPTH + "]" * MOST_DEPTH, None),
    ],
)
def test_json_is_read(text: str | bytes, value: object) -> None:
    assert parse_json(text) == value or value is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "it is nested more than 100 deep"),
        ("[" * 101 + "]" * 101, "it is nested more than 100 deep"),
        ('{"a":' * 200 + "1" + "}" * 200, "it is nested more than 100 deep"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' is there twice"),
        ("9223372036854775808", "a number of 19 digits has more than 64 bits"),
        ("-" + "9" * 4000, "a number of 4,000 digits has more than 64 bits"),
        ("[1e999]", "the number 1e999 is too large"),
        ("[NaN]", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ("[1,", "no valid JSON"),
        ("", "no valid JSON"),
        (b'"\xff"', "it is not UTF-8 text"),
    ],
)
def test_other_json_is_refused_with_its_reason(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (its text is checked)
        parse_json(text)
    assert str(caught.value) == said


def test_whole_numbers_have_64_bits() -> None:
    assert parse_whole("-9223372036854775808") == -(2**63)
    with pytest.raises(ValueError, match="19 digits"):
        parse_whole("-9223372036854775809")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "file", DataError, "x") == read_file(tmp_path / "link", DataError, "x") == b"abc"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    cases = {
        "fifo": r"cannot be read \(it is not a regular file", "zero": r"cannot be read \(it is not a regular file",
        ".": r"cannot be read \(it is a folder", "none": r"cannot be read \(No such file or directory\)",
        "loop": r"cannot be read \(Too many levels", "a\0b": r"cannot be read \(the path holds a NUL byte",
        "\ud800": r"cannot be read \(no file has such a name", "x" * 300: r"cannot be read \(File name too long\)",
    }  # fmt: skip
    for name, said in cases.items():
        with pytest.raises(DataError, match=said + ".*; do it$"):
            read_file(tmp_path / name, DataError, "do it")


def test_messages_are_one_printable_line_of_bounded_length() -> None:
    text = str(DataError("a\nb\0\x1b[31m\ud800\u202e", "x" * 10_000, "y\r\nz"))
    assert text.startswith(r"a b\x00\x1b[31m\ud800\u202e: xxx")
    assert text.endswith("x; y z")
    assert text.isprintable()
    assert len(text) < 600
