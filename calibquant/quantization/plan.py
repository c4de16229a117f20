"""The plan: where quantizers stand, and with what grid. A value that can be read, printed, edited and stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from torch import fx

from calibquant.errors import QuantizationError, nearest
from calibquant.graph.nodes import activations_of, kind_of, op_of, weight_of
from calibquant.graph.ops import Kind
from calibquant.numerics.grid import Granularity, Grid, PerChannel, PerTensor
from calibquant.numerics.reach import adds_pairs, grid_within, reach_of
from calibquant.quantization.sites import integer_sites, main_sites, origin
from calibquant.recipe import Bits, QuantRecipe
from calibquant.recipe.section import checked


@dataclass(frozen=True)
class LevelPlan:
    """Levels in place of a uniform grid.

    Args:
        kind: "power-of-two", "apot", "ternary", "binary", "codebook" or "nuq".
        count: of levels, of an activation at most; a code takes ceil(log2(count)) bits.
        own: each channel has levels of its own.
    """

    kind: str
    count: int
    own: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return max(1, (self.count - 1).bit_length())


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is quantized.

    Args:
        grid: its codes; with an allocation its bits are the average of the channels'.
        symmetric: the range is symmetric around zero.
        granularity: what one scale spans.
        role: why it is quantized as it is: "main", "boundary" (kept wider by the boundary rule), "integer"
            (quantized by the integer placement only), or "bits" (the recipe names it in `bits`).
        allocation: how bits are shared among channels when calibrating: "none", "banner" or "optimal".
        levels: of the codes where they are few of the grid's, which is that of 8 bits then, signed for a weight.
        reach: of a weight, the largest magnitude of a code less its zero point that its kernels take on every
            processor, see `numerics.reach`; None: any. Levels and channels that share bits may pass it: deploy.onnx
            has a slower form for them.
    """

    grid: Grid
    symmetric: bool
    granularity: Granularity = PerTensor()  # noqa: RUF009  (a frozen value)
    role: str = "main"
    allocation: str = "none"
    levels: LevelPlan | None = None
    reach: int | None = None

    @property
    def bits(self) -> int:
        """Bits of a stored code."""
        return self.grid.bits if self.levels is None else self.levels.bits

    def within(self, reach: int) -> TensorPlan:
        """A copy whose codes stay within ±reach, on the widest grid that does."""
        if self.levels is not None or self.allocation != "none":
            return replace(self, reach=reach)
        grid, symmetric = grid_within(self.grid, self.symmetric, reach)
        return replace(self, grid=grid, symmetric=symmetric, reach=reach)

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        axis = self.granularity.axis if isinstance(self.granularity, PerChannel) else None
        row = {**asdict(self.grid), "symmetric": self.symmetric, "axis": axis, "role": self.role}
        row |= {} if self.allocation == "none" else {"allocation": self.allocation}
        row |= {} if self.reach is None else {"reach": self.reach}
        return row | ({} if self.levels is None else {"levels": asdict(self.levels)})

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> TensorPlan:
        """Inverse of `to_json`."""
        granularity = PerTensor() if row["axis"] is None else PerChannel(row["axis"])
        grid, allocation = Grid(row["bits"], row["signed"]), row.get("allocation", "none")
        levels = LevelPlan(**row["levels"]) if "levels" in row else None
        return TensorPlan(grid, row["symmetric"], granularity, row["role"], allocation, levels, row.get("reach"))


@dataclass(frozen=True)
class QuantPlan:
    """Where quantizers stand.

    Args:
        weights: parameter name -> how it is quantized; each parameter once, however often it is used.
        activations: node name -> how that node's output is quantized, for all that read it.
        placement, boundary: the rules it was made by.
        reach: "auto": what it deploys is exact on every processor; "full": only where kernels do not saturate.
    """

    weights: Mapping[str, TensorPlan]
    activations: Mapping[str, TensorPlan]
    placement: str
    boundary: str
    reach: str = "auto"

    def with_bits(self, name: str, bits: int) -> QuantPlan:
        """A copy in which one weight or activation has other bits; 8-bit weights are symmetric where they must be.

        A weight stays within the reach of its kernels: of 8 bits it gets 7 where these add products in pairs. Where
        channels share bits, these are their average; 16 bits are not shared.

        Raises:
            QuantizationError: there is no quantizer of that name, or a grid of so many bits is not supported.
        """
        if bits not in get_args(Bits):
            raise QuantizationError(f"plan, {name}", f"{bits} bits are not supported", "use 2 to 8, or 16")
        if name not in self.weights and name not in self.activations:
            known = [*self.weights, *self.activations]
            raise QuantizationError("plan", f"there is no quantizer named '{name}'", nearest(name, known))

        if name in self.activations:
            plain = replace(self.activations[name], grid=Grid(bits), levels=None)
            plan = _shared_up_to_8_bits(plain)
            return replace(self, activations={**self.activations, name: plan})
        plan = self.weights[name]
        symmetric = plan.symmetric or only_symmetric(self.placement, bits)
        grid = Grid(bits, signed=symmetric)
        plan = _shared_up_to_8_bits(replace(plan, grid=grid, symmetric=symmetric, levels=None))
        if plan.reach is not None and bits <= 8:
            plan = plan.within(plan.reach)
        return replace(self, weights={**self.weights, name: plan})


