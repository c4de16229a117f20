"""Values of recipe fields: what is refused, how null takes values away, and recipes that are made of others."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from calibquant.errors import CalibQuantError, RecipeError
from calibquant.numerics.grid import Grid
from calibquant.numerics.levels import unsigned_levels
from calibquant.pipeline import quantize
from calibquant.quantization import make_plan
from calibquant.quantization.leveling import leveled_weight
from calibquant.quantization.observers import make_observer, weight_range
from calibquant.quantization.plan import LevelPlan, TensorPlan
from calibquant.quantization.quantizers import WeightQuantizer
from calibquant.recipe import (
    STRATEGIES,
    ActivationRecipe,
    QuantRecipe,
    Recipe,
    ReconstructRecipe,
    TrainRecipe,
    WeightRecipe,
    changed,
    load_recipe,
    make_recipe,
    valid,
)
from calibquant.recipe.idle import value_at
from calibquant.recipe.section import Section, given, leaves, section_of
from calibquant.reconstruction.phases import phases
from calibquant.selection import STRATEGIES as PICKS
from calibquant.studies.selection.planning import make_selection_study
from calibquant.training.engine import optimizer_of
from calibquant.training.schedules import learning_rate

OTHER = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "idle_fields.py"))["OTHER"]
# What optional sections need in order to be there.
THERE = {
    "quant.mixed": "quant.mixed.limit=3", "data.augment": "data.augment={}", "finetune": "finetune={}",
    "train": "train={}", "data.calibration_preprocess": "data.calibration_preprocess={}",
}  # fmt: skip
FIELDS = [field for field in leaves(Recipe) if field not in ("version", "quant.mixed.limit", "quant.mixed.max_drop")]


def annotation(field: str) -> Any:
    section: type[Section] = Recipe
    *outer, last = field.split(".")
    for name in outer:
        section = section_of(section.model_fields[name]) or section
    return section.model_fields[last].annotation


def kinds(kind: Any) -> set[Any]:
    """What an annotation is made of."""
    return {kind, *(part for inner in get_args(kind) for part in kinds(inner))} if _hashable(kind) else set()


def _hashable(kind: Any) -> bool:
    try:
        hash(kind)
    except TypeError:
        return False
    return True


def there(field: str) -> list[str]:
    return [text for section, text in THERE.items() if field.startswith(f"{section}.")]


NUMBERS = [f for f in FIELDS if kinds(annotation(f)) & {int, float} or "bits" in f.rpartition(".")[2]]
LISTS = [f for f in NUMBERS if any("tuple" in str(k) for k in kinds(annotation(f)))]


def refused(field: str, value: str) -> str:
    """The error of a value, which is one line that names the field."""
    with pytest.raises(RecipeError) as caught:
        make_recipe({}, [*there(field), f"{field}={value}"])
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"recipe, {field}"), text
    return text


def test_numbers_are_found() -> None:
    assert len(NUMBERS) > 80
    assert {"quant.weights.bits", "finetune.lr", "data.preprocess.mean", "reconstruct.time", "seed"} <= {*NUMBERS}


@pytest.mark.parametrize("field", [f for f in NUMBERS if f != "quant.bits"])
def test_numbers_that_are_none_are_refused(field: str) -> None:
    listed = "[{0}, {0}]" if field in LISTS else "{0}"
    for value in (".nan", ".inf", "-.inf", "true", "word", "{a: 1}", "1e999"):
        assert "; got" in refused(field, listed.format(value))
    with pytest.raises(RecipeError, match=rf"override '{field}=.*more than 64 bits"):
        make_recipe({}, [f"{field}={listed.format(10**30)}"])
    if not field.endswith("preprocess.mean"):
        assert refused(field, listed.format("-1"))


@pytest.mark.parametrize("field", [f for f in FIELDS if f not in NUMBERS and not f.startswith("model.options")])
def test_values_of_another_kind_are_refused(field: str) -> None:
    value = "[1]" if field == "quant.bits" else "{a: {b: 1}}"
    assert refused(field, value)
    if "Literal" in str(annotation(field)) or field == "preset":
        assert "tommorow" in refused(field, "tommorow")


@pytest.mark.parametrize(
    "field",
    ["calibration.count", "calibration.range_count", "calibration.batch_size", "reconstruct.iterations", "finetune.lr",
     "reconstruct.batch_size", "quant.mixed.images", "evaluation.count", "evaluation.batch_size", "export.images",
     "reconstruct.views", "reconstruct.scale_iterations", "train.batch_size", "train.lr", "threads", "train.epochs",
     "finetune.evaluate_every", "reconstruct.rounding_lr", "reconstruct.network.batch_size", "reconstruct.time",
     "reconstruct.beta", "data.augment.ratio", "data.preprocess.std", "finetune.freeze", "finetune.temperature"],
)  # fmt: skip
def test_nothing_of_what_there_must_be_some_is_refused(field: str) -> None:
    refused(field, "[0, 0]" if field in LISTS else "0")


@pytest.mark.parametrize("field", [f for f in FIELDS if f in OTHER])
def test_null_takes_away_what_a_file_set(field: str, tmp_path: Path) -> None:
    """For every field: the recipe is as if the file had not set it."""
    path, plain = tmp_path / "recipe.yaml", make_recipe({}, there(field))
    tree: Any = OTHER[field]
    for name in reversed(field.split(".")):
        tree = f"{{{name}: {tree}}}"
    path.write_text(tree)
    found = load_recipe(path, [*there(field), f"{field}=null"])
    assert found == plain
    assert list(given(found)) == list(given(plain))


@pytest.mark.parametrize(
    ("tree", "overrides", "key", "expected"),
    [
        ({"model": {"options": {"a": 1}}}, ["model.options={}"], "model.options", {}),
        ({"model": {"options": {"a": 1}}}, ["model.options=null"], "model.options", {}),
        ({"model": {"options": {"a": 1}}}, ["model.options={}", "model.options.b=2"], "model.options", {"b": 2}),
        ({"model": {"options": {"a": 1}}}, ["model.options.a=null"], "model.options", {"a": None}),
        ({"quant": {"bits": {"x.weight": 8}}}, ["quant.bits={}"], "quant.bits", {}),
        ({"quant": {"bits": {"x.weight": 8}}}, ["quant.bits={}", "quant.bits.y.w=4"], "quant.bits", {"y.w": 4}),
        ({"preset": "int8", "quant": {"weights": {"bits": 3}}}, ["quant.weights.bits=null"], "quant.weights.bits", 8),
        ({"quant": {"weights": {"bits": 3}}}, ["quant.weights=null"], "quant.weights.bits", 4),
        ({"quant": {"weights": {"bits": 3}}}, ["quant.weights={}"], "quant.weights.bits", 3),
        ({"preset": "qat"}, ["finetune=null"], "finetune", None),
        ({"finetune": {"epochs": 3}}, ["finetune=null", "finetune={}"], "finetune.epochs", 5),
        ({"data": {"preprocess": {"mean": [0.5]}}}, ["data.preprocess.mean=null"], "data.preprocess.mean",
         (0.485, 0.456, 0.406)),
        ({"seed": None, "quant": None}, [], "seed", 1005),
    ],
)  # fmt: skip
def test_null_and_empty_mappings(tree: dict[str, Any], overrides: list[str], key: str, expected: Any) -> None:
    assert value_at(make_recipe(tree, overrides), key) == expected


def test_an_included_mapping_is_emptied_by_the_file_too(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("model: {options: {a: 1}}")
    (tmp_path / "recipe.yaml").write_text("{include: [part.yaml], model: {options: {}}}")
    assert load_recipe(tmp_path / "recipe.yaml").model.options == {}


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["quant.weights.bits=2", "quant.weights.grid=codebook", "quant.weights.levels=128"], "W7A4"),
        (["quant.weights.grid=codebook", "quant.weights.levels=5"], "W3A4"),
        (["quant.weights.grid=codebook", "quant.weights.bits=1"], "W1A4"),
        (["preset=int8", "quant.weights.grid=nuq"], "W5A8"),
        (["preset=int8", "quant.weights.grid=nuq", "quant.weights.levels=16"], "W4A8"),
        (["quant.weights.grid=ternary", "quant.weights.bits=2"], "W2A4"),
        (["quant.weights.grid=binary", "quant.weights.bits=3"], "W3A4"),
        (["quant.weights.grid=apot"], "W4A4"),
        (["quant.mixed.limit=3"], "WmixA4"),
    ],
)
def test_a_setting_is_named_by_the_stored_bits(overrides: list[str], setting: str) -> None:
    assert make_recipe({}, overrides).setting == setting


def test_a_run_of_many_levels_is_named_by_its_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {"grid": "codebook", "bits": 2, "levels": 128}
    run = quantize({
        "model": {"name": "digits_resnet"}, "calibration": {"count": 16}, "evaluation": {"count": 8},
        "data": {"kind": "digits", "preprocess": {"mean": [0.5], "std": [0.5], "resize": 16}},
        "quant": {"weights": keys, "boundary": "none"}, "export": {"onnx": False},
    })  # fmt: skip
    assert run.folder.name == "digits_resnet-w7a4-001"
    assert (run.metrics["setting"], run.metrics["size"]["weight_bits"]) == ("W7A4", pytest.approx(7, abs=0.2))


# --- recipes made of others -------------------------------------------------------------------------------------------


def test_a_changed_recipe_is_checked() -> None:
    base = make_recipe({"preset": "qdrop"}, ["quant.weights.grid=apot"])
    assert changed(base, {"quant.weights.bits": 3, "calibration.manifest": None}).setting == "W3A4"
    assert changed(base, {}) == base
    with pytest.raises(RecipeError, match=r"somewhere, quant.weights.bits: apot has no grid of 8 bits; use 2 to 6"):
        changed(base, {"quant.weights.bits": 8}, "somewhere")
    with pytest.raises(RecipeError, match=r"quant.weights.bitts: this key is unknown; did you mean 'bits'\?"):
        changed(base, {"quant.weights.bitts": 8})


def test_a_recipe_copied_with_anything_is_refused_where_a_run_starts() -> None:
    weights = WeightRecipe().model_copy(update={"observer": "mes"})
    recipe = Recipe().model_copy(update={"quant": QuantRecipe().model_copy(update={"weights": weights})})
    for start in (valid, quantize):
        with pytest.raises(RecipeError, match=r"recipe, quant.weights.observer: input should be 'minmax', .*'mes'"):
            start(recipe)
    assert valid(Recipe(seed=4)) == Recipe(seed=4)


@pytest.mark.parametrize(
    ("overrides", "bits", "message"),
    [
        (["quant.weights.grid=apot"], "w8a4", r"study, bits: apot has no codes of 8 bits with this recipe, which w8a4"),
        (["quant.weights.grid=codebook", "quant.weights.levels=128"], "w2a2", r"bits: codebook has no codes of 2 bits"),
        (["quant.activations.grid=codebook"], "w4a8", r"quant.activations.bits: codebook has no grid of 8 bits"),
        (["quant.mixed.limit=3"], "w2a2", "study, quant.mixed: the settings studied give the bits; leave quant.mixed"),
        (["quant.weights.allocation=banner"], "w16a16", "quant.weights.allocation: gives a channel 8 bits at most"),
    ],
)
def test_a_selection_study_makes_valid_recipes(overrides: list[str], bits: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_selection_study("digits", ["class-balanced"], [16], [bits], overrides=overrides)


def test_a_selection_study_knows_grids_by_their_stored_bits() -> None:
    study = make_selection_study("digits", ["class-balanced"], [16], ["w5a8"], overrides=["quant.weights.grid=nuq",
                                 "quant.weights.bits=8"])  # fmt: skip
    assert study.recipe_of(study.cells[0]).setting == "W5A8"


def test_strategies_are_those_that_can_choose() -> None:
    assert set(STRATEGIES) == set(PICKS)
    for text in ("herdng", "herding=0", "herding=x", ""):
        with pytest.raises(RecipeError, match=r"recipe, calibration.strategy: "):
            make_recipe({"calibration": {"strategy": text}})
    with pytest.raises(RecipeError, match=r"calibration.strategy: there is no strategy 'herdng'; did you mean"):
        make_recipe({"calibration": {"strategy": "herdng=0.5,tail=0.5"}})


# --- unknown names in functions ---------------------------------------------------------------------------------------

PLAN = TensorPlan(Grid(4), symmetric=False)
WEIGHT = torch.linspace(-1, 1, 24).reshape(4, 6)


def odd(section: Section, **fields: Any) -> Any:
    return section.model_copy(update=fields)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_observer(odd(ActivationRecipe(), observer="mes"), PLAN), "'mes' is unknown; did you mean 'mse'"),
        (
            lambda: weight_range(WEIGHT, odd(WeightRecipe(), observer="kl"), PLAN),
            "quant.weights.observer: 'kl' is unkn",
        ),
        (lambda: make_plan(torch.fx.GraphModule({}, torch.fx.Graph()), odd(QuantRecipe(), boundary="al")), "boundary"),
        (lambda: make_plan(torch.fx.GraphModule({}, torch.fx.Graph()), odd(QuantRecipe(), placement="x")), "placement"),
        (lambda: leveled_weight(WEIGHT, PLAN, LevelPlan("quaternary", 4)), "quant.weights.grid: 'quaternary' is unkn"),
        (lambda: unsigned_levels("ternary", 2, True), "quant.activations.grid: 'ternary' is unknown"),
        (lambda: phases(odd(ReconstructRecipe(), method="brec")), "method"),
        (lambda: learning_rate(odd(TrainRecipe(), schedule="linear"), 0, 1), "train.schedule: 'linear' is unknown"),
        (lambda: optimizer_of([], odd(TrainRecipe(), optimizer="adam")), "'adam' is unknown; did you mean 'adamw'"),
    ],
)
def test_an_unknown_name_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(CalibQuantError, match=message):
        call()


def test_an_unknown_way_of_training_weights_is_refused() -> None:
    quantizer = WeightQuantizer("w", PLAN)
    quantizer.set(leveled_weight(WEIGHT, PLAN, LevelPlan("ternary", 3)))
    with pytest.raises(RecipeError, match=r"finetune.weights: 'lsk' is unknown; did you mean 'lsq'"):
        quantizer.start_training(WEIGHT, "lsk")
