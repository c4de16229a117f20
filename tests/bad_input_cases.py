"""The table of bad inputs: what is wrong, the command, and what its one line must say (a regular expression)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bad_site import Mine, Site, flip, mine
from bad_training_cases import TRAININGS
from torch import nn

from calibquant import zoo

D, F = "quantize digits.yaml", "quantize folder.yaml"
SAVE_STATE = r"; save network\.state_dict\(\)"


@dataclass(frozen=True)
class Case:
    """One bad input; `error` must be found in the error's line, from the file or field to the mend."""

    name: str
    command: str
    error: str
    arrange: Callable[[Site], Any] = lambda site: None


WEIGHTS = [
    Case("missing", f"{D} model.weights=w.pth", "w.pth: there is no such file; give the path"),
    Case("truncated pth", f"{D} model.weights=w.pth", "w.pth: .* truncated or damaged; download or save it again",
         lambda s: (s.pth(lambda w: None), s.cut("w.pth", 0.6))),
    Case("truncated safetensors", f"{D} model.weights=w.safetensors", "w.safetensors: .* truncated .*; download",
         lambda s: (s.safetensors(), s.cut("w.safetensors", 0.6))),
    Case("empty file", f"{D} model.weights=w.pth", "w.pth: .* truncated or damaged; download",
         lambda s: s.write("w.pth", b"")),
    Case("pickle that runs code", f"{D} model.weights=w.pth", r"w.pth: is a pickle that would run code .*mkdir" +
         ".*not loaded" + SAVE_STATE, lambda s: s.pth(lambda w: {"state_dict": Mine()})),
    Case("whole network", f"{D} model.weights=w.pth", "w.pth: is a whole pickled network, .*" + SAVE_STATE,
         lambda s: s.pth(lambda w: zoo.build("digits_resnet"))),
    Case("wrong key", f"{D} model.weights=w.pth", r"1 missing \(fc.bias\), 1 unexpected \(fc.bais\); "
         r".*did you mean 'fc.bias'\?", lambda s: s.pth(lambda w: w.update({"fc.bais": w.pop("fc.bias")}))),
    Case("wrong shape", f"{D} model.weights=w.pth", r"w.pth, tensor 'fc.bias': has shape \(7,\).*\(10,\); check",
         lambda s: s.pth(lambda w: w.update({"fc.bias": torch.zeros(7)}))),
    Case("NaN", f"{D} model.weights=w.pth", "tensor 'conv1.weight': holds NaN or infinite values; give",
         lambda s: s.pth(lambda w: w.update({"conv1.weight": w["conv1.weight"] * float("nan")}))),
    Case("Inf", f"{D} model.weights=w.pth", "tensor 'fc.weight': holds NaN or infinite values; give",
         lambda s: s.pth(lambda w: w.update({"fc.weight": w["fc.weight"] / 0}))),
    Case("list of tensors", f"{D} model.weights=w.pth", "w.pth: holds a list, not a state_dict" + SAVE_STATE,
         lambda s: s.pth(lambda w: list(w.values()))),
    Case("text file", f"{D} model.weights=w.txt", "w.txt: is not a file of weights",
         lambda s: s.write("w.txt", "conv1.weight 0.5\n")),
    Case("wrong extension", f"{D} model.weights=w.safetensors", "w.safetensors: is not a file of weights",
         lambda s: (s.pth(lambda w: None), (s.root / "w.pth").rename(s.root / "w.safetensors"))),
]  # fmt: skip

