"""Networks as users have them: wrapped, pruned, reparametrized, in other types, with tensors of a history."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from calibquant.errors import CalibQuantError, CaptureError, ModelError
from calibquant.graph import capture
from calibquant.networks import LIMIT, bare, check_values, float_copy, owned_copy

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()


def weights_of(graph: nn.Module) -> set[str]:
    return {name for name, _ in graph.named_buffers()}


@contextmanager
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# --- weights that are computed ----------------------------------------------------------------------------------------


def pruned(network: nn.Sequential) -> None:
    prune.l1_unstructured(network[0], "weight", 0.5)
    prune.random_unstructured(network[0], "weight", 0.2)  # two methods become a container
    prune.ln_structured(network[4], "weight", 0.5, n=2, dim=0)


def weight_norm(network: nn.Sequential) -> None:
    nn.utils.weight_norm(network[0])
    network[0].weight_g.data *= 3


def spectral_norm(network: nn.Sequential) -> None:
    nn.utils.spectral_norm(network[0])


def parametrized(network: nn.Sequential) -> None:
    parametrizations.weight_norm(network[0])
    parametrizations.spectral_norm(network[4])


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def several_parametrizations(network: nn.Sequential) -> None:
    for name in ("weight", "bias"):
        parametrize.register_parametrization(network[4], name, Doubled())
    parametrize.register_parametrization(network[4], "bias", Doubled())


COMPUTED = (pruned, weight_norm, spectral_norm, parametrized, several_parametrizations)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("change", COMPUTED)
def test_weights_that_are_computed_become_plain_ones(change: Callable[[nn.Sequential], None]) -> None:
    network = plain()
    change(network)
    with torch.no_grad():
        want = network(X)
    network(X)  # leaves weights with a history of gradients
    names = list(network.state_dict())
    graph = capture(network, X)
    assert torch.allclose(graph(X), want, atol=1e-6)
    assert weights_of(graph) == weights_of(capture(plain(), X)), "no mask and no norm is left"
    assert not torch.allclose(want, plain()(X), atol=1e-3), "the change matters"
    assert list(network.state_dict()) == names, "the user's network is as it was"
    with torch.no_grad():
        assert torch.equal(network(X), want)


@pytest.mark.parametrize("change", [pruned, parametrized])
def test_a_copy_to_train_keeps_what_computes_its_weights(change: Callable[[nn.Sequential], None]) -> None:
    network = plain()
    change(network)
    network(X).sum().backward()
    copied = owned_copy(network)
    assert list(copied.state_dict()) == list(network.state_dict())
    copied(X).sum().backward()
    copy.deepcopy(owned_copy(copied))


class Caching(nn.Module):
    """Keeps features where modules and hooks usually keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen, self.by_name = plain(), list[Tensor](), dict[str, tuple[Tensor, ...]]()
        self.net[1].register_forward_hook(self.keep)

    def keep(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.last = output
        self.by_name["relu"] = (output,)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        self.seen.append(y)
        return y


class Keeper:
    """An object outside the network, whose method is a hook."""

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}

    def hook(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.features["out"] = output


def test_cached_features_are_no_hindrance() -> None:
    network = Caching().eval()
    network.net[0].register_forward_hook(Keeper().hook)
    want = network(X)
    assert not network.last.is_leaf
    assert torch.allclose(capture(network, X)(X), want, atol=1e-6)
    assert network.seen[0] is want, "the user's features are as they were"


def test_what_cannot_be_copied_is_named() -> None:
    network = plain()
    network[1].lock = threading.Lock()
    with pytest.raises(ModelError, match=r"^network, attribute '1\.lock': cannot be copied \(cannot pickle") as caught:
        capture(network, X)
    assert "\n" not in str(caught.value)
    del network[1].lock  # as the error says
    capture(network, X)


# --- where and how it was made ----------------------------------------------------------------------------------------


def test_a_network_of_inference_mode_is_an_ordinary_one() -> None:
    with torch.inference_mode():
        network = nn.Sequential(plain(), nn.BatchNorm1d(2)).eval()
        network.register_buffer("table", torch.ones(2))
        network[0][0].weight = nn.Parameter(network[0][0].weight * 2)
        want = network(X)
        graph = capture(network, X.clone())
        with torch.inference_mode(False):
            assert torch.allclose(graph(X), want.clone(), atol=1e-6)
    copied = float_copy(network)
    copied(X).sum().backward()  # which an inference tensor refuses
    assert all(p.grad is not None for p in copied.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_modes_become_float32_in_evaluation_mode(dtype: torch.dtype) -> None:
    network = nn.Sequential(plain(), nn.BatchNorm1d(2), nn.Dropout(0.9)).to(dtype).train()
    network.scale = torch.tensor(2.0, dtype=dtype)  # neither parameter nor buffer
    copied = float_copy(network)
    assert {t.dtype for t in copied.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert copied.scale.dtype == torch.float32
    assert not any(module.training for module in copied.modules())
    assert torch.allclose(capture(network, X)(X), copied(X), atol=1e-6)
    assert network.training
    assert network[0][0].weight.dtype == dtype


def test_tied_weights_stay_tied() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    network[1].weight = network[0].weight
    copied = float_copy(network)
    assert copied[0].weight is copied[1].weight


# --- wrappers ---------------------------------------------------------------------------------------------------------


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, backend="eager")


class Wrapped(nn.Module):
    """Parts of it are wrapped."""

    def __init__(self) -> None:
        super().__init__()
        net = plain()
        self.body, self.head = nn.DataParallel(compiled(net[:2])), compiled(net[2:])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compiled": compiled,
    "averaged": AveragedModel,
    "nested": lambda network: AveragedModel(nn.DataParallel(compiled(network))),
    "nested otherwise": lambda network: compiled(AveragedModel(network)),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_are_taken_off(wrap: str) -> None:
    network = WRAPPERS[wrap](plain())
    assert type(bare(network)) is nn.Sequential
    graph = capture(network, X)
    assert torch.equal(graph(X), capture(plain(), X)(X))
    assert weights_of(graph) == weights_of(capture(plain(), X))
    part = capture(network, X, submodule="4")
    assert part(torch.ones(1, 4)).shape == (1, 2)


def test_distributed_data_parallel_is_taken_off() -> None:
    with process_group():
        network = nn.parallel.DistributedDataParallel(plain())
        assert torch.equal(capture(compiled(network), X)(X), capture(plain(), X)(X))


def test_wrappers_of_parts_are_taken_off() -> None:
    network = Wrapped().eval()
    graph = capture(network, X)
    assert torch.equal(graph(X), capture(plain(), X)(X))
    assert isinstance(network.body, nn.DataParallel), "the user's network is as it was"
    assert not any("module" in name or "_orig_mod" in name for name in weights_of(graph))


# --- tensors without usable values ------------------------------------------------------------------------------------


def sparse() -> nn.Module:
    network = plain()
    network[4].weight = nn.Parameter(network[4].weight.detach().to_sparse())
    return network


def compressed() -> nn.Module:
    network = plain()
    network.register_buffer("table", torch.eye(3).to_sparse_csr())
    return network


def partly_meta() -> nn.Module:
    network = plain()
    network[4] = nn.Linear(4, 2, device="meta")
    return network


def complex_weights() -> nn.Module:
    network = plain()
    network.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    return network


def quantized() -> nn.Module:
    network = plain()
    network.register_buffer("table", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8))
    return network


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:Sparse CSR", "ignore:.*quantized tensor creation")
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), r"^network, parameter '0\.weight': has no shape yet.*run it once"),
        (lambda: nn.Sequential(nn.LazyBatchNorm2d()), "parameter '0.weight': has no shape yet"),
        (partly_meta, r"parameter '4\.weight': is on the meta device, where tensors have no values"),
        (sparse, r"parameter '4\.weight': is stored as sparse_coo; make it dense with to_dense\(\)"),
        (compressed, "buffer 'table': is stored as sparse_csr"),
        (complex_weights, "parameter 'phase': holds complex numbers"),
        (quantized, "buffer 'table': is quantized already"),
        (lambda: torch.jit.trace(plain(), X), "network: is a TorchScript program; give the nn.Module"),
    ],
)  # fmt: skip
def test_tensors_without_usable_values_are_named(build: Callable[[], nn.Module], said: str) -> None:
    for enter in (float_copy, owned_copy, lambda network: capture(nn.DataParallel(network), X)):
        with pytest.raises(ModelError, match=said) as caught:
            enter(build())
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_network_is_taken_once_it_has_run() -> None:
    network = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2)).eval()
    want = network(X)
    assert torch.allclose(capture(network, X)(X), want, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (plain().state_dict(), "is of type OrderedDict, not an nn.Module; build the network, load the weights"),
        (nn.ReLU, r"is the class ReLU, not a network; pass an instance, e\.g\. ReLU\(\)"),
        (F.relu, "is of type function, not an nn.Module; pass an nn.Module whose forward calls it"),
        ("resnet18.pth", "is the str 'resnet18.pth'; leave network out, and set model.name and model.weights"),
        (X, "is of type Tensor, not an nn.Module"),
    ],
)  # fmt: skip
def test_what_is_no_network_is_told_what_to_pass(given: object, said: str) -> None:
    with pytest.raises(ModelError, match=f"^network: {said}"):
        capture(given, X)  # type: ignore[arg-type]


