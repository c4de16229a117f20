"""Files made to hang a reader or to fill its memory: each is refused in one line, and the memory taken stays small."""

from __future__ import annotations

import io
import json
import resource
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calibquant.data import open_images, read_manifest
from calibquant.data.batch_pickle import read_batch
from calibquant.data.classes import read_classes
from calibquant.data.shards import expand
from calibquant.errors import DataError
from calibquant.recipe import DataRecipe

NESTED = "[" * 100_000 + "]" * 100_000


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """A test may reserve 512 MB more than is in use."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def shards(root: Path, pattern: str = "a.tar") -> Any:
    return open_images(DataRecipe(kind="shards", root=root, evaluation=pattern), "evaluation")


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A block of a tar with a size field of 12 bytes, whatever it says."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


OCTAL = b"77777777777\0"  # 8 GiB
BASE_256 = b"\x80" + (1 << 80).to_bytes(11, "big")
NEGATIVE = b"\xff" + (-512).to_bytes(11, "big", signed=True)
PAX = b"20 size=-5120000000\n".ljust(512, b"\0")


@pytest.mark.parametrize("size", [OCTAL, BASE_256, NEGATIVE], ids=["octal", "base-256", "negative"])
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S"])
def test_tar_members_of_a_false_size_are_refused(tmp_path: Path, kind: bytes, size: bytes) -> None:
    first = header("a.png", b"00000000001\0") + b"x".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(first + header("b.png", size, kind) + bytes(2048))
    with pytest.raises(DataError, match=r"a.tar(#b.png)?: is (truncated or|a link or special)"):
        shards(tmp_path)


def test_a_pax_header_cannot_send_the_reader_back(tmp_path: Path) -> None:
    data = header("x", b"%011o\0" % 20, b"x") + PAX + header("a.png", b"00000000000\0") + bytes(1024)
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a.tar: is truncated or no tar file"):
        shards(tmp_path)


def test_a_chain_of_extended_headers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(header("x", b"00000000000\0", b"x") * 3000 + bytes(1024))
    with pytest.raises(DataError, match=r"a.tar: is truncated or no tar file"):
        shards(tmp_path)


@pytest.mark.parametrize("member", ["a.cls", "a.json", "a.png"])
def test_members_that_are_really_huge_are_not_read(tmp_path: Path, member: str) -> None:
    size = 6 << 30
    other = header("a.png", b"00000000000\0") if member != "a.png" else header("a.cls", b"00000000000\0")
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(other + header(member, b"%011o\0" % size))
        file.truncate(file.tell() + size + 1024)  # takes no space
    with pytest.raises(DataError, match=rf"a.tar#{member}: has 6,442,450,944 bytes, more than the limit"):
        shards(tmp_path).image(0)


def test_nested_json_of_a_sample_is_refused(tmp_path: Path) -> None:
    for name, text, told in (
        ("a", NESTED, "holds lists within lists, too deep"),
        ("b", json.dumps({"label": [[1]]}), "label of type list is not a class index"),
        ("c", '{"label": ' + "[" * 900 + "]" * 900 + "}", "label of type list is not"),
        ("d", '{"label": ' + "9" * 5000 + "}", "is not valid JSON"),
    ):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for member, data in (("x.png", b""), ("x.json", text.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        with pytest.raises(DataError, match=rf"{name}.tar#x.json: {told}"):
            shards(tmp_path, f"{name}.tar")


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("a-{000000000..999999999}.tar", "a-000000001.tar: there is no such file"),
        ("{a,a}" * 30 + "*.tar", "matches no file"),
        ("{,}" * 30 + "a-000000000.tar", "names the file a-000000000.tar twice"),
        ("{0..999999999}" * 5, "there is no such file"),
        ("{" * 2000, "has more than 32 braces"),
        ("{,}" * 2000, "has more than 32 braces"),
        ("{0.." + "9" * 5000 + "}.tar", "is no rising range and no list"),
        ("a**b.tar", r"is not a pattern of files|matches no file"),
        ("x" * 300 + "*", "matches no file"),
        ("a\0*.tar", "is not a pattern of files|matches no file"),
    ],
)
def test_patterns_of_very_many_files_end_at_once(tmp_path: Path, pattern: str, told: str) -> None:
    (tmp_path / "a-000000000.tar").write_bytes(bytes(1024))
    with pytest.raises(DataError, match=told):
        shards(tmp_path, pattern)


def test_patterns_are_expanded_one_by_one() -> None:
    texts = expand("{00000000..99999999}-{a,b}")
    assert [next(texts) for _ in range(3)] == ["00000000-a", "00000000-b", "00000001-a"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (NESTED, "holds lists within lists, too deep to be read"),
        ('{"0": ' + NESTED + "}", "holds lists within lists"),
        ("[" + "[" * 500 + "]" * 500 + "]", r"entry 0 is not a name or \[id, name\]"),
        ('{"0": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"0": NaN}', "entry 0 is not a name"),
    ],
)
def test_nested_class_lists_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(DataError, match=rf"classes.json: {told}"):
        read_classes(tmp_path / "classes.json")


def test_messages_do_not_repeat_endless_labels(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError) as raised:
        read_classes(tmp_path / "classes.txt").index("c" * 100_000, "here")
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("text", ["file,label\na.png,1\nb\0.png,2\n", "file\na.png\n\0", "fi\0le\na.png\n"])
def test_nul_bytes_in_lists_name_their_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    line = text[: text.index("\0")].count("\n") + 1
    with pytest.raises(DataError, match=rf"list.csv, line {line}: holds a NUL byte; save the list as CSV in UTF-8"):
        open_images(DataRecipe(kind="csv", root=tmp_path, evaluation="list.csv"), "evaluation")


def test_lists_in_utf_16_are_refused(tmp_path: Path) -> None:
    for name, encoding in (("a.csv", "utf-16"), ("b.csv", "utf-16-le")):
        (tmp_path / name).write_text("path,sha256,label,score,strategy,seed\n", encoding=encoding)
        with pytest.raises(DataError, match="UTF-8"):
            read_manifest(tmp_path / name)


def put(number: int) -> bytes:
    return b"r" + struct.pack("<I", number)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (b"\x80\x02}" + put(2**32 - 1) + b".", "is truncated"),  # a memo of 64 GiB
        (b"}p4294967295\n.", "is truncated"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".", "is truncated"),  # bytes of 1 TiB
        (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.", "is truncated"),
        (b"\x80\x04" + b"\x8f" * 1_000_002 + b".", "is truncated"),  # empty sets, 216 bytes each
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds no images of 3072 bytes"),
    ],
    ids=["memo", "text memo", "bytes", "frame", "sets", "nested"],
)
def test_pickles_reserve_no_more_memory_than_they_hold(tmp_path: Path, code: bytes, told: str) -> None:
    (tmp_path / "data_batch_1").write_bytes(code)
    with pytest.raises(DataError, match=f"data_batch_1: {told}"):
        read_batch(tmp_path / "data_batch_1")


def test_a_pickle_encodes_each_text_once(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
    encode = b"h\x00h\x01X\x06\x00\x00\x00latin1\x86R"
    again = b"\x80\x02c_codecs\nencode\nq\x00" + text + b"q\x01(" + encode * 1000 + b"l."
    (tmp_path / "data_batch_1").write_bytes(again)
    with pytest.raises(DataError, match="data_batch_1: is truncated"):
        read_batch(tmp_path / "data_batch_1")


def test_honest_pickles_are_read(
    tmp_path: Path, cifar_records: Callable[..., Any], write_py: Callable[..., None]
) -> None:
    pixels, labels = cifar_records(3, 0)
    for protocol in range(5):
        write_py(tmp_path / "data_batch_1", pixels, labels, python2=False, protocol=protocol)
        found, numbers = read_batch(tmp_path / "data_batch_1")
        assert (found.tolist(), numbers.tolist()) == (pixels.tolist(), labels)
