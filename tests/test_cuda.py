"""On a CUDA device the pipeline gives the CPU's network. Skips where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibquant import load
from calibquant.pipeline import quantize
from calibquant.studies.digits import digits_recipe
from calibquant.zoo import build, save_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


@pytest.mark.parametrize(
    "observer",
    ["minmax", "moving-average", "percentile", "mse", "mse-batch", "mse-shrink", "kl", "aciq", "ifmr", "hfmg"],
)
def test_cuda_equals_cpu(tmp_path: Path, observer: str) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "digits.safetensors"
    save_weights(build("digits_resnet"), weights)
    recipe = digits_recipe(weights, 4, tmp_path, seed=0)
    activations = recipe.quant.activations.model_copy(update={"observer": observer})
    quant = recipe.quant.model_copy(update={"activations": activations})
    runs = {d: quantize(recipe.model_copy(update={"quant": quant, "device": d})) for d in ("cpu", "cuda")}

    cpu, cuda = runs["cpu"].model, runs["cuda"].model
    for name, quantizer in cpu.weight_quantizers.items():
        other = cuda.weight_quantizers[name]
        assert quantizer.codes is not None
        assert other.codes is not None
        torch.testing.assert_close(other.scale.cpu(), quantizer.scale)
        assert (other.codes.cpu() == quantizer.codes).float().mean() > 0.999
    for name, activation in cpu.activation_quantizers.items():
        assert activation.scale is not None
        torch.testing.assert_close(cuda.activation_quantizers[name].scale.cpu(), activation.scale, rtol=1e-3, atol=0)
    assert abs(runs["cuda"].metrics["quantized"]["top1"] - runs["cpu"].metrics["quantized"]["top1"]) < 0.02

    images = torch.rand(8, 1, 16, 16) * 2 - 1
    saved = load(runs["cuda"].folder).to("cuda")
    assert torch.equal(saved(images.cuda()), cuda(images.cuda()))
