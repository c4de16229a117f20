"""Networks, images and recipes passed from Python: the kinds that enter a run, and early errors of one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import calibquant
from calibquant import TensorImages
from calibquant.data import ImageSet
from calibquant.errors import CalibQuantError, CaptureError, DataError, ModelError, RecipeError, RunFolderError
from calibquant.pipeline import dry_run, evaluate_float, resume, resume_training
from calibquant.recipe import make_recipe


def images(size: int = 8, count: int = 8, channels: int = 3, labels: list[int] | None = None) -> TensorImages:
    generator = torch.Generator().manual_seed(size)
    return TensorImages(torch.randn(count, channels, size, size, generator=generator), labels)


def network(flat: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    end = [nn.Flatten(), nn.Linear(4 * 36, 2)] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *end).eval()


def fields(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"runs": str(tmp_path), "threads": 1, "calibration": {"count": 8}, "export": {"onnx": False}, **more}


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


# --- networks in other forms ------------------------------------------------------------------------------------------


def codes(run: calibquant.Run) -> dict[str, Tensor]:
    return {name: q.get().codes for name, q in run.model.weight_quantizers.items()}


def pruned() -> nn.Module:
    made = network()
    prune.l1_unstructured(made[0], "weight", 0.5)
    return made


def pruned_for_good() -> nn.Module:
    made = pruned()
    prune.remove(made[0], "weight")  # type: ignore[index]
    return made


def of_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return network()


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "pruned": (pruned, pruned_for_good),
    "averaged": (lambda: AveragedModel(nn.DataParallel(network())), network),
    "of inference mode": (of_inference_mode, network),
    "double": (lambda: network().double(), network),
    "training": (lambda: network().train(), network),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_network_in_another_form_quantizes_as_the_plain_one(form: str, tmp_path: Path) -> None:
    make, plain = FORMS[form]
    recipe = fields(tmp_path, reconstruct={"method": "qdrop", "iterations": 2, "batch_size": 4})
    run = calibquant.quantize(recipe, make(), images())
    want = calibquant.quantize(recipe, plain(), images())
    assert run.metrics["quantized"] == want.metrics["quantized"]
    assert run.folder.name.startswith("sequential-"), "it has the network's name, not the wrapper's"
    mine, theirs = codes(run), codes(want)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_runs_learn_under_a_mode_without_gradients(mode: Callable[[], Any], tmp_path: Path) -> None:
    recipe = fields(tmp_path, reconstruct={"method": "qdrop", "iterations": 2, "batch_size": 4})
    with mode():
        run = calibquant.quantize(recipe, network(), images())
        trained = calibquant.train(fields(tmp_path, train={"epochs": 1}), network(), images(labels=[0, 1] * 4))
        calibquant.finetune(run.folder, ["finetune.epochs=1"], network(), images())
    assert len(trained.metrics["epochs"]) == 1


def test_a_wrapped_network_is_trained_finetuned_and_selected_for(tmp_path: Path) -> None:
    wrapped = torch.compile(nn.DataParallel(network()), backend="eager")
    trained = calibquant.train(fields(tmp_path, train={"epochs": 1}), wrapped, images(labels=[0, 1] * 4))
    assert type(trained.network) is nn.Sequential
    run = calibquant.quantize(fields(tmp_path), wrapped, images())
    again = calibquant.finetune(run.folder, ["finetune.epochs=1"], AveragedModel(network()), images())
    assert again.folder.name.startswith("sequential-")
    assert len(calibquant.select({"calibration": {"count": 4}}, wrapped, images()).rows) == 4


def test_a_pruned_network_stays_pruned_while_it_trains(tmp_path: Path) -> None:
    start = pruned()
    start(torch.zeros(1, 3, 8, 8))
    done = calibquant.train(
        fields(tmp_path, train={"epochs": 2, "ema": 0.5, "lr": 0.1}), start, images(labels=[0, 1] * 4)
    )
    weight, mask = done.network[0].weight, start[0].weight_mask  # type: ignore[index]
    assert not weight[mask == 0].any()
    assert not torch.equal(weight, start[0].weight)  # type: ignore[index]


def test_a_wrapper_from_a_file_is_taken_off(tmp_path: Path) -> None:
    built = "nn.DataParallel(nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten()))"
    (tmp_path / "net.py").write_text(f"from torch import nn\ndef make():\n    return {built}\n")
    weights = tmp_path / "w.pt"
    torch.save({"0.weight": torch.ones(2, 3, 8, 8), "0.bias": torch.zeros(2)}, weights)
    recipe = make_recipe({"model": {"name": f"{tmp_path / 'net.py'}:make", "weights": str(weights)}})
    built = calibquant.pipeline.preparing.build(recipe)
    assert type(built) is nn.Sequential
    assert built[0].weight.eq(1).all()


# --- wrong types ------------------------------------------------------------------------------------------------------

STACK = torch.zeros(8, 3, 8, 8)
WRONG_IMAGES: list[tuple[object, str]] = [
    (STACK, r"of type Tensor, not a set of images; pass calibquant\.TensorImages\(images\)"),
    (STACK.numpy(), r"of type ndarray, .*TensorImages\(torch\.from_numpy\(images\)\)"),
    ([STACK[0], STACK[1]], r"of type list, .*TensorImages\(images, labels\) with all images in one tensor"),
    (torch.utils.data.TensorDataset(STACK), "of type TensorDataset, .*all images in one tensor"),
    (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(STACK)), "of type DataLoader, "),
    ("imagenet/val", "of type str, .*leave them out and name them in the recipe's section data"),
]


@pytest.mark.parametrize(("given", "said"), WRONG_IMAGES)
def test_what_is_no_set_of_images_is_told_what_to_pass(given: Any, said: str, tmp_path: Path) -> None:
    recipe, good = fields(tmp_path), images()
    training = fields(tmp_path, train={"epochs": 1})
    entries: list[tuple[str, Callable[[], object]]] = [
        ("calibration images", lambda: calibquant.quantize(recipe, network(), given)),
        ("evaluation images", lambda: calibquant.quantize(recipe, network(), good, given)),
        ("calibration images", lambda: calibquant.train(training, network(), given)),
        ("evaluation images", lambda: calibquant.train(training, network(), good, given)),
        ("calibration images", lambda: calibquant.finetune(tmp_path, None, network(), given)),
        ("calibration images", lambda: resume(tmp_path, network(), given)),
        ("calibration images", lambda: resume_training(tmp_path, network(), given)),
        ("calibration images", lambda: calibquant.select(recipe, network(), given)),
        ("evaluation images", lambda: dry_run(make_recipe(recipe), network(), good, given)),
        ("images", lambda: calibquant.evaluate(network(), given)),
    ]
    for where, call in entries:
        with pytest.raises(DataError, match=f"^{where}: are {said}") as caught:
            call()
        one_line(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [network().state_dict(), "net.pth", nn.ReLU])
def test_what_is_no_network_is_told_what_to_pass(given: Any, tmp_path: Path) -> None:
    recipe = fields(tmp_path)
    for call in (
        lambda: calibquant.quantize(recipe, given, images()),
        lambda: calibquant.train({**recipe, "train": {"epochs": 1}}, given, images()),
        lambda: calibquant.finetune(tmp_path, None, given, images()),
        lambda: calibquant.select(recipe, given, images()),
    ):
        with pytest.raises(ModelError, match=r"^network: is ") as caught:
            call()
        one_line(caught.value)
    assert not list(tmp_path.iterdir())


def test_evaluate_names_what_is_no_network() -> None:
    with pytest.raises(ModelError, match=r"^network: is of type OrderedDict, not an nn\.Module"):
        calibquant.evaluate(network().state_dict(), images())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("w4a4.yaml", r"is of type str, not a recipe; pass calibquant\.load_recipe\('w4a4\.yaml'\)"),
        (Path("w4a4.yaml"), r"is of type PosixPath, not a recipe; pass calibquant\.load_recipe\("),
        (network(), "is of type Sequential, not a recipe; pass a calibquant.Recipe or its fields as a dictionary"),
        (None, "is of type NoneType, not a recipe"),
    ],
)
def test_what_is_no_recipe_is_told_what_to_pass(given: Any, said: str) -> None:
    for call in (calibquant.quantize, calibquant.train, calibquant.select):
        with pytest.raises(RecipeError, match=f"^recipe: {said}"):
            call(given, network(), images())
    with pytest.raises(RecipeError, match=f"^recipe: {said}"):
        calibquant.judge(given, images(), network(), images())


# --- told before the work ---------------------------------------------------------------------------------------------


class WorkBegunError(Exception):
    """The work has begun."""


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where anything is learned or calibrated."""

    def begun(*_: object, **__: object) -> None:
        raise WorkBegunError

    monkeypatch.setattr(calibquant.pipeline.quantizing, "calibrate", begun)
    monkeypatch.setattr(calibquant.pipeline.training, "train_network", begun)


