"""What exported files compute, hold and cost: parity, size, speed, and OpenVINO.

    OMP_NUM_THREADS=1 python benchmarks/export.py --data DATA [--part parity|size|openvino|speed]
        [--settings W4A4 …] [--networks ResNet-20 …] [--old-python PY] [--openvino-python PY]

DATA holds weights/, imagenet/ and cifar-10-batches-bin/. ResNet-18 has random weights, and BatchNorm statistics of
calibration images. Decisions and codes are compared with the simulation in float64. Each row is saved when it is done,
and not made again by the same source; the files stay in --files, below a hash of that source. PY are Pythons with the
oldest supported ONNX Runtime, and with OpenVINO.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import torch
from export_tables import TRACED, UNTRAINED, Row, tables
from torch import nn

from calibquant import zoo
from calibquant.data import batches
from calibquant.errors import ModelError
from calibquant.export.executor import execute
from calibquant.export.lowering import make_program
from calibquant.export.onnx_deploy import deploy_onnx
from calibquant.export.onnx_files import with_outputs
from calibquant.export.onnx_writer import float_onnx
from calibquant.export.program import Program
from calibquant.export.session import open_session
from calibquant.pipeline.preparing import open_set, prepare
from calibquant.quantization import QuantModel, calibrate_activations, calibrate_weights, fit_biases, make_plan
from calibquant.recipe import Recipe, load_recipe
from calibquant.studies.bench import measure
from calibquant.studies.external import PEER, static_peer

ROOT = Path(__file__).parents[1]
SETTINGS = ("W4A4", "W8A8", "W2A2", "W2A4", "W4A8", "W3A3", "W5A6")
FLOAT, DEPLOY, INT8 = "float.onnx", "deploy.onnx", "deploy-int8.onnx"
BATCH, CHUNK = 25, 8  # images at a time: for logits; for codes, of which every value is held three times
ROUNDS, SECONDS, PEER_IMAGES = 15, 0.05, 32  # of speed
NETWORKS = {  # configuration, weights, folder; images for calibration, decisions, codes and OpenVINO
    "ResNet-20": ("resnet20-cifar10.yaml", "resnet20-12fca82f.th", ".", (256, 5000, 256, 2000)),
    "MobileNetV2": ("mobilenetv2-imagenet.yaml", "mobilenetv2_tf_1.0_224_fp32.pt", "imagenet", (100, 650, 200, 300)),
    "SqueezeNet 1.1": ("squeezenet-imagenet.yaml", "squeezenet1_1_gluon_fp32.pt", "imagenet", (100, 650, 200, 300)),
    UNTRAINED: ("squeezenet-imagenet.yaml", "", "imagenet", (50, 50, 16, 50)),
}
Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Case:
    """A network at a setting."""

    name: str
    setting: str
    given: Namespace

    @property
    def folder(self) -> Path:
        return self.given.files / source() / f"{self.name}-{self.setting}".replace(" ", "-")

    @property
    def counts(self) -> tuple[int, ...]:
        """Images for calibration, decisions, codes and OpenVINO."""
        return tuple(min(n, self.given.images or n) for n in NETWORKS[self.name][3])

    def recipe(self) -> Recipe:
        (config, weights, root, _), data = NETWORKS[self.name], self.given.data
        return load_recipe(ROOT / "configs" / config, [
            f"data.root={data / root}", f"calibration.count={self.counts[0]}", "quant.placement=integer",
            "quant.boundary=qdrop", f"quant.weights.bits={self.setting[1]}", "quant.weights.observer=mse",
            f"quant.activations.bits={self.setting[3]}", "quant.activations.observer=mse",
            f"model.weights={data / 'weights' / weights}" if weights else "model.name=resnet18",
        ])  # fmt: skip

    def quantized(self) -> QuantModel:
        """The calibrated network, rounded to nearest; its files are left in the folder."""
        recipe = self.recipe()
        prepared = prepare(recipe, None if recipe.model.weights else random_network(recipe))
        model = QuantModel(prepared.teacher, make_plan(prepared.teacher, recipe.quant))
        calibrate_weights(model, recipe.quant)
        calibrate_activations(model, recipe.quant.activations, prepared.inputs(BATCH))
        fit_biases(model.biases())
        example, program = next(prepared.inputs(2)), make_program(model)
        for name, data in {FLOAT: float_onnx(model, example), DEPLOY: deploy_onnx(program, example),
                           INT8: deploy_onnx(program, example, "int8")}.items():  # fmt: skip
            with appearing(self.folder / name) as path:
                path.write_bytes(data)
        return model

    def file(self, name: str) -> bytes:
        """A file; made where it is missing."""
        if not (self.folder / INT8).is_file():
            self.quantized()
        return (self.folder / name).read_bytes()

    def images(self, split: str = "evaluation") -> Path:
        """The images as the network takes them, in one array file."""
        count = max(self.counts[1:]) if split == "evaluation" else PEER_IMAGES
        path = self.given.files / f"{self.name.replace(' ', '-')}-{split}-{count}.npy"
        if not path.is_file():
            images = open_set(self.recipe(), split)  # type: ignore[arg-type]
            chosen = images.subset(range(min(count, len(images))))
            with appearing(path) as partial, partial.open("wb") as file:
                np.save(file, np.concatenate([b.images.numpy() for b in batches(chosen, BATCH)]))
        return path

    def chunks(self, count: int, size: int, start: int = 0) -> Iterator[Array]:
        whole = np.load(self.images(), mmap_mode="r")[:count]
        yield from (np.array(whole[i : i + size]) for i in range(start, len(whole), size))

    def logits(self, name: str, count: int) -> Array:
        """Of the first evaluation images, in this Python's ONNX Runtime."""
        session = open_session(name, self.file(name), 1)
        return np.concatenate([session.run(x)[0] for x in self.chunks(count, BATCH)])

    def elsewhere(self, python: str, runtime: str, name: str, count: int) -> tuple[str, Array]:
        """Version and logits of a runtime in another Python."""
        out, script = self.folder / f"{runtime}.npy", Path(__file__).with_name("export_runtime.py")
        command = [python, script, runtime, self.folder / name, self.images(), count, out]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return done.stdout.split()[-1], np.load(out)


