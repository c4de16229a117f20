"""The analysis of a recipe's network: facts about tensors, the harm each does, and advice whose effect is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibquant.data import ImageSet
from calibquant.errors import RecipeError
from calibquant.export.artifact import size_of
from calibquant.parallel import set_threads
from calibquant.pipeline.reporting import Reporter, Silent
from calibquant.pipeline.stages import Job, Steps, calibrate, open_job, range_batches, step_names
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, make_plan, weight_energies
from calibquant.quantization.model import parameter_tensors
from calibquant.quantization.sensitivity import harm_of, one_at_a_time, second_order
from calibquant.recipe import Recipe, changed
from calibquant.runfolder import RunFolder, check_place, make_folder, shared_folder
from calibquant.studies.analysis import advice as words
from calibquant.studies.analysis.advice import WIDE, Advice, Harm
from calibquant.studies.analysis.figures import growth_svg, harm_svg, histogram_svg
from calibquant.studies.analysis.page import page
from calibquant.studies.analysis.ranges import RangeRow, ranges_by_observer
from calibquant.studies.analysis.tensors import TensorFacts, activation_facts, weight_facts

IMAGES = 32  # calibration images on which tensors are measured
BATCH = 16
FIGURES = 12  # histograms that are drawn: of the tensors that do the most harm
RESULT, PAGE = "analysis.json", "analysis.md"
BEFORE = ("prepare", "equalize", "mixed", "weights", "activations")
STEPS = ("tensors", "ranges", "harm", "advice", "write_analysis")


@dataclass(frozen=True, eq=False)
class Effect:
    """What the suggested bits would do, measured on the analysis' images.

    Args:
        names: the tensors that get `WIDE` bits.
        loss: KL(float network's classes || the quantized network's), in nats, as the recipe says and with them.
        agreement: share of images of equal class, as the recipe says and with them.
        bytes: of the packed network, as the recipe says and with them.
    """

    names: tuple[str, ...]
    loss: tuple[float, float]
    agreement: tuple[float, float]
    bytes: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What was found.

    Args:
        setting: such as W4A4.
        images: calibration images that were used.
        tensors: weights and activations.
        ranges: activation ranges by observer.
        harms: of each tensor alone.
        errors: relative feature error after each block.
        advice: what it suggests.
        effect: of the suggested bits; None if there is nothing to suggest.
        folder: where the files are.
    """

    setting: str
    images: int
    tensors: tuple[TensorFacts, ...]
    ranges: tuple[RangeRow, ...]
    harms: tuple[Harm, ...]
    errors: dict[str, float]
    advice: tuple[Advice, ...]
    effect: Effect | None
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """The content of analysis.json; an infinite ratio is null."""
        tensors = [
            {f.name: getattr(t, f.name) for f in fields(t) if f.name not in ("histogram", "density")}
            | {"density": asdict(t.density)}
            for t in self.tensors
        ]
        found = {
            "setting": self.setting, "images": self.images, "tensors": tensors,
            "ranges": [asdict(row) for row in self.ranges], "harms": [asdict(row) for row in self.harms],
            "feature_errors": self.errors, "advice": [asdict(row) for row in self.advice],
            "effect": self.effect and asdict(self.effect),
        }  # fmt: skip
        return _finite(found)


def analyze(
    recipe: Recipe,
    network: nn.Module | None = None,
    calibration: ImageSet | None = None,
    out: Path | None = None,
    images: int = IMAGES,
    reporter: Reporter | None = None,
) -> Analysis:
    """Look into a network that is quantized as a recipe says, by nearest rounding, and leave a page about it.

    Args:
        recipe: as for `quantize`; its reconstruction and evaluation do not count.
        network, calibration: live ones instead of the recipe's.
        out: folder for analysis.md, analysis.json and figures; None takes `analysis` in the recipe's `runs`.
        images: calibration images on which tensors are measured.
        reporter: hears of the steps.

    Raises:
        CalibQuantError: something about the recipe, network or images.

    Example:
        >>> from calibquant.recipe import load_recipe
        >>> found = analyze(load_recipe("recipe.yaml"))  # doctest: +SKIP
        >>> print(found.advice[0].text)  # doctest: +SKIP
        weight conv1.weight does 41 % of the harm that single tensors do: 8 bits in place of 4 costs 216 bytes (+0.3 %)
    """
    if recipe.quant.activations.dynamic:
        raise RecipeError("recipe, quant.activations.dynamic", "leaves no ranges to analyze", "use false")
    recipe = changed(recipe, {"reconstruct.method": "none"})
    folder = recipe.runs / "analysis" if out is None else out
    check_place(folder)
    set_threads(recipe.threads)
    steps = Steps(reporter or Silent(), (*(name for name in step_names(recipe) if name in BEFORE), *STEPS))
    job = open_job(recipe, (network, calibration, calibration), steps)
    errors = calibrate(job).nearest
    count = min(images, len(job.prepared.images))
    chosen = partial(_batches, job, count)
    with steps.begin("tensors", "Measure each tensor"):
        facts = (*weight_facts(job.model), *activation_facts(job.model, chosen(), job.mount(job.model)))
    with steps.begin("ranges", "Compare observers"):
        settings = recipe.quant.activations
        ranges = ranges_by_observer(job.model, settings, chosen, job.mount, progress=steps.reporter.progress)
    with steps.begin("harm", "Quantize one tensor at a time"):
        harms = _harms(job, chosen())
    with steps.begin("advice", "Try what it suggests"):
        widest = words.widest_harm(harms)
        advice = _advice(job, facts, ranges, harms, errors, widest)
        effect = _effect(job, widest, chosen)
    found = Analysis(recipe.setting, count, facts, tuple(ranges), tuple(harms), errors, advice, effect, folder)
    with steps.begin("write_analysis", f"Write {folder}"):
        _write(found, job)
    return found


