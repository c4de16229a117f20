"""Networks that are not of the zoo: of timm, of torchvision, or made by a function in the user's own file."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibquant.errors import ModelError, nearest

# Package, the module to import, and its functions that make a network and list the names.
_PACKAGES = {
    "timm": ("timm", "create_model", "list_models"),
    "torchvision": ("torchvision.models", "get_model", "list_models"),
}
FORMS = "use a network of the zoo, timm:NAME, torchvision:NAME or path/to/file.py:FUNCTION"


def is_external(name: str) -> bool:
    """Whether a name has one of the forms of `build_external`."""
    return ":" in name or name.endswith(".py")


def build_external(name: str, options: Mapping[str, object]) -> nn.Module:
    """A network by `timm:NAME`, `torchvision:NAME` or `path/to/file.py:FUNCTION`.

    The first two have random weights, unless an option asks the package for others. The last runs the file, with its
    folder in front of the import path, and then the function: give only files that you trust.

    Args:
        name: as above; a path is taken from the working directory.
        options: keyword arguments of the package's builder or of the function.

    Raises:
        ModelError: a package or file is missing or fails, or there is no such network or function.
    """
    package, _, rest = name.partition(":")
    if package in _PACKAGES:
        return _from_package(package, rest, options)
    path, _, function = name.rpartition(":")
    if path.endswith(".py") and function:
        return _from_file(Path(path), function, options)
    if name.removesuffix(":").endswith(".py"):
        raise ModelError("model.name", f"'{name}' names no function", f"write {name.removesuffix(':')}:FUNCTION")
    raise ModelError("model.name", f"'{name}' has no known form", FORMS)


def unsafe(name: str, options: Mapping[str, object]) -> str | None:
    """The field of `model` by which a network runs code of unknown origin; None where it runs none.

    A Python file is code. The builders of packages are known, but options other than numbers may name files and
    pickles that they load.

    Args:
        name, options: as `build_external` takes them, or a network of the zoo.

    Example:
        >>> unsafe("nets.py:make", {}), unsafe("timm:vgg11", {"num_classes": 3}), unsafe("resnet18", {})
        ('name', None, None)
    """
    if not is_external(name):
        return None
    if name.partition(":")[0] not in _PACKAGES:
        return "name"
    loose = (key for key, value in options.items() if isinstance(value, bool) or not isinstance(value, int | float))
    return next((f"options.{key}" for key in loose), None)


def check_trusted(name: str, options: Mapping[str, object], strangers: Mapping[str, str]) -> None:
    """Check that no code is run because a run folder says so.

    Args:
        name, options: as `unsafe` takes them.
        strangers: which of "name" and "options" a run folder gives, and the path of its recipe.

    Raises:
        ModelError: code would be run that the user did not name.
    """
    field = unsafe(name, options)
    source = strangers.get("name") if field == "name" else strangers.get("options") or strangers.get("name")
    if field is None or source is None:
        return
    what = f"code in {name.rpartition(':')[0] or name}" if field == "name" else f"{name} with what this option names"
    mend = "look at it, and if you trust it add --trust-code (in Python trust_code=True)"
    raise ModelError(f"{source}, model.{field}", f"would run {what}, but a run folder is data", mend)


def _from_package(package: str, name: str, options: Mapping[str, object]) -> nn.Module:
    module_name, create, list_models = _PACKAGES[package]
    where = f"model.name, {package}:{name}"
    module = _import(package, module_name, where)
    known = getattr(module, list_models)()
    if name.partition(".")[0] not in known:  # timm names weights after a point
        close = difflib.get_close_matches(name, known, n=1)
        mend = f"did you mean '{package}:{close[0]}'?" if close else f"{module_name}.{list_models}() lists the names"
        raise ModelError(where, f"{package} has no such network", mend)
    try:
        network = getattr(module, create)(name, **options)
    except Exception as error:
        raise ModelError(where, f"{package} cannot build it ({_first_line(error)})", "check model.options") from error
    return _network(network, where)


def _import(package: str, module: str, where: str) -> Any:
    mend = f"install {package} in a version made for PyTorch {torch.__version__}, or use a network of the zoo"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        problem = "is not installed" if error.name == package else f"cannot be imported ({_first_line(error)})"
        raise ModelError(where, f"{package} {problem}", mend) from error
    except Exception as error:  # a build that does not fit PyTorch's fails in many ways
        raise ModelError(where, f"{package} cannot be imported ({_first_line(error)})", mend) from error


def _from_file(path: Path, name: str, options: Mapping[str, object]) -> nn.Module:
    try:
        source = path.read_bytes()
    except OSError as error:
        mend = "give the path of a Python file, from the working directory"
        raise ModelError(path, f"cannot be read ({error.strerror})", mend) from None
    module = types.ModuleType(f"calibquant_user_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and the like look their module up
    with _import_from(path.parent):
        with _blamed_on(path):
            exec(compile(source, str(path), "exec"), module.__dict__)
        function = _function(module, name, path, options)
        with _blamed_on(path):
            network = function(**options)
    return _network(network, f"{path}:{name}")


def _function(module: types.ModuleType, name: str, path: Path, options: Mapping[str, object]) -> Callable[..., object]:
    """The named function, which takes the options."""
    own = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("__")}
    if name not in own:
        raise ModelError(path, f"defines no function '{name}'", nearest(name, own) if own else "define it there")
    try:
        signature = inspect.signature(own[name])
    except (TypeError, ValueError):  # of what is written in C there may be none
        return own[name]
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ModelError("model.options", f"{name} does not take them ({error})", f"it is {name}{signature}") from None
    return own[name]


@contextmanager
def _import_from(folder: Path) -> Iterator[None]:
    """The folder in front of the import path, as when Python runs a file in it."""
    first = str(folder.resolve())
    sys.path.insert(0, first)
    try:
        yield
    finally:
        with suppress(ValueError):  # the code may have taken it out
            sys.path.remove(first)


@contextmanager
def _blamed_on(path: Path) -> Iterator[None]:
    """Turn what a user's code raises into one line with the last line of the file that led there."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError):
            file, line = error.filename or str(path), error.lineno
        else:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            file, line = str(path), lines[-1] if lines else None  # none where the function is another file's
        where = file if line is None else f"{file}, line {line}"
        raise ModelError(where, _first_line(error), "correct the code, or model.options") from error


def _network(made: object, where: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ModelError(where, f"gives a {type(made).__name__}, not an nn.Module", "return the network itself")
    return made


def _first_line(error: BaseException) -> str:
    """An error's kind and the beginning of what it says."""
    said = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
