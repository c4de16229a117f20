"""The network as one torch.fx graph of canonical ops: capture, facts about it and edits that do not quantize."""

from calibquant.graph.capture import capture
from calibquant.graph.folding import fold_batch_norm
from calibquant.graph.units import Unit, units

__all__ = ["Unit", "capture", "fold_batch_norm", "units"]
