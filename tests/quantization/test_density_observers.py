"""ACIQ on networks: statistics before the functions that limit, ranges within their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize
from scipy.special import erfc
from torch import Tensor, nn

from calibquant.graph import capture, fold_batch_norm
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import ActivationRecipe, Observer, QuantRecipe


class Net(nn.Module):
    """Outputs of a ReLU, a ReLU6, a sum of both, a hardtanh, a tanh, a sum of both and an average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.a(x))
        two = F.relu6(self.b(one))
        three = F.hardtanh(self.c(one + two))
        four = torch.tanh(self.d(three))
        return self.fc(F.adaptive_avg_pool2d(four + two, 1).flatten(1))


def images() -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(n, 1, 12, 12, generator=g) for n in (8, 8, 3)]


def network(gain: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3 * gain)
    return net


def calibrated(net: nn.Module, observer: Observer, bits: int = 4) -> QuantModel:
    recipe = QuantRecipe(
        boundary="none", residual_bits=bits, activations=ActivationRecipe(bits=bits, observer=observer)  # type: ignore[arg-type]
    )  # fmt: skip
    graph = fold_batch_norm(capture(net, images()[0][:2]))
    model = QuantModel(graph, make_plan(graph, recipe))
    calibrate_weights(model, recipe)
    calibrate_activations(model, recipe.activations, images())
    return model


def before(net: Net) -> dict[str, np.ndarray]:
    """What is quantized, before ReLUs and the like."""
    x = torch.cat(images())
    with torch.no_grad():
        a = net.a(x)
        b = net.b(a.relu())
        total = a.relu() + F.relu6(b)
        c = net.c(total)
        values = {"image": x, "relu": a, "relu6": b, "sum": total, "hardtanh": c, "conv": net.d(F.hardtanh(c))}
    return {name: v.double().numpy().ravel() for name, v in values.items()}


def ratio(observer: str, bits: int) -> float:
    """The clipping value in units of the scale, by brute force on the formula."""

    def error(a: float) -> float:
        if observer == "aciq-laplace":
            clipped = 2 * np.exp(-a)
        else:
            clipped = (1 + a * a) * erfc(a / 2**0.5) - (2 / np.pi) ** 0.5 * a * np.exp(-a * a / 2)
        return float(np.log(clipped + a * a / 3 / 4**bits))

    return float(optimize.minimize_scalar(error, bounds=(0.5, 15), method="bounded", options={"xatol": 1e-8}).x)


def by_hand(name: str, x: np.ndarray, observer: str, bits: int) -> tuple[float, float]:
    def scale(values: np.ndarray) -> float:
        return float(np.abs(values).mean() if observer == "aciq-laplace" else (values**2).mean() ** 0.5)

    center = x.mean()
    one, two = scale(x - center) * ratio(observer, bits + 1), scale(x - center) * ratio(observer, bits)
    if name in ("relu", "relu6"):
        return 0.0, min(max(center, 0) + one, x.max(), 6.0 if name == "relu6" else np.inf)
    if name == "sum":  # no value below zero, and no ReLU behind it
        return 0.0, min(scale(x) * ratio(observer, bits + 1), x.max())
    reach = 1.0 if name == "hardtanh" else np.inf
    return max(center - two, x.min(), -reach), min(center + two, x.max(), reach)


@pytest.mark.parametrize("observer", ["aciq-laplace", "aciq-gauss"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ranges_come_from_the_values_before_the_limits(observer: Observer, bits: int) -> None:
    net = network()
    model = calibrated(net, observer, bits)
    ops = {n.name: n for n in model.teacher.graph.nodes}
    seen = dict.fromkeys(before(net), False)
    for name, quantizer in model.activation_quantizers.items():
        node = ops[name]
        kind = "image" if node.op == "placeholder" else node.target.__name__
        if kind == "clamp":
            kind = "relu6" if node.kwargs["high"] == 6 else "hardtanh"
        kind = {"add": "sum", "conv2d": "conv"}.get(kind, kind)
        if kind not in seen or seen[kind]:
            continue  # behind the tanh
        seen[kind] = True
        low, high = by_hand(kind, before(net)[kind], observer, bits)
        assert quantizer.scale is not None
        span = float(quantizer.scale) * (2**bits - 1)
        assert span == pytest.approx(max(high, 0) - min(low, 0), rel=5e-3), kind
        assert float(quantizer.zero_point) == pytest.approx(-min(low, 0) / float(quantizer.scale), abs=0.6), kind
    assert all(seen.values())


def test_a_relu6_is_never_wider_than_six() -> None:
    for gain in (1.0, 3.0):
        net = network(gain)
        model = calibrated(net, "aciq", 8)
        name = next(n.name for n in model.teacher.graph.nodes if n.kwargs.get("high") == 6)
        quantizer = model.activation_quantizers[name]
        top = float(quantizer.get()[0]) * 255
        assert top <= 6 * (1 + 1e-6)
    assert top == pytest.approx(6)
    assert int(quantizer.zero_point) == 0


@pytest.mark.parametrize("observer", ["aciq", "aciq-laplace", "aciq-gauss", "ifmr", "hfmg"])
def test_the_network_works_and_batches_do_not_matter(observer: Observer) -> None:
    net = network()
    model = calibrated(net, observer, 8)
    x = torch.cat(images())
    recipe = ActivationRecipe(bits=8, observer=observer)
    with torch.no_grad():
        assert float((model(x) - net(x)).abs().mean()) < 0.15 * float(net(x).std())
    scales = [float(q.get()[0]) for q in model.activation_quantizers.values()]
    calibrate_activations(model, recipe, [x])  # convolutions differ in the last bit with the batch's size
    assert [float(q.get()[0]) for q in model.activation_quantizers.values()] == pytest.approx(scales, rel=1e-3)
    calibrate_activations(model, recipe, [x], quantized_weights=True)
    with torch.no_grad():
        assert float((model(x) - net(x)).abs().mean()) < 0.15 * float(net(x).std())


def test_two_quantizers_may_watch_one_node() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return (self.b(F.relu(y)) + self.c(F.hardtanh(y))).mean((2, 3))

    torch.manual_seed(1)
    net = Twice().eval()
    model = calibrated(net, "aciq-gauss")
    with torch.no_grad():
        y = net.a(torch.cat(images())).numpy()
    names = {n.kwargs.get("low"): n.name for n in model.teacher.graph.nodes if n.op == "call_function"}
    relu = next(n.name for n in model.teacher.graph.nodes if n.op == "call_function" and n.target.__name__ == "relu")
    top = float(model.activation_quantizers[relu].get()[0]) * 15
    assert top == pytest.approx(max(y.mean(), 0) + y.std() * ratio("aciq-gauss", 5), rel=5e-3)
    tanh = model.activation_quantizers[names[-1]]
    assert float(tanh.get()[0]) * 15 <= 2 * (1 + 1e-6)
    assert int(tanh.zero_point) > 0