@pytest.mark.usefixtures("no_work")
def test_weights_that_a_live_network_does_not_need_are_looked_for_first(tmp_path: Path) -> None:
    runs, missing = tmp_path / "runs", tmp_path / "missing.pt"
    recipe = fields(runs, model={"weights": str(missing)})
    for call in (
        lambda: calibquant.quantize(recipe, network(), images()),
        lambda: calibquant.train({**recipe, "train": {"epochs": 1}}, network(), images(labels=[0, 1] * 4)),
    ):
        with pytest.raises(
            ModelError, match=r"^recipe, model\.weights, .*missing\.pt: there is no such file; "
        ) as caught:
            call()
        assert "leave model.weights out" in one_line(caught.value)
    assert not list(runs.iterdir())
    with pytest.raises(WorkBegunError):  # as the error says
        calibquant.quantize(fields(runs), network(), images())
    missing.write_bytes(b"weights")
    with pytest.raises(WorkBegunError):
        calibquant.quantize(recipe, network(), images())


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("other", "sizes"), [(images(12), "3 x 12 x 12"), (images(8, 8, 1), "1 x 8 x 8"), (images(2), "3 x 2 x 2")]
)
def test_evaluation_images_that_the_network_does_not_take_are_told_first(
    other: ImageSet, sizes: str, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=f"^evaluation images: are {sizes}, but .* calibration images of 3 x 8 x 8"
    ) as c:
        calibquant.quantize(fields(tmp_path), network(flat=True), images(), other)
    assert "does not take them (" in one_line(c.value)
    training = fields(tmp_path, train={"epochs": 1})
    with pytest.raises(CalibQuantError, match="does not take images of shape"):
        calibquant.train(training, network(flat=True), images(labels=[0, 1] * 4), other)


