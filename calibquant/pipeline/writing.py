"""What a run writes into its folder."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from calibquant.data import manifest_csv
from calibquant.evaluation import Evaluation
from calibquant.export.artifact import MODEL, compressed_codes, save_artifact, size_of
from calibquant.export.record import record, record_text
from calibquant.pipeline.preparing import Prepared
from calibquant.quantization import QuantModel
from calibquant.quantization.model import parameter_tensors
from calibquant.recipe import Recipe
from calibquant.reconstruction import LayerReport, UnitReport
from calibquant.runfolder import RunFolder, sha256


def run_metrics(
    recipe: Recipe,
    prepared: Prepared,
    model: QuantModel,
    float_result: Evaluation,
    quantized: Evaluation,
    layers: list[LayerReport],
    reports: list[UnitReport],
    errors: tuple[dict[str, float], dict[str, float] | None],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of metrics.json, but for the size of the file; `errors`: with nearest rounding, and at the end."""
    nearest, reconstructed = errors
    return {
        "setting": recipe.setting,
        "placement": recipe.quant.placement,
        "boundary": recipe.quant.boundary,
        "rounding": recipe.quant.weights.rounding,
        "reconstruction": recipe.reconstruct.method,
        "calibration_images": len(prepared.manifest.rows),
        "evaluated_on": "calibration images" if prepared.evaluation is None else "evaluation images",
        "skipped": {
            "calibration": sorted(prepared.images.skipped),
            "evaluation": [] if prepared.evaluation is None else sorted(prepared.evaluation.skipped),
        },
        "float": float_result.scores.to_dict(),
        "quantized": quantized.scores.to_dict(),
        "size": asdict(size_of(model)),
        "coverage": [asdict(row) for row in model.coverage()],
        "layers": [asdict(report) for report in layers],
        "units": [asdict(report) for report in reports],
        "feature_errors": [
            {"after": node, "nearest": error, "reconstructed": reconstructed and reconstructed[node]}
            for node, error in nearest.items()
        ],
        "seconds": seconds,
    }


def write_run(
    folder: RunFolder,
    recipe: Recipe,
    prepared: Prepared,
    model: QuantModel,
    metrics: dict[str, Any],
    exported: Mapping[str, bytes],
    machine: dict[str, Any],
) -> None:
    """Write every file of a run but log.txt, the receipt last; `exported` are the ONNX files by name."""
    manifest = manifest_csv(prepared.manifest)
    folder.write("recipe.yaml", recipe.to_yaml())
    folder.write("manifest.csv", manifest)
    save_artifact(model, folder)
    folder.write_json("record.json", record(model))
    folder.write("record.txt", record_text(model))
    for name, data in exported.items():
        folder.write(name, data)
    entropy, compressed = compressed_codes(model)
    own = {"file": (folder.path / MODEL).stat().st_size, "code_entropy": entropy, "compressed_codes": compressed}
    metrics["size"] |= own
    folder.write_json("metrics.json", metrics)
    count = len(prepared.manifest.rows)
    folder.seal({"network": network_hash(model)} | made_of(recipe, manifest, count) | machine)


def made_of(recipe: Recipe, manifest: str, count: int, packages: Sequence[str] = ("torch", "numpy")) -> dict[str, Any]:
    """What a receipt says of weights, calibration images, versions, machine and seed.

    Args:
        recipe: of the run.
        manifest: the content of manifest.csv, a list of `count` images.
        count: of these.
        packages: whose versions matter beside this one's.
    """
    weights = recipe.model.weights
    return {
        "weights": None if weights is None else {"path": str(weights), "sha256": sha256(weights.read_bytes())},
        "images": {"count": count, "sha256": sha256(manifest.encode())},
        **versions(packages),
        "seed": recipe.seed,
    }


def run_stem(recipe: Recipe, network: nn.Module | None, what: str) -> str:
    """A run folder's name without its number: the network, and `what` was done with it."""
    name = recipe.model.name if network is None or recipe.model.name else type(network).__name__.lower()
    name = (name or "network").replace("\\", "/").rpartition("/")[2]  # of path/to/file.py:function
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return f"{safe}-{what}"


def network_hash(model: QuantModel, names: Collection[str] | None = None) -> str:
    """SHA-256 over the names and values of the float network's parameters, BatchNorm folded; of some or of all."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parameter_tensors(model.teacher).items()):
        if names is not None and name not in names:
            continue
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def versions(packages: Sequence[str] = ("torch", "numpy")) -> dict[str, Any]:
    """What of the machine and its software stands in a receipt; `packages` are those whose versions matter."""
    own = {name: _version(name) for name in ("calibquant", *packages)}
    return {"versions": {"python": platform.python_version()} | own, "machine": platform.machine()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
