"""What a unit's reconstruction minimizes."""

from __future__ import annotations

from torch import Tensor


def feature_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of a unit's output, summed over channels, averaged over all else; a scalar.

    Source: Li et al., BRECQ, ICLR 2021 (the released code's default), and Wei et al., QDrop, ICLR 2022.

    Args:
        output, target: float32, (N, C, ...).
    """
    return (output - target).pow(2).sum(1).mean()


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
