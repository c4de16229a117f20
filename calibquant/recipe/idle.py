"""Which fields of a recipe have no effect beside its other fields: one table, a row for each condition.

A field without a row acts under every recipe, or its other values are refused where it does not. A new field whose
effect depends on another gets a row; tests/test_recipe_idle.py asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from calibquant.recipe.images import parse_strategy
from calibquant.recipe.models import Recipe
from calibquant.recipe.presets import PRESETS
from calibquant.recipe.section import given

Command = Literal["quantize", "finetune", "train", "select"]  # finetune: of a finished run


@dataclass(frozen=True)
class Row:
    """When fields have an effect.

    Args:
        because: the field whose value leaves them without one, by its dotted name.
        acts: whether they have one under a recipe.
        fields: dotted names; a section's name stands for all its fields.
        words: why, where the value alone does not say it.
    """

    because: str
    acts: Callable[[Recipe], bool]
    fields: tuple[str, ...]
    words: str = ""


@dataclass(frozen=True)
class Idle:
    """A field that the user has set and that has no effect.

    Args:
        field: its dotted name.
        reason: which other field leaves it without effect.
    """

    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.field} has no effect, because {self.reason}"


def idle_fields(recipe: Recipe, command: Command = "quantize") -> list[Idle]:
    """The fields that the user has set (not a preset) and that have no effect under this recipe.

    Args:
        recipe: as it was loaded or made: `model_fields_set` of its sections says what the user has set.
        command: what is to be done. Sections that it does not read are left out, since one recipe serves several
            commands.

    Returns:
        each field once, in the recipe's order.

    Example:
        >>> from calibquant.recipe import make_recipe
        >>> print(*idle_fields(make_recipe({"reconstruct": {"method": "brecq", "drop": 0.3}})))
        reconstruct.drop has no effect, because reconstruct.method is brecq; only qdrop drops values
    """
    rows = (*ADOPTED, *ROWS) if command == "finetune" else ROWS
    fields = [field for field in given(recipe) if field.partition(".")[0] in READS[command]]
    found = ((field, _idle_row(field, recipe, rows)) for field in fields)
    return [Idle(field, _reason(row, recipe)) for field, row in found if row is not None]


def _idle_row(field: str, recipe: Recipe, rows: Sequence[Row]) -> Row | None:
    """The first row that leaves a field without effect."""
    own = (row for row in rows if any(field == name or field.startswith(f"{name}.") for name in row.fields))
    return next((row for row in own if not row.acts(recipe)), None)


def _reason(row: Row, recipe: Recipe) -> str:
    parts = [row.words] if row.words else []
    if row.because:
        value = value_at(recipe, row.because)
        shown = "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        parts = [f"{row.because} is {shown}", *parts]
    return "; ".join(parts)


def value_at(recipe: Recipe, field: str) -> Any:
    """The value at a dotted name; None within a section that is not there."""
    value: Any = recipe
    for name in field.split("."):
        value = None if value is None else getattr(value, name)
    return value


# --- conditions -------------------------------------------------------------------------------------------------------


def _learns(recipe: Recipe) -> bool:
    return recipe.reconstruct.method != "none"


def _learns_scales(recipe: Recipe) -> bool:
    return recipe.reconstruct.method in ("brecq", "qdrop")


def _static(recipe: Recipe) -> bool:
    return not recipe.quant.activations.dynamic


def _has_fixed_second_phase(recipe: Recipe) -> bool:
    return recipe.reconstruct.method == "brecq" and recipe.reconstruct.scale_iterations is not None


def _whole(recipe: Recipe) -> bool:
    return recipe.reconstruct.network.iterations > 0


def _tries(recipe: Recipe) -> bool:
    """Whether Gram rounding judges draws of calibration images."""
    settings = recipe.calibration
    return settings.manifest is None and "best-of-random" in [name for name, _ in parse_strategy(settings.strategy)]


def _rounds(recipe: Recipe) -> bool:
    return recipe.quant.weights.rounding == "gram" or _tries(recipe)


def _keeps_features(recipe: Recipe) -> bool:
    again = recipe.finetune is not None and recipe.finetune.batch_norm == "reestimated"
    return _learns(recipe) or _rounds(recipe) or recipe.quant.bias_correction == "empirical" or again


def _augments(recipe: Recipe) -> bool:
    return recipe.calibration.augment or recipe.finetune is not None or recipe.train is not None


def _crops_at_random(recipe: Recipe) -> bool:
    return _augments(recipe) and recipe.data.augment is not None and recipe.data.augment.scale is not None


def _resizes(recipe: Recipe) -> bool:
    data = recipe.data
    return data.preprocess.resize is not None or (data.calibration_preprocess is None and _crops_at_random(recipe))


def _resizes_calibration(recipe: Recipe) -> bool:
    own = recipe.data.calibration_preprocess
    return own is None or own.resize is not None or _crops_at_random(recipe)


def _uniform_bits(recipe: Recipe) -> set[int]:
    """Bits that weights on uniform grids may have."""
    quant, found = recipe.quant, set[int](recipe.quant.bits.values())
    if quant.weights.grid in ("uniform", "nuq"):  # nuq leaves grouped convolutions uniform
        found.add(_narrow(recipe))
    if quant.boundary != "none":
        found.add(max(_narrow(recipe), int(quant.boundary_bits)))
    return {*found, *(() if quant.mixed is None else quant.mixed.choices)}


def _narrow(recipe: Recipe) -> int:
    """Bits of a uniform weight that no rule keeps wider."""
    return 8 if recipe.quant.weights.grid == "nuq" else recipe.quant.weights.code_bits


def _has_signs_to_choose(recipe: Recipe) -> bool:
    """Whether a weight may be symmetric or not: those of 8 bits are symmetric for integer kernels, levels always."""
    bits = _uniform_bits(recipe)
    return bool(bits - {8}) if recipe.quant.placement == "integer" else bool(bits)


def _has_wide_ends(recipe: Recipe) -> bool:
    """Whether it matters what the boundary rule names: it has more bits than others, or is quantized in another way.

    The rule "none" always does what it says.
    """
    quant = recipe.quant
    if quant.boundary == "none":
        return True
    special = quant.weights.grid != "uniform" or quant.activations.grid != "uniform" or quant.mixed is not None
    shared = quant.weights.allocation != "none" or quant.activations.allocation != "none"
    return special or shared or quant.boundary_bits > min(_narrow(recipe), quant.activations.bits)


def _main_weights_matter(recipe: Recipe) -> bool:
    """Whether weights.bits reaches a weight: under `mixed` it is the least of those at the boundary."""
    quant = recipe.quant
    return quant.mixed is None or (quant.boundary != "none" and quant.weights.bits > quant.boundary_bits)


def _main_activations_matter(recipe: Recipe) -> bool:
    quant, bits = recipe.quant, recipe.quant.activations.bits
    if quant.mixed is None or quant.mixed.tensors == "weights":
        return True
    ends = quant.boundary != "none" and bits > quant.boundary_bits
    return ends or (quant.placement == "integer" and bits > quant.residual_bits)


def _has_few_bits(recipe: Recipe) -> bool:
    """Whether a weight has fewer than 8 bits."""
    return min({*_uniform_bits(recipe), recipe.quant.weights.code_bits}) < 8


def _learns_ranges(recipe: Recipe) -> bool:
    tune = recipe.finetune
    return tune is None or tune.weights != "arq" or (tune.activations != "fixed" and _static(recipe))


def _sets_more(recipe: Recipe) -> bool:
    """Whether the preset sets a field that the user has not set and that has an effect."""
    own, names = set(given(recipe)), _names(PRESETS.get(recipe.preset or "", {}))
    return recipe.preset is None or any(name not in own and _idle_row(name, recipe, ROWS) is None for name in names)


def _names(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _is(field: str, *values: Any) -> Callable[[Recipe], bool]:
    return lambda recipe: value_at(recipe, field) in values


def _is_not(field: str, *values: Any) -> Callable[[Recipe], bool]:
    return lambda recipe: value_at(recipe, field) not in values


# --- the table --------------------------------------------------------------------------------------------------------

READS: dict[Command, tuple[str, ...]] = {
    "quantize": ("preset", "model", "data", "calibration", "quant", "reconstruct", "evaluation", "export", "finetune"),
    "finetune": ("preset", "model", "data", "calibration", "quant", "reconstruct", "evaluation", "export", "finetune"),
    "train": ("model", "data", "evaluation", "train"),
    "select": ("model", "data", "calibration"),
}

_LEARNING = tuple(
    f"reconstruct.{name}"
    for name in (
        "loss", "iterations", "time", "batch_size", "sampling", "rounding_lr", "regularizer", "warm_up", "beta",
        "scale_lr", "relative_scales", "weight_scale_lr", "bias_lr", "views", "zero_point_lr", "drop",
        "scale_iterations", "scale_power", "scale_inputs", "network", "precision", "skip_first",
    )
)  # fmt: skip
_NETWORK = tuple(
    f"reconstruct.network.{name}"
    for name in (
        "batch_size", "rounding_lr", "weight_scale_lr", "scale_lr", "bias_lr", "rise", "features", "temperature",
        "augment",
    )
)  # fmt: skip
_SCALES = ("reconstruct.scale_lr", "reconstruct.relative_scales", "reconstruct.zero_point_lr")
_SECOND_PHASE = ("reconstruct.scale_iterations", "reconstruct.scale_power", "reconstruct.scale_inputs")

# Of a finished run that is trained further.
ADOPTED = (
    Row("", lambda recipe: False, (*_LEARNING, "reconstruct.method", "reconstruct.never_worse", "reconstruct.cache",
        "calibration.range_count"), "the run's codes and scales are where training begins"),
)  # fmt: skip

DEPLOYED = ("export.storage", "export.evaluate", "quant.weights.reach")  # what only deploy.onnx has to do with
ROWS = (
    Row("", _sets_more, ("preset",), "the recipe's own fields leave nothing of it"),
    Row("model.name", _is_not("model.name", None), ("model.options", "model.weights")),
    Row("data.kind", _is_not("data.kind", "digits"), ("data.root",)),
    Row("data.kind", _is_not("data.kind", "digits", "cifar10"), ("data.on_error", "data.preprocess.color",
        "data.calibration_preprocess.color"), "its images are no files to decode"),
    Row("data.preprocess.resize", _resizes, ("data.preprocess.interpolation",)),
    Row("data.calibration_preprocess.resize", _resizes_calibration, ("data.calibration_preprocess.interpolation",)),
    Row("calibration.augment", _augments, ("data.augment",), "nothing is trained either"),
    Row("data.augment.scale", _is_not("data.augment.scale", None), ("data.augment.ratio",)),
    Row("calibration.manifest", _is("calibration.manifest", None),
        ("calibration.count", "calibration.strategy", "calibration.pool"), "it names the images"),
    Row("quant.activations.dynamic", lambda r: _static(r) or r.quant.weights.clustering != "plain",
        ("calibration.range_count",)),
    Row("quant.weights.levels", lambda r: r.quant.weights.grid != "codebook" or r.quant.weights.levels is None,
        ("quant.weights.bits",), "a code takes as many bits as this number needs"),
    Row("quant.mixed.choices", _main_weights_matter, ("quant.weights.bits",), "quant.mixed chooses among these"),
    Row("quant.mixed.choices", _main_activations_matter, ("quant.activations.bits",),
        "quant.mixed chooses among these"),
    Row("quant.weights.grid", _is("quant.weights.grid", "codebook"), ("quant.weights.codebook",)),
    Row("quant.weights.grid", lambda r: r.quant.weights.grid in ("uniform", "nuq") or bool(_uniform_bits(r)),
        ("quant.weights.symmetric", "quant.weights.observer", "quant.weights.percentile"), "levels have no range"),
    Row("quant.placement", _has_signs_to_choose, ("quant.weights.symmetric",), "weights of 8 bits are symmetric there"),
    Row("quant.weights.observer", _is("quant.weights.observer", "percentile"), ("quant.weights.percentile",)),
    Row("quant.activations.dynamic", _static, ("quant.activations.observer", "quant.activations.percentile")),
    Row("quant.activations.observer", _is("quant.activations.observer", "percentile"),
        ("quant.activations.percentile",)),
    Row("quant.boundary_bits", _has_wide_ends, ("quant.boundary",), "weights and activations have as many"),
    Row("quant.boundary", _is_not("quant.boundary", "none"), ("quant.boundary_bits",)),
    Row("quant.placement", _is("quant.placement", "integer"), ("quant.residual_bits",)),
    Row("quant.activations.bits", lambda r: r.quant.residual_bits >= r.quant.activations.bits,
        ("quant.residual_bits",), "the larger number holds"),
    Row("quant.weights.bits",
        lambda r: r.quant.boundary_bits >= min(_narrow(r), r.quant.activations.bits), ("quant.boundary_bits",),
        "activations have as many or more, and the larger number holds"),
    Row("reconstruct.method", _learns, _LEARNING),
    Row("reconstruct.method", _learns_scales, _SCALES, "it learns no scales of activations"),
    Row("quant.activations.dynamic", _static, (*_SCALES, *_SECOND_PHASE, "reconstruct.network.scale_lr")),
    Row("reconstruct.method", _is("reconstruct.method", "qdrop"), ("reconstruct.drop",), "only qdrop drops values"),
    Row("reconstruct.method", _is("reconstruct.method", "brecq"), _SECOND_PHASE, "only brecq has a second phase"),
    Row("reconstruct.regularizer", _is_not("reconstruct.regularizer", 0), ("reconstruct.warm_up", "reconstruct.beta")),
    Row("reconstruct.time",
        lambda r: r.reconstruct.time is None or _whole(r) or _has_fixed_second_phase(r),
        ("reconstruct.iterations",), "it alone says how many fit"),
    Row("reconstruct.network.iterations", _whole, _NETWORK),
    Row("reconstruct.method", lambda r: _learns(r) or _rounds(r), ("reconstruct.never_worse", "reconstruct.cache"),
        "nothing keeps features"),
    Row("reconstruct.method", _keeps_features, ("reconstruct.cache_limit",), "nothing keeps features"),
    Row("export.onnx", _is("export.onnx", True), ("export.storage", "export.images", "export.evaluate")),
    Row("quant.placement", _is("quant.placement", "integer"), DEPLOYED, "there is no deploy.onnx"),
    Row("quant.activations.dynamic", _static, DEPLOYED, "there is no deploy.onnx"),
    Row("quant.activations.granularity", _is("quant.activations.granularity", "per_tensor"), DEPLOYED,
        "there is no deploy.onnx"),
    Row("quant.weights.bits", _has_few_bits, ("export.storage",), "no weight has fewer than 8"),
    *(
        row
        for part in ("train", "finetune")
        for row in (
            Row(f"{part}.iterations", _is(f"{part}.iterations", None), (f"{part}.epochs",)),
            Row(f"{part}.optimizer", _is(f"{part}.optimizer", "sgd"), (f"{part}.nesterov",)),
            Row(f"{part}.holdout", _is_not(f"{part}.holdout", 0), (f"{part}.evaluate_every",)),
        )
    ),
    Row("finetune.labels", _is_not("finetune.labels", 0), ("finetune.label_smoothing",)),
    Row("finetune.distill", _is_not("finetune.distill", 0), ("finetune.temperature",)),
    Row("quant.activations.dynamic", _static, ("finetune.activations",)),
    Row("finetune.activations", _learns_ranges, ("finetune.scale_lr", "finetune.freeze"),
        "finetune.weights is arq, so no range is learned"),
)  # fmt: skip
