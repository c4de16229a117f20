"""From a raw trace (torch.fx or torch.export) to the canonical graph.

The raw graph is run node by node on two batches of different size while the canonical graph is written beside it. So
every shape is known, sizes that a network computes become constants, what is the batch dimension is seen rather than
guessed, parts that do not depend on the input become constants, and in-place operations and aliases are recognized by
what they really do to memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from calibquant.errors import CaptureError

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
"""How a torch function, method or aten operator of this name is written in canonical ops; filled by rules.py."""

WAY_OUT = "rewrite that line, or quantize a part of the network with model.submodule"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the names of the functions, methods and aten operators it lowers."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


class UnsupportedError(Exception):
    """Raised by a rule for an argument it cannot express; becomes a CaptureError that names the line."""


class Lowering:
    """Writes the canonical graph; what rules see.

    Args:
        raw: the raw graph; its call targets are torch functions, tensor methods or aten operators.
        inputs: two tuples of input tensors that differ in their batch size only.
    """

    def __init__(self, raw: fx.GraphModule, inputs: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]) -> None:
        self.raw, self.inputs = raw, inputs
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}  # canonical parameter name -> tensor
        self.parameters: dict[str, fx.Node] = {}
        self.values: dict[fx.Node, tuple[Any, Any]] = {}  # raw node -> its value for either batch
        self.env: dict[fx.Node, Any] = {}  # raw node -> canonical node(s), for what depends on the input
        self.current: fx.Node | None = None

    def run(self) -> fx.GraphModule:
        """The canonical GraphModule.

        Raises:
            CaptureError: an operation has no canonical form, or depends on the batch in a way that cannot be kept.
        """
        fed = 0
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about the user's code
            for node in self.raw.graph.nodes:
                self.current = node
                if node.op == "placeholder":
                    if fed < len(self.inputs[0]):
                        self.values[node] = (self.inputs[0][fed].clone(), self.inputs[1][fed].clone())
                        self.env[node] = self.graph.placeholder(f"x_{fed}" if fed else "x")
                        self.env[node].meta["example"] = (self.inputs[0][fed], self.inputs[1][fed])
                    else:
                        default = node.args[0] if node.args else None
                        self.values[node] = (default, default)
                    fed += 1
                elif node.op == "output":
                    self._finish(node)
                else:
                    self._lower(node)
        return self._module()

    # --- for rules ----------------------------------------------------------------------------------------------------

    def emit(self, op: Callable[..., Tensor], *tensors: Any, **attributes: Any) -> fx.Node:
        """Append a canonical op; constant tensors among its arguments become parameters of the graph."""
        nodes, attributes = tuple(self._operand(t) for t in tensors), _plain(attributes)
        node = self.graph.create_node("call_function", op, nodes, attributes, name=self._name(op.__name__))
        node.meta["example"] = (self._example(op, nodes, attributes, 0), self._example(op, nodes, attributes, 1))
        return node

    @staticmethod
    def _example(op: Callable[..., Tensor], nodes: tuple[Any, ...], attributes: dict[str, Any], which: int) -> Tensor:
        return op(*fx.node.map_arg(nodes, lambda n: n.meta["example"][which]), **attributes)

    def shapes(self, value: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape of a tensor argument for either batch."""
        a, b = (value, value) if isinstance(value, Tensor) else value.meta["example"]
        return tuple(a.shape), tuple(b.shape)

    @property
    def result(self) -> tuple[Any, Any]:
        """The value of the raw node that is being lowered, for either batch."""
        assert self.current is not None
        return self.values[self.current]

    # --- the walk -----------------------------------------------------------------------------------------------------

    def _lower(self, node: fx.Node) -> None:
        versions = {n: self._versions(n) for n in node.all_input_nodes}
        try:
            self.values[node] = (self._execute(node, 0), self._execute(node, 1))
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(self._where(), f"fails when run ({error})", WAY_OUT) from error
        mutated = [n for n, before in versions.items() if self._versions(n) != before]
        if not any(n in self.env for n in node.all_input_nodes):
            self._check_constant(node)
            return
        a, _ = self.values[node]
        if mutated and (not isinstance(a, Tensor) or any(n not in self.env for n in mutated)):
            raise CaptureError(self._where(), "writes into a tensor in place", WAY_OUT)
        if not _tensors(a):
            return  # a size or a flag: later nodes read its two values
        try:
            self.env[node] = self._apply_rule(node)
            self._compare(self.env[node], self.values[node])
        except CaptureError as error:
            if mutated:
                raise
            self.env[node] = _Refused(error)  # raised where its value is used: dead code may do what it likes
        for source in mutated:
            self._follow_mutation(source, node)

    def _execute(self, node: fx.Node, which: int) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n][which])
        if node.op == "get_attr":
            return _attribute(self.raw, str(node.target))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.raw.get_submodule(str(node.target))(*args, **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _apply_rule(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            target = self.raw.get_submodule(str(node.target))
            name = next((c.__name__ for c in type(target).__mro__ if c.__name__ in RULES), type(target).__name__)
        else:
            target, name = None, _target_name(node)
        if name not in RULES:
            raise CaptureError(self._where(), f"the operation '{name}' has no canonical form", WAY_OUT)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
        try:
            return RULES[name](self, *([target] if target is not None else []), *args, **kwargs)
        except UnsupportedError as error:
            raise CaptureError(self._where(), f"'{name}' {error}", WAY_OUT) from None
        except TypeError as error:
            raise CaptureError(self._where(), f"'{name}' is called in an unknown way ({error})", WAY_OUT) from error

    def _argument(self, node: fx.Node) -> Any:
        """What a rule sees of a raw argument: canonical node(s), a constant tensor, or a plain value."""
        if node in self.env:
            if isinstance(self.env[node], _Refused):
                raise self.env[node].error
            return self.env[node]
        a, b = self.values[node]
        if isinstance(a, Tensor):
            self._name_constant(node, a)
            return a
        return a if _same(a, b) else BatchDependent(a, b)

    def _operand(self, value: Any) -> Any:
        if isinstance(value, fx.Node) or value is None:
            return value
        if isinstance(value, Expanded):
            raise UnsupportedError("of an expanded tensor is not supported; expand it in a sum or a product only")
        if isinstance(value, (list, tuple)):
            return [self._operand(v) for v in value]
        if not isinstance(value, Tensor):
            raise UnsupportedError(f"takes {type(value).__name__} where a tensor is expected")
        name = next((n for n, t in self.constants.items() if t is value), None)
        if name is None:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value
        if name not in self.parameters:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self.parameters[name] = self.graph.create_node(
                    "get_attr", name, (), {}, name=name.replace(".", "_").strip("_") or "parameter"
                )
            self.parameters[name].meta["example"] = (value, value)
        return self.parameters[name]

    def _name_constant(self, node: fx.Node, value: Tensor) -> None:
        if any(t is value for t in self.constants.values()):
            return
        name = parameter_name(str(node.target)) if node.op == "get_attr" else node.name
        self.constants[name if name not in self.constants else f"{name}_{len(self.constants)}"] = value

    def _check_constant(self, node: fx.Node) -> None:
        a, b = self.values[node]
        if isinstance(a, Tensor) and (a.shape != b.shape or not torch.equal(a, b)):
            raise CaptureError(
                self._where(), "makes a tensor that differs from run to run or with the batch size", WAY_OUT
            )

    # --- in-place operations and aliases ------------------------------------------------------------------------------

    def _versions(self, node: fx.Node) -> list[int]:
        return [t._version for t in _tensors(self.values[node][0])]

    def _follow_mutation(self, mutated: fx.Node, by: fx.Node) -> None:
        """After an in-place operation, every name of the same memory means the new value."""
        target = self.values[mutated][0]
        later = {n for user in self._later_nodes(by) for n in user.all_input_nodes}
        for node, value in list(self.env.items()):
            old = self.values[node][0]
            if node is by or not isinstance(old, Tensor) or not isinstance(value, fx.Node):
                continue
            if old.untyped_storage().data_ptr() != target.untyped_storage().data_ptr():
                continue
            if (old.storage_offset(), old.shape, old.stride()) == (
                target.storage_offset(),
                target.shape,
                target.stride(),
            ):
                self.env[node] = self.env[by]
            elif node in later:
                raise CaptureError(
                    self._where(), "changes a view in place, and the tensor it belongs to is used again", WAY_OUT
                )

    def _later_nodes(self, node: fx.Node) -> list[fx.Node]:
        nodes = list(self.raw.graph.nodes)
        return nodes[nodes.index(node) + 1 :]

    def _compare(self, nodes: Any, expected: tuple[Any, Any]) -> None:
        """The canonical value must be the raw one, here, at the line that made it."""
        if nodes is None:
            return  # a result without canonical form, such as a pool's indices
        if isinstance(nodes, (list, tuple)):
            for node, a, b in zip(nodes, *expected, strict=True):
                self._compare(node, (a, b))
            return
        for got, want in zip(nodes.meta["example"], expected, strict=True):
            if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise CaptureError(self._where(), "is computed differently by its canonical form", WAY_OUT)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, node: fx.Node) -> None:
        value = node.args[0]
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]  # torch.export wraps a single output
        found = self.env.get(value) if isinstance(value, fx.Node) else None
        single = isinstance(value, fx.Node) and isinstance(self.values[value][0], Tensor)
        if single and isinstance(found, _Refused):
            raise found.error
        if not single or not isinstance(found, fx.Node):
            what = "a constant" if isinstance(value, fx.Node) and value not in self.env else "more than one tensor"
            what = "an expanded tensor" if isinstance(found, Expanded) else what
            raise CaptureError(
                "the network's output", f"is {what}, not one tensor", "name the part to quantize with model.submodule"
            )
        self.graph.output(found)

    def _module(self) -> fx.GraphModule:
        self.graph.eliminate_dead_code()
        kept = {str(n.target): n for n in self.graph.nodes if n.op == "get_attr"}
        for node in self.graph.nodes:
            if "example" in node.meta:
                node.meta["shape"] = tuple(node.meta.pop("example")[0].shape)  # folding and plans need to know it
        return build({name: self.constants[name].detach().clone() for name in kept}, self.graph)

    def _name(self, op: str) -> str:
        """A readable name: the module's path for an op that is a whole torch.nn module, else path and op."""
        stack = self.current.meta.get("nn_module_stack") if self.current is not None else None
        if not stack:
            return op
        path, cls = list(stack.values())[-1] if not isinstance(stack, str) else ("", "")
        kind = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
        stem = str(path).replace(".", "_").strip("_")
        if not stem:
            return op
        return stem if kind.startswith("torch.nn.") else f"{stem}_{op.strip('_')}"

    def _where(self) -> str:
        assert self.current is not None
        return source_line(self.current.stack_trace) or f"graph node '{self.current.name}'"


