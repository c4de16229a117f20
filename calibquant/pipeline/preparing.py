"""Before quantization: the network, its captured graph and the images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx, nn

from calibquant.data import (
    Augmented,
    ImageSet,
    Manifest,
    batches,
    check_labels,
    open_images,
)
from calibquant.data.loading import images_within
from calibquant.errors import CaptureError, DataError, ModelError, RecipeError
from calibquant.graph import capture, fold_batch_norm
from calibquant.graph.capture import TOLERANCE, relative_difference
from calibquant.graph.watching import Watched
from calibquant.networks import beyond, check_values, float_copy, output_words, short
from calibquant.parallel import fit_threads
from calibquant.pipeline.live import check_weights_file, checked_live
from calibquant.pipeline.reporting import Reporter, Silent, log, note
from calibquant.pipeline.selecting import Candidates, candidates_of
from calibquant.recipe import Preprocess, Recipe
from calibquant.zoo import build_model

SAME = (
    1e-3  # of the largest logit: rounding differs by less, a size that the captured network keeps as a number by more
)


@dataclass(frozen=True)
class Prepared:
    """What stands before quantization.

    Args:
        network: the user's network, a copy in float32, on the CPU and in eval mode.
        teacher: its canonical graph (or that of the named part), BatchNorm folded.
        submodule: name of the part, or None.
        images: the calibration images.
        manifest: which they are.
        evaluation: the evaluation images; None to measure on the calibration images.
    """

    network: nn.Module
    teacher: fx.GraphModule
    submodule: str | None
    images: ImageSet
    manifest: Manifest
    evaluation: ImageSet | None

    def mount(self, part: nn.Module) -> nn.Module:
        """A network that takes images: `part` itself, or the user's network with `part` in the named place."""
        return part if self.submodule is None else mounted(copy.deepcopy(self.network), self.submodule, part)

    @property
    def classes(self) -> int:
        """How many classes the network tells apart; it runs on one image."""
        with torch.no_grad():
            return int(self.network(next(self.batches(1, slice(1)))).shape[1])

    @property
    def entries(self) -> int:
        """How many tensors the teacher takes."""
        return sum(node.op == "placeholder" for node in self.teacher.graph.nodes)

    def batches(
        self, batch_size: int, which: slice = slice(None), device: torch.device | str = "cpu", exact: bool = False
    ) -> Iterator[Tensor]:
        """Calibration images, (N, C, H, W) float32, batch by batch on a device; `which` of them, all by default.

        Large images come in smaller batches, unless the result depends on the size and it has to be `exact`.
        """
        chosen = range(len(self.images))[which]
        batch_size = batch_size if exact else self._at_once(batch_size)
        for batch in batches(self.images.subset(chosen), batch_size):
            yield batch.images.to(device)

    def inputs(self, batch_size: int, count: int | None = None) -> Iterator[Tensor]:
        """What enters the teacher in the float network, (N, ...) float32, batch by batch and at each of its calls.

        Args:
            batch_size: images in one forward pass.
            count: of the first `count` calibration images; None means all.
        """
        chosen = self.images if count is None else self.images.subset(range(min(count, len(self.images))))
        batch_size = self._at_once(batch_size)
        if self.submodule is None:
            yield from (batch.images for batch in batches(chosen, batch_size))
            return
        seen: list[Tensor] = []
        handle = self.network.get_submodule(self.submodule).register_forward_pre_hook(
            lambda _module, arguments, named: seen.extend([*arguments, *named.values()]), with_kwargs=True
        )
        try:
            for batch in batches(chosen, batch_size):
                with torch.no_grad():
                    self.network(batch.images)
                yield from seen
                seen.clear()
        finally:
            handle.remove()

    def _at_once(self, batch_size: int) -> int:
        return images_within(batch_size, next(batches(self.images, 1)).images.shape)


