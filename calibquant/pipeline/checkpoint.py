"""Checkpoints of Gram rounding and reconstruction: enough to go on after the last layer or unit with the same bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from calibquant.errors import RunFolderError
from calibquant.export.artifact import DAMAGE, artifact_tensors, restore
from calibquant.pipeline.writing import network_hash
from calibquant.quantization import QuantModel
from calibquant.reconstruction import LayerReport, UnitReport
from calibquant.runfolder import CHECKPOINT, RunFolder, sha256


@dataclass(frozen=True)
class Progress:
    """How far Gram rounding and reconstruction have come.

    Args:
        reports: of the units done, in order.
        nearest: relative feature errors of the network before both; see `reconstruction.feature_errors`.
        seconds: of the stages before reconstruction.
        layers: reports of the layers that Gram rounding has done, in order.
    """

    reports: list[UnitReport]
    nearest: dict[str, float]
    seconds: dict[str, float]
    layers: list[LayerReport] = field(default_factory=list)


def save_checkpoint(
    folder: RunFolder, model: QuantModel, manifest: str, progress: Progress, recipe: dict[str, Any]
) -> None:
    """Store the quantizers and the reports so far.

    The tensors go to a file of their own for each layer or unit, and the small JSON file that names it is replaced
    last: killed at any moment, the folder holds either the old or the new checkpoint.

    Args:
        folder: the run's folder.
        model: the network as it is by now.
        manifest: the text of manifest.csv; going on needs the same images.
        progress: how far it has come.
        recipe: the fields of the run's recipe; continuing it needs the same but for a few.
    """
    done = len(progress.layers) + len(progress.reports)
    name = f"checkpoint-{done:04d}.safetensors"
    data = save_safetensors(artifact_tensors(model), {"calibquant": "checkpoint"})
    folder.write(name, data)
    folder.write_json(CHECKPOINT, {
        "tensors": name,
        "sha256": sha256(data),
        "network": network_hash(model),
        "images": sha256(manifest.encode()),
        "recipe": recipe,
        "layers": [asdict(report) for report in progress.layers],
        "units": [asdict(report) for report in progress.reports],
        "nearest": progress.nearest,
        "seconds": progress.seconds,
    })  # fmt: skip
    folder.remove(f"checkpoint-{done - 1:04d}.safetensors")


def load_checkpoint(folder: RunFolder, model: QuantModel, manifest: str) -> Progress | None:
    """Give the model's quantizers the stored state, if the folder holds a checkpoint.

    Returns:
        how far it had come; None without a checkpoint.

    Raises:
        RunFolderError: the checkpoint is damaged, or was made of another network or other images.
    """
    if not (folder.path / CHECKPOINT).is_file():
        return None
    stored = folder.read_json(CHECKPOINT)
    where = folder.path / CHECKPOINT
    try:
        for field, now in (("network", network_hash(model)), ("images", sha256(manifest.encode()))):
            if stored[field] != now:
                raise RunFolderError(where, f"was made with another {field}", "restore what the run began with")
        data = folder.read(stored["tensors"])
        if sha256(data) != stored["sha256"]:
            raise ValueError("its hash is wrong")
        restore(model, load_safetensors(data))
        reports = [UnitReport(**row) for row in stored["units"]]
        layers = [LayerReport(**row) for row in stored.get("layers", [])]  # earlier versions had none
        return Progress(reports, dict(stored["nearest"]), dict(stored["seconds"]), layers)
    except DAMAGE as error:
        raise RunFolderError(
            where, f"is damaged ({str(error)[:200]})", "delete the hidden folder and quantize again"
        ) from None