IMAGES = [
    Case("empty set", F, "images/train: holds no images; put files there that end in .apng, .bmp",
         lambda s: [p.unlink() for p in (s.root / "images/train").rglob("*.png")]),
    Case("one image", F, "calibration.count: the calibration set is a single image; give at least 2",
         lambda s: [p.unlink() for p in sorted((s.root / "images/train").rglob("*.png"))[1:]]),
    Case("one image asked for", f"{D} calibration.count=1", "calibration.count: .* single image; give at least 2"),
    Case("more images than there are", f"{F} calibration.count=5",
         "calibration.count: 5 images are asked for but the set has 4; use a count of at most 4"),
    Case("corrupt", F, "train/dog/1.png: is a truncated or corrupt image; replace .*on_error",
         lambda s: s.write("images/train/dog/1.png", b"no image at all")),
    Case("truncated", F, "train/cat/0.png: is a truncated or corrupt image; replace .*on_error",
         lambda s: s.cut("images/train/cat/0.png", 0.5)),
    Case("zero bytes", F, "train/cat/0.png: is empty; replace", lambda s: s.write("images/train/cat/0.png", b"")),
    Case("all unreadable, skipped", f"{F} data.on_error=skip", "this image and all others are unreadable; correct",
         lambda s: [p.write_bytes(b"") for p in (s.root / "images/train").rglob("*.png")]),
    Case("all but one unreadable, skipped", f"{F} data.on_error=skip", "the calibration set is a single image; give",
         lambda s: [p.write_bytes(b"") for p in sorted((s.root / "images/train").rglob("*.png"))[1:]]),
    Case("corrupt in evaluation", F, "val/dog/0.png: is a truncated or corrupt image; replace",
         lambda s: s.write("images/val/dog/0.png", b"\x89PNG")),
    *(
        Case(f"{mode} under strict", f"{F} data.preprocess.color=strict",
             rf"train/x\.{end}: is not a 3-channel RGB image \(PIL mode {mode}\); convert the file to RGB, or set",
             lambda s, mode=mode, end=end: (  # type: ignore[misc]
                 [p.unlink() for p in (s.root / "images/train").rglob("*.png")],
                 s.image(f"images/train/x.{end}", mode), s.image("images/train/y.png"), s.write("folder.yaml",
                 (s.root / "folder.yaml").read_text().replace("count: 4", "count: 2"))))
        for mode, end in (("CMYK", "jpg"), ("L", "png"), ("P", "png"))
    ),
    Case("16-bit grey", F, r"dog/1.png: has more than 8 bits a channel \(PIL mode I;16\); convert it to 8 bits",
         lambda s: s.image("images/train/dog/1.png", "I;16")),
    Case("smaller than the crop", f"{F} data.preprocess.crop=14",
         r"\w+.png: the crop of 14 x 14 is larger than the image of 12 x 16; set data.preprocess.resize"),
    Case("sizes differ", F, r" but .* of the same batch is (9|12) x 16; set data.preprocess.resize",
         lambda s: s.image("images/train/dog/1.png", height=9)),
    Case("images beside folders", F, r"images/train: holds images \(x.png\) beside class folders \(cat\); move",
         lambda s: s.image("images/train/x.png")),
    Case("labels out of range", f"{F} model.options.num_classes=1",
         r"val/dog/0.png: label 1 is outside 0\.\.0; correct the label, or use a network"),
    Case("no root", f"{F} data.root=null", "data.root: is not given, but folder needs it; set it"),
    Case("missing root", f"{F} data.root=nowhere", "data.root, nowhere: there is no such folder; set it"),
    Case("missing split", f"{F} data.evaluation=test", "images/test: .*; name one of the folders there: train, val"),
    Case("unknown split", f"{D} data.calibration=trian", "data.calibration: .*'trian'; did you mean 'train'"),
    Case("grey images, colour recipe", f"{D} data.preprocess.mean=[0.5,0.5,0.5]",
         r"data.preprocess.mean: has length 3 .*; give one value .* mean: \[0.5\]"),
    Case("colour images, short std", f"{F} data.preprocess.std=[1,1]", "data.preprocess.std: has length 2 .*; give"),
    Case("wrong image size", f"{F} model.name=digits_resnet model.options={{}}", "expected input.*to have 1 channels"),
]  # fmt: skip

CSV = f"{F} data.kind=csv data.calibration=list.csv data.evaluation=list.csv calibration.count=2"


def rows(*lines: str) -> Callable[[Site], Path]:
    """images/list.csv with these lines."""
    return lambda s: s.write("images/list.csv", "\n".join(lines) + "\n")


