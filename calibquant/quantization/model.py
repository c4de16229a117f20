"""QuantModel: the float network, the plan, and the quantized network that they make."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from calibquant.graph.nodes import activations_of, kind_of, op_of, weight_of
from calibquant.graph.ops import COMPUTE, Kind
from calibquant.graph.subgraph import subgraph
from calibquant.quantization.biases import BiasDelta, BiasRounding
from calibquant.quantization.plan import QuantPlan
from calibquant.quantization.quantizers import ActivationQuantizer, WeightQuantizer


@dataclass(frozen=True)
class CoverageRow:
    """How one compute node is quantized.

    Args:
        node: its name in the graph.
        op: its canonical op.
        kind: the op's kind.
        weight_bits: of its weight, None where it has none or it stays float; the mean where channels differ.
        input_bits: of each activation it reads, None for float; the mean where channels differ.
        reason: why something of it stays float; empty when all of it is quantized.
        note: what else is to be known: bits shared among channels, and what exists in simulation only.
    """

    node: str
    op: str
    kind: str
    weight_bits: float | None
    input_bits: tuple[float | None, ...]
    reason: str
    note: str = ""


class QuantModel(nn.Module):
    """A network of quantized weights and activations, simulated in float32.

    Args:
        teacher: the float network as a canonical graph, BatchNorm folded. It is never changed.
        plan: where quantizers stand.
        dynamic: activation ranges are taken from each batch at run time.
        shared: take this model's quantizers instead of new ones; `part` does.

    With every quantizer disabled it computes exactly what the teacher computes.

    Example:
        >>> import torch
        >>> from calibquant.graph import capture, fold_batch_norm
        >>> from calibquant.quantization import make_plan
        >>> from calibquant.recipe import QuantRecipe
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> teacher = fold_batch_norm(capture(net, torch.zeros(1, 1, 8, 8)))
        >>> model = QuantModel(teacher, make_plan(teacher, QuantRecipe()))
        >>> list(model.activation_quantizers)
        ['x', '_1']
    """

    def __init__(
        self, teacher: fx.GraphModule, plan: QuantPlan, dynamic: bool = False, shared: QuantModel | None = None
    ) -> None:
        super().__init__()
        self.teacher, self.plan = teacher, plan
        # Node name -> the correction of its bias, for products with a quantized weight and a bias.
        self.bias_deltas: dict[str, BiasDelta]
        # Node name -> quantizer of the input, for products whose bias is added in integers; a part may not hold it.
        self.bias_sources: dict[str, ActivationQuantizer]
        if shared is None:
            self.weight_quantizers = {name: WeightQuantizer(name, p) for name, p in plan.weights.items()}
            self.activation_quantizers = {n: ActivationQuantizer(n, p, dynamic) for n, p in plan.activations.items()}
            self.bias_sources = self._find_bias_sources()
            self.bias_deltas = self._make_bias_deltas()
        else:
            self.weight_quantizers = {name: shared.weight_quantizers[name] for name in plan.weights}
            self.activation_quantizers = {name: shared.activation_quantizers[name] for name in plan.activations}
            self.bias_sources = shared.bias_sources
            calls = [
                n.name for n in teacher.graph.nodes if n.op == "call_function"
            ]  # an input may have a product's name
            self.bias_deltas = {name: shared.bias_deltas[name] for name in calls if name in shared.bias_deltas}
        self.simulation = self._build()
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        """The simulated output for inputs of shape (N, ...)."""
        return self.simulation(*inputs)

    @property
    def quantizers(self) -> list[WeightQuantizer | ActivationQuantizer]:
        """All quantizers, in the order in which data passes them."""
        order: dict[str, WeightQuantizer | ActivationQuantizer] = {}
        for node in self.teacher.graph.nodes:
            weight = weight_of(node)
            if weight is not None and str(weight.target) in self.weight_quantizers:
                order[f"weight {weight.target}"] = self.weight_quantizers[str(weight.target)]
            if node.name in self.activation_quantizers:
                order[f"activation {node.name}"] = self.activation_quantizers[node.name]
        return list(order.values())

    def part(self, nodes: Collection[str], outputs: Sequence[str]) -> QuantModel:
        """A piece of the network with the same quantizers; its inputs are taken as they come.

        Args:
            nodes: names of the ops that the piece computes.
            outputs: names of what it returns; see `graph.subgraph`.
        """
        teacher = subgraph(self.teacher, nodes, outputs)
        inside = {n.name for n in teacher.graph.nodes if n.op == "call_function"}
        parameters = {str(n.target) for n in teacher.graph.nodes if n.op == "get_attr"}
        plan = replace(
            self.plan,
            weights={name: p for name, p in self.plan.weights.items() if name in parameters},
            activations={name: p for name, p in self.plan.activations.items() if name in inside},
        )
        return QuantModel(teacher, plan, shared=self)

    def enable(self, weights: bool = True, activations: bool = True) -> None:
        """Switch all quantizers of a kind on or off."""
        for weight_quantizer in self.weight_quantizers.values():
            weight_quantizer.enabled = weights
        for activation_quantizer in self.activation_quantizers.values():
            activation_quantizer.enabled = activations

    def stop_learning(self) -> None:
        """Each quantizer and bias takes what was learned."""
        for quantizer in self.quantizers:
            quantizer.stop_learning()
        for delta in self.bias_deltas.values():
            delta.stop_learning()

    @contextmanager
    def float_mode(self) -> Iterator[None]:
        """Within the context every quantizer is off; then each is as it was."""
        before = [(q, q.enabled) for q in self.quantizers]
        self.enable(False, False)
        try:
            yield
        finally:
            for quantizer, enabled in before:
                quantizer.enabled = enabled

    def quantizer_before(self, node: fx.Node) -> ActivationQuantizer | None:
        """The quantizer on whose grid the values of a node of the teacher's graph lie; None for float values."""
        while node.name not in self.activation_quantizers:
            op = op_of(node)
            if op is None or not op.keeps_grid:
                return None
            node = activations_of(node)[0]
        return self.activation_quantizers[node.name]

    def biases(self) -> dict[str, tuple[ActivationQuantizer, WeightQuantizer, Tensor]]:
        """The products whose bias is added in integers: quantizers of input and weight, corrected bias, by node."""
        found = {}
        for node in self.teacher.graph.nodes:
            if node.name in self.bias_sources:
                quantizer = self.weight_quantizers[str(weight_of(node).target)]  # type: ignore[union-attr]
                bias, delta = self._bias(node), self.bias_deltas[node.name].delta
                found[node.name] = (self.bias_sources[node.name], quantizer, bias if delta is None else bias + delta)
        return found

    def bias_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the bias that a node with a `bias_delta` adds."""
        return tuple(self._bias(self._node(name)).shape)

    def simulated_biases(self) -> dict[str, Tensor]:
        """The biases that the simulation changes, corrected and rounded, by the node that adds them."""
        found = {}
        for node in self.teacher.graph.nodes:
            if node.name in self.bias_deltas:
                bias = self._bias(node)
                corrected = self.bias_deltas[node.name](bias)
                if node.name in self.bias_sources:
                    corrected = self.simulation.get_submodule(f"bias_roundings.{node.name}")(corrected)
                if corrected is not bias:
                    found[node.name] = corrected
        return found

    def coverage(self) -> list[CoverageRow]:
        """Every compute node, its bits, or the reason why something of it stays float."""
        return [
            self._coverage_row(node)
            for node in self.teacher.graph.nodes
            if kind_of(node) in COMPUTE or weight_of(node) is not None
        ]

    def summary(self) -> str:
        """One line: how many compute nodes run on quantized inputs and weights."""
        rows = self.coverage()
        whole = sum(1 for row in rows if not row.reason)
        return f"{whole} of {len(rows)} compute nodes quantized throughout, {len(self.weight_quantizers)} weights"

    # --- inside -------------------------------------------------------------------------------------------------------

    def _build(self) -> fx.GraphModule:
        """The teacher's graph with quantizers inserted; parameters are shared with the teacher."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.teacher.graph, copies))
        root = nn.Module()
        root.add_module("network", self.teacher)
        weights, activations = nn.ModuleDict(), nn.ModuleDict()
        root.add_module("weight_quantizers", weights)
        root.add_module("activation_quantizers", activations)
        for node in list(graph.nodes):
            if node.op == "get_attr":
                name = str(node.target)
                node.target = f"network.{name}"
                if name in self.weight_quantizers:
                    weights[node.name] = self.weight_quantizers[name]
                    self._insert(graph, node, f"weight_quantizers.{node.name}")
            elif node.name in self.activation_quantizers:
                activations[node.name] = self.activation_quantizers[node.name]
                self._insert(graph, node, f"activation_quantizers.{node.name}")
        deltas, roundings = nn.ModuleDict(), nn.ModuleDict()
        root.add_module("bias_deltas", deltas)
        root.add_module("bias_roundings", roundings)
        for node in [n for n in graph.nodes if n.name in self.bias_deltas and n.op == "call_function"]:
            deltas[node.name] = self.bias_deltas[node.name]
            self._insert_at_bias(graph, node, f"bias_deltas.{node.name}")
        for node in [n for n in graph.nodes if n.name in self.bias_sources and n.op == "call_function"]:
            weight = weight_of(self._node(node.name))
            quantizer = self.weight_quantizers[str(weight.target)]  # type: ignore[union-attr]
            roundings[node.name] = BiasRounding(self.bias_sources[node.name], quantizer)
            self._insert_at_bias(graph, node, f"bias_roundings.{node.name}")
        graph.lint()
        return fx.GraphModule(root, graph)

    def bias_of(self, name: str) -> Tensor:
        """The float bias of a product that has one, by the product's name, (C,)."""
        return self._bias(self._node(name))

    def _bias(self, node: fx.Node) -> Tensor:
        return self.teacher.get_buffer(str(node.args[op_of(node).bias].target))  # type: ignore[union-attr, index]

    def _node(self, name: str) -> fx.Node:
        return next(n for n in self.teacher.graph.nodes if n.name == name)

    def _find_bias_sources(self) -> dict[str, ActivationQuantizer]:
        """With the integer placement: products that have a bias, a quantized weight and an input on a stored grid."""
        found: dict[str, ActivationQuantizer] = {}
        if self.plan.placement != "integer":
            return found
        for node in self.teacher.graph.nodes:
            op, weight = op_of(node), weight_of(node)
            if op is None or not op.accumulates or weight is None or str(weight.target) not in self.weight_quantizers:
                continue
            bias, source = node.args[op.bias or 0], self.quantizer_before(activations_of(node)[0])
            stored = source is not None and not source.dynamic and not source.per_channel
            if isinstance(bias, fx.Node) and bias.op == "get_attr" and stored:
                found[node.name] = source  # type: ignore[assignment]
        return found

    def _make_bias_deltas(self) -> dict[str, BiasDelta]:
        found = {}
        for node in self.teacher.graph.nodes:
            op, weight = op_of(node), weight_of(node)
            if op is None or op.bias is None or weight is None or str(weight.target) not in self.weight_quantizers:
                continue
            bias = node.args[op.bias]
            if isinstance(bias, fx.Node) and bias.op == "get_attr":
                found[node.name] = BiasDelta(self.weight_quantizers[str(weight.target)])
        return found

    @staticmethod
    def _insert_at_bias(graph: fx.Graph, node: fx.Node, target: str) -> None:
        place = op_of(node).bias or 0  # type: ignore[union-attr]
        with graph.inserting_before(node):
            changed = graph.call_module(target, (node.args[place],))
        node.update_arg(place, changed)

    @staticmethod
    def _insert(graph: fx.Graph, node: fx.Node, target: str) -> None:
        with graph.inserting_after(node):
            quantized = graph.call_module(target, (node,))
        node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)

    def _coverage_row(self, node: fx.Node) -> CoverageRow:
        op = op_of(node)
        assert op is not None
        weight = weight_of(node)
        own = self.weight_quantizers.get(str(weight.target)) if weight is not None else None
        sources = [self._read(node, s) for s in activations_of(node) if op.kind is not Kind.LOOKUP]
        bits = tuple(None if source is None else source.mean_bits for source in sources)
        return CoverageRow(
            node.name, op.name, op.kind.value, None if own is None else own.mean_bits, bits,
            self._reason(node, own is not None, bits), self._note(own, [s for s in sources if s is not None]),
        )  # fmt: skip

    def _read(self, node: fx.Node, source: fx.Node) -> ActivationQuantizer | None:
        """The quantizer on whose grid `node` finds the values of `source`; None for float."""
        before = self.quantizer_before(source)
        if before is None and kind_of(node) is Kind.CONCAT:
            return self.activation_quantizers.get(node.name)  # its inputs are put on its own grid
        return before

    @staticmethod
    def _note(weight: WeightQuantizer | None, inputs: list[ActivationQuantizer]) -> str:
        """What bits alone do not say."""
        said = []
        if weight is not None and weight.plan.allocation != "none":
            said.append(f"weight bits{_between(weight.channel_bits)} by {weight.plan.allocation}")
        channels = [q for q in inputs if q.per_channel]
        said += [
            f"input bits{_between(q.channel_bits)} by {q.plan.allocation}"
            for q in channels
            if q.plan.allocation != "none"
        ]
        return "; ".join([*said, "input per channel: simulation only"] if channels else said)

    def _reason(self, node: fx.Node, has_weight: bool, bits: tuple[float | None, ...]) -> str:
        kind = kind_of(node)
        if kind in (Kind.NORM, Kind.FLOAT):
            return f"{node.target.__name__} has no integer form and is computed in float"  # type: ignore[union-attr]
        op = op_of(node)
        if op is not None and op.weight is not None and not has_weight:
            return "its weight is computed by the network"
        if None in bits:
            return f"not quantized by the {self.plan.placement} placement"
        constants = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        if kind in (Kind.ADD, Kind.MUL) and constants:
            return "its constant operand stays float"
        return ""


def _between(channel_bits: Tensor | None) -> str:
    """The channels' fewest and most bits, in words."""
    return "" if channel_bits is None else f" {int(channel_bits.min())} to {int(channel_bits.max())}"


def parameter_tensors(graph: fx.GraphModule) -> dict[str, Tensor]:
    """The parameters of a canonical graph by name."""
    return dict(graph.named_buffers())
