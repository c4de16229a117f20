"""How torch's functions, tensor methods and aten operators are written in canonical ops.

One rule serves every spelling of an operation: `F.relu`, `torch.relu`, `x.relu_()` and `aten.relu_` are all "relu". A
rule takes the lowering and then the operation's own arguments: canonical nodes for what depends on the input, tensors
for constants, plain values for the rest.
"""

from calibquant.graph.rules import functions, moves, pools, products

__all__ = ["functions", "moves", "pools", "products"]