@pytest.mark.parametrize("example", [[X], X.numpy(), torch.zeros(0, 3, 8, 8), torch.tensor(1.0)])
def test_what_is_no_example_is_told_what_to_pass(example: object) -> None:
    with pytest.raises(ModelError, match=r"^example: .*; give a tensor of images, \(N, C, H, W\)"):
        capture(plain(), example)  # type: ignore[arg-type]


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("0.weight", -3e20, r"parameter '0\.weight': holds values up to -3e\+20, where 1e\+19 is the largest"),
        ("1.running_mean", 2e19, r"buffer '1\.running_mean': holds values up to 2e\+19"),
        ("1.running_var", torch.nan, r"buffer '1\.running_var': holds NaN or infinite values"),
        ("1.running_var", -0.5, r"buffer '1\.running_var': holds -0\.5, which is no variance"),
        ("1.bias", torch.inf, r"parameter '1\.bias': holds NaN or infinite values"),
    ],
)
def test_values_that_cannot_be_squared_are_named(where: str, value: float, said: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network.register_buffer("mask", torch.full((2,), -torch.inf))  # may be so
    check_values(network)
    network.state_dict()[where].view(-1)[1] = value
    with pytest.raises(ModelError, match=said):
        check_values(network)
    network.state_dict()[where].view(-1)[1] = LIMIT
    check_values(network)


# --- outputs and inputs -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    loss: None
    hidden: Tensor
    logits: Tensor


Pair = namedtuple("Pair", ["logits", "features"])


class Returning(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.net, self.wrap = plain(), wrap

    def forward(self, x: Tensor) -> object:
        features = self.net[:2](x)
        return self.wrap(self.net[2:](features), features)


@pytest.mark.parametrize(
    ("wrap", "what", "mend"),
    [
        (lambda y, z: {"features": z, "logits": y}, "a dictionary with 'features', 'logits'", "network(x)['logits']"),
        (lambda y, z: {"only": y}, "a dictionary with 'only'", "network(x)['only']"),
        (lambda y, z: Output(None, z, y), "a dataclass Output with loss, hidden, logits", "network(x).logits"),
        (lambda y, z: (z, y), "a tuple of 2", "network(x)[1]"),
        (lambda y, z: [y], "a list of 1", "network(x)[0]"),
        (lambda y, z: Pair(y, z), "a Pair of 2", "network(x)[0]"),
        (lambda y, z: None, "None", "its tensor"),
    ],
)
def test_other_outputs_than_a_tensor_are_refused_in_one_line(
    wrap: Callable[[Tensor, Tensor], object], what: str, mend: str
) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Returning(wrap).eval(), X)
    assert caught.value.where == "the network's output"
    assert caught.value.problem == f"is {what}, not one tensor"
    assert f"wrap the network in a module that returns {mend}" in caught.value.mend


def test_the_wrapper_that_the_error_proposes_works() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Returning(lambda y, z: {"features": z, "logits": y})

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)["logits"]

    assert torch.allclose(capture(Logits().eval(), X)(X), plain()(X), atol=1e-6)


