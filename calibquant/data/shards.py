"""Images in tar files of the WebDataset form: members KEY.jpg and KEY.cls or KEY.json stand for one sample.

Nothing is extracted: each tar is read through once for its headers and labels, images are then read by their offset.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tarfile import TarInfo
from typing import IO, Any, cast

import numpy as np

from calibquant.data.classes import Classes
from calibquant.data.encoded import EncodedImages, Strings
from calibquant.data.files import relative
from calibquant.data.imageset import OnError, UnreadableImageError
from calibquant.data.lists import parse_label
from calibquant.errors import DataError
from calibquant.reading import MOST_IMAGE, is_regular
from calibquant.recipe import Preprocess

ENDINGS = ("jpg", "jpeg", "png", "webp")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
MOST_LABEL = 1 << 24  # bytes of KEY.cls or KEY.json
MOST_BRACES = 32
FORM = "a sample is KEY.jpg (or .jpeg, .png, .webp) with KEY.cls or KEY.json; KEY ends at the first dot"


@dataclass
class _Shard:
    """What is known of the samples of one tar, in order."""

    members: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    hidden: int = 0


class ShardImages(EncodedImages):
    """The samples of tar files, in the order of the files and within them; names are `shard.tar#member`."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        shards: Sequence[_Shard],
        settings: Preprocess,
        classes: list[str] | None,
        on_error: OnError,
    ) -> None:
        self._shards = np.repeat(np.arange(len(shards), dtype=np.int32), [len(s.members) for s in shards])
        members = (f"{name}#{member}" for name, s in zip(names, shards, strict=True) for member in s.members)
        labels = list(chain.from_iterable(s.labels for s in shards))
        super().__init__(Strings(members), labels, settings, classes, on_error)
        self._root, self._files = root, list(names)
        self._offsets = np.fromiter(chain.from_iterable(s.offsets for s in shards), dtype=np.int64)
        self._sizes = np.fromiter(chain.from_iterable(s.sizes for s in shards), dtype=np.int64)

    def where(self, i: int) -> str:
        return str(self._root / self.name(i))

    def read(self, i: int) -> bytes:
        size = int(self._sizes[i])
        if size > MOST_IMAGE:
            problem = f"has {size:,} bytes, more than the limit of {MOST_IMAGE:,}"
            raise UnreadableImageError(self.where(i), problem, "remove it, or set data.on_error to skip")
        try:
            # Opened anew each time, which takes microseconds: no limit on open files, and threads share no position.
            with (self._root / self._files[self._shards[i]]).open("rb", buffering=0) as file:
                file.seek(int(self._offsets[i]))
                data = file.read(size)
        except OSError as error:
            mend = "make the shard readable, or set data.on_error to skip"
            raise UnreadableImageError(self.where(i), f"cannot be read ({error.strerror})", mend) from None
        if len(data) < size:
            raise DataError(self.where(i), "is missing: the shard became shorter", "restore the shard")
        return data


def open_shards(
    root: Path, pattern: str, settings: Preprocess, on_error: OnError = "fail", classes: Classes | None = None
) -> ShardImages:
    """Open tar files in the WebDataset form.

    Args:
        root: folder that the pattern is relative to.
        pattern: a file, `{000000..000146}` or `{a,b}` for several, or with `*`, `?` and `[…]`; these take files in the
            order of their names.
        settings, on_error: as for the other sets.
        classes: what labels may be named by; without, they are numbers.

    Raises:
        DataError: a file is missing, compressed, truncated or no tar, a sample is not in the form, or there is none.
    """
    paths = _find(root, pattern)
    names = [relative(root, path) for path in paths]
    shards = [_index(path, classes) for path in paths]
    if not any(shard.members for shard in shards):
        raise DataError(root / pattern, "holds no images", FORM)
    images = ShardImages(root, names, shards, settings, list(classes.names) if classes else None, on_error)
    empty = [name for name, shard in zip(names, shards, strict=True) if not shard.members]
    hidden = sum(shard.hidden for shard in shards)
    remarks = [f"{root / pattern}: hidden members left out: {hidden:,}"] if hidden else []
    remarks += [f"{root / pattern}: shards without images: {len(empty):,} ({empty[0]})"] if empty else []
    images.remarks = tuple(remarks)
    return images


def _find(root: Path, pattern: str) -> list[Path]:
    """The files of a pattern. It may stand for billions: the first that is missing or comes again ends the search."""
    found: dict[Path, None] = {}
    for text in expand(pattern):
        wild = any(mark in text for mark in "*?[")
        paths = sorted(_glob(root, text)) if wild else []
        for path in paths or [root / text]:
            if not is_regular(path):
                problem = "matches no file" if wild else "there is no such file"
                raise DataError(path, problem, "correct data.root or the pattern of the shards")
            if path in found:
                raise DataError(root / pattern, f"names the file {path.name} twice", "name each shard once")
            found[path] = None
    return list(found)


def _glob(root: Path, text: str) -> list[Path]:
    path = Path(text)
    base = Path(path.anchor) if path.anchor else root  # pathlib's patterns are relative
    try:
        return list(base.glob(str(path.relative_to(path.anchor))))
    except (ValueError, OSError) as error:
        raise DataError(root / text, f"is not a pattern of files ({error})", "write for example val-*.tar") from None


