"""graph.json: what is written can be read back exactly, and nothing but that is accepted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, captured, folded
from torch import Tensor, nn

from calibquant.errors import RunFolderError
from calibquant.graph import capture
from calibquant.graph.serialize import from_json, input_shapes, to_json

Rows = list[dict[str, Any]]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_survives_the_trip_through_json(name: str) -> None:
    for graph in (captured(name), folded(name)):
        text = json.dumps(to_json(graph.graph), allow_nan=False)
        shapes = input_shapes(graph.graph)
        assert shapes is not None
        rebuilt = from_json(json.loads(text), dict(graph.named_buffers()), json.loads(json.dumps(shapes)))
        assert input_shapes(rebuilt.graph) == shapes
        for batch in (1, 3):
            x = NETWORKS[name].example(batch)
            assert torch.equal(graph(x), rebuilt(x))
        assert [n.name for n in rebuilt.graph.nodes] == [n.name for n in graph.graph.nodes]
        assert json.dumps(to_json(rebuilt.graph)) == text


def example() -> tuple[Rows, dict[str, Tensor]]:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten())
    graph = capture(network, torch.zeros(2, 3, 5, 5))
    return json.loads(json.dumps(to_json(graph.graph))), dict(graph.named_buffers())


def test_the_rows_of_a_small_network() -> None:
    convolution = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    assert example()[0] == [
        {"name": "_0_weight", "op": "get_attr", "parameter": "0.weight"},
        {"name": "x", "op": "placeholder"},
        {"name": "_0", "op": "conv2d", "inputs": ["x", "_0_weight", None], "attributes": convolution},
        {"name": "_1", "op": "relu", "inputs": ["_0"], "attributes": {}},
        {"name": "_2", "op": "flatten", "inputs": ["_1"], "attributes": {"start": 1}},
        {"name": "output", "op": "output", "inputs": ["_2"]},
    ]


def changed(**fields: Any) -> Callable[[Rows], Any]:
    """Fields of the convolution's row, replaced, or removed where the value is None."""

    def change(rows: Rows) -> Rows:
        rows[2] = {k: v for k, v in {**rows[2], **fields}.items() if v is not None}
        return rows

    return change


def _renamed(name: str) -> Callable[[Rows], Rows]:
    """Another name for the input, everywhere."""

    def change(rows: Rows) -> Rows:
        rows[1]["name"], rows[2]["inputs"][0] = name, name
        return rows

    return change


