"""Checkpoints of a reconstruction: enough to go on after the last finished unit, and end with the same bytes."""

from __future__ import annotations

from dataclasses import asdict

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from calibquant.errors import RunFolderError
from calibquant.export.artifact import artifact_tensors, restore
from calibquant.pipeline.writing import network_hash
from calibquant.quantization import QuantModel
from calibquant.reconstruction import UnitReport
from calibquant.runfolder import CHECKPOINT, RunFolder, sha256


def save_checkpoint(folder: RunFolder, model: QuantModel, manifest: str, reports: list[UnitReport]) -> None:
    """Store the quantizers and the reports so far.

    The tensors go to a file of their own for each unit and the small JSON file, which names it, is replaced last:
    killed at any moment, the folder holds either the old or the new checkpoint.

    Args:
        folder: the run's folder.
        model: the network as reconstructed so far.
        manifest: the text of manifest.csv; going on needs the same images.
        reports: of the units done.
    """
    name = f"checkpoint-{len(reports):04d}.safetensors"
    data = save_safetensors(artifact_tensors(model), {"calibquant": "checkpoint"})
    folder.write(name, data)
    folder.write_json(CHECKPOINT, {
        "tensors": name,
        "sha256": sha256(data),
        "network": network_hash(model),
        "images": sha256(manifest.encode()),
        "units": [asdict(report) for report in reports],
    })  # fmt: skip
    folder.remove(f"checkpoint-{len(reports) - 1:04d}.safetensors")


def load_checkpoint(folder: RunFolder, model: QuantModel, manifest: str) -> list[UnitReport] | None:
    """Give the model's quantizers the stored state, if the folder holds a checkpoint.

    Returns:
        the reports of the units done; None without a checkpoint.

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
        return [UnitReport(**row) for row in stored["units"]]
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise RunFolderError(where, f"is damaged ({error})", "delete the hidden folder and quantize again") from None
