"""What a unit's reconstruction minimizes."""

from __future__ import annotations

from torch import Tensor


def feature_loss(output: Tensor, target: Tensor, power: float = 2.0, importance: Tensor | None = None) -> Tensor:
    """|output - target|^power, each value times its importance, summed over channels, averaged over all else; a scalar.

    Sources: Li et al., BRECQ, ICLR 2021 (the released code's default; power 2.4 for activation scales), and Wei et al.,
    QDrop, ICLR 2022.

    Args:
        output, target: float32, (N, C, ...).
        power: exponent, >= 1.
        importance: float32 like `target`; see `importance_of`.
    """
    difference = output - target
    error = difference.pow(2) if power == 2 else difference.abs().pow(power)
    return (error if importance is None else error * importance).sum(1).mean()


def importance_of(gradient: Tensor, mean_square: float) -> Tensor:
    """The weight of every value of a unit's output in the loss, from the gradient g of the network's own loss there.

    (1 + g^2 / mean(g^2)) / 2, whose mean is 1. BRECQ's eq. 10 is g^2, the diagonal of the Fisher information; alone it
    leaves most values nearly without a say, which is why the released code uses (1 + |g|)^2. This form does not depend
    on the size of g, so the regularizer keeps its meaning.

    Args:
        gradient: float32, (N, C, ...).
        mean_square: of the gradient, over all images.
    """
    return (1 + gradient.pow(2) / max(mean_square, 1e-30)) / 2


def regularizer_exponent(step: int, steps: int, warm_up: float, beta: tuple[float, float]) -> float | None:
    """The rounding regularizer's exponent at a step, None before it sets in.

    From `warm_up * steps` on it goes linearly from beta[0] to beta[1], which it reaches at the last step.

    Args:
        step: 1 … steps.
    """
    start = warm_up * steps
    if step < start:
        return None
    progress = (step - start) / (steps - start) if steps > start else 1.0
    return beta[1] + (beta[0] - beta[1]) * max(0.0, 1.0 - progress)
