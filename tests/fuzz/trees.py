"""Mutators of JSON and YAML as trees: what comes out is valid JSON or YAML again, with other content."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import yaml

from .mutators import Mutator

MOST = 50_000  # bytes that are read as a tree
Path = tuple[Any, ...]


def _nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


ALIENS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 99, 2**31, 2**40, -(2**63), 2**70, 10**300, 1e308, 1e-320, -0.5, 0.5, "", " ",
    "x", "0", "conv2d", "relu", "cat", "none", "auto", "\0", "a\nb", "\ud800", "../x", "/dev/zero", "x" * 3000, [], {},
    [[]], [None], [0], [1, 1], [-1, -1], [2**40, 2**40], [1, 1, 1, 1], [0.5], ["x"], [True], {"a": 1}, {"": []},
    {"x": None},
)  # fmt: skip


def _paths(tree: Any, at: Path = ()) -> list[Path]:
    """The places of all values in a tree, the tree itself first."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at, *(path for key, value in items for path in _paths(value, (*at, key)))]


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def change_tree(tree: Any, rng: Random) -> Any:
    """The tree with one place changed: another value, a neighbour's, none, another name, or a number somewhat off."""
    paths = [path for path in _paths(tree) if path]
    if not paths or rng.random() < 0.02:
        return deepcopy(rng.choice(ALIENS))
    path = rng.choice(paths)
    holder, key, value = _at(tree, path[:-1]), path[-1], _at(tree, path)
    how = rng.choice(("alien", "alien", "alien", "other", "drop", "rename", "number", "double", "nest"))
    if how == "other":
        other = json.loads(json.dumps(_at(tree, rng.choice(paths))))
        holder[key] = other
    elif how == "drop":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[rng.choice(("x", "", "\0", "a.b", "a b", "é", str(key) + "_", "x" * 3000))] = holder.pop(key)
    elif how == "number" and isinstance(value, int | float):
        holder[key] = rng.choice((value + 1, value - 1, -value, value * 1000, value * 10**9, float(value), str(value)))
    elif how == "double" and isinstance(holder, list):
        holder[key:key] = [value] * rng.choice((1, 1, 100))
    elif how == "nest":
        holder[key] = _nested(rng.choice((1, 2, 40, 200)))
    else:
        holder[key] = deepcopy(rng.choice(ALIENS))
    return tree


def _changed(name: str, read: Callable[[bytes], Any], write: Callable[[Any], str]) -> Mutator:
    def mutate(data: bytes, rng: Random) -> bytes:
        if len(data) > MOST or b"&a" in data:  # nested or multiplied by a mutator before
            return data
        try:
            tree = read(data)
        except Exception:  # damaged by a mutator before
            return data
        for _ in range(rng.choice((1, 1, 2, 5))):
            tree = change_tree(tree, rng)
        return write(tree).encode("utf-8", "surrogatepass")

    mutate.__name__ = name
    return mutate


def duplicate_key(data: bytes, rng: Random) -> bytes:
    """The first key of a JSON object stands there twice."""
    starts = [i for i, byte in enumerate(data[:-1]) if data[i : i + 2] == b'{"']
    if not starts:
        return data
    start = rng.choice(starts)
    key = data[start + 1 : data.index(b'"', start + 2) + 1] if b'"' in data[start + 2 :] else b'"a"'
    return data[: start + 1] + key + b": 1, " + data[start + 1 :]


def _dump_yaml(tree: Any) -> str:
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


change_json = _changed("change_json", json.loads, json.dumps)
change_yaml = _changed("change_yaml", lambda data: yaml.safe_load(data.decode()), _dump_yaml)

JSON_TREE: tuple[Mutator, ...] = (change_json, change_json, change_json, change_json, duplicate_key)
YAML_TREE: tuple[Mutator, ...] = (change_yaml, change_yaml, change_yaml)
