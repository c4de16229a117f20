"""The networks on which capture is tested.

`NETWORKS` holds published architectures, narrow but written the way their authors write them (module reuse, in-place
operations, functional calls, size arithmetic), and construct networks that each isolate something hard. `UNTRACEABLE`
holds networks that capture must refuse. All weights are seeded random and every BatchNorm has random statistics and
affine parameters, so that folding one wrongly shows in the output.

    case = NETWORKS["resnet50"]
    network, x = case.build(), case.example(batch=2)
    count_compute(network, x)      # {"convolution": …, "matmul": …, "add": …, "pool": …}

- `case`: NetworkCase, seeding, registration
- `resnets`, `plain`, `inception`, `branching`, `mobile`, `mobile_cat`: published architectures
- `constructs`, `sharing`: construct networks
- `refused`: what must be refused
- `dispatch`: an independent count of compute operations, below every tracer
- `graphs`: the captured networks, made once

tests/ is on the import path of every test: `from networks import NETWORKS`.
"""

# These modules register their networks when they are imported.
from . import branching, constructs, inception, mobile, mobile_cat, plain, refused, resnets, sharing  # noqa: F401
from .case import NETWORKS, UNTRACEABLE, NetworkCase
from .dispatch import count_compute
from .graphs import calls, captured, difference, folded, network_of, quantized, values_of

__all__ = [
    "NETWORKS", "UNTRACEABLE", "NetworkCase", "calls", "captured", "count_compute", "difference", "folded",
    "network_of", "quantized", "values_of",
]  # fmt: skip
