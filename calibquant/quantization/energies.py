"""How much a layer's output suffers from an error of each of its weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from calibquant import parallel
from calibquant.graph.nodes import activations_of, op_of, weight_of
from calibquant.graph.ops import Kind
from calibquant.graph.watching import Watched
from calibquant.quantization.calibration import show
from calibquant.quantization.model import QuantModel, parameter_tensors
from calibquant.recipe import QuantRecipe

LEAST = 1e-4  # of the mean energy: weights that met only zeros still count a little


def weight_energies(
    model: QuantModel,
    recipe: QuantRecipe,
    batches: Iterable[Tensor],
    mount: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> dict[str, Tensor]:
    """The energy of the inputs that each weight multiplies, where the recipe clusters by it; else nothing.

    An error d of one weight adds d * x to an output, so the squared error of a layer's outputs is, to second order and
    but for products of two errors, the sum of d^2 * energy: the diagonal of the Hessian, as OBS and GPTQ have it, and
    as SqueezeLLM (Kim et al., ICML 2024) weighs its clusters. It is found as the gradient of sum(op(x^2, w)) with
    respect to w, for any op that is linear in its weight.

    Args:
        model: its float network runs, on its device.
        recipe: says whether energies are needed (`weights.clustering`).
        batches: images, (N, C, H, W) float32, already preprocessed.
        mount: puts the network where images reach it; see `calibration.calibrate_activations`.

    Returns:
        by weight float32, its shape, positive, with the mean 1.

    Raises:
        QuantizationError: there are no images.
    """
    if recipe.weights.clustering == "plain":
        return {}
    readers: dict[str, list[fx.Node]] = defaultdict(list)
    for node in model.teacher.graph.nodes:
        weight = weight_of(node)
        if weight is not None and str(weight.target) in model.weight_quantizers:
            readers[activations_of(node)[0].name].append(node)
    tensors = parameter_tensors(model.teacher)
    sums = {name: torch.zeros_like(tensors[name], dtype=torch.float64) for name in model.weight_quantizers}

    def visit(source: str, x: Tensor) -> None:
        for node in readers[source]:
            name = str(weight_of(node).target)  # type: ignore[union-attr]
            sums[name] += _energy(node, x, tensors[name])

    with torch.no_grad():
        show(mount(Watched(model.teacher, readers.keys(), visit)), batches)
    shares = parallel.every({name: total.cpu() for name, total in sums.items()})
    return {
        name: _relative(torch.stack([share[name] for share in shares]).sum(0)).to(total.device)
        for name, total in sums.items()
    }


def _energy(node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    """Sums of the squared inputs that each weight meets, the shape of `weight`; how often a row is looked up."""
    op = op_of(node)
    assert op is not None
    squares = x.detach() if op.kind is Kind.LOOKUP else x.detach().float().square()
    with torch.enable_grad():
        free = weight.detach().clone().requires_grad_()
        source, own = activations_of(node)[0], weight_of(node)
        given = (squares if a is source else free if a is own else None for a in node.args)  # no bias
        total = op.run(*given, **node.kwargs).sum()
        return torch.autograd.grad(total, free)[0]


def _relative(total: Tensor) -> Tensor:
    return (total / total.mean().clamp(min=1e-30)).clamp(min=LEAST).float()
