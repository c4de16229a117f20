"""Which index a class has in a network: from the class files that come with ImageNet and with trained networks."""

from __future__ import annotations

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibquant.errors import DataError
from calibquant.reading import MOST_LIST, read_regular

FORMS = "write one WordNet id or name a line in index order, or JSON as in imagenet_class_index.json"
_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of a network in index order.

    Attributes:
        path: the file that names them.
        names: what a person calls each class.
        tables: word -> indices, one table for each way to name a class, the most exact first.
    """

    path: Path
    names: tuple[str, ...]
    tables: tuple[Mapping[str, tuple[int, ...]], ...]

    def index(self, word: str, where: str) -> int:
        """The class that a word means: by id, then by first name, then by any synonym.

        Args:
            word: a WordNet id or name; case, spaces, hyphens and underscores do not matter in names.
            where: what errors are about.

        Raises:
            DataError: it is no class, or more than one.
        """
        for table in self.tables:
            found = table.get(word) or table.get(_plain(word)) or ()
            if len(found) > 1:
                problem = f"'{word[:40]}' is the name of the classes {' and '.join(map(str, found))} in {self.path}"
                raise DataError(where, problem, "use the WordNet id, or change a name in that file")
            if found:
                return found[0]
        known = [key for table in self.tables for key in table]
        close = difflib.get_close_matches(word, known, 1) or difflib.get_close_matches(_plain(word), known, 1)
        mend = f"did you mean '{close[0]}'?" if close else f"use its words, such as '{known[0]}'"
        raise DataError(where, f"'{word[:40]}' is no class of {self.path}", mend)


def read_classes(path: Path) -> Classes:
    """Read a class file.

    Text with a class a line in index order: an id, a name with synonyms, or both (`n01440764 tench, Tinca tinca`, as
    in synset_words.txt and LOC_synset_mapping.txt). Or JSON, `{"0": ["n01440764", "tench"], …}` or a list.

    Raises:
        DataError: the file cannot be read, is in none of these forms, leaves out an index, or has an id twice.
    """
    try:
        text = read_regular(path, MOST_LIST, links=True).decode("utf-8-sig")
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "set data.classes to a class file") from None
    except UnicodeDecodeError:
        raise DataError(path, "is not UTF-8 text", FORMS) from None
    rows = _from_json(path, text) if text.lstrip()[:1] in ("{", "[") else _from_lines(path, text)
    exact, first, synonyms = (defaultdict[str, list[int]](list) for _ in range(3))
    for i, row in enumerate(rows):
        exact[row[0]].append(i)
        names = [_plain(name) for name in row[1:]]
        first[names[0] if names else _plain(row[0])].append(i)
        for name in set(names[1:]):
            synonyms[name].append(i)
    twice = next((word for word, found in exact.items() if len(found) > 1 and _WORDNET.fullmatch(word)), None)
    if twice is not None:
        raise DataError(path, f"names {twice} twice, as {exact[twice][0]} and {exact[twice][1]}", FORMS)
    tables = tuple({word: tuple(found) for word, found in table.items()} for table in (exact, first, synonyms))
    return Classes(path, tuple(row[1] if len(row) > 1 else row[0] for row in rows), tables)


def _from_lines(path: Path, text: str) -> list[list[str]]:
    """One row a line: its id or whole name, then its names."""
    rows = []
    for number, line in enumerate(text.rstrip().splitlines(), start=1):
        head, _, rest = line.strip().partition(" ")
        words = [word.strip() for word in (rest if _WORDNET.fullmatch(head) else line).split(",") if word.strip()]
        row = [head, *words] if _WORDNET.fullmatch(head) else [line.strip(), *words]
        if not row[0]:
            raise DataError(f"{path}, line {number}", "is empty", FORMS)
        rows.append(row)
    if not rows:
        raise DataError(path, "is empty", FORMS)
    return rows


def _from_json(path: Path, text: str) -> list[list[str]]:
    """One row an index: its id or only name, then its names."""
    try:
        tree: Any = json.loads(text)
    except ValueError:
        raise DataError(path, "is not valid JSON", FORMS) from None
    except RecursionError:
        raise DataError(path, "holds lists within lists, too deep to be read", FORMS) from None
    if isinstance(tree, dict):
        missing = next((i for i in range(len(tree)) if str(i) not in tree), None)
        if missing is not None:
            raise DataError(path, f'has {len(tree)} entries but none with the key "{missing}"', FORMS)
        tree = [tree[str(i)] for i in range(len(tree))]
    rows = [[value] if isinstance(value, str) else value for value in tree]
    wrong = next((i for i, row in enumerate(rows) if not _is_row(row)), None)
    if wrong is not None or not rows:
        raise DataError(path, "is empty" if wrong is None else f"entry {wrong} is not a name or [id, name]", FORMS)
    return rows


def _is_row(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) and word.strip() for word in value)


def _plain(name: str) -> str:
    """A name without what people write differently: case, spaces, hyphens, underscores."""
    return " ".join(re.split(r"[\s_\-]+", name.casefold().strip()))