@cache
def source() -> str:
    """A hash of the packages that make and check files."""
    folders = ("export", "graph", "numerics", "quantization", "zoo")
    paths = sorted(path for folder in folders for path in (ROOT / "calibquant" / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path to write to; the file takes its place when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path.with_suffix(".part")
    path.with_suffix(".part").replace(path)


def random_network(recipe: Recipe) -> nn.Module:
    """ResNet-18 with random weights, and the BatchNorm statistics that its activations have."""
    torch.manual_seed(0)
    network = zoo.build("resnet18").train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        for batch in batches(open_set(recipe, "calibration").subset(range(50)), BATCH):
            network(batch.images)
    return network.eval()


def changed(one: Array, other: Array) -> int:
    return int((one.argmax(1) != other.argmax(1)).sum())


def simulate(model: QuantModel, images: Iterator[Array], dtype: torch.dtype) -> Array:
    with torch.inference_mode():
        return np.concatenate([model(torch.from_numpy(x).to(dtype)).float().numpy() for x in images])


def parity(case: Case) -> Row:
    """deploy.onnx against the simulation, the integer executor and the oldest ONNX Runtime."""
    model, count = case.quantized(), case.counts[1]
    program = make_program(model)
    rounded = simulate(model, case.chunks(count, BATCH), torch.float32)
    simulated = simulate(model.double(), case.chunks(count, BATCH), torch.float64)
    deployed, labels = case.logits(DEPLOY, count), open_set(case.recipe(), "evaluation").labels()[:count]
    error, probe = np.abs(simulated - deployed).max(axis=1), Probe(model, program, case.file(DEPLOY))
    flips: list[Row] = []
    for i in np.flatnonzero(simulated.argmax(1) != deployed.argmax(1)).tolist():
        second, first = np.partition(simulated[i].astype(np.float64), -2)[-2:]
        margin = float(first - second)
        flips.append({"image": i, "margin": margin, "error": float(error[i]), "within": bool(margin <= error[i])})
        if len(flips) <= TRACED:
            flips[-1] |= probe.first_difference(next(case.chunks(count, BATCH, i - i % BATCH)), i % BATCH)
    old: Row = {"runtime": "not run", "images": 0, "images_equal": 0}
    if case.given.old_python:
        version, logits = case.elsewhere(case.given.old_python, "onnxruntime", DEPLOY, count)
        old = {"runtime": version, "images": len(logits), "images_equal": int((logits == deployed).all(axis=1).sum())}
    return {
        "runtime": probe.session.runtime, "images": len(deployed), "changed": len(flips), "flips": flips,
        "logit_error_median": float(np.median(error)), "logit_error_largest": float(error.max()), "old": old,
        "top1": [float((x.argmax(1) == labels).mean()) for x in (simulated, deployed)],
        "float32": {"changed": changed(rounded, simulated)},
        "codes": probe.codes(case.chunks(case.counts[2], CHUNK), deployed),
    }  # fmt: skip


class Probe:
    """deploy.onnx with the codes of every activation as outputs, and the simulation in float64."""

    def __init__(self, model: QuantModel, program: Program, data: bytes) -> None:
        self.model, self.program = model, program
        self.grids = {name: grid for name, grid in self.program.grids.items() if grid is not None}
        self.session = open_session(DEPLOY, with_outputs(data, [*self.grids]), 1)

    def values(self, images: Array) -> dict[str, Array]:
        return dict(zip(self.session.outputs, self.session.run(images), strict=True))

    def codes(self, images: Iterator[Array], logits: Array) -> Row:
        """Every code against the executor's and, where the simulation has it too, against the simulation's."""
        total, steps = Counter[str](simulation_differing=0, simulation_largest=0, logits_equal=0), Counter[str]()
        for chunk in images:
            got, done, simulated = self.values(chunk), execute(self.program, chunk, keep=True), self.simulated(chunk)
            for name in self.grids:
                total["compared"] += got[name].size
                steps[name] += int(np.count_nonzero(got[name] != done.values[name]))
            for name, (_, codes) in simulated.items():
                apart = np.abs(got[name].astype(np.int32) - codes)
                total["simulation_compared"] += apart.size
                total["simulation_differing"] += int(np.count_nonzero(apart))
                total["simulation_largest"] = max(total["simulation_largest"], int(apart.max()))
            plain = logits[total["images"] :][: len(chunk)]
            total["images"] += len(chunk)
            total["logits_equal"] += int((done.output == plain).all(axis=1).sum())
        return {**total, "activations": len(self.grids), "differing": sum(steps.values()), "steps": dict(+steps)}

    def simulated(self, images: Array) -> dict[str, tuple[Array, Array]]:
        """By value: what the simulation rounds, in steps of the grid, and the code it gets."""
        found: dict[str, tuple[Array, Array]] = {}

        def keep(name: str) -> Any:
            quantizer = self.model.activation_quantizers.get(name.removesuffix(".codes"))
            if quantizer is None:
                return None
            scale, zero = quantizer.get()

            def hook(_: nn.Module, inputs: Any, value: Any) -> None:
                codes = (torch.round(value / scale) + zero).to(torch.int32)
                found[name] = (inputs[0] / scale + zero).numpy(), codes.numpy()

            same = (np.float32(scale), int(zero)) == (self.grids[name].scale, self.grids[name].zero_point)
            return quantizer.register_forward_hook(hook) if same else None

        handles = [keep(name) for name in self.grids]
        with torch.inference_mode():
            self.model(torch.from_numpy(images).double())
        for handle in filter(None, handles):
            handle.remove()
        return found

    def first_difference(self, images: Array, i: int) -> Row:
        """Where the codes of image i of a batch leave the simulation's, and how near to a tie what it rounds lies."""
        simulated, got = self.simulated(images), self.values(images[i : i + 1])
        for name in (name for name in self.grids if name in simulated):
            values, codes = (array[i : i + 1] for array in simulated[name])
            apart = values[codes != got[name]]
            if apart.size:
                tie = float(np.abs(apart - np.floor(apart) - 0.5).max())
                return {"step": name, "codes": apart.size, "of": values.size, "tie_simulation": tie}
        return {"step": "none, only the logits differ", "codes": 0, "of": 0, "tie_simulation": 0.0}


def size(case: Case) -> Row:
    """Bytes, and whether both storages compute the same."""
    same = bool((case.logits(DEPLOY, CHUNK) == case.logits(INT8, CHUNK)).all())
    return {"bytes": {name: len(case.file(name)) for name in (FLOAT, DEPLOY, INT8)}, "same": same}


def speed(case: Case) -> Row:
    """Side by side on one thread: float, W8A8, W4A4, and ONNX Runtime's own 8 bits."""
    images, float_file = np.load(case.images("calibration")), case.file(FLOAT)
    networks = {"float": float_file, PEER: static_peer(float_file, np.split(images, len(images)))}
    networks |= {s: Case(case.name, s, case.given).file(DEPLOY) for s in ("W8A8", "W4A4")}
    sessions = {name: open_session(name, data, 1) for name, data in networks.items()}
    rows = []
    for batch in (1, 8):
        *_, last = measure(sessions, images[:batch], ROUNDS, SECONDS)
        for name, times in last.items():
            ratios = [np.percentile(np.array(last[of]) / times, (50, 25, 75)).tolist() for of in ("float", PEER)]
            rows.append({"what": name, "batch": batch, "ms": 1e3 * float(np.median(times)), "ratios": ratios})
    return {"runtime": sessions["float"].runtime, "rounds": ROUNDS, "rows": rows}


def openvino(case: Case) -> Row:
    """The same file (2-bit weights as INT8) in OpenVINO and in ONNX Runtime."""
    name, count = INT8 if case.setting[1] == "2" else DEPLOY, case.counts[3]
    want = case.logits(name, count)
    version, got = case.elsewhere(case.given.openvino_python, "openvino", name, count)
    return {"openvino": version, "file": name, "images": len(want), "changed": changed(want, got),
            "largest": float(np.abs(want - got).max())}  # fmt: skip


PARTS = {"parity": parity, "size": size, "openvino": openvino, "speed": speed}


def load() -> dict[str, list[Row]]:
    path = common.RESULTS / "export.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {part: stored.get(part, []) for part in PARTS}


def save(part: str, *rows: Row) -> None:
    """Add rows to the results, in place of older ones; parts may run side by side."""
    order = [(name, setting) for name in NETWORKS for setting in SETTINGS]
    with (Path(tempfile.gettempdir()) / "calibquant-export.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        facts = load()
        known = {(row["network"], row["setting"]): row for row in (*facts[part], *rows)}
        facts[part] = [known[key] for key in order if key in known]
        command = "OMP_NUM_THREADS=1 python benchmarks/export.py --data DATA --old-python PY --openvino-python PY"
        with contextlib.redirect_stdout(io.StringIO()):
            common.write("export", command, facts, tables(facts))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--part", choices=[*PARTS], help="default: all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=[*NETWORKS])
    parser.add_argument("--old-python", help="with the oldest supported ONNX Runtime")
    parser.add_argument("--openvino-python", default=sys.executable)
    parser.add_argument("--files", type=Path, default=Path(tempfile.gettempdir()) / "calibquant-export")
    parser.add_argument("--images", type=int, help="at most so many, for a trial")
    given = parser.parse_args()
    torch.set_num_threads(1)
    source()  # of what is imported, whoever edits it later
    for part in [given.part] if given.part else PARTS:
        python = given.openvino_python
        if part == "openvino" and subprocess.run([python, "-c", "import openvino"], capture_output=True).returncode:
            print(f"openvino: left out, {python} does not have it (pip install openvino)")
            continue
        done = {(row["network"], row["setting"]) for row in load()[part] if row["source"] == source()}
        for key in [(n, s) for s in (given.settings if part != "speed" else ["W8A8"]) for n in given.networks]:
            if key in done or (part, key[0]) == ("speed", "SqueezeNet 1.1"):
                continue
            row: Row = dict(zip(("network", "setting", "source"), (*key, source()), strict=True))
            try:
                row |= PARTS[part](Case(*key, given))
            except (ModelError, RuntimeError) as failure:
                row["error"] = str(failure)
            save(part, row)
            print(part, json.dumps(row)[:2000], flush=True)
        save(part)


if __name__ == "__main__":
    main()
