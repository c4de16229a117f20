"""What one pass of the float network tells about every candidate image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calibquant.data import ImageSet, batches
from calibquant.graph.expectations import normal_of
from calibquant.graph.nodes import activations_of, weight_of
from calibquant.graph.watching import Watched
from calibquant.selection.pixels import pixel_values

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
MOST_LAYERS = 16  # whose inputs are looked at, evenly over the network
FILTERS = 16  # random ones a layer
MOST_CHANNELS = 64  # of a layer whose peaks are kept


@dataclass(frozen=True, eq=False)
class Pool:
    """Candidate images and what is known of them; a row an image, in the same order everywhere.

    Args:
        indices: where the images stand in their set, (n,).
        classes: their labels, or the float network's classes where they have none; -1 where neither is known, (n,).
        values: by name, (n,): those of `pixels.PIXEL_VALUES`; `loss` (cross-entropy of the class), `margin` (of the
            two largest probabilities) and `uncertainty` (entropy of the probabilities, nats); `reach` (mean over
            channels of the share of the pool whose peaks lie lower); `bn_distance` where BatchNorm was folded: mean
            over channels and layers of ((mean - mu)^2 + (std - sigma)^2) / sigma^2.
        layers: names of the nodes whose values entered the layers looked at.
        means, squares: of the responses of random filters to each layer's input, over its positions, (n, layers,
            FILTERS); `squares` are random linear functions of the second moments G = E[x x^T] of the layer's patches.
        peaks: largest |value| of channels of these inputs, (n, channels).
        peak_layers: the layer (its number in `layers`) of each of these channels, (channels,).
        entering: names of all nodes whose values enter a layer, those in `layers` among them.
        tops: largest |value| of each of these, (n, entering): what an image asks of a tensor's range.
        predictions: the float network's classes, (n,).
    """

    indices: Ints
    classes: Ints
    values: dict[str, Floats] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    means: Floats | None = None
    squares: Floats | None = None
    peaks: Floats | None = None
    peak_layers: Ints | None = None
    entering: tuple[str, ...] = ()
    tops: Floats | None = None
    predictions: Ints | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, rows: Sequence[int]) -> Pool:
        """Some of the rows, in that order."""
        chosen = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            indices=self.indices[chosen],
            classes=self.classes[chosen],
            values={name: value[chosen] for name, value in self.values.items()},
            means=None if self.means is None else self.means[chosen],
            squares=None if self.squares is None else self.squares[chosen],
            peaks=None if self.peaks is None else self.peaks[chosen],
            tops=None if self.tops is None else self.tops[chosen],
            predictions=None if self.predictions is None else self.predictions[chosen],
        )

    def as_predicted(self) -> Pool:
        """The same with the float network's classes in place of labels."""
        return self if self.predictions is None else replace(self, classes=self.predictions)


def labelled_pool(images: ImageSet, indices: Sequence[int]) -> Pool:
    """A pool of which only labels are known; no image is read."""
    chosen = np.asarray(indices, dtype=np.int64)
    return Pool(chosen, images.labels()[chosen])


