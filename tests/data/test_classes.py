"""Class files: the forms that people have, matching words to classes, and folders and lists labelled by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibquant.data import check_labels, open_images
from calibquant.data.classes import read_classes
from calibquant.errors import DataError
from calibquant.recipe import DataRecipe, Preprocess

Save = Callable[..., Path]
IDS = ["n01440764", "n02012849", "n03126707", "n04277352"]
SYNSETS = [
    "n01440764 tench, Tinca tinca",
    "n02012849 crane",
    "n03126707 crane, hoisting machine",
    "n04277352 spindle, wading-bird",
]
JSON_FORM = json.dumps({str(i): [line.split()[0], line.split()[1].strip(",")] for i, line in enumerate(SYNSETS)})


def written(folder: Path, text: str) -> Path:
    path = folder / "classes"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    ["\n".join(SYNSETS) + "\n", "\r\n".join(IDS) + "\r\n\r\n", "\ufeff" + "\n".join(IDS), JSON_FORM, json.dumps(IDS)],
)
def test_ids_are_found_in_every_form(tmp_path: Path, text: str) -> None:
    classes = read_classes(written(tmp_path, text))
    assert [classes.index(word, "x") for word in IDS] == [0, 1, 2, 3]
    assert classes.index("N04277352", "x") == 3
    assert len(classes.names) == 4


@pytest.mark.parametrize(
    ("word", "index"),
    [("tench", 0), ("Tench", 0), ("tinca_tinca", 0), ("TINCA-TINCA", 0), ("hoisting machine", 2), ("wading bird", 3)],
)
def test_names_are_found_whatever_their_spelling(tmp_path: Path, word: str, index: int) -> None:
    assert read_classes(written(tmp_path, "\n".join(SYNSETS))).index(word, "x") == index


def test_a_first_name_wins_over_a_synonym(tmp_path: Path) -> None:
    classes = read_classes(written(tmp_path, "crane, wading bird\nheron, crane\n"))
    assert (classes.index("crane", "x"), classes.index("Heron", "x"), classes.names) == (0, 1, ("crane", "heron"))


def test_names_for_people(tmp_path: Path) -> None:
    assert read_classes(written(tmp_path, "\n".join(SYNSETS))).names == ("tench", "crane", "crane", "spindle")
    assert read_classes(written(tmp_path, "\n".join(IDS))).names == tuple(IDS)
    assert read_classes(written(tmp_path, '["hen", "white shark"]')).names == ("hen", "white shark")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("crane", "here: 'crane' is the name of the classes 1 and 2 in .*classes; use the WordNet id"),
        ("n01440765", "'n01440765' is no class of .*classes; did you mean 'n01440764'"),
        ("tensh", "'tensh' is no class .*did you mean 'tench'"),
        ("zzz", "'zzz' is no class of .*; use its words, such as 'n01440764'"),
    ],
)
def test_words_that_mean_no_class_or_two(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_classes(written(tmp_path, "\n".join(SYNSETS))).index(word, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; write one WordNet id"),
        ("[]", "is empty"),
        ("cat\n\ndog\n", "classes, line 2: is empty"),
        ("n01440764 a\nn01440764 b\n", "names n01440764 twice, as 0 and 1"),
        ('{"0": "cat"', "is not valid JSON"),
        ('{"0": "cat", "2": "dog"}', 'has 2 entries but none with the key "1"'),
        ('{"n01440764": 0}', 'has 1 entries but none with the key "0"'),
        ('["cat", 3]', r"entry 1 is not a name or \[id, name\]"),
        ('[["n01440764", 3]]', "entry 0 is not a name"),
        ("[[]]", "entry 0 is not a name"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (None, "cannot be read .*; set data.classes to a class file"),
    ],
)
def test_files_that_are_no_class_files(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    if text is not None:
        (tmp_path / "classes").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=message):
        read_classes(tmp_path / "classes")


def opened(kind: str, root: Path, **fields: Any) -> Any:
    written(root, "\n".join(SYNSETS))
    return open_images(
        DataRecipe.model_validate({"kind": kind, "root": root, "classes": "classes"} | fields), "evaluation"
    )


def test_folders_of_some_classes_are_numbered_as_the_network_does(tmp_path: Path, save_image: Save) -> None:
    for name in ("n04277352/a.png", "tench/b.png", "n02012849/deep/c.png"):
        save_image(f"val/{name}")
    (tmp_path / "val/empty").mkdir()
    images = opened("folder", tmp_path)
    assert [(images.name(i), images.label(i)) for i in range(3)] == [
        ("val/n02012849/deep/c.png", 1),
        ("val/n04277352/a.png", 3),
        ("val/tench/b.png", 0),
    ]
    assert images.classes == ["tench", "crane", "crane", "spindle"]
    save_image("val/n02012848/x.png")
    with pytest.raises(DataError, match=r"val/n02012848: 'n02012848' is no class of .*; did you mean 'n02012849'"):
        opened("folder", tmp_path)


def test_images_without_class_folders_stay_without_labels(tmp_path: Path, save_image: Save) -> None:
    save_image("val/a.png")
    images = opened("folder", tmp_path)
    assert images.label(0) is None
    assert images.classes is not None


def test_lists_may_name_classes(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file,label\na.png,n04277352\nb.png,Tench\nc.png,2\nd.png,\n")
    images = opened("csv", tmp_path, evaluation="list.csv")
    assert images.labels().tolist() == [3, 0, 2, -1]
    (tmp_path / "list.csv").write_text("file,label\na.png,n04277352\nb.png,dog\n")
    with pytest.raises(DataError, match=r"list.csv, line 3: 'dog' is no class of"):
        opened("csv", tmp_path, evaluation="list.csv")


@pytest.mark.parametrize("unpacked", [True, False])
def test_kaggles_lists(tmp_path: Path, save_image: Save, unpacked: bool) -> None:
    folder = "ILSVRC/Data/CLS-LOC/" if unpacked else ""
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000007,n04277352 1 2 3 4 n04277352 5 6 7 8 \n"
        "n01440764_12,n01440764 1 2 3 4\n"
    )
    images = opened("csv", tmp_path, evaluation="LOC_val_solution.csv")
    inner = ["val/", "train/n01440764/"] if unpacked else ["", ""]
    expected = [f"{folder}{inner[0]}ILSVRC2012_val_00000007.JPEG", f"{folder}{inner[1]}n01440764_12.JPEG"]
    assert [images.name(i) for i in range(2)] == expected
    assert images.labels().tolist() == [3, 0]
    save_image("x.jpg").rename(save_image(expected[0].replace("JPEG", "jpg")).with_suffix(".JPEG"))
    assert images.image(0).shape == (3, 6, 8)
    with pytest.raises(DataError, match=r"labels images by WordNet id.*; set data.classes to LOC_"):
        opened("csv", tmp_path, evaluation="LOC_val_solution.csv", classes=None)


def test_sets_with_classes_of_their_own_take_no_file(tmp_path: Path) -> None:
    settings = Preprocess(mean=(0.5,), std=(0.5,))
    with pytest.raises(DataError, match=r"data.classes: digits has classes of its own; leave it out"):
        opened("digits", tmp_path, preprocess=settings)


def test_imagenette_has_imagenets_labels(shared_data: Path) -> None:
    recipe = DataRecipe(
        kind="folder", root=shared_data / "imagenette10", classes=str(shared_data / "imagenet" / "synset_words.txt")
    )
    images = open_images(recipe, "calibration")
    check_labels(images, 1000)
    # the indices that Imagenette's ten classes have in ImageNet, as its authors list them
    assert sorted(set(images.labels().tolist())) == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    assert images.classes is not None
    assert images.classes[701] == "parachute"
