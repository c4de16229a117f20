"""The export of a run: its ONNX files, checked, and the accuracy of deploy.onnx itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from calibquant.errors import CalibQuantError
from calibquant.evaluation import Evaluation
from calibquant.evaluation.onnx_network import OnnxNetwork
from calibquant.export.file_names import DEPLOY
from calibquant.export.processor import EVERY
from calibquant.export.session import brief, open_session
from calibquant.pipeline.exporting import export_files
from calibquant.pipeline.measuring import measure
from calibquant.pipeline.reporting import log, note
from calibquant.pipeline.run_inputs import entering
from calibquant.pipeline.stages import Job, evaluated


@dataclass(frozen=True)
class Deployed:
    """What the export stage leaves.

    Args:
        files: ONNX files and parity.json by name.
        parity: for metrics.json; None if nothing was exported.
        scores: of deploy.onnx on the evaluation images; None without that file, or if the recipe does not ask.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    parity: dict[str, Any] | None = None
    scores: dict[str, Any] | None = None


def export(job: Job, float_result: Evaluation, quantized: Evaluation) -> Deployed:
    """The ONNX files, and the accuracy of deploy.onnx itself. A run is not lost for its export, whatever fails."""
    with job.steps.begin("export", "Export to ONNX, compare, and measure deploy.onnx"):
        try:
            return _exported(job, float_result, quantized)
        except Exception as error:
            reason = error if isinstance(error, CalibQuantError) else f"{type(error).__name__}: {brief(error)}"
            log.debug("export", exc_info=True)
            note(job.reporter, f"no ONNX files were written: {reason}; the run is complete without them")
            return Deployed()
        finally:
            job.model.to(job.device)


def _exported(job: Job, float_result: Evaluation, quantized: Evaluation) -> Deployed:
    settings, threads = job.recipe.export, job.recipe.threads or 1
    made = export_files(job.model.to("cpu"), entering(job.prepared, settings.images), settings.storage, threads=threads)
    for line in made.told():
        note(job.reporter, line)
    facts = {
        "images": made.parity.images,
        "exact_on": made.parity.exact_on if DEPLOY in made.files else "",
        "approximate": list(made.parity.approximate),
        "not_written": {**made.left_out, **made.faults},
        "agreement_with_simulation": None,
    }
    if DEPLOY in made.files and made.parity.exact_on != EVERY:
        note(
            job.reporter,
            f"deploy.onnx is exact on {made.parity.exact_on}; quant.weights.reach=auto makes it exact on all",
        )
    if DEPLOY not in made.files or not settings.evaluate:
        return Deployed(made.files, facts)
    with job.steps.time("evaluate_deployed"):
        network = job.prepared.mount(OnnxNetwork(open_session(DEPLOY, made.files[DEPLOY], threads)))
        found = measure(job.recipe, network, evaluated(job), torch.device("cpu"), job.reporter, float_result)
    facts["agreement_with_simulation"] = float((found.predictions == quantized.predictions).mean())
    return Deployed(made.files, facts, found.scores.to_dict())