def mounted(host: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """`host` with `part` in place of its submodule, under every name that the submodule has."""
    old = host.get_submodule(name)
    for alias in [n for n, module in host.named_modules(remove_duplicate=False) if module is old]:
        host.set_submodule(alias, part)
    return host.eval()


def prepare(
    recipe: Recipe,
    network: nn.Module | None = None,
    calibration: ImageSet | None = None,
    evaluation: ImageSet | None = None,
    reporter: Reporter | None = None,
    known: Manifest | None = None,
) -> Prepared:
    """Open images and network, capture it, fold BatchNorm, check that it still computes the same, and choose images.

    Args:
        recipe: where network and images come from, and which images calibrate.
        network, calibration, evaluation: live ones instead; see `quantize`.
        reporter: hears how the file of weights was read, if that is not plain, and of the choice of images.
        known: the images that were chosen before, for a run that goes on.

    Raises:
        CalibQuantError: something about the recipe, network or images, also what only the end of a run would meet.
    """
    if calibration is None:
        calibration = open_calibration(recipe)
        evaluation = open_set(recipe, "evaluation") if evaluation is None else evaluation
    _, _, evaluation = checked_live(None, None, evaluation)
    prepared, candidates = open_candidates(recipe, network, calibration, reporter)
    chosen = candidates.choose(known)
    images = candidates.images.subset(chosen.indices)
    prepared = replace(prepared, images=images, manifest=chosen.manifest, evaluation=evaluation)
    _check_evaluation(prepared, recipe.evaluation.count)
    return prepared


def open_candidates(
    recipe: Recipe, network: nn.Module | None = None, images: ImageSet | None = None, reporter: Reporter | None = None
) -> tuple[Prepared, Candidates]:
    """The float network with all images of the calibration set, of which none is chosen yet, and the candidates.

    Args:
        recipe, network, reporter: as `prepare` takes them.
        images: live ones in place of the recipe's calibration set.

    Raises:
        CalibQuantError: something about the recipe, network or images.
    """
    reporter = reporter or Silent()
    network, images, _ = checked_live(network, images)
    if network is None:
        network = build(recipe, partial(note, reporter))
    else:
        check_weights_file(recipe)
    network = float_copy(network)
    check_values(network)
    images = open_calibration(recipe) if images is None else images
    indices, submodule = candidates_of(recipe, images), recipe.model.submodule
    example = next(batches(images, 3, indices)).images
    teacher = fold_batch_norm(capture(network, example, submodule))
    prepared = Prepared(network, teacher, submodule, images, Manifest(()), None)
    _check_sizes(prepared, example)
    _check_teacher(prepared, example)
    log.info("threads: %d", fit_threads(recipe.threads, network, example))
    return prepared, Candidates(recipe, images, indices, teacher, prepared.mount, reporter)


def _check_teacher(prepared: Prepared, example: Tensor) -> None:
    """The folded graph computes what the network does, and that is logits."""
    with torch.no_grad():
        want, got = prepared.network(example), prepared.mount(prepared.teacher)(example)
    if not isinstance(want, Tensor) or want.dim() != 2:
        shape = tuple(want.shape) if isinstance(want, Tensor) else output_words(want)[0]
        raise ModelError("network output", f"is {shape}, not (N, classes)", "give a network that returns class logits")
    error = relative_difference(want, got)
    if error > TOLERANCE and _folding_error(prepared, example) > TOLERANCE:
        mend = "report it with the network, or quantize a part of it with model.submodule"
        raise CaptureError("BatchNorm folding", f"changes the network by {error:.1e}", mend)


def _folding_error(prepared: Prepared, example: Tensor) -> float:
    """What folding changes in float64, where there is no rounding for a deep network to amplify.

    An untrained ResNet-101 changes by up to 1.6e-5 in float32, and by less than 1e-12 here.
    """
    teacher = fold_batch_norm(capture(prepared.network, example, prepared.submodule).double())
    exact = replace(prepared, network=copy.deepcopy(prepared.network).double(), teacher=teacher)
    with torch.no_grad():
        return relative_difference(exact.network(example.double()), exact.mount(teacher)(example.double()))


def _check_sizes(prepared: Prepared, example: Tensor) -> None:
    """Weights, with BatchNorm folded in, and what is computed from a few images stay within the values allowed."""
    kinds = {node.name: (node.op, node.target) for node in prepared.teacher.graph.nodes if node.op != "output"}

    def check(name: str, value: Tensor) -> None:
        wrong = beyond(value, masks=True) if value.is_floating_point() else None
        if wrong is None:
            return
        op, target = kinds[name]
        if op == "get_attr":
            where, mend = f"network, '{target}' with BatchNorm folded in", "check the statistics of BatchNorm"
        elif op == "placeholder" and prepared.submodule is None:
            where, mend = "calibration images", "check data.preprocess, or normalize the images that you pass"
        else:
            where, mend = f"activations of {name}", "check the weights, and the normalization of the images"
        raise ModelError(where, f"{'holds' if op == 'get_attr' else 'hold'} {wrong}", mend)

    with torch.no_grad():
        prepared.mount(Watched(prepared.teacher, kinds, check))(example)


def _check_evaluation(prepared: Prepared, count: int | None) -> None:
    """What is measured at the end can be: labels are classes, and images of another size pass the captured network.

    Raises:
        DataError: there are no images, a label is no class of the network, or images are of a size that it does not
            take.
    """
    images = measured(prepared.images if prepared.evaluation is None else prepared.evaluation, count)
    check_labels(images, prepared.classes)
    if prepared.evaluation is None:
        return
    example, other = next(prepared.batches(1, slice(1))), next(batches(images, 1)).images
    if other.shape != example.shape and (reason := _differs(prepared, other)) is not None:
        theirs, ours = (" x ".join(map(str, shape[1:])) for shape in (other.shape, example.shape))
        problem = f"are {theirs}, but the network was captured for calibration images of {ours}, and {reason}"
        raise DataError(
            "evaluation images", problem, f"give images of {ours}; data.preprocess.resize and crop make them"
        )


def measured(images: ImageSet, count: int | None) -> ImageSet:
    """The first `count` images, on which networks are measured; None means all.

    Raises:
        DataError: there are none.
    """
    if not len(images):
        raise DataError("evaluation images", "there are none", "give at least one image")
    return images.subset(range(min(count or len(images), len(images))))


def _differs(prepared: Prepared, images: Tensor) -> str | None:
    """Why the captured network does not stand for the user's on images of another size; None where it does."""
    try:
        with torch.no_grad():
            want, got = prepared.network(images), prepared.mount(prepared.teacher)(images)
    except (RuntimeError, ValueError, IndexError) as error:
        return f"does not take them ({short(error)})"
    same = relative_difference(want, got) <= SAME
    return None if same else "what was captured computes something else on them"


def build(recipe: Recipe, tell: Callable[[str], None] = lambda _: None) -> nn.Module:
    """The recipe's network with its weights, in eval mode; `tell` hears how their file was read, if not plainly.

    Raises:
        RecipeError: the recipe names no network.
        ModelError: it cannot be built or its weights do not fit.
    """
    if recipe.model.name is None:
        raise RecipeError("recipe, model.name", "this field is required", "name a network of the zoo")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # what the weights file does not give is drawn the same way each time
        return build_model(recipe.model, tell)


def open_set(recipe: Recipe, split: Literal["calibration", "evaluation"]) -> ImageSet:
    """The recipe's calibration or evaluation images.

    Raises:
        RecipeError: the recipe names no data.
        DataError: they cannot be opened, or there are none.
    """
    if recipe.data.kind is None:
        raise RecipeError("recipe, data.kind", "this field is required", "use cifar10, digits, folder, csv or shards")
    images = open_images(recipe.data, split)
    if split == "evaluation" and len(images) == 0:
        raise DataError("recipe, data.evaluation", "there are no images", "name a set that holds images")
    return images


def open_calibration(recipe: Recipe) -> ImageSet:
    """The recipe's calibration images, changed at random where `calibration.augment` asks for it.

    Raises:
        CalibQuantError: as `open_set`.
    """
    images = open_set(recipe, "calibration")
    if not recipe.calibration.augment or recipe.data.augment is None:
        return images
    return Augmented(images, recipe.data.augment, learned_preprocess(recipe), recipe.seed, epoch=0)


def learned_preprocess(recipe: Recipe) -> Preprocess:
    """How images are preprocessed that calibrate or train."""
    return recipe.data.calibration_preprocess or recipe.data.preprocess