def score_pool(
    images: ImageSet,
    indices: Sequence[int],
    teacher: fx.GraphModule,
    mount: Callable[[nn.Module], nn.Module] = lambda network: network,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Pool:
    """Run the float network once over candidate images and keep what selection and judging need.

    Memory: 4 * (2 * layers * FILTERS + channels + entering) bytes an image, at most 6 kB and 4 bytes a layer.

    Args:
        images: the set.
        indices: the candidates.
        teacher: the float network's canonical graph, on `device`.
        mount: puts it where images reach it.
        seed: of the random filters and channels; pools are comparable only under the same one.
        batch_size: images in one forward pass.
        device: where the network runs.
        progress: called with (done, total).

    Raises:
        DataError: an image cannot be read.
    """
    look = _Look(teacher, seed, device)
    network = mount(Watched(teacher, look.names, look.visit))
    chosen = [int(i) for i in indices]
    labels, parts, seen = images.labels(), [], list[int]()
    bounds: tuple[float, float] | None = None
    with torch.inference_mode():
        for batch in batches(images, batch_size, chosen):
            x = batch.images.to(device)
            if bounds is None:  # of the intensities, for all histograms alike
                bounds = float(x.mean(1).min()), float(x.mean(1).max())
            logits = network(x).float()
            seen.extend(batch.indices)
            known = torch.from_numpy(labels[list(batch.indices)]).to(device)
            predictions = logits.argmax(1)
            classes = torch.where(known < 0, predictions, known)
            found = {
                "classes": classes,
                "predictions": predictions,
                **pixel_values(x, *bounds),
                **_certainty(logits, classes),
                **look.take(),
            }
            parts.append({name: value.cpu().numpy() for name, value in found.items()})
            if progress:
                progress(len(seen), len(chosen))
    table = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    arrays = {name: table.pop(name) for name in ("classes", "predictions", "means", "squares", "peaks", "tops")}
    values = {"reach": _reach(arrays["peaks"]), **{name: value.astype(np.float32) for name, value in table.items()}}
    return Pool(
        np.asarray(seen, dtype=np.int64), values=values, layers=tuple(look.layers), peak_layers=look.peak_layers,
        entering=tuple(look.entering), **arrays,
    )  # fmt: skip


def _certainty(logits: Tensor, classes: Tensor) -> dict[str, Tensor]:
    shares = logits.softmax(1)
    best = shares.topk(min(2, shares.shape[1]), dim=1).values
    return {
        "loss": F.cross_entropy(logits, classes, reduction="none"),
        "margin": best[:, 0] - best[:, 1] if best.shape[1] > 1 else best[:, 0],
        "uncertainty": torch.special.entr(shares).sum(1),
    }


def _reach(peaks: Floats) -> Floats:
    """Mean over channels of the share of images whose peaks lie lower."""
    total = np.zeros(len(peaks))
    for column in peaks.T:
        total += np.searchsorted(np.sort(column), column) / len(column)
    return (total / max(1, peaks.shape[1])).astype(np.float32)


class _Look:
    """Collects statistics of a batch as it passes through the network."""

    def __init__(self, teacher: fx.GraphModule, seed: int, device: torch.device | str) -> None:
        entering = [activations_of(n)[0].name for n in teacher.graph.nodes if weight_of(n) is not None]
        self.entering = [*dict.fromkeys(entering)]
        last = len(self.entering) - 1
        take = np.unique(np.linspace(0, last, min(MOST_LAYERS, last + 1)).round().astype(int))
        self.layers = [self.entering[i] for i in take]
        self.normals = {n.name: normal for n in teacher.graph.nodes if (normal := normal_of(n)) is not None}
        self.names = {*self.entering, *self.normals}
        self.random = torch.Generator().manual_seed(seed)
        self.device = device
        self.filters: dict[str, Tensor] = {}
        self.channels: dict[str, Tensor] = {}
        self.now: dict[str, dict[str, Tensor]] = {}

    @property
    def peak_layers(self) -> Ints:
        """The number of the layer of each channel whose peaks are kept."""
        return np.repeat(np.arange(len(self.layers)), [len(self.channels[name]) for name in self.layers])

    def visit(self, name: str, value: Tensor) -> None:
        value = value.float()
        found = self.now.setdefault(name, {})
        if name in self.normals:
            found["distance"] = self._distance(name, value)
        if name in self.layers:
            response = self._responses(name, value)
            found |= {"means": response.mean(2), "squares": response.square().mean(2)}
            highest = _positions(value).abs().amax(2)
            found |= {"peaks": highest[:, self.channels[name]], "top": highest.amax(1)}
        elif name in self.entering:
            found["top"] = value.flatten(1).abs().amax(1)

    def take(self) -> dict[str, Tensor]:
        """The statistics of the batch that passed; in the order of the layers whatever the order of the calls."""
        seen, self.now = self.now, {}
        rows = [seen[name] for name in self.layers]
        found = {key: torch.stack([row[key] for row in rows], 1) for key in ("means", "squares")}
        found["peaks"] = torch.cat([row["peaks"] for row in rows], 1)
        found["tops"] = torch.stack([seen[name]["top"] for name in self.entering], 1)
        if self.normals:
            found["bn_distance"] = torch.stack([seen[name]["distance"] for name in self.normals]).mean(0)
        return found

    def _responses(self, name: str, value: Tensor) -> Tensor:
        """(N, FILTERS, positions)"""
        if name not in self.filters:
            count, wide = value.shape[1], value.dim() == 4 and min(value.shape[2:]) >= 3
            size = (FILTERS, count, 3, 3) if wide else (FILTERS, count)
            drawn = torch.randn(size, generator=self.random) / np.prod(size[1:]) ** 0.5
            self.filters[name] = drawn.to(self.device)
            order = torch.randperm(count, generator=self.random)[:MOST_CHANNELS]
            self.channels[name] = order.sort().values.to(self.device)
        filters = self.filters[name]
        if filters.dim() == 4:
            return F.conv2d(value, filters, stride=2 if min(value.shape[2:]) >= 8 else 1).flatten(2)
        return torch.einsum("fc,ncp->nfp", filters, _positions(value))

    def _distance(self, name: str, value: Tensor) -> Tensor:
        normal, x = self.normals[name], _positions(value)
        mean, std = normal.mean.to(x), normal.std.to(x).clamp(min=1e-6)
        own = x.mean(2)
        spread = (x.square().mean(2) - own.square()).clamp(min=0).sqrt()  # Tensor.std takes ten times as long
        return (((own - mean).square() + (spread - std).square()) / std.square()).mean(1)


def _positions(value: Tensor) -> Tensor:
    """(N, C, positions); of a vector (N, C) there is one."""
    return value.flatten(2) if value.dim() > 2 else value.unsqueeze(2)