def test_evaluation_images_of_a_size_that_the_network_takes_are_measured(tmp_path: Path) -> None:
    run = calibquant.quantize(fields(tmp_path), network(), images(), images(12, labels=[0, 1] * 4))
    assert run.metrics["evaluated_on"] == "evaluation images"


@pytest.mark.usefixtures("no_work")
def test_a_size_that_the_captured_network_keeps_as_a_number_is_told_first(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).sum((2, 3))

    with pytest.raises(
        DataError, match=r"^evaluation images: .* computes something else on them; give images of 3 x 8"
    ):
        calibquant.quantize(fields(tmp_path), Sum().eval(), images(), images(12))
    with pytest.raises(WorkBegunError):
        calibquant.quantize(fields(tmp_path), Sum().eval(), images(), images(8))


@pytest.mark.usefixtures("no_work")
def test_labels_and_images_that_only_the_end_needs_are_looked_at_first(tmp_path: Path) -> None:
    wrong, right = images(labels=[0, 2] * 4), images(labels=[0, 1] * 4)
    empty = TensorImages(torch.zeros(0, 3, 8, 8))
    learned = {"finetune": {"epochs": 1, "labels": 0.5, "holdout": 0}}
    training = {"train": {"epochs": 1}}
    late: list[tuple[Callable[[], object], str]] = [
        (
            lambda: calibquant.quantize(fields(tmp_path), network(), images(), wrong),
            "tensor#1: label 2 is outside 0..1",
        ),
        (
            lambda: calibquant.quantize(fields(tmp_path), network(), images(), empty),
            "evaluation images: there are none",
        ),
        (
            lambda: calibquant.quantize(fields(tmp_path, **learned), network(), images(), right),
            "tensor#0: has no label",
        ),
        (lambda: calibquant.quantize(fields(tmp_path, **learned), network(), wrong, right), "tensor#1: label 2 is"),
        (lambda: calibquant.train(fields(tmp_path, **training), network(), right, wrong), "tensor#1: label 2 is"),
        (
            lambda: calibquant.train(fields(tmp_path, **training), network(), right, empty),
            "evaluation images: there are",
        ),
    ]
    for call, said in late:
        with pytest.raises(DataError, match=f"^{said}") as caught:
            call()
        one_line(caught.value)
    with pytest.raises(WorkBegunError):  # beyond `evaluation.count` nothing is measured
        calibquant.quantize(fields(tmp_path, evaluation={"count": 1}), network(), images(), wrong)


def test_evaluate_names_images_that_the_network_does_not_take() -> None:
    with pytest.raises(DataError, match=r"^tensor#0: is 3 x 12 x 12, which the network does not take \(mat1") as caught:
        calibquant.evaluate(network(flat=True), images(12))
    one_line(caught.value)


def test_a_dictionary_from_the_host_of_a_part_is_one_line(tmp_path: Path) -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.part(x)}

    with pytest.raises(ModelError, match=r"^network output: is a dictionary with 'logits', not \(N, classes\)"):
        calibquant.quantize(fields(tmp_path, model={"submodule": "part"}), Host(), images())


# --- values that are too large ----------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """The network behind a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net, self.factor = network(), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net[3:](self.net[:3](x) * self.factor)


def folded_to_infinity() -> nn.Module:
    made = network()
    made[1].running_var[2], made[1].eps = 0.0, 0.0
    return made


