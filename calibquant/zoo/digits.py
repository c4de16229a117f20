"""The network of the digits demo."""

from __future__ import annotations

from calibquant.zoo.cifar_resnet import CifarResNet


def digits_resnet(num_classes: int = 10) -> CifarResNet:
    """A ResNet-8 with 77,754 parameters: images (N, 1, 16, 16) to logits (N, num_classes).

    It is a CIFAR ResNet (He et al., CVPR 2016) with one block in each stage, convolutional shortcuts and one input
    channel, small enough to be trained and quantized on a laptop within a minute.
    """
    return CifarResNet(1, "conv", num_classes, in_channels=1)
