"""The curves of a training as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from calibquant.training import EpochReport

INK, MARK = "#33557a", "#b8432f"


def curves_png(reports: Sequence[EpochReport]) -> bytes:
    """Loss, accuracy on the images held out (where there are some) and learning rate by epoch, one below the other."""
    from matplotlib.figure import Figure  # heavy, and needed here alone

    epochs = [report.epoch for report in reports]
    seen = [report for report in reports if report.accuracy is not None]
    figure = Figure(figsize=(7, 6 if seen else 4), layout="constrained")
    axes = list(figure.subplots(3 if seen else 2, 1, sharex=True))
    axes[0].plot(epochs, [report.loss for report in reports], color=INK)
    axes[0].set_ylabel("training loss")
    if seen:
        shares = [100 * (report.accuracy or 0.0) for report in seen]
        axes[1].plot([report.epoch for report in seen], shares, color=MARK)
        axes[1].set_ylabel("held-out top-1, %")
    axes[-1].plot(epochs, [report.lr for report in reports], color="black", linewidth=1)
    axes[-1].set_ylabel("learning rate")
    axes[-1].set_xlabel("epoch")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()
