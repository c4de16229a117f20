"""What capture promises besides equality: nothing of the user's changes, parts by name, aliases, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, calls, difference
from torch import Tensor, nn

from calibquant.errors import CaptureError, ModelError
from calibquant.graph import capture, fold_batch_norm


class Function(nn.Module):
    """A convolution, then a function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        with torch.no_grad():
            for parameter in self.conv.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def images(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("name", ["resnet50", "inplace_reused", "shape_branch", "tied_embedding"])
@pytest.mark.parametrize("training", [True, False])
def test_the_users_network_and_images_stay_as_they_are(name: str, training: bool) -> None:
    case = NETWORKS[name]
    network, x = case.build().train(training), case.example()
    before, kept = {k: v.clone() for k, v in network.state_dict().items()}, x.clone()
    gradients, generator = torch.is_grad_enabled(), torch.get_rng_state()
    fold_batch_norm(capture(network, x))
    after = network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(x, kept)
    assert all(m.training is training for m in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert torch.is_grad_enabled() is gradients
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("name", ["cifar_resnet", "tied_linears"])
def test_parameters_are_copied(name: str) -> None:
    case = NETWORKS[name]
    network, x = case.build(), case.example()
    graph = capture(network, x)
    want = graph(x)
    with torch.no_grad():
        for value in network.state_dict().values():
            value.fill_(7)
    assert torch.equal(graph(x), want)
    assert not any(t.requires_grad for t in graph.buffers())
    assert not list(graph.parameters())


def test_a_training_network_is_captured_in_evaluation_mode() -> None:
    case = NETWORKS["vgg_bn"]
    x = case.example()
    with torch.no_grad():
        assert difference(case.build()(x), capture(case.build().train(), x)(x)) < 1e-5


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [("resnet50", "layer2"), ("resnet50", "layer2.0.downsample"), ("unet", "up1"), ("googlenet", "inception3a")],
)
def test_a_named_part_computes_what_the_part_computes(name: str, part: str) -> None:
    case = NETWORKS[name]
    network = case.build()
    module, fed = network.get_submodule(part), []
    handle = module.register_forward_hook(lambda _m, args, out: fed.append((args, out.clone())))
    with torch.no_grad():
        network(case.example(3, seed=5))
    handle.remove()
    graph = capture(network, case.example(), submodule=part)
    inputs, want = fed[0]
    assert len([n for n in graph.graph.nodes if n.op == "placeholder"]) == len(inputs)
    assert difference(want, graph(*inputs)) < 1e-5
    assert not list(module._forward_pre_hooks)


@pytest.mark.parametrize(
    ("wrong", "right"), [("layr2", "layer2"), ("layer1.1.con1", "layer1.1.conv1"), ("relo", "relu")]
)
def test_an_unknown_part_names_the_nearest(wrong: str, right: str) -> None:
    case = NETWORKS["resnet50"]
    with pytest.raises(ModelError, match=f"did you mean '{right}'") as caught:
        capture(case.build(), case.example(), submodule=wrong)
    assert "\n" not in str(caught.value)


def test_a_part_that_the_network_never_calls_is_refused() -> None:
    case = NETWORKS["dead_code"]
    with pytest.raises(CaptureError, match="never calls it"):
        capture(case.build(), case.example(), submodule="unused")


# --- several inputs ---------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, image: Tensor, depth: Tensor, scale: float = 0.5) -> Tensor:
        return F.relu(self.a(image)) * scale + self.b(depth)


def test_several_inputs_come_as_a_tuple() -> None:
    network = TwoInputs().eval()
    graph = capture(network, (images(2), images(2)[:, :1]))
    x, depth = images(5), images(5)[:, 2:]
    with torch.no_grad():
        assert difference(network(x, depth), graph(x, depth)) < 1e-5
    assert [n.name for n in graph.graph.nodes if n.op == "placeholder"] == ["x", "x_1"]


def test_an_example_of_one_image_is_enough() -> None:
    case = NETWORKS["cifar_resnet"]
    network, x = case.build(), case.example(4, seed=3)
    with torch.no_grad():
        assert difference(network(x), capture(network, case.example(1))(x)) < 1e-5


# --- modules and memory used more than once ---------------------------------------------------------------------------


def test_one_shared_relu_gives_one_node_a_call() -> None:
    relu = nn.ReLU(inplace=True)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Conv2d(4, 2, 3), relu)
    graph = capture(network, images())
    assert calls(graph) == ["conv2d", "relu"] * 3
    with torch.no_grad():
        assert difference(network(images()), graph(images())) < 1e-5


