"""Reads files that anybody may have written: bytes, JSON and YAML, within limits and with errors of one line."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml

from calibquant.errors import CalibQuantError, RunFolderError

MOST = 4 << 30  # bytes of the largest file that is read: ONNX files have up to 2 GiB
MOST_TEXT = 64 << 20  # bytes of the largest JSON file
MOST_RECIPE = 256 << 10  # bytes of the largest recipe
MOST_IMAGE = 1 << 29  # bytes of an image: three for each of the most pixels that Pillow opens (178,956,970)
MOST_LIST = 1 << 28  # bytes of a list of images or classes: three million lines of 80
MOST_DEPTH = 100  # containers within containers
MOST_NODES = 50_000  # values of a YAML file, those behind aliases counted each time
_MIN_WHOLE, _MAX_WHOLE = -(2**63), 2**63 - 1


def read_file(path: Path, kind: type[CalibQuantError], mend: str) -> bytes:
    """The content of a regular file.

    Args:
        path: the file. Folders, pipes and devices are refused, since reading them may never end.
        kind: of the error.
        mend: what the error tells the user to do.

    Raises:
        CalibQuantError: there is no such file, or it cannot be read.
    """
    try:
        return read_regular(path, links=True)
    except OSError as error:
        raise kind(path, f"cannot be read ({error.strerror})", mend) from None


def read_regular(path: Path, most: int = MOST, links: bool = False) -> bytes:
    """The content of a regular file. A device, a pipe or a folder is refused without waiting for it.

    Args:
        path: the file.
        most: bytes that it may have.
        links: whether the name may be a symbolic link.

    Raises:
        OSError: it is missing, unreadable, no such file or larger; `strerror` says why.
    """
    with _open_regular(path, most, links) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # Python would allocate `most` bytes


def hash_regular(path: Path) -> str:
    """The hexadecimal SHA-256 of a regular file, which is read piece by piece.

    Raises:
        OSError: as `read_regular`.
    """
    digest = hashlib.sha256()
    with _open_regular(path, MOST, links=False) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text without doubled keys, numbers beyond 64 bits and deep nesting.

    Raises:
        ValueError: the text is no such JSON; says why.

    Example:
        >>> parse_json('{"a": [1, 2.5]}')
        {'a': [1, 2.5]}
        >>> parse_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: the key 'a' is there twice
    """
    try:
        value = json.loads(
            data,
            object_pairs_hook=_unique,
            parse_int=parse_whole,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError:
        raise ValueError("no valid JSON") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if _is_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


def parse_yaml(data: bytes) -> Any:
    """The value of a YAML text: plain values only, no doubled keys, no deep nesting, no number beyond 64 bits.

    Raises:
        ValueError: the text is no such YAML; says why, and in which line if that is known.

    Example:
        >>> parse_yaml(b"a: [1, 2.5]")
        {'a': [1, 2.5]}
        >>> parse_yaml(b"a: 1\\na: 2")
        Traceback (most recent call last):
        ValueError: line 2: the key 'a' is there twice
    """
    if len(data) > MOST_RECIPE:
        raise ValueError(f"it has {len(data):,} bytes, and at most {MOST_RECIPE:,} are read")
    try:
        return yaml.load(data.decode("utf-8-sig"), Loader=_YamlLoader)  # a SafeLoader: it makes plain values alone
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}{reason or 'it is not valid YAML'}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def parse_whole(text: str) -> int:
    """A whole number of at most 64 bits.

    Raises:
        ValueError: it has more, or is none.
    """
    digits = len(text.lstrip("-"))
    value = int(text) if digits < 20 else None  # Python reads no more than some thousands of digits
    if value is None or not _MIN_WHOLE <= value <= _MAX_WHOLE:
        raise ValueError(f"a number of {digits:,} digits has more than 64 bits")
    return value


@contextmanager
def described_by(path: Path) -> Iterator[None]:
    """Within the context, what the content of a JSON file lacks or has of another type is an error that names the file.

    Raises:
        RunFolderError: it does.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        problem = f"does not hold what calibquant writes there ({type(error).__name__}: {error})"
        raise RunFolderError(path, problem, "restore it or quantize again") from None


def _open_regular(path: Path, most: int, links: bool) -> BinaryIO:
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not links:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link")
        flags |= getattr(os, "O_NOFOLLOW", 0)
    file = os.fdopen(_open(path, flags), "rb")
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    if found.st_size > most:
        file.close()
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, more than the limit of {most:,}")
    return file


def _open(path: Path, flags: int) -> int:
    """A descriptor; a folder is refused here, since it cannot be opened as a file."""
    if path.is_dir():
        raise OSError(errno.EISDIR, "it is a folder")
    try:
        return os.open(path, flags)
    except ValueError:
        raise OSError(errno.EINVAL, _no_name(path)) from None


def _no_name(path: Path) -> str:
    return "the path holds a NUL byte" if "\0" in str(path) else "no file has such a name"


def is_regular(path: Path) -> bool:
    """Whether there is a regular file at a path; False also for paths that no file can have."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether there is a folder at a path; False also for paths that no folder can have."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (OSError, ValueError):  # among them a name that is too long, a circle of links, a NUL byte
        return 0


_TOO_DEEP = f"it is nested more than {MOST_DEPTH} deep"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key '{key[:60]}' is there twice")
        result[key] = value
    return result


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
    return any(isinstance(inner, dict | list) for inner in level)


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


class _YamlLoader(yaml.SafeLoader):
    """Refuses doubled keys, deep nesting, aliases that multiply, and numbers beyond 64 bits."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # id of a node -> the nodes in it, those behind aliases too

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        mark, before = self.peek_event().start_mark, self._nodes
        is_alias = self.check_event(yaml.AliasEvent)
        if self._depth > MOST_DEPTH:
            raise _problem(_TOO_DEEP, mark)
        self._depth += 1
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise _problem("an alias stands inside what it names", mark)
        self._nodes += self._sizes[id(node)] if is_alias else 1
        if self._nodes > MOST_NODES:
            raise _problem(f"it holds more than {MOST_NODES:,} values, aliases written out", mark)
        if not is_alias:
            self._sizes[id(node)] = self._nodes - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _problem(f"the key '{key.value[:60]}' is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
            # What the constructors of single values raise, such as those of !!int '' and of dates that no calendar has.
            kind = str(node.tag).rpartition(":")[2]
            raise _problem(f"a value is not a valid '{kind[:60]}'", node.start_mark) from None

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)
        if not _MIN_WHOLE <= value <= _MAX_WHOLE:
            raise _problem("a number has more than 64 bits", node.start_mark)
        return value


_YamlLoader.add_constructor("tag:yaml.org,2002:int", _YamlLoader.construct_yaml_int)


def _problem(text: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)