def make_plan(graph: fx.GraphModule, recipe: QuantRecipe) -> QuantPlan:
    """Place quantizers on a canonical graph.

    Weights of convolutions, linears and embeddings are quantized, each parameter once.

    Activations, `academic` placement: the output of every convolution, linear, matmul, sum, product and unfolded norm,
    taken after the activation function that alone reads it, and the concatenation of such outputs. Not quantized are:
    the image; what only sums read (a residual branch before its addition: the sum is quantized once); what only
    concatenations read (the concatenation is); and what no further computing op but pools reads (the logits).

    `integer` placement adds, at `residual_bits`, whatever else an integer runtime reads: the image, residual branches,
    pool outputs; and what its kernels make for a function that is computed in float, such as hardswish. 8-bit weights
    are symmetric there. Unless the recipe's `reach` is full, they get 7 bits where kernels of some processors would
    saturate; not with activation ranges that integer kernels do not run.

    Boundary rules, by execution order: `qdrop`: first and last weights and the last main activation have
    `boundary_bits`; `captq`: also the first layer's output; `brecq`: first and last weights and the first layer's
    output; `none`: nothing. What the recipe's `bits` names has those, whatever the rules say.

    Per-channel activations: those of shape (N, C, H, W) with more than one position; others keep one scale. Bits are
    shared among channels of weights of convolutions and products, and of such activations, with the role "main".

    Raises:
        RecipeError: the recipe was copied with a value that is not valid.
        QuantizationError: there is nothing to quantize, or `bits` names what is not quantized; or activations are asked
            for per channel, and the graph is not a captured one, whose shapes are known.
    """
    recipe = checked(recipe)
    weighted = [n for n in graph.graph.nodes if weight_of(n) is not None]
    if not weighted:
        raise QuantizationError("network", "holds no convolution or linear to quantize", "check model.submodule")
    main = main_sites(graph.graph)
    sites = dict.fromkeys(main, "main")
    if recipe.placement == "integer":
        sites |= dict.fromkeys(integer_sites(graph.graph, set(main)), "integer")
    wide = _boundary(graph.graph, main, recipe.boundary)
    weights: dict[str, TensorPlan] = {}
    for node in weighted:
        name = str(weight_of(node).target)  # type: ignore[union-attr]
        weights.setdefault(name, _weight_plan(node, recipe, "boundary" if name in wide else "main"))
    order = [n for n in graph.graph.nodes if n.name in sites]
    activations = {n.name: _activation_plan(n, recipe, "boundary" if n.name in wide else sites[n.name]) for n in order}
    plan = QuantPlan(weights, activations, recipe.placement, recipe.boundary, recipe.weights.reach)
    plan = _with_named_bits(plan, recipe)
    stored = not recipe.activations.dynamic and recipe.activations.granularity == "per_tensor"
    return _within_reach(plan, graph) if recipe.placement == "integer" and stored else plan


# --- bits -------------------------------------------------------------------------------------------------------------


def _boundary(graph: fx.Graph, main: list[str], rule: str) -> set[str]:
    """Names of the weights and activations that the boundary rule keeps wider."""
    weighted = [n for n in graph.nodes if weight_of(n) is not None and kind_of(n) is not Kind.LOOKUP]
    if rule == "none" or not weighted:
        return set()
    weights = [str(weight_of(n).target) for n in weighted]  # type: ignore[union-attr]
    wide = {weights[0], weights[-1]}
    if rule in ("qdrop", "captq"):
        wide |= set(main[-1:])
    if rule in ("brecq", "captq"):
        wide |= set(_site_of(weighted[0], main))
    return wide


def _site_of(node: fx.Node, main: list[str]) -> list[str]:
    """The main quantizer that a layer's output passes first, if any."""
    while node.name not in main:
        if len(node.users) != 1:
            return []
        node = next(iter(node.users))
    return [node.name]