def huge_image(at: int) -> TensorImages:
    made = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made[at] *= 1e21
    return TensorImages(made)


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (lambda: Scaled(1e21), images(), r"activations of mul_scalar: hold values up to \d"),
        (lambda: Scaled(float("inf")), images(), "activations of mul_scalar: hold NaN or infinite values"),
        (folded_to_infinity, images(), "network, '.*weight' with BatchNorm folded in: holds NaN or infinite values"),
        (network, huge_image(0), r"(calibration images|activations of x): hold values up to -?\d"),
        (network, huge_image(7), r"(calibration images|activations of x): hold values up to -?\d"),
    ],
)  # fmt: skip
def test_values_beyond_the_largest_magnitude_are_named_early(
    make: Callable[[], nn.Module], given: ImageSet, said: str, tmp_path: Path
) -> None:
    recipe = fields(tmp_path, reconstruct={"method": "qdrop", "iterations": 1})
    with pytest.raises(CalibQuantError, match=f"^{said}") as caught:
        calibquant.quantize(recipe, make(), given)
    one_line(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1e-15, 1e15, 1e18])
def test_large_and_small_values_within_it_end_in_a_run(factor: float, tmp_path: Path) -> None:
    made = network()
    made[0].weight.data *= factor
    run = calibquant.quantize(fields(tmp_path), made, images())
    assert run.evaluation.predictions.shape == (8,)


def test_a_mask_of_minus_infinity_is_no_value_beyond(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            y = self.net[:5](x)
            return self.net[5](y * torch.softmax(y + self.mask, 1))

    recipe = fields(tmp_path, quant={"placement": "academic"})
    assert calibquant.quantize(recipe, Masked().eval(), images()).metrics["setting"] == "W4A4"


def test_the_float_network_of_a_file_may_be_in_another_form(tmp_path: Path) -> None:
    source = (
        "import torch\nfrom torch import nn\ndef make():\n"
        "    return nn.DataParallel(nn.Sequential(nn.Conv2d(1, 10, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())).half()\n"
    )
    (tmp_path / "net.py").write_text(source)
    recipe = make_recipe(
        {
            "model": {"name": f"{tmp_path / 'net.py'}:make"},
            "data": {"kind": "digits", "preprocess": {"mean": [0.5], "std": [0.5]}},
        }
    )
    assert 0 <= evaluate_float(recipe)["float"]["top1"] <= 1


def test_a_capture_error_is_raised_before_any_image_is_chosen(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="fails on images of 1 x 8 x 8"):
        calibquant.quantize(fields(tmp_path), network(), images(channels=1))


# --- the other arguments ----------------------------------------------------------------------------------------------


def test_paths_may_be_strings_and_a_run_is_told_to_pass_its_folder(tmp_path: Path) -> None:
    run = calibquant.quantize(fields(tmp_path), network(), images())
    again = calibquant.finetune(str(run.folder), ["finetune.epochs=1"], network(), images())  # type: ignore[arg-type]
    assert again.metrics["started_from"] == str(run.folder)
    for call in (calibquant.finetune, resume, resume_training):
        with pytest.raises(
            RunFolderError, match=r"^(start|run): is of type Run, not a path; pass its attribute folder"
        ):
            call(run)  # type: ignore[operator]
    recipe = fields(tmp_path, calibration={"count": 4})
    chosen = calibquant.select(recipe, network(), images(), str(tmp_path / "chosen.csv"))  # type: ignore[arg-type]
    judged = calibquant.judge(recipe, str(tmp_path / "chosen.csv"), network(), images())  # type: ignore[arg-type]
    assert len(chosen.rows) == 4
    assert judged.pool == 8
    assert dry_run(recipe, network(), images()).images == 4


@pytest.mark.parametrize("given", [STACK, None])
def test_what_cannot_be_judged_is_told_what_to_pass(given: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^images to judge: are of type .*, not a set of images; pass calibquant"):
        calibquant.judge(fields(tmp_path), given, network(), images())


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (torch.zeros(3, 8, 8).numpy(), r"ndarray, float32 of shape \(3, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"Tensor, uint8 of shape \(3, 8, 8\)"),
        (torch.zeros(3, 8, 8).double(), r"Tensor, float64 of shape"),
        (torch.zeros(8, 8), r"Tensor, float32 of shape \(8, 8\)"),
    ],
)  # fmt: skip
def test_a_set_of_ones_own_that_gives_other_images_is_named(image: Any, what: str, tmp_path: Path) -> None:
    class Own(TensorImages):
        def image(self, i: int) -> Tensor:
            return image  # type: ignore[no-any-return]

    with pytest.raises(DataError, match=rf"^tensor#\d: is {what}.*, not a float32 tensor of shape \(C, H, W\)"):
        calibquant.quantize(fields(tmp_path), network(), Own(STACK))