ATTRIBUTES = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed(op="system"), "'_0': the op 'system' is not on the allow-list"),
        (changed(op="call_function"), "not on the allow-list"),
        (changed(op=["conv2d"]), "'_0': is damaged"),
        (changed(op=None), "is damaged"),
        (changed(name=None), "node 2: is damaged"),
        (changed(name=5), "is damaged"),
        (changed(name="x"), "'x': is damaged"),
        (changed(name="a b"), "is damaged"),
        (changed(name="return"), "is damaged"),
        (changed(inputs=["y", "_0_weight", None]), "'_0': is damaged"),
        (changed(inputs=["_1", "_0_weight", None]), "'_0': is damaged"),
        (changed(inputs=["x"]), "'_0': is damaged"),
        (changed(inputs=None), "'_0': is damaged"),
        (changed(inputs=3), "'_0': is damaged"),
        (changed(attributes=None), "'_0': is damaged"),
        (changed(attributes=[1]), "'_0': is damaged"),
        (changed(attributes={"stride": [1, 1]}), "'_0': is damaged .*padding"),
        (changed(attributes={**ATTRIBUTES, "extra": 1}), "'_0': is damaged .*extra"),
        (changed(attributes={**ATTRIBUTES, "groups": True}), "'_0': is damaged .*groups"),
        (changed(attributes={**ATTRIBUTES, "groups": 1.0}), "'_0': is damaged .*groups"),
        (changed(attributes={**ATTRIBUTES, "stride": 1}), "'_0': is damaged .*stride"),
        (changed(attributes={**ATTRIBUTES, "stride": [1, [1]]}), "'_0': is damaged .*stride"),
        (changed(attributes={**ATTRIBUTES, "padding": None}), "'_0': is damaged .*padding"),
        (changed(inputs=[None, "_0_weight", None]), "'_0': is damaged .*'x'"),
        (changed(inputs=[["x"], "_0_weight", None]), "'_0': is damaged .*'x'"),
        (lambda rows: rows[:-1], "has no output"),
        (lambda rows: [*rows, rows[-1]], "'output': is damaged"),
        (lambda rows: [], "has no output"),
        (lambda rows: [*rows[:2], 7, *rows[2:]], "node 2: is damaged"),
        (lambda rows: [None], "node 0: is damaged"),
        (lambda rows: [{**rows[0], "parameter": "1.weight"}, *rows[1:]], "'_0_weight': is damaged"),
        (lambda rows: [{**rows[0], "parameter": None}, *rows[1:]], "'_0_weight': is damaged"),
        (lambda rows: [{**rows[0], "parameter": ["0.weight"]}, *rows[1:]], "'_0_weight': is damaged"),
        (lambda rows: rows[1:], "'_0': is damaged"),
    ],
)  # fmt: skip
def test_malformed_rows_are_one_line_errors(change: Callable[[Rows], Any], said: str) -> None:
    rows, tensors = example()
    with pytest.raises(RunFolderError, match=said) as caught:
        from_json(change(copy.deepcopy(rows)), tensors)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("graph.json")


@pytest.mark.parametrize("name", ["x=open({!r}, 'w')", "x): open({!r}, 'w')\n#", "x, *, y=open({!r}, 'w')"])
def test_names_cannot_carry_code(name: str, tmp_path: Path) -> None:
    rows, tensors = example()
    trap = tmp_path / "trap"
    with pytest.raises(RunFolderError, match="is damaged"):
        from_json(_renamed(name.format(str(trap)))(rows), tensors)
    parameter = f'a"), open({str(trap)!r}, "w"), getattr(self, "a'
    rows, tensors = example()
    rows[0]["parameter"] = parameter
    with pytest.raises(RunFolderError, match="is damaged"):
        from_json(rows, {parameter: tensors["0.weight"]})
    assert not trap.exists()


def test_parameter_names_of_any_module_are_accepted() -> None:
    wrapped = nn.Sequential()
    wrapped.add_module("größe 2", nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 5, 5)
    graph = capture(wrapped, x)
    rebuilt = from_json(json.loads(json.dumps(to_json(graph.graph))), dict(graph.named_buffers()))
    assert torch.equal(rebuilt(x), graph(x))


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"stride": [0, 1]}, "node '_0' cannot be computed"),
        ({"stride": [-1, 1]}, "node '_0' cannot be computed"),
        ({"stride": [1, 1, 1]}, "node '_0' cannot be computed"),
        ({"groups": 2}, "node '_0' cannot be computed"),
        ({"dilation": [9, 9]}, "node '_0' cannot be computed"),
        ({"padding": [40_000, 40_000]}, r"node '_0' has \d\d,.* values for two images"),
    ],
)
def test_a_graph_that_cannot_run_is_refused_when_it_is_read(attributes: dict[str, Any], said: str) -> None:
    rows, tensors = example()
    rows[2]["attributes"] |= attributes
    with pytest.raises(RunFolderError, match=f"graph.json: {said}"):
        from_json(rows, tensors, [[3, 5, 5]])


@pytest.mark.parametrize(
    "shapes", [[], [[3, 5, 5]] * 2, [[3, 5]], [["3", 5, 5]], [[3, 0, 5]], [[3, -5, 5]], [[4, 5, 5]], [3]]
)
def test_shapes_that_are_not_those_of_the_inputs_are_refused(shapes: Any) -> None:
    with pytest.raises(RunFolderError, match=r"^graph\.json: "):
        from_json(*example(), shapes)