LISTS = [
    Case("CSV without a header", CSV, "list.csv: holds no rows under a header .*; write file,label as the first line",
         rows("val/cat/0.png,0", "val/cat/1.png,0")),
    Case("CSV of no rows", CSV, "list.csv: holds no rows", rows("file,label")),
    Case("CSV that is missing", CSV, r"list.csv: cannot be read \(No such file .*\); give the path of a CSV file"),
    Case("CSV not named", f"{F} data.kind=csv", "data.calibration: names no file; set it to a CSV file"),
    Case("CSV naming a missing file", CSV, "val/cow.png: there is no such file; correct the path",
         rows("file,label", "val/cow.png,0", "val/cat/1.png,0")),
    Case("CSV with a word for a label", CSV, "list.csv, line 2: label 'cat' is not a class index; write a whole",
         rows("file,label", "val/cat/0.png,cat")),
    Case("CSV with a fraction for a label", CSV, "list.csv, line 3: label '0.5' is not a class index; write",
         rows("file,label", "val/cat/0.png,0", "val/cat/1.png,0.5")),
    Case("CSV with a label too large", CSV, r"val/cat/1.png: label 7 is outside 0\.\.1; correct the label",
         rows("file,label", "val/cat/0.png,0", "val/cat/1.png,7")),
    Case("CSV with a short row", CSV, "list.csv, line 2: has another number of fields .*; quote",
         rows("file,label", "val/cat/0.png")),
    Case("CSV with a changed file", CSV, "val/cat/0.png: is not the file that was listed: .*; restore",
         rows("file,label,sha256", f"val/cat/0.png,0,{'0' * 64}", "val/cat/1.png,0,")),
    Case("CSV with half a hash", CSV, "list.csv, line 2: '00' is not a sha256; it has 64",
         rows("file,label,sha256", "val/cat/0.png,0,00")),
    Case("CSV in UTF-16", CSV, "list.csv: is not a CSV file in UTF-8; save",
         lambda s: s.write("images/list.csv", "file,label\nä,1\n".encode("utf-16"))),
]  # fmt: skip

CLASSES = f"{F} data.classes=classes.txt"
NAMES = ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")
SHARDS = f"{F} data.kind=shards data.calibration=a.tar data.evaluation=a.tar"

SETS = [
    Case("class file missing", CLASSES, r"classes.txt: cannot be read .*; set data.classes to a class file"),
    Case("folder of no class", CLASSES, "train/dog: 'dog' is no class of .*classes.txt; did you mean 'doge'",
         lambda s: s.write("images/classes.txt", "cat\ndoge\n")),
    Case("classes for digits", f"{D} data.classes=x", "data.classes: digits has classes of its own; leave it out"),
    Case("shards not named", f"{F} data.kind=shards", "data.calibration: names no file; set it to tar files"),
    Case("shard missing", SHARDS, "images/a.tar: there is no such file; correct data.root or the pattern"),
    Case("shard no tar", SHARDS, "images/a.tar: is truncated or no tar file .*; download or pack it again",
         lambda s: s.write("images/a.tar", b"x" * 2000)),
    Case("shard truncated", SHARDS, "images/a.tar: is truncated or .*; download or pack it again",
         lambda s: (s.tar("a.tar", *NAMES), s.cut("images/a.tar", 0.2))),
    Case("shard compressed", SHARDS, "images/a.tar: is compressed, .*; decompress it",
         lambda s: s.write("images/a.tar", b"\x1f\x8b" + bytes(2000))),
    Case("shard with a corrupt image", SHARDS, r"a.tar#cat/1.png: is a truncated or corrupt image; replace .*on_error",
         lambda s: (s.cut("images/train/cat/1.png", 0.5), s.tar("a.tar", *NAMES))),
    Case("negative workers", f"{F} data.workers=-1", "folder.yaml, data.workers: .*greater than or equal to 0"),
]  # fmt: skip

CIFAR = f"{F} data.kind=cifar10 model.options={{}}"

CIFARS = [
    Case("CIFAR without batches", CIFAR, "images: holds no CIFAR-10 files of the split train .*; set data.root"),
    Case("CIFAR binary, truncated", CIFAR, "data_batch_1.bin: is truncated .*3073 bytes; download",
         lambda s: s.cifar("data_batch_1.bin", bytes(3073 * 4 - 1))),
    Case("CIFAR binary, empty", CIFAR, "data_batch_2.bin: is truncated .*; download",
         lambda s: s.cifar("data_batch_2.bin", b"")),
    Case("CIFAR binary, labels", CIFAR, r"data_batch_1.bin: label 11 of record 0 is outside 0\.\.9; .*download",
         lambda s: s.cifar("data_batch_1.bin", b"\x0b" + bytes(3072))),
    Case("CIFAR python, truncated", CIFAR, "data_batch_1: is truncated or not a CIFAR-10 batch; download",
         lambda s: s.cifar("data_batch_1", mine()[:20])),
    Case("CIFAR python, runs code", CIFAR, "data_batch_1: is not read because it asks to run .*mkdir.*; do not trust",
         lambda s: s.cifar("data_batch_1", mine())),
]  # fmt: skip


