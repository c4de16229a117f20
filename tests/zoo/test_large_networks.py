"""VGG-16-BN and Inception-v3: torchvision's keys, shapes by hand, and a way through capture and quantization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calibquant
from calibquant import zoo
from calibquant.graph import fold_batch_norm
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import QuantRecipe
from calibquant.zoo.inception import InceptionV3
from calibquant.zoo.vgg import VGG16

Shapes = dict[str, tuple[int, ...]]


def shapes(name: str) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in zoo.build(name).state_dict().items()}


def batch_norm(name: str, channels: int) -> Shapes:
    each = dict.fromkeys([f"{name}.{v}" for v in ("weight", "bias", "running_mean", "running_var")], (channels,))
    return {**each, f"{name}.num_batches_tracked": ()}


def test_vgg_keys_are_torchvisions() -> None:
    """torchvision's indices of `features`: convolutions at 0, 3, 7, 10, …, each with its BatchNorm behind it."""
    convolutions = {0: (64, 3), 3: (64, 64), 7: (128, 64), 10: (128, 128), 14: (256, 128), 17: (256, 256)}
    convolutions |= {20: (256, 256), 24: (512, 256)} | dict.fromkeys((27, 30, 34, 37, 40), (512, 512))
    expected: Shapes = {}
    for i, (outputs, inputs) in convolutions.items():
        expected |= {f"features.{i}.weight": (outputs, inputs, 3, 3), f"features.{i}.bias": (outputs,)}
        expected |= batch_norm(f"features.{i + 1}", outputs)
    for i, (outputs, inputs) in {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}.items():
        expected |= {f"classifier.{i}.weight": (outputs, inputs), f"classifier.{i}.bias": (outputs,)}
    assert shapes("vgg16_bn") == expected


# Convolutions of torchvision's inception_v3, by the key before `.conv.weight`: one of each kind and every odd shape.
INCEPTION = {
    "Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1), "Conv2d_4a_3x3": (192, 80, 3, 3),
    "Mixed_5b.branch1x1": (64, 192, 1, 1), "Mixed_5b.branch5x5_2": (64, 48, 5, 5),
    "Mixed_5b.branch3x3dbl_3": (96, 96, 3, 3), "Mixed_5b.branch_pool": (32, 192, 1, 1),
    "Mixed_5d.branch_pool": (64, 288, 1, 1), "Mixed_6a.branch3x3": (384, 288, 3, 3),
    "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3), "Mixed_6b.branch7x7_2": (128, 128, 1, 7),
    "Mixed_6b.branch7x7_3": (192, 128, 7, 1), "Mixed_6c.branch7x7dbl_2": (160, 160, 7, 1),
    "Mixed_6d.branch7x7dbl_5": (192, 160, 1, 7), "Mixed_6e.branch7x7dbl_3": (192, 192, 1, 7),
    "Mixed_7a.branch3x3_2": (320, 192, 3, 3), "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3),
    "Mixed_7b.branch3x3_2a": (384, 384, 1, 3), "Mixed_7b.branch3x3dbl_1": (448, 1280, 1, 1),
    "Mixed_7c.branch3x3dbl_3b": (384, 384, 3, 1), "Mixed_7c.branch_pool": (192, 2048, 1, 1),
    "AuxLogits.conv0": (128, 768, 1, 1), "AuxLogits.conv1": (768, 128, 5, 5),
}  # fmt: skip


def test_inception_keys_are_torchvisions() -> None:
    found = shapes("inception_v3")
    assert {key: found[f"{key}.conv.weight"] for key in INCEPTION} == INCEPTION
    convolutions = [key for key in found if key.endswith(".conv.weight")]
    assert len(convolutions) == 96  # 94 of the network and two of the auxiliary classifier
    expected = {key: found[key] for key in convolutions}
    for key in convolutions:
        expected |= batch_norm(key.removesuffix("conv.weight") + "bn", found[key][0])
    expected |= {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    expected |= {"AuxLogits.fc.weight": (1000, 768), "AuxLogits.fc.bias": (1000,)}
    assert found == expected


def test_a_file_with_the_auxiliary_classifier_loads_and_capture_leaves_it_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = zoo.build("inception_v3", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "inception.pth")
    network = zoo.build("inception_v3", num_classes=3)
    zoo.load_weights(network, tmp_path / "inception.pth")
    assert torch.equal(network.AuxLogits.conv1.conv.weight, source.AuxLogits.conv1.conv.weight)  # type: ignore[union-attr, arg-type]
    assert network.train()(torch.randn(2, 3, 75, 75)).shape == (2, 3)


@pytest.mark.parametrize("network", [lambda: VGG16(5, hidden=32), lambda: InceptionV3(5)], ids=["vgg", "inception"])
def test_capture_and_quantize(network: type[nn.Module]) -> None:
    """The folded graph computes the network; in 8 bits it stays near; all weights but the auxiliary are planned."""
    torch.manual_seed(0)
    net = network()
    x = torch.randn(3, 3, 75, 75)
    with torch.no_grad():
        net(x)  # BatchNorm's statistics
    net.eval()
    teacher = fold_batch_norm(calibquant.capture(net, x))
    weights = [key for key, p in net.named_parameters() if p.dim() > 1 and not key.startswith("AuxLogits")]
    recipe = QuantRecipe.model_validate(
        {"weights": {"bits": 8, "observer": "minmax"}, "activations": {"bits": 8, "observer": "minmax"}}
    )
    model = QuantModel(teacher, make_plan(teacher, recipe))
    assert len(model.plan.weights) == len(weights)
    calibrate_weights(model, recipe)
    calibrate_activations(model, recipe.activations, [x])
    with torch.no_grad():
        want, plain, got = net(x), teacher(x), model(x)
    torch.testing.assert_close(plain, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert float((got - want).norm() / want.norm()) < 0.15
    assert all(not row.reason for row in model.coverage())


def test_a_factorized_block_is_its_convolutions() -> None:
    """Mixed_6c by F.conv2d with the paddings of torchvision's source."""
    torch.manual_seed(0)
    block = InceptionV3(2).eval().Mixed_6c
    x = torch.randn(1, 768, 9, 9)

    def apply(name: str, value: Tensor, padding: tuple[int, int] = (0, 0)) -> Tensor:
        branch = block.get_submodule(name)  # type: ignore[union-attr]
        norm = branch.bn
        y = F.conv2d(value, branch.conv.weight, padding=padding)  # type: ignore[arg-type]
        return F.relu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3))  # type: ignore[union-attr, arg-type]

    single = apply("branch7x7_3", apply("branch7x7_2", apply("branch7x7_1", x), (0, 3)), (3, 0))
    double = apply("branch7x7dbl_1", x)
    for number, padding in enumerate([(3, 0), (0, 3), (3, 0), (0, 3)], start=2):
        double = apply(f"branch7x7dbl_{number}", double, padding)
    pooled = apply("branch_pool", F.avg_pool2d(x, 3, 1, 1))
    expected = torch.cat([apply("branch1x1", x), single, double, pooled], 1)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)  # type: ignore[operator]
