"""Quantize a module that is defined here, on images in memory; load it again and compare.

    python examples/quantize_module.py

Writes to a temporary folder only.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn

import calibquant


class Net(nn.Module):
    """A small network with a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 3, H, W)."""
        x = self.stem(x)
        x = torch.relu(x + self.conv(x))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def main() -> None:
    torch.manual_seed(0)
    network, images = Net(), torch.randn(128, 3, 32, 32)
    # Random images say nothing about accuracy; without labels the agreement with the float network is measured.
    calibration, evaluation = calibquant.TensorImages(images[:64]), calibquant.TensorImages(images[64:])
    with tempfile.TemporaryDirectory() as runs:
        recipe = {"runs": runs, "threads": 1, "calibration": {"count": 64}}
        run = calibquant.quantize(recipe, network, calibration, evaluation)
        model = calibquant.load(run.folder)
        size = run.metrics["size"]
    with torch.inference_mode():
        float_logits, logits = network.eval()(images[64:]), model(images[64:])
        same = torch.equal(logits, run.model(images[64:]))
    print(f"{size['float32']} bytes as float32, {size['packed']} packed, {size['weight_bits']:.2f} bits a weight")
    print(f"agreement {run.metrics['quantized']['agreement']:.3f}")
    print(f"largest difference of a logit {(logits - float_logits).abs().max():.4f}")
    print(f"the loaded network equals the saved one: {same}")


if __name__ == "__main__":
    main()