def bits(field: str, value: str) -> Case:
    """Bits that no grid has."""
    shown = value if value.isdigit() else f"'{value}'"
    allowed = "1, 2, 3, 4, 5, 6, 7, 8 or 16" if field == "weights.bits" else "2, 3, 4, 5, 6, 7, 8 or 16"
    error = f"digits.yaml, quant.{field}: input should be {allowed}; got {shown}$"
    return Case(f"{field}={value}", f"{D} quant.{field}={value}", error)


def unknown(key: str, hint: str) -> Case:
    """A key that no section has."""
    return Case(f"unknown {key}", f"{D} {key}=1", rf"digits.yaml, {key}: this key is unknown; did you mean '{hint}'\?$")


RECIPES = [
    *(bits("weights.bits", value) for value in ("0", "9", "17", "four")),
    Case("one uniform bit", f"{D} quant.weights.bits=1",
         "digits.yaml, quant.weights.bits: a uniform grid of 1 bit holds no sign; use the grid codebook or binary$"),
    Case("no such grid", f"{D} quant.weights.grid=apto",
         "quant.weights.grid: input should be 'uniform', .*; got 'apto'"),
    Case("eight bits of sums of powers", f"{D} quant.weights.grid=apot quant.weights.bits=8",
         "digits.yaml, quant.weights.bits: apot has no grid of 8 bits; use 2 to 6$"),
    Case("no such strategy", f"{D} calibration.strategy=herdng",
         r"calibration.strategy: there is no strategy 'herdng'; did you mean 'herding'\?$"),
    Case("no such manifest", f"{D} calibration.manifest=m.csv", "m.csv: cannot be read"),
    bits("activations.bits", "1"), bits("boundary_bits", "12"), bits("residual_bits", "eight"),
    unknown("sed", "seed"), unknown("modle", "model"), unknown("model.weight", "weights"),
    unknown("quant.weights.observr", "observer"), unknown("data.preprocess.stdd", "std"),
    unknown("data.calibration_preprocess.croop", "crop"),
    Case("word for a number", f"{D} calibration.count=many", "calibration.count: input should be .* integer.*'many'"),
    Case("count 0", f"{D} calibration.count=0", "calibration.count: .* greater than or equal to 1; got 0"),
    Case("negative seed", f"{D} seed=-1", "seed: input should be greater than or equal to 0; got -1"),
    Case("number for a section", f"{D} quant=4", "digits.yaml, quant: holds 4 in place of fields; give"),
    Case("section taken away", f"{D} data=null", "recipe, data.kind: this field is required; use cifar10, digits"),
    Case("unknown observer", f"{D} quant.weights.observer=max", "weights.observer: input should be 'minmax', .*'max'"),
    Case("unknown correction", f"{D} quant.bias_correction=emp",
         "quant.bias_correction: input should be 'none', .*'emp'"),
    Case("correction of learned roundings", f"{D} quant.weights.correction=mean reconstruct.method=qdrop",
         "quant.weights.correction: corrects rounding to nearest, which reconstruction replaces; use"),
    Case("unknown allocation", f"{D} quant.weights.allocation=baner", "weights.allocation: input should be .*'baner'"),
    Case("bits shared by one channel", f"{D} quant.weights.allocation=banner quant.weights.granularity=per_tensor",
         r"digits.yaml, quant.weights.allocation: shares bits among channels; set quant.weights.granularity=per_ch"),
    Case("16 bits shared", f"{D} quant.weights.allocation=optimal quant.weights.bits=16",
         "quant.weights.allocation: gives a channel 8 bits at most; set quant.weights.bits to 8 or fewer$"),
    Case("shared without channels", f"{D} quant.activations.allocation=banner",
         "quant.activations.allocation: shares bits among channels; set quant.activations.granularity=per_channel$"),
    Case("shared by a search in batches", f"{D} quant.activations.allocation=banner "
         "quant.activations.granularity=per_channel quant.activations.observer=mse-batch",
         "allocation: mse-batch searches each batch for one number of bits; use the observer mse$"),
    Case("dynamic per channel", f"{D} quant.activations.granularity=per_channel quant.activations.dynamic=true",
         "quant.activations.dynamic: takes one range for a tensor; set granularity=per_tensor$"),
    Case("learned per channel", f"{D} quant.activations.granularity=per_channel reconstruct.method=qdrop",
         "reconstruct.method: qdrop learns one scale for an activation; use adaround, or quant.activations.gran"),
    Case("bits of an unknown tensor", f"{D} quant.bits.layer1.0.conv1.weigt=4",
         r"recipe, quant.bits: there is no quantizer named 'layer1.0.conv1.weigt'; did you mean 'layer1.0.conv1"),
    Case("bits that no grid has", f"{D} quant.bits.conv1.weight=9", "quant.bits: input should be 2, 3, .*; got 9$"),
    Case("mixed without a limit", f"{D} quant.mixed.images=8", "mixed: give limit or max_drop, one of the two; got"),
    Case("mixed with two limits", f"{D} quant.mixed.limit=3 quant.mixed.max_drop=0.1", "mixed: give limit or max"),
    Case("mixed, a choice twice", f"{D} quant.mixed.limit=3 quant.mixed.choices=[3,3]",
         "quant.mixed: name each of the choices once; got"),
    Case("mixed, one choice", f"{D} quant.mixed.limit=3 quant.mixed.choices=[3]", "choices: .* at least 2 items"),
    Case("mixed activations in bytes", f"{D} quant.mixed.limit=3 quant.mixed.tensors=both",
         "mixed: tensors: both needs budget: bops, and a sensitivity other than gradient and fisher; got"),
    Case("mixed below the fewest bits", f"{D} quant.mixed.limit=1", "no choice of bits is within .*; raise the limit"),
    Case("unknown boundary", f"{D} quant.boundary=brq", "quant.boundary: input should be 'brecq', .*; got 'brq'"),
    Case("unknown data kind", f"{D} data.kind=coco", "data.kind: input should be 'cifar10', .*; got 'coco'"),
    Case("unknown preset", f"{D} preset=qdrop-refrence", "preset: .* is unknown; did you mean 'qdrop-reference'"),
    Case("preset that is a list", f"{D} preset=[int8]", "preset: .*is unknown; did you mean 'int8'"),
    Case("unknown network", f"{D} model.name=digit_resnet", "model.name: .* the zoo; did you mean 'digits_resnet'"),
    Case("unknown form of network", f"{D} model.name=timn:resnet18", "model.name: .* no known form; use a network of"),
    Case("network without a function", f"{D} model.name=net.py", "'net.py' names no function; write net.py:FUNCTION"),
    Case("missing network file", f"{D} model.name=net.py:net", r"net.py: cannot be read \(No such file .*\); give the"),
    Case("network file that fails", f"{D} model.name=net.py:net", r"net.py, line 2: ZeroDivisionError: .*; correct the",
         lambda s: s.write("net.py", "def net():\n    return 1 / 0\n")),
    Case("network file without the function", f"{D} model.name=net.py:nett", "net.py: .*'nett'; did you mean 'net'",
         lambda s: s.write("net.py", "def net():\n    return None\n")),
    Case("no network", f"{D} model.name=null", "recipe, model.name: this field is required; name a network"),
    Case("unknown option", f"{D} model.options.classes=10", "model.options.classes: .*; did you mean 'num_classes'"),
    Case("bad option", f"{D} model.options.num_classes=-1", "model.options.num_classes: -1 is not valid; use a whole"),
    Case("no data", f"{D} data.kind=null", "recipe, data.kind: this field is required; use cifar10, digits"),
    Case("unknown submodule", f"{D} model.submodule=layr1", "model.submodule: .*no part 'layr1'; .* mean 'layer1'"),
    Case("unknown device", f"{D} device=gpu", "device: 'gpu' is unknown; use auto, cpu"),
    Case("absent device", f"{D} device=cuda:99", "device: this machine has no 'cuda:99'; use device"),
    Case("absent device, dry", f"{D} --dry-run device=cuda:99", "device: this machine has no 'cuda:99'; use device"),
    Case("resize 0", f"{D} data.preprocess.resize=0", "data.preprocess.resize: .*greater than or equal to 1; got 0"),
    Case("negative crop", f"{D} data.preprocess.crop=[8,-1]", "data.preprocess.crop.1: .*or equal to 1; got -1"),
    Case("resize in words", f"{D} data.preprocess.resize=big", "data.preprocess.resize: input should be .*; got 'big'"),
    Case("std 0", f"{D} data.preprocess.std=[0]", "data.preprocess.std.0: input should be greater than 0; got 0"),
    Case("mean NaN", f"{D} data.preprocess.mean=[.nan]", "data.preprocess.mean.0: input should be a finite number"),
    Case("override without value", f"{D} seed", "override 'seed': is not key=value; write for example"),
    Case("override without key", f"{D} =3", "override '=3': is not key=value; write"),
    Case("override of bad YAML", f"{D} data.preprocess.mean=[0.5",
         r"override '.*': its value is not valid YAML \(line 1: .*\); quote"),
    Case("override of no date", f"{D} model.name=2024-13-45",
         r"override '.*': its value is not valid YAML \(line 1: .*timestamp.*\); quote"),
    Case("recipe missing", "quantize nowhere.yaml", r"nowhere.yaml: cannot be read \(No such file .*\); give the path"),
    Case("recipe is a folder", "quantize images", r"images: cannot be read \(it is a folder\); give the path"),
    Case("recipe not YAML", "quantize r.yaml", r"r.yaml: is not valid YAML \(line 2: .*\); correct the indentation",
         lambda s: s.write("r.yaml", "model: {name: a\ndata: b: c\n")),
    Case("recipe with no date", "quantize r.yaml",
         r"r.yaml: is not valid YAML \(line \d: a value is not a valid .timestamp.\); correct",
         lambda s: s.write("r.yaml", "seed: 2024-13-45\n")),
    Case("recipe is a list", "quantize r.yaml", "r.yaml: is not a recipe; it must hold fields",
         lambda s: s.write("r.yaml", "- model\n- data\n")),
    Case("recipe empty", "quantize r.yaml", "r.yaml: is not a recipe; it must hold", lambda s: s.write("r.yaml", "")),
    Case("recipe not UTF-8", "quantize r.yaml", r"r.yaml: is not valid YAML \(it is not UTF-8 text\); correct",
         lambda s: s.write("r.yaml", "model: {name: é}\n".encode("latin1"))),
    Case("included file missing", "quantize r.yaml", r"part.yaml: cannot be .*\(No such .*; correct include in r.yaml",
         lambda s: s.write("r.yaml", "include: [part.yaml]\n")),
    Case("included in a circle", "quantize r.yaml", r"r.yaml, include: goes in a circle \(r.yaml -> r.yaml\); take",
         lambda s: s.write("r.yaml", "include: [r.yaml]\n")),
    Case("unknown key in an included file", "quantize r.yaml", "part.yaml, quant.bitts: this key is unknown; did you",
         lambda s: (s.write("r.yaml", "include: [part.yaml]\n"), s.write("part.yaml", "quant: {bitts: 3}\n"))),
    Case("include by override", f"{D} include=[digits.yaml]", "digits.yaml, include: is known in recipe files alone"),
    Case("recipe of version 2", f"{D} version=2", "digits.yaml, version: input should be 1; got 2"),
]  # fmt: skip

