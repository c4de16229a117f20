"""What the facts suggest, in plain words; every suggestion is a recipe key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from calibquant.studies.analysis.ranges import RangeRow
from calibquant.studies.analysis.tensors import OUTLIER, TensorFacts

WIDE = 8  # bits at which a tensor does next to no harm
SHARE, MOST = 0.5, 5  # suggested tensors: as many as do half of the harm, at most five
CLIPPING = 0.02  # a share of clipped values worth telling
BETTER = 1.0  # dB by which another observer must be better on the median activation


@dataclass(frozen=True)
class Harm:
    """What quantizing one tensor alone does to the network's decisions.

    Args:
        name: of the tensor.
        kind: "weight" or "activation".
        bits: of its grid.
        harm: mean square change of the centered logits, over classes and images. Of the measures it foretells best
            what several tensors do together; see docs/methods.md, "Mixed precision".
        estimate: of `harm`, from one backward pass an image; weights only.
        loss: KL(float network's classes || with the tensor quantized), in nats, mean over images.
        disagreement: share of images whose class changes.
        bytes: what the weight would take more at `WIDE` bits; 0 for activations.
    """

    name: str
    kind: str
    bits: int
    harm: float
    estimate: float | None
    loss: float
    disagreement: float
    bytes: int


@dataclass(frozen=True)
class Advice:
    """One suggestion.

    Args:
        text: in words.
        overrides: recipe keys that follow it.
    """

    text: str
    overrides: tuple[str, ...] = ()


def widest_harm(harms: Sequence[Harm]) -> list[Harm]:
    """The tensors below `WIDE` bits that do the most harm: as many as do `SHARE` of all, at most `MOST`."""
    total, chosen, done = sum(h.harm for h in harms), list[Harm](), 0.0
    for row in sorted(harms, key=lambda h: h.harm, reverse=True):
        if done >= SHARE * total or len(chosen) == MOST or row.harm <= 0:
            break
        if row.bits < WIDE:
            chosen.append(row)
            done += row.harm
    return chosen


def keep_wide(chosen: Sequence[Harm], harms: Sequence[Harm], size: int) -> list[Advice]:
    """Which tensors to keep at 8 bits, and what each would cost; `size` is the packed network's, in bytes."""
    total = sum(h.harm for h in harms)
    advice = []
    for row in chosen:
        cost = (
            f"costs {row.bytes:,} bytes ({100 * row.bytes / size:+.1f} %)"
            if row.kind == "weight"
            else "costs no bytes, but wider activations"
        )
        text = (
            f"{row.kind} {row.name} does {100 * row.harm / total:.0f} % of the harm that single tensors do: "
            f"{WIDE} bits in place of {row.bits} {cost}"
        )
        advice.append(Advice(text, (f"quant.bits.{row.name}={WIDE}",)))
    return advice


def about_tensors(facts: Sequence[TensorFacts], per_channel: bool) -> list[Advice]:
    """Outlier channels and heavy clipping."""
    advice = []
    for fact in facts:
        if fact.outliers and not (fact.kind == "weight" and per_channel):
            mend, keys = (
                ("one scale for each channel keeps them apart", ("quant.weights.granularity=per_channel",))
                if fact.kind == "weight"
                else ("equalization moves their range into the weights", ("quant.equalize=true",))
            )
            channels = ", ".join(map(str, fact.outliers[:5])) + (" …" if len(fact.outliers) > 5 else "")
            text = (
                f"{fact.kind} {fact.name}: {len(fact.outliers)} of its channels ({channels}) reach beyond "
                f"{OUTLIER:.0f} times the median channel's range, at most {fact.spread:.0f} times; {mend}"
            )
            advice.append(Advice(text, keys))
        if fact.kind == "activation" and fact.clipped > CLIPPING:
            text = f"activation {fact.name}: {100 * fact.clipped:.1f} % of its values are clipped"
            advice.append(Advice(text))
    return advice


def about_observers(rows: Sequence[RangeRow], used: str) -> list[Advice]:
    """Whether another observer leaves less error on the median activation."""
    levels = {name: median(row.sqnr for row in rows if row.observer == name) for name in {r.observer for r in rows}}
    if used not in levels:
        return []
    best = max(levels, key=lambda name: (levels[name], name))
    if levels[best] < levels[used] + BETTER:
        return []
    text = (
        f"observer {best} leaves {levels[best] - levels[used]:.1f} dB less error on the median activation than {used}"
    )
    return [Advice(text, (f"quant.activations.observer={best}",))]


def about_growth(errors: Mapping[str, float]) -> list[Advice]:
    """Where the error grows most from one block to the next."""
    if len(errors) < 2:
        return []
    nodes, values = list(errors), list(errors.values())
    steps = [after - before for before, after in pairwise(values)]
    worst = max(range(len(steps)), key=steps.__getitem__)
    if steps[worst] <= 0:
        return []
    return [
        Advice(
            f"the relative feature error grows most between {nodes[worst]} and {nodes[worst + 1]}: "
            f"{100 * values[worst]:.0f} % to {100 * values[worst + 1]:.0f} %"
        )
    ]
