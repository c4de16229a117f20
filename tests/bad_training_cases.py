"""Bad inputs of `calibquant train`; part of the table in bad_input_cases.py."""

from __future__ import annotations

from bad_site import Site

# Name, command, what the line must say, and what is spoiled before.
T, F = "train digits.yaml train.epochs=2", "train folder.yaml train.epochs=2"
SCALE = f"{F} data.preprocess.crop=8 data.augment.scale"


def other_size(site: Site) -> None:
    """One image larger than the others."""
    site.image("images/train/dog/1.png", height=20, width=20)


def third_class(site: Site) -> None:
    """A class more than the network has."""
    site.image("images/train/eel/0.png")


def plain(site: Site) -> None:
    """Images without class folders."""
    site.image("images/flat/0.png")
    site.image("images/flat/1.png")


def alone(site: Site) -> None:
    """A single image."""
    site.image("images/one/cat/0.png")


TRAININGS = [
    ("no section", "train digits.yaml", r"recipe, train: this section is required; add train: \{epochs"),
    ("unknown key", f"{T} train.epoch=3", r"digits\.yaml, train\.epoch: this key is unknown; did you mean"),
    ("no epochs", "train digits.yaml train.epochs=0", r"train\.epochs: input should be greater than or equal"),
    ("rate of 0", f"{T} train.lr=0", r"train\.lr: input should be greater than 0; got 0"),
    ("NaN as rate", f"{T} train.lr=.nan", r"train\.lr: input should be (a finite number|greater than 0); got nan"),
    ("rise without fall", f"{T} train.warm_up=2", r"train\.warm_up: 2 epochs of 2; leave epochs for the fall"),
    ("unknown schedule", f"{T} train.schedule=step", r"train\.schedule: input should be 'cosine' or 'one-cycle'"),
    ("most images held out", f"{T} train.holdout=0.9", r"train\.holdout: input should be less than or equal"),
    ("Nesterov alone", f"{T} train.momentum=0", r"train\.nesterov: needs momentum; set train\.nesterov=false"),
    ("scale reversed", f"{SCALE}=[1.0,0.5]", r"data\.augment\.scale: \[1\.0, 0\.5\] is no range of shares"),
    ("scale above 1", f"{SCALE}=[0.5,2]", r"data\.augment\.scale: \[0\.5, 2\.0\] is no range of shares"),
    ("ratio reversed", f"{F} data.augment.ratio=[2,1]", r"data\.augment\.ratio: \[2\.0, 1\.0\] is no range; give"),
    ("negative pad", f"{T} data.augment.pad=-1", r"data\.augment\.pad: input should be greater than or equal"),
    ("random crops without a size", f"{F} data.augment.scale=[0.5,1]", r"data\.augment\.scale: .*; set data\.prep"),
    ("augmented calibration of nothing", "quantize digits.yaml calibration.augment=true",
     r"calibration\.augment: changes images as data\.augment says, which is not given; give data\.augment"),
    ("more classes than outputs", F, r"train/eel/0\.png: label 2 is outside 0\.\.1; correct the label", third_class),
    ("no labels", f"{F} data.calibration=flat", r"flat/0\.png: has no label; train on images in class folders", plain),
    ("one image", f"{F} data.calibration=one", r"training images: are 1; give at least 2", alone),
    ("corrupt image", F, r"train/dog/1\.png: is a truncated or corrupt image; replace",
     lambda s: s.write("images/train/dog/1.png", b"no image at all")),
    ("images of two sizes", F, r"train/dog/1\.png: is 20 x 20 but .* of the same batch is 12 x 16; set data\.prep",
     other_size),
    ("other channels", f"{T} model.name=cifar_resnet20", r"network: does not take images of shape \(1, 16, 16\)"),
    ("neither recipe nor run", "train", "calibquant train: takes a recipe, or --resume RUN; give one of the two"),
    ("recipe and run", "train digits.yaml --resume runs/x", "takes a recipe, or --resume RUN; give one of the"),
    ("no such run", "train --resume runs/x", r"runs/x: is no interrupted run with a checkpoint; name the run"),
    ("a quantized run", "train --resume runs/done", r"runs/done: is complete already; name the run",
     lambda s: s.run()),
    ("full disk", T, r"cannot be written \(No space left on device\); free space", lambda s: s.full_disk("os.fsync")),
    ("Ctrl-C", T, "interrupted; nothing was left behind",
     lambda s: s.fail("calibquant.training.losses.classification_loss", KeyboardInterrupt())),
]  # fmt: skip