COMMANDS = [
    Case("unknown command", "quantise digits.yaml", "No such command 'quantise'.*'quantize'.*see calibquant --help"),
    Case("unknown option", f"{D} --fast", "No such option: --fast.*see calibquant --help"),
    Case("no recipe", "quantize", "calibquant quantize: takes a recipe, or --resume RUN; give one of the two"),
    Case("option without value", "demo --seed", "Option '--seed' requires an argument; see"),
    Case("recipes of nothing", "recipes resnet18 w9a9", "recipes: no recipe is of 'resnet18 w9a9'; without words it"),
    Case("classes of images without labels", "evaluate folder.yaml --per-class",
         "evaluation images: have no labels; leave --per-class and --confusion out",
         lambda s: [p.rename(p.parents[1] / p.name) for p in sorted((s.root / "images/val").glob("*/*.png"))]),
    Case("demo where no folder can be", "demo --runs digits.yaml/x", r"digits.yaml: is a file, not a folder; choose"),
]  # fmt: skip


def receipt(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change receipt.json."""

    def apply(run: Path) -> None:
        facts = json.loads((run / "receipt.json").read_text())
        changed = change(facts)
        (run / "receipt.json").write_text(json.dumps(facts if changed is None else changed))

    return apply


RESTORE = r"is damaged \(its hash is not the receipt's\); restore it or quantize again"
RUNS = [
    Case("no run yet", "evaluate", "runs: holds no run yet; run calibquant quantize"),
    Case("missing run", "evaluate runs/none", "runs/none: there is no such run folder; list"),
    Case("folder that is no run", "evaluate images", r"images: is no run folder \(receipt.json is missing\); name"),
    Case("file that is in no run", "inspect digits.yaml", r"is no run folder \(receipt.json is missing\); name"),
    Case("missing file to inspect", "inspect runs/none", "runs/none: there is no such run folder; list"),
    Case("run of another version", "evaluate runs/done", "receipt.json: format version 99 is not 1; use the calibquant",
         lambda s: s.run(receipt(lambda facts: facts.update(format_version=99)))),
    Case("receipt without files", "evaluate runs/done", "receipt.json: format version None is not 1; use",
         lambda s: s.run(receipt(lambda facts: facts.pop("files") and None))),
    Case("receipt is a list", "inspect runs/done", "receipt.json: format version None is not 1; use",
         lambda s: s.run(receipt(lambda facts: [1]))),
    Case("receipt cut", "evaluate runs/done", r"receipt.json: is damaged \(no valid JSON\); quantize again",
         lambda s: (s.run(), s.cut("runs/done/receipt.json", 0.5))),
    *(
        Case(f"damaged {name}", f"{command} runs/done", f"runs/done/{name}: {RESTORE}",
             lambda s, name=name: s.run(lambda run: flip(run / name)))  # type: ignore[misc]
        for name in ("model.safetensors", "graph.json", "recipe.yaml", "metrics.json")
        for command in ("evaluate", "inspect")
    ),
    Case("missing model", "evaluate runs/done", r"model.safetensors: cannot be read \(No such file .*\); name",
         lambda s: s.run(lambda run: (run / "model.safetensors").unlink())),
    Case("images of a run are gone",
         "evaluate runs/done data.kind=cifar10 data.root=gone data.preprocess.mean=[0,0,0] data.preprocess.std=[1,1,1]",
         "data.root, gone: there is no such folder", lambda s: s.run()),
]  # fmt: skip

MACHINE = [
    Case("runs below a file", f"{D} runs=digits.yaml/x", r"digits.yaml: is a file, not a folder; choose another"),
    Case("runs is a file", f"{D} runs=digits.yaml", r"digits.yaml: is a file, not a folder; choose another"),
    *(
        Case(f"full disk at {target}", D, r"cannot be written \(No space left on device\); free space there, or choose",
             lambda s, target=target: s.full_disk(target))  # type: ignore[misc]
        for target in ("os.fsync", "pathlib.Path.replace", "pathlib.Path.mkdir",
                       "calibquant.pipeline.reporting._LogFile.flush")
    ),
    *(
        Case(f"Ctrl-C in {stage}", D, "interrupted; nothing was left behind",
             lambda s, stage=stage: s.fail(f"calibquant.pipeline.{stage}", KeyboardInterrupt()))  # type: ignore[misc]
        for stage in ("stages.prepare", "stages.calibrate_weights", "stages.calibrate_activations",
                      "quantizing.write_run")
    ),
    Case("bug", D, r"internal error \(ZeroDivisionError: oh no\); run again with --debug",
         lambda s: s.fail("calibquant.pipeline.stages.make_plan", ZeroDivisionError("oh\nno"))),
    Case("network giving maps", D, r"network output: is \(3, 4, 14, 14\), not \(N, classes\); give a network",
         lambda s: s.network(nn.Sequential(nn.Conv2d(1, 4, 3)))),
    Case("network giving vectors of one image", D, "network output: is .*; give a network",
         lambda s: s.network(nn.Sequential(nn.Conv2d(1, 1, 16), nn.Flatten(0)))),
]  # fmt: skip

TABLE = {
    f"{group}: {case.name}" + (" by inspect" if case.command.startswith("inspect") else ""): case
    for group, cases in (
        ("weights", WEIGHTS), ("images", IMAGES), ("lists", LISTS), ("sets", SETS), ("cifar", CIFARS),
        ("recipe", RECIPES), ("command", COMMANDS), ("runs", RUNS), ("machine", MACHINE),
        ("train", [Case(*row) for row in TRAININGS]),
    )
    for case in cases
}  # fmt: skip