def _inplace_on_reshaped(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    flat.relu_()
    return x


def _inplace_on_slice(x: Tensor) -> Tensor:
    left, right = x[:, :2], x[:, 2:]
    left.relu_()
    return torch.cat([left, right - 1, x], 1)


def _inplace_on_alias(x: Tensor) -> Tensor:
    alias = x.view(x.shape)
    x.mul_(2)
    return alias + 1


def _inplace_after_copy(x: Tensor) -> Tensor:
    kept = x.clone()
    x.relu_()
    return kept - x


def _inplace_on_old_name(x: Tensor) -> Tensor:
    y = x
    y += 1
    return F.relu(x) + y


def _inplace_twice(x: Tensor) -> Tensor:
    y = x.add_(1)
    z = x.relu_()
    return y + z * 2


def _inplace_on_dead_view(x: Tensor) -> Tensor:
    y = x * 1
    x[:, :1].zero_()
    return y


@pytest.mark.parametrize(
    "function",
    [_inplace_on_reshaped, _inplace_on_slice, _inplace_on_alias, _inplace_after_copy, _inplace_on_old_name,
     _inplace_twice, _inplace_on_dead_view],
)  # fmt: skip
def test_in_place_operations_mean_what_they_do_to_memory(function: Callable[[Tensor], Tensor]) -> None:
    network = Function(function).eval()
    graph = capture(network, images())
    for batch in (1, 4):
        with torch.no_grad():
            assert difference(network(images(batch)), graph(images(batch))) < 1e-5


# --- refusals ---------------------------------------------------------------------------------------------------------


def _inplace_on_chunk(x: Tensor) -> Tensor:
    pieces = x.chunk(2, 1)
    pieces[0].relu_()
    return torch.cat([pieces[0], pieces[1]], 1)


class Counting(nn.Module):
    """Keeps state between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.conv(x) * self.count


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (Function(lambda x: x + torch.arange(x.shape[0]).float().view(-1, 1, 1, 1)), "batch size"),
        (Function(lambda x: x / x.shape[0]), "depends on the batch size"),
        (Function(lambda x: x - x.mean()), "over the batch"),
        (Function(lambda x: x - x.mean(0, keepdim=True)), "over the batch"),
        (Function(lambda x: torch.cat([x, x], 0)), "along the batch"),
        (Function(lambda x: x[:1]), "batch"),
        (Function(lambda x: x.transpose(0, 1)), "batch dimension"),
        (Function(_inplace_on_chunk), "computed differently"),  # torch calls it an error where gradients are recorded
        (Function(lambda x: x.double()), "data type"),
        (Function(lambda x: torch.fft.fft2(x).abs()), "no canonical form"),
        (Function(lambda x: torch.ones(2, 3)), "a constant"),
        (Counting(), "state between calls"),
    ],
)  # fmt: skip
def test_what_depends_on_the_batch_or_has_no_form_is_refused(network: nn.Module, said: str) -> None:
    with pytest.raises(CaptureError, match=said) as caught:
        capture(network.eval(), images())
    assert "\n" not in str(caught.value)


def test_a_branch_on_the_training_flag_is_no_branch() -> None:
    network = Function(lambda x: F.dropout(F.relu(x), 0.5, False))
    assert calls(capture(network, images())) == ["conv2d", "relu"]