class _Refused:
    """Stands for a value that has no canonical form."""

    def __init__(self, error: CaptureError) -> None:
        self.error = error


class Expanded:
    """The result of `expand` and the like (`values`, for either batch): sums and products take its `source` instead."""

    def __init__(self, source: fx.Node | Tensor, values: tuple[Tensor, Tensor]) -> None:
        self.source = source
        smaller = (source, source) if isinstance(source, Tensor) else source.meta["example"]
        try:
            examples = tuple(a.expand(b.shape) for a, b in zip(smaller, values, strict=True))
        except RuntimeError:
            raise UnsupportedError("repeats values, which is not supported") from None
        self.meta = {"example": examples}  # as a node has, so that rules know its shape


class BatchDependent:
    """A plain value that depends on the batch size: only shapes may take it."""

    def __init__(self, a: Any, b: Any) -> None:
        self.values = (a, b)


def build(tensors: dict[str, Tensor], graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule in eval mode whose parameters are `tensors` (name -> tensor), without gradients."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(leaf, tensor)
    graph.lint()
    return fx.GraphModule(root, graph).eval()


def parameter_name(path: str) -> str:
    """A parameter's name in the graph: its path, parts that nn.Module uses itself (`half`, `type`) made different."""
    taken = nn.Module()
    return ".".join(f"{part}_" if hasattr(taken, part) else part for part in path.split("."))


def source_line(stack_trace: str | None) -> str | None:
    """`file, line N: code` of the innermost line in a stack trace that is not torch's or ours."""
    if not stack_trace:
        return None
    found = None
    lines = stack_trace.splitlines()
    for i, line in enumerate(lines):
        if line.strip().startswith("File ") and "/torch/" not in line and "/calibquant/graph/" not in line:
            place = line.strip().removeprefix("File ").rpartition(", in ")[0].replace('"', "")
            code = lines[i + 1].strip() if i + 1 < len(lines) else ""
            code = "" if code.startswith("File ") else code
            found = f"{place}: `{code}`" if code else place
    return found


def _target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).split("::")[1]
    module = str(getattr(target, "__module__", "") or "")
    name = str(getattr(target, "__name__", target))
    builtin = module.split(".")[0] in {"torch", "_operator", "operator", "math", "builtins", ""}
    return name if builtin else f"{module}.{name}"


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _plain(value: Any) -> Any:
    """Attributes as JSON-able values: tuples of ints become lists' immutable form in the graph."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, BatchDependent):
        raise UnsupportedError("depends on the batch size")
    if isinstance(value, torch.SymInt | torch.SymFloat):
        raise UnsupportedError("depends on a symbolic size")
    return value