def expand(pattern: str) -> Iterator[str]:
    """The texts that a pattern with braces stands for, as in a shell, one after the other.

    Raises:
        DataError: braces hold neither a list nor a rising range, or there are too many.

    Example:
        >>> list(expand("train-{08..10}.tar"))
        ['train-08.tar', 'train-09.tar', 'train-10.tar']
        >>> list(expand("{a,b}-0.tar"))
        ['a-0.tar', 'b-0.tar']
    """
    if pattern.count("{") > MOST_BRACES:
        raise DataError(pattern[:80], f"has more than {MOST_BRACES} braces", "name the shards by fewer")
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    choices = _choices(braces[1])
    if choices is None:
        mend = "write a range such as {000000..000146}, or a list such as {a,b}"
        raise DataError(pattern, f"'{braces[0]}' is no rising range and no list", mend)
    for choice in choices:
        yield from expand(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _choices(text: str) -> Iterable[str] | None:
    """What stands between braces: the numbers of a rising range, or the words of a list; None for neither."""
    numbers = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", text)
    if numbers is None:
        return text.split(",") if "," in text else None
    first, last = numbers.groups()
    width = len(first) if first.startswith("0") else 0
    return (f"{n:0{width}d}" for n in range(int(first), int(last) + 1)) if int(first) <= int(last) else None


def _index(path: Path, classes: Classes | None) -> _Shard:
    """Read a tar's headers and labels."""
    shard, samples = _Shard(), dict[str, dict[str, TarInfo]]()
    for member in _members(path):
        folder, _, base = member.name.rpartition("/")
        if base.startswith("."):
            shard.hidden += not member.isdir()
            continue
        if member.isdir():
            continue
        where = f"{path}#{member.name}"
        if not member.isreg() or member.issparse():
            raise DataError(where, "is a link or special file", "pack the files themselves")
        key, _, ending = base.partition(".")
        sample = samples.setdefault(f"{folder}/{key}", {})
        part = "image" if ending.lower() in ENDINGS else ending.lower()
        if part in sample:
            raise DataError(where, f"{sample[part].name} belongs to the same sample", FORM)
        sample[part] = member
    with path.open("rb") as file:
        for sample in samples.values():
            if "image" not in sample:
                other = next(iter(sample.values())).name
                raise DataError(f"{path}#{other}", "belongs to a sample without image", FORM)
            shard.members.append(sample["image"].name)
            shard.offsets.append(sample["image"].offset_data)
            shard.sizes.append(sample["image"].size)
            shard.labels.append(_label(path, file, sample, classes))
    return shard


def _members(path: Path) -> list[TarInfo]:
    mend = "download or pack it again"
    try:
        with path.open("rb") as file:
            if file.read(6).startswith(COMPRESSED):
                raise DataError(path, "is compressed, so that its images have no place of their own", "decompress it")
            file.seek(0)
            members, end = _headers(file)
            file.seek(end)  # tarfile takes whatever is no header for the end; a whole tar has zeros there
            block = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "make the file readable") from None
    except DataError:
        raise
    except Exception as error:  # on damaged headers tarfile raises whatever its parsing stumbles over
        raise DataError(path, f"is truncated or no tar file ({error})", mend) from None
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise DataError(path, f"is truncated or damaged at byte {end:,}", mend)
    return members


def _headers(file: IO[bytes]) -> tuple[list[TarInfo], int]:
    """The members of a tar and the place of its end.

    Raises:
        Exception: nearly any, where the file is no tar.
    """
    members, place = list[TarInfo](), 0
    with tarfile.open(fileobj=cast("IO[bytes]", _Bounded(file)), mode="r:") as tar:
        while (member := tar.next()) is not None:
            if tar.offset <= place:  # with negative sizes tarfile goes back, and reads the same headers for ever
                raise tarfile.ReadError(f"{member.name} has a negative size")
            place = tar.offset
            members.append(member)
        return members, tar.offset


class _Bounded:
    """A file as tarfile reads it: sizes that headers declare reserve no more memory than the file has bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        if count < 0:
            raise tarfile.ReadError("a header declares a negative size")
        return self._file.read(min(count, max(0, self._size - self._file.tell())))


def _label(path: Path, file: IO[bytes], sample: dict[str, TarInfo], classes: Classes | None) -> int | None:
    """What KEY.cls says, or else `label` in KEY.json; None where neither does."""
    if "cls" in sample:
        return parse_label(_text(path, file, sample["cls"]), f"{path}#{sample['cls'].name}", classes)
    if "json" not in sample:
        return None
    where = f"{path}#{sample['json'].name}"
    try:
        tree: Any = json.loads(_text(path, file, sample["json"]))
    except ValueError:
        raise DataError(where, "is not valid JSON", 'write for example {"label": 3}') from None
    except RecursionError:
        problem = "holds lists within lists, too deep to be read"
        raise DataError(where, problem, 'write for example {"label": 3}') from None
    label = tree.get("label") if isinstance(tree, dict) else None
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, int | str):
        shown = label if isinstance(label, bool | float) else f"of type {type(label).__name__}"
        raise DataError(where, f"label {shown} is not a class index", "write a whole number from 0")
    return parse_label(str(label), where, classes)


def _text(path: Path, file: IO[bytes], member: TarInfo) -> str:
    if member.size > MOST_LABEL:
        problem = f"has {member.size:,} bytes, more than the limit of {MOST_LABEL:,} for a label"
        raise DataError(f"{path}#{member.name}", problem, "write only the label into it")
    file.seek(member.offset_data)
    return file.read(member.size).decode("utf-8", "replace")
