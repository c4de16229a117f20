"""Make a plan, keep one layer at 8 bits, calibrate by hand and print the coverage.

    python examples/edit_plan.py

Writes no files.
"""

from __future__ import annotations

import torch

import calibquant
from calibquant.data import batches
from calibquant.graph import fold_batch_norm
from calibquant.quantization import calibrate_activations, calibrate_weights, make_plan
from calibquant.recipe import QuantRecipe
from calibquant.zoo import build

KEEP = "layer2.0.conv1.weight"


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = build("cifar_resnet20")
    images = calibquant.TensorImages(torch.randn(32, 3, 32, 32))
    # Untrained, each BatchNorm would keep its initial statistics, and activations would grow from block to block.
    for batch in batches(images, 16):
        network.train()(batch.images)

    quant = QuantRecipe.model_validate({"weights": {"bits": 3}, "activations": {"bits": 4}, "boundary": "captq"})
    teacher = fold_batch_norm(calibquant.capture(network, images.image(0)[None]))
    plan = make_plan(teacher, quant).with_bits(KEEP, 8)
    model = calibquant.QuantModel(teacher, plan)
    calibrate_weights(model, quant)
    calibrate_activations(model, quant.activations, (batch.images for batch in batches(images, 16)))

    print(f"{'node':<16} {'op':<8} {'weight':>6} {'input':>6}  stays float because")
    for row in model.coverage():
        inputs = " ".join("float" if bits is None else str(bits) for bits in row.input_bits)
        print(f"{row.node:<16} {row.op:<8} {row.weight_bits or '–':>6} {inputs:>6}  {row.reason}")
    with model.float_mode():
        reference = calibquant.evaluate(model, images, batch_size=16).predictions
    scores = calibquant.evaluate(model, images, batch_size=16, reference=reference).scores
    print(f"agreement with the float network on the calibration images: {scores.agreement:.3f}")


if __name__ == "__main__":
    main()