def test_a_part_that_returns_several_tensors_is_named() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Returning(lambda y, z: (y, z))

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x)[0]

    with pytest.raises(CaptureError, match=r"^the output of 'part': is a tuple of 2"):
        capture(Host().eval(), X, submodule="part")


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 4, 8, 8), (2, 3, 2, 2), (2, 3)])
@pytest.mark.parametrize("part", [None, "4"])
def test_images_that_the_network_does_not_take_are_one_line(shape: tuple[int, ...], part: str | None) -> None:
    sizes = " x ".join(map(str, shape[1:]))
    with pytest.raises(CaptureError, match=f"fails on images of {sizes} .*give images of the size and channels") as c:
        capture(plain(), torch.zeros(shape), part)
    assert "\n" not in str(c.value)


# --- tensors that are expanded ----------------------------------------------------------------------------------------


class Gate(nn.Module):
    """A channel's share of each image, and what is done with both."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.use = nn.Conv2d(3, 4, 3), use
        self.register_buffer("table", torch.rand(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.use(y, torch.sigmoid(F.adaptive_avg_pool2d(y, 1)))


EXPANDED: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "product": ("mul", lambda y, w: y * w.expand_as(y)),
    "in place": ("mul", lambda y, w: F.relu(y).mul_(w.expand_as(y))),
    "first": ("mul", lambda y, w: w.expand_as(y) * y),
    "sum": ("add", lambda y, w: torch.add(y, w.expand(y.size()), alpha=2)),
    "difference": ("sub", lambda y, w: w.expand(-1, -1, y.shape[2], y.shape[3]) - y),
    "quotient": ("div", lambda y, w: y / w.broadcast_to(y.shape)),
    "repeated": ("mul", lambda y, w: y * w.repeat(1, 1, y.shape[2], y.shape[3])),
    "contiguous": ("mul", lambda y, w: y * w.expand_as(y).contiguous()),
    "twice": ("mul", lambda y, w: y * w.expand(-1, -1, y.shape[2], -1).expand_as(y)),
    "new dimension": ("mul", lambda y, w: y.flatten(2) * w.flatten(2).expand(y.shape[0], y.shape[1], 36)),
    "nothing to expand": ("mul", lambda y, w: w * w.expand_as(w)),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_an_expanded_factor_is_a_product_with_broadcasting(name: str) -> None:
    op, use = EXPANDED[name]
    network = Gate(use).eval()
    graph = capture(network, X)
    ops = [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
    assert op in ops
    assert not {"cat", "upsample_nearest"} & set(ops), "nothing is made larger"
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.allclose(graph(x), network(x), atol=1e-6)


def test_an_expanded_constant_is_taken_too() -> None:
    class Table(Gate):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + self.table.expand_as(y)

    network = Table(torch.add).eval()
    assert torch.allclose(capture(network, X)(X), network(X), atol=1e-6)


@pytest.mark.parametrize(
    "use",
    [
        lambda y, w: torch.cat([y, w.expand_as(y)], 1),
        lambda y, w: w.expand_as(y),
        lambda y, w: w.expand_as(y) * w,
        lambda y, w: y * (2 * w.expand_as(y)),
        lambda y, w: y.repeat(1, 2, 1, 1),
    ],
)
def test_an_expanded_tensor_elsewhere_is_refused_in_one_line(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(CalibQuantError) as caught:
        capture(Gate(use).eval(), X)
    assert "\n" not in str(caught.value)