def _weight_plan(node: fx.Node, recipe: QuantRecipe, role: str) -> TensorPlan:
    op = op_of(node)
    assert op is not None
    levels = _levels(node, recipe) if role == "main" else None
    if levels is not None:
        granularity = PerChannel(op.weight_axis) if recipe.weights.granularity == "per_channel" else PerTensor()
        return TensorPlan(Grid(8, signed=True), True, granularity, role, levels=levels)
    narrow = 8 if recipe.weights.grid == "nuq" else recipe.weights.code_bits
    bits = max(narrow, recipe.boundary_bits) if role == "boundary" else narrow
    symmetric = recipe.weights.symmetric or only_symmetric(recipe.placement, bits)
    granularity = PerChannel(op.weight_axis) if recipe.weights.granularity == "per_channel" else PerTensor()
    shared = role == "main" and op.kind is not Kind.LOOKUP
    allocation = recipe.weights.allocation if shared else "none"
    return TensorPlan(Grid(bits, signed=symmetric), symmetric, granularity, role, allocation)


def _levels(node: fx.Node, recipe: QuantRecipe) -> LevelPlan | None:
    """The levels of a weight; None for uniform ones. AMCT's NUQ leaves dilated and grouped convolutions uniform."""
    settings = recipe.weights
    plain = all(node.kwargs.get(key, 1) in (1, (1, 1), [1, 1]) for key in ("dilation", "groups"))
    if settings.grid == "uniform" or (settings.grid == "nuq" and not plain):
        return None
    own = settings.grid == "codebook" and settings.codebook == "per_channel"
    return LevelPlan(settings.grid, settings.level_count, own)


def _with_named_bits(plan: QuantPlan, recipe: QuantRecipe) -> QuantPlan:
    """The plan with the bits that the recipe gives single tensors."""
    for name, bits in recipe.bits.items():
        if name not in plan.weights and name not in plan.activations:
            problem = f"there is no quantizer named '{name}'"
            raise QuantizationError("recipe, quant.bits", problem, nearest(name, [*plan.weights, *plan.activations]))
        if name in plan.weights:  # before 8 bits made it symmetric
            weight = replace(plan.weights[name], symmetric=recipe.weights.symmetric, role="bits")
            plan = replace(plan, weights={**plan.weights, name: weight})
        else:
            activation = replace(plan.activations[name], role="bits")
            plan = replace(plan, activations={**plan.activations, name: activation})
        plan = plan.with_bits(name, bits)
    return plan


def _within_reach(plan: QuantPlan, graph: fx.GraphModule) -> QuantPlan:
    """The plan with weights that no integer kernel saturates with."""
    if plan.reach == "full":
        return plan
    weights = dict(plan.weights)
    for node in graph.graph.nodes:
        op, weight = op_of(node), weight_of(node)
        if op is None or not op.accumulates or weight is None:
            continue
        name, source = str(weight.target), plan.activations.get(origin(activations_of(node)[0]).name)
        wide = weights[name].grid.bits > 8 or (source is not None and source.grid.bits > 8)
        shape = graph.get_buffer(name).shape
        if source is not None and not wide and adds_pairs(shape, node.kwargs.get("groups", 1)):
            weights[name] = weights[name].within(reach_of(source.grid.bits))
    return replace(plan, weights=weights)


def only_symmetric(placement: str, bits: int) -> bool:
    """Integer kernels take 8-bit weights without zero points only."""
    return placement == "integer" and bits == 8


def _shared_up_to_8_bits(plan: TensorPlan) -> TensorPlan:
    return plan if plan.grid.bits <= 8 else replace(plan, allocation="none")


def _activation_plan(node: fx.Node, recipe: QuantRecipe, role: str) -> TensorPlan:
    bits = recipe.activations.bits
    if role != "main":
        bits = max(bits, recipe.boundary_bits if role == "boundary" else recipe.residual_bits)
    grid = recipe.activations.grid
    if grid != "uniform" and role == "main":
        return TensorPlan(Grid(8), grid != "codebook", PerTensor(), role, levels=LevelPlan(grid, 2**bits))
    if recipe.activations.granularity == "per_tensor" or not _is_map(node):
        return TensorPlan(Grid(bits), recipe.activations.symmetric, PerTensor(), role)
    allocation = recipe.activations.allocation if role == "main" else "none"
    return TensorPlan(Grid(bits), recipe.activations.symmetric, PerChannel(1), role, allocation)


def _is_map(node: fx.Node) -> bool:
    """Whether a node of a captured graph makes (N, C, H, W) with more than one position."""
    shape = node.meta.get("shape")
    if shape is None:
        raise QuantizationError(
            f"plan, {node.name}", "the shape of its value is not known", "capture the network first"
        )
    return len(shape) == 4 and shape[2] * shape[3] > 1
