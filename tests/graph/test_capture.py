"""Capture over sixty networks: the graph computes what the network computes, and counts what really runs."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from networks import NETWORKS, UNTRACEABLE, captured, count_compute, difference, folded, network_of
from torch import fx, nn

from calibquant.errors import CaptureError
from calibquant.graph import capture, fold_batch_norm
from calibquant.graph.ops import OPS
from calibquant.quantization import QuantModel, make_plan
from calibquant.recipe import Placement, QuantRecipe

TOLERANCE = 1e-5
# A third of the networks: each kind of construct, and what was hard on the second route.
EXPORTED = [
    "densenet", "unet", "convnext", "resnet50", "preact_resnet", "res2net", "mobilenet_v3", "shufflenet_v2",
    "inplace_reused", "spatial_means", "flattenings", "concatenations", "paddings", "pools", "shuffles", "tied_linears",
    "tied_embedding", "attention", "reflect_padding", "weight_standardized",
]  # fmt: skip


def assert_equal_networks(name: str, graph: fx.GraphModule) -> None:
    case = NETWORKS[name]
    for batch in (1, 2, 5):
        x = case.example(batch, seed=batch)
        with torch.no_grad():
            assert difference(network_of(name)(x.clone()), graph(x)) <= TOLERANCE, f"batch size {batch}"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETWORKS)
def test_captured_and_folded_networks_compute_the_same(name: str) -> None:
    assert_equal_networks(name, captured(name))
    assert_equal_networks(name, folded(name))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("placement", ["integer", "academic"])
@pytest.mark.parametrize("name", NETWORKS)
def test_coverage_lists_every_compute_operation_that_runs(name: str, placement: Placement) -> None:
    graph = folded(name)
    coverage = QuantModel(graph, make_plan(graph, QuantRecipe(placement=placement))).coverage()
    found = Counter(row.kind for row in coverage)
    runs = count_compute(network_of(name), NETWORKS[name].example())
    if name == "dead_code":  # the network runs a convolution and a mean whose result nothing reads; the graph does not
        runs = {**runs, "convolution": runs["convolution"] - 1, "pool": runs["pool"] - 1}
    assert {kind: found[kind] for kind in runs} == runs
    assert len({row.node for row in coverage}) == len(coverage)


@pytest.mark.parametrize("name", EXPORTED)
def test_the_second_route_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[capture.__module__]  # the package's own attribute of that name is the function

    def refuse(_network: nn.Module) -> fx.GraphModule:
        raise module._UntraceableError("test", "symbolic tracing is switched off", "none")

    monkeypatch.setattr(module, "_symbolic", refuse)
    graph = capture(network_of(name), NETWORKS[name].example())
    assert {n.target for n in graph.graph.nodes if n.op == "call_function"} <= {op.run for op in OPS.values()}
    assert_equal_networks(name, graph)
    assert_equal_networks(name, fold_batch_norm(graph))


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_no_graph_can_stand_for_is_refused_in_one_line(name: str) -> None:
    case = UNTRACEABLE[name]
    with pytest.raises(CaptureError) as caught:
        capture(case.build(), case.example())
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    if name.endswith("_output"):
        assert caught.value.where == "the network's output"
    else:
        assert "refused.py, line " in caught.value.where
        assert "`" in caught.value.where, "the line itself is shown"
    assert "model.submodule" in caught.value.mend
