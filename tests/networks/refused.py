"""Networks that no graph can stand for: capture must refuse each with an error that names the reason."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import untraceable
from .constructs import IMAGE, TwoStage


@untraceable("data_dependent_branch", IMAGE, "`if x.sum() > 0` takes another path for other images")
class DataDependentBranch(TwoStage):
    def middle(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return F.relu(x)
        return torch.tanh(x)


@untraceable("data_dependent_loop", IMAGE, "the number of iterations is computed from the values")
class DataDependentLoop(TwoStage):
    def middle(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().mean().item() * 3)):
            x = F.relu(self.second(x))
        return x


@untraceable("numpy_round_trip", IMAGE, "the values leave torch and come back")
class NumpyRoundTrip(TwoStage):
    def middle(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().clip(0, 6))


@untraceable("random_in_eval", IMAGE, "torch.rand in eval mode: two calls give two results")
class RandomInEval(TwoStage):
    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x) * torch.rand(x.shape)


@untraceable("dropout_in_eval", IMAGE, "F.dropout with training=True whatever the mode")
class DropoutInEval(TwoStage):
    def middle(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), 0.5, training=True)


@untraceable("tuple_output", IMAGE, "two outputs, logits and features")
class TupleOutput(TwoStage):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        features = F.relu(self.first(x))
        return self.head(features), features


@untraceable("dict_output", IMAGE, "a dictionary of outputs, as segmentation models return")
class DictOutput(TwoStage):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        features = F.relu(self.first(x))
        return {"out": self.head(features), "aux": features}


class Outputs(NamedTuple):
    logits: Tensor
    features: Tensor


@untraceable("named_tuple_output", IMAGE, "a NamedTuple of outputs, as GoogLeNet returns while training")
class NamedTupleOutput(TwoStage):
    def forward(self, x: Tensor) -> Outputs:  # type: ignore[override]
        features = F.relu(self.first(x))
        return Outputs(self.head(features), features)


@untraceable("scalar_output", IMAGE, "a Python number comes out")
class ScalarOutput(TwoStage):
    def forward(self, x: Tensor) -> float:  # type: ignore[override]
        return super().forward(x).sum().item()
