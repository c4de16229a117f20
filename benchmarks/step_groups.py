"""Where an iteration's time goes: the profiler's events of a reconstruction unit, by what they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.autograd.profiler_util import FunctionEvent

BETWEEN = "between ops"
# Beginnings of names of profiler events -> group. What none of them fits is soft rounding if it follows a sigmoid (only
# softly rounded weights take one) or the end of the feature loss (then only the regularizer comes).
GROUPS = {
    "_FakeQuantize": "fake-quantize",
    "Optimizer.": "optimizer",
    "ConvolutionBackward": "convolution backward",
    "AddmmBackward": "convolution backward",
    "aten::conv": "convolution forward",
    "aten::linear": "convolution forward",
    "aten::index": "batch gathering",
    "aten::rand": "batch gathering",
    "aten::random_": "drop",
    "aten::ge": "drop",
    "aten::to": "drop",
    "aten::lerp": "drop",
    "aten::sigmoid": "soft rounding",
}
LOSS_ENDS = ("aten::mean", "aten::mse_loss")
BACKWARD = "autograd::engine::evaluate_function: "
ORDER = ["convolution forward", "convolution backward", "fake-quantize", "drop", "soft rounding", "optimizer",
         "batch gathering", "other ops", BETWEEN]  # fmt: skip
NOTES = """Shares of the profiler's self times. Convolution includes the linear layer. Fake-quantize is
`_FakeQuantize` and its backward; drop is the random numbers, the masks made of them and the mixing of the unit's input;
soft rounding includes the regularizer and both backward passes. Other ops: ReLU, addition, shortcut, pool, feature
loss, their backward passes, the storing of gradients. Between ops: no op ran, but Python or autograd's engine, and the
profiler itself: what the profiled time exceeds the other by."""


def grouped(events: Iterable[FunctionEvent]) -> Iterator[tuple[FunctionEvent, str]]:
    """Each event with the group of the outermost op around it; a backward op that is in none has its forward op's."""
    group, group_of = "other ops", dict[int, str]()  # the latter by the sequence number of the autograd node
    for root in sorted((e for e in events if e.cpu_parent is None), key=lambda e: e.time_range.start):
        inside = list(_family(root))
        known = _known(root.name.removeprefix(BACKWARD))
        if root.name.startswith(BACKWARD):
            number = max(e.sequence_nr for e in inside)
            here = known or group_of.get(number, "other ops")
        else:
            here = known or (group if group == "soft rounding" else "other ops")
            group = "soft rounding" if root.name in LOSS_ENDS else here
            group_of |= {e.sequence_nr: here for e in inside if e.sequence_nr >= 0}
        for event in inside:
            yield event, here


def _known(name: str) -> str | None:
    fitting = [start for start in GROUPS if name.startswith(start)]
    return GROUPS[max(fitting, key=len)] if fitting else None


def _family(event: FunctionEvent) -> Iterator[FunctionEvent]:
    yield event
    for child in event.cpu_children:
        yield from _family(child)
