"""The house rules of DESIGN §2 as checks of source text: each function lists what breaks a rule."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

FLOORS = {
    "errors": 0, "strangers": 0, "locking": 0, "reading": 0,
    "recipe": 1, "runfolder": 1, "parallel": 1,
    "networks": 2, "numerics": 2, "metrics": 2,
    "graph": 3, "data": 3, "zoo": 3,
    "quantization": 4, "features": 4,
    "export": 5, "reconstruction": 5, "training": 5, "selection": 5, "evaluation": 5,
    "report": 6, "pipeline": 6, "studies": 6,
    "cli": 7,
    "__main__": 8,
}  # fmt: skip
# On floor 0 readers raise errors, on floor 6 the studies run pipelines; else rooms do not know their neighbours.
NEIGHBOURS = {("reading", "errors"), ("studies", "pipeline")}
ARCHITECTURE = re.compile(
    r"alexnet|convnext|densenet|efficientnet|googlenet|inception|mnasnet|mobilenet|regnet|resnet|resnext|shufflenet"
    r"|squeezenet|vgg|(?<!e)xception",
    re.IGNORECASE,
)
# The demo's study names the network that it trains by its name in the zoo.
MAY_NAME_ARCHITECTURES = {"calibquant.studies.digits"}


def module_name(path: Path, package: Path) -> str:
    """calibquant/data/files.py -> calibquant.data.files; a package's __init__ has the package's name."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """calibquant.data.files -> data; None for the face of the package and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "calibquant" and len(parts) > 1 else None


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, wherever in it; relative imports are resolved."""
    base = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def climbing(text: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of a room from a higher floor, or from a neighbour on its own."""
    room, found = room_of(module), []
    if room is None:
        return []
    if room not in FLOORS:
        return [f"{module}: the room '{room}' is on no floor; add it to DESIGN §2 and to tests/floors.py"]
    for line, name in imports(ast.parse(text), module, is_package):
        other = room_of(name)
        if other is None and name.split(".")[0] == "calibquant":
            found.append(f"{module}:{line} imports the face of the package")
        elif other not in FLOORS or other == room or (room, other) in NEIGHBOURS:
            continue
        elif FLOORS[other] >= FLOORS[room]:
            found.append(f"{module}:{line} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[other]})")
    return found


def eager_imports_of_the_face(text: str) -> list[str]:
    """Imports that run when the package's face is imported, apart from the standard library's light ones."""
    light = ("__future__", "importlib", "typing")
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and _is_type_checking(node.test))]
    return [
        f"line {line}: {name}" for line, name in imports(tree, "calibquant", True) if name.split(".")[0] not in light
    ]


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def architectures(text: str, module: str) -> list[str]:
    """Names of architectures in code outside zoo/: identifiers and strings, but neither docstrings nor help texts."""
    if room_of(module) == "zoo" or module in MAY_NAME_ARCHITECTURES:
        return []
    tree = ast.parse(text)
    prose = {id(part) for node in ast.walk(tree) for part in _prose(node)}
    named = (
        (node.lineno, word)
        for node in ast.walk(tree)
        if id(node) not in prose and isinstance(node, ast.expr | ast.stmt | ast.arg | ast.keyword | ast.alias)
        for word in _words(node)
    )
    return [f"{module}:{line} names an architecture: {word}" for line, word in named if ARCHITECTURE.search(word)]


def _prose(node: ast.AST) -> Iterator[ast.AST]:
    """The strings under a node that only people read: its docstring, or the text of a field or option."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            yield first.value
    elif isinstance(node, ast.keyword) and node.arg in ("description", "help"):
        yield from ast.walk(node.value)


def _words(node: ast.AST) -> Iterator[str]:
    for field in ("id", "attr", "name", "arg", "asname", "value"):
        word = getattr(node, field, None)
        if isinstance(word, str):
            yield word
    if isinstance(node, ast.ImportFrom) and node.module:
        yield node.module


def distributed(text: str, module: str) -> list[str]:
    """Uses of torch.distributed outside the room `parallel`."""
    if room_of(module) == "parallel":
        return []
    tree = ast.parse(text)
    lines = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed")
    ]
    lines += [line for line, name in imports(tree, module, False) if name.startswith("torch.distributed")]
    return [f"{module}:{line} asks torch.distributed; ask calibquant.parallel" for line in sorted(set(lines))]