def _batches(job: Job, count: int) -> Iterator[Tensor]:
    return job.prepared.batches(BATCH, slice(count), job.device)


def _harms(job: Job, images: Iterable[Tensor]) -> list[Harm]:
    """Each tensor of the calibrated network alone."""
    model, kept = job.model, list(images)
    kinds = {
        **dict.fromkeys(model.weight_quantizers, "weight"),
        **dict.fromkeys(model.activation_quantizers, "activation"),
    }
    measured = one_at_a_time({0: model}, list(kinds), kept, job.mount, lambda n: job.reporter.progress(n, len(kept)))
    weights = list(model.weight_quantizers)
    estimates = second_order({0: model}, weights, kept, job.mount, job.recipe.seed)[:, 0]
    estimated = dict(zip(weights, estimates.tolist(), strict=True))
    tensors = parameter_tensors(model.teacher)
    rows = []
    for i, (name, kind) in enumerate(kinds.items()):
        bits = (model.plan.weights if kind == "weight" else model.plan.activations)[name].grid.bits
        more = max(0, WIDE - bits) * tensors[name].numel() // 8 if kind == "weight" else 0
        estimate = estimated[name] if kind == "weight" else None
        found = (float(values[i, 0]) for values in (measured.logits, measured.loss, measured.disagreement))
        harm, loss, changed = found
        rows.append(Harm(name, kind, bits, harm, estimate, loss, changed, more))
    return rows


def _advice(
    job: Job, facts: Iterable[TensorFacts], ranges: list[RangeRow], harms: list[Harm], errors: dict[str, float],
    widest: list[Harm],
) -> tuple[Advice, ...]:  # fmt: skip
    settings = job.recipe.quant
    return (
        *words.keep_wide(widest, harms, size_of(job.model).packed),
        *words.about_tensors(list(facts), settings.weights.granularity == "per_channel"),
        *words.about_observers(ranges, settings.activations.observer),
        *words.about_growth(errors),
    )


def _effect(job: Job, widest: list[Harm], images: Any) -> Effect | None:
    """The network as the recipe says, and with the suggested bits."""
    if not widest:
        return None
    names = tuple(harm.name for harm in widest)
    quant = job.recipe.quant.model_copy(update={"bits": {**job.recipe.quant.bits, **dict.fromkeys(names, WIDE)}})
    wider = QuantModel(job.model.teacher, make_plan(job.model.teacher, quant))
    energies = weight_energies(wider, quant, range_batches(job, Silent()), job.mount)
    calibrate_weights(wider, quant, energies=energies)
    calibrate_activations(wider, quant.activations, range_batches(job, Silent()), job.mount)
    wider.to(job.device)
    losses, agreements = zip(*(_against_float(job, model, images()) for model in (job.model, wider)), strict=True)
    sizes = tuple(size_of(model).packed for model in (job.model, wider))
    return Effect(names, losses, agreements, (sizes[0], sizes[1]))


def _against_float(job: Job, model: QuantModel, images: Iterable[Tensor]) -> tuple[float, float]:
    """KL to the float network in nats, and agreement; means over images."""
    teacher, network = job.mount(job.model.teacher), job.mount(model)
    loss, equal, count = 0.0, 0, 0
    with torch.inference_mode():
        for batch in images:
            want, got = teacher(batch), network(batch)
            loss += float(harm_of(want, got)[1].sum())
            equal += int((want.argmax(1) == got.argmax(1)).sum())
            count += len(batch)
    return loss / count, equal / count


def _write(found: Analysis, job: Job) -> None:
    with shared_folder(found.folder) as folder:
        make_folder(found.folder / "figures")
        folder.remove("figures/.*.tmp")  # what a kill left
        _write_files(found, job, folder)


def _write_files(found: Analysis, job: Job, folder: RunFolder) -> None:
    figures = {"harm.svg": harm_svg(found.harms)}
    if found.errors:
        figures["growth.svg"] = growth_svg(found.errors)
    worst = {h.name for h in sorted(found.harms, key=lambda h: h.harm, reverse=True)[:FIGURES]}
    for fact in found.tensors:
        if fact.name in worst:
            safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in fact.name)
            figures[f"{fact.kind}-{safe}.svg"] = histogram_svg(fact, _ends(job.model, fact))
    for name, data in figures.items():
        folder.write(f"figures/{name}", data)
    result = found.to_dict()
    folder.write_json(RESULT, result)
    folder.write(PAGE, page(result, job.recipe, sorted(figures)))


def _ends(model: QuantModel, fact: TensorFacts) -> tuple[float, float] | None:
    """What an activation's grid represents; weights have a range for each channel."""
    if fact.kind == "weight":
        return None
    quantizer = model.activation_quantizers[fact.name]
    scale, zero_point = quantizer.get()
    if scale.dim():
        return None
    grid = quantizer.plan.grid
    return float((grid.qmin - zero_point) * scale), float((grid.qmax - zero_point) * scale)


def _finite(value: Any) -> Any:
    """The same without infinities, which JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
