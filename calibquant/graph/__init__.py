"""The network as one torch.fx graph of canonical ops: capture, facts about it and edits that do not quantize."""

from calibquant.graph.capture import capture
from calibquant.graph.equalization import Equalization, equalize
from calibquant.graph.folding import fold_batch_norm, with_biases
from calibquant.graph.units import Unit, units, whole_network

__all__ = [
    "Equalization", "Unit", "capture", "equalize", "fold_batch_norm", "units", "whole_network", "with_biases",
]  # fmt: skip
