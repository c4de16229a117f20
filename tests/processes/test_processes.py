"""Two processes do what one does, and a job that loses one of them goes on later."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import JOBS

from calibquant.zoo import build, save_weights

JOB = Path(__file__).with_name("jobs.py")
COMMAND = ("-m", "calibquant")
FILES = ("model.safetensors", "graph.json", "record.json", "manifest.csv")


def start(processes: int, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """jobs.py, or with -m the command, in so many processes; more than one are started by torchrun."""
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = [] if arguments[0] == "-m" else [str(JOB)]
    command = [sys.executable, *many, *script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300, check=False)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one process found of all jobs, and what two did."""
    found = []
    for processes in (1, 2):
        out = tmp_path_factory.mktemp(f"of{processes}") / "out.json"
        done = start(processes, ",".join(JOBS), str(out))
        assert done.returncode == 0, done.stderr[:3000]
        found.append(json.loads(out.read_text()))
        left = list(out.parent.rglob("receipt.json"))
        assert len(left) == 7  # one run folder a run, whichever the number of processes
    return found[0], found[1]


def test_calibration_ranges_are_the_same_bit_for_bit(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = both
    assert one["ranges"] == two["ranges"]
    assert len({str(v) for v in one["ranges"].values()}) == 4


def test_evaluation_loses_and_repeats_no_image(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = both
    assert one["scores"] == two["scores"]
    assert two["scores"]["indices"] == list(range(101))
    assert two["scores"]["logits"] == 101


@pytest.mark.parametrize("job", ["learned", "fisher"])
def test_reconstruction_with_a_global_batch_learns_the_same(
    both: tuple[dict[str, Any], dict[str, Any]], job: str
) -> None:
    one, two = (result[job] for result in both)
    for ours, theirs in zip(one["losses"], two["losses"], strict=True):
        assert theirs == pytest.approx(ours, rel=0.02)
    assert two["scales"] == pytest.approx(one["scales"], rel=5e-3)  # three steps may change them by 1.5 %


def test_training_takes_the_same_steps(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = (result["tuned"] for result in both)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert two["scales"] == pytest.approx(one["scales"], rel=1e-3)
    assert two["biases"] == pytest.approx(one["biases"], rel=1e-2, abs=1e-5)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains a network of digits with random weights for three epochs."""
    folder = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    save_weights(build("digits_resnet"), folder / "digits.safetensors")
    (folder / "recipe.yaml").write_text(
        "model: {name: digits_resnet, weights: digits.safetensors}\n"
        "data: {kind: digits, preprocess: {resize: 16, mean: [0.5], std: [0.5]}}\n"
        "calibration: {count: 48, batch_size: 16}\nevaluation: {count: 50}\nexport: {onnx: false}\nthreads: 1\n"
        "finetune: {epochs: 3, batch_size: 200, holdout: 0.1}\n"
    )
    return folder / "recipe.yaml"


def test_a_job_that_lost_a_process_says_so_and_goes_on_to_the_same_end(recipe: Path) -> None:
    place = recipe.parent
    whole = start(2, *COMMAND, "finetune", str(recipe), "runs=whole", cwd=place)
    assert whole.returncode == 0, whole.stderr[:3000]
    assert whole.stdout.count("Run folder:") == 1
    killed = start(2, "dying", "1", "finetune", str(recipe), "runs=killed", cwd=place)
    assert killed.returncode != 0
    told = " ".join(killed.stderr.split())
    # It notices by itself, or torchrun tells it first.
    assert re.search("process 0: (lost another process|was told to end: another process is lost), whose own", told)
    assert "start the job again with --resume" in told
    again = start(2, *COMMAND, "finetune", "--resume", "killed/digits_resnet-w4a4-001", cwd=place)
    assert again.returncode == 0, again.stderr[:3000]
    assert "going on after epoch 1" in again.stdout
    for name in FILES:
        one, other = (place / runs / "digits_resnet-w4a4-001" / name for runs in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name


def test_uneven_shares_and_other_commands_are_refused(recipe: Path) -> None:
    done = start(2, *COMMAND, "finetune", str(recipe), "finetune.batch_size=75", "runs=refused", cwd=recipe.parent)
    assert done.returncode != 0
    assert "finetune.batch_size: 75 images make no equal shares for 2 processes" in done.stderr
    assert not list((recipe.parent / "refused").glob("*"))
    done = start(2, *COMMAND, "bench", "nothing", cwd=recipe.parent)
    assert "calibquant bench: is no work for several processes; start it without torchrun" in done.stderr
