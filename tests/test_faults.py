"""Bad input of every kind at every entrance: one contract for all of it, and odd but valid pictures load as what they are."""

import math
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vdm_utils.__main__ import main
from vdm_utils.data import SPLITS, load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.gates import HardConcrete
from vdm_utils.objective import Multiplier
from vdm_utils.sources import read_image, read_pictures
from vdm_utils.training import (
    ClassifierSettings,
    DiffMaskSettings,
    evaluate_classifier,
    evaluate_diffmask,
    settings,
    train_classifier,
    train_diffmask,
)
from vdm_utils.vit import PatchView, build_classifier, load_classifier, with_image_size


def complaint(call):
    """The message of the VDMError that `call` raises: what, where, expected, got and what to do, on a line each."""
    with pytest.raises(VDMError) as caught:
        call()
    what, *lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["where", "expected", "got", "what to do"]
    assert what and max(map(len, lines)) < 330
    return str(caught.value)


def table(cases):
    """The parameters of a test from a dict of cases by name."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), id=name) for name, case in cases.items()]


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# ---------------------------------------------------------------- picture files


def png(width, height, pixels=b"\0" * 10, bits=8, kind=2):
    """The bytes of a PNG file with that header, whatever its pixels are."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def noise(file, kept=1.0, flip=None):
    """A picture of noise, of which the first part is there and perhaps one bit is flipped."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
    content = bytearray(file.read_bytes())
    if flip:
        content[int(flip * len(content))] ^= 0x10
    file.write_bytes(content[: int(kept * len(content))])


def floats(file, value=0.5):
    pixels = np.full((40, 40), 0.5, dtype=np.float32)
    pixels[3, 3] = value
    Image.fromarray(pixels).save(file)


DAMAGED = {  # name: (file, how it is made)
    "zero bytes": ("a.png", lambda file: file.write_bytes(b"")),
    "one byte": ("a.jpg", lambda file: file.write_bytes(b"\xff")),
    **{f"truncated {end}": (f"a.{end}", lambda file: noise(file, kept=0.6)) for end in ("png", "jpg", "tif", "webp", "bmp")},
    "flipped bit in a PNG": ("a.png", lambda file: noise(file, flip=0.5)),
    "text": ("a.png", lambda file: file.write_text("not a picture")),
    "error page": ("a.jpg", lambda file: file.write_text("<html>404</html>")),
    "SVG": ("a.png", lambda file: file.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")),
    "no pixels": ("a.png", lambda file: file.write_bytes(png(0, 5))),
    "bomb of 2.5 billion pixels": ("a.png", lambda file: file.write_bytes(png(50_000, 50_000))),
    "bomb of 100 million pixels": ("a.png", lambda file: file.write_bytes(png(10_000, 10_000, b"\0" * 12_510_000, bits=1, kind=0))),
    "folder": ("a.png", lambda file: file.mkdir()),
    "link to nowhere": ("a.png", lambda file: file.symlink_to("nowhere")),
    "floating-point pixels": ("a.tif", floats),
    "NaN pixels": ("a.tif", lambda file: floats(file, math.nan)),
    "infinite pixels": ("a.tif", lambda file: floats(file, math.inf)),
}  # fmt: skip


@pytest.fixture
def own(tmp_path):
    """A folder of two classes with four pictures each: cat and dog."""
    for label in ("cat", "dog"):
        (tmp_path / "own" / label).mkdir(parents=True)
        for n in range(4):
            Image.new("RGB", (8, 8), (40 * n, 0, 0)).save(tmp_path / "own" / label / f"{n}.png")
    return tmp_path / "own"


def read_all(**options):
    """How many pictures of a folder can be read."""
    parts = [load_data("folder", split, image_size=8, **options) for split in SPLITS]
    return sum(len(part.batch(range(len(part)))["labels"]) for part in parts)


@pytest.mark.parametrize(("name", "make"), table(DAMAGED))
def test_damaged_pictures_are_named_and_can_be_left_out(own, name, make):
    make(own / "cat" / name)
    for reading in (lambda: read_all(data_dir=own), lambda: read_pictures([own / "cat" / name], (8, 8))):
        message = complaint(reading)
        assert f"cat/{name}" in message and "cannot be read" in message and "skip_unreadable" in message
    assert read_all(data_dir=own, skip_unreadable=True) == 8


def test_a_damaged_picture_is_named_by_a_loading_process_too(own):
    (own / "cat" / "0.png").write_bytes(b"")
    (own / "cat" / "1.png").write_bytes(b"")
    (own / "cat" / "2.png").write_bytes(b"")
    message = complaint(lambda: list(DataLoader(load_data("folder", "train", data_dir=own), num_workers=1)))
    assert "cannot be read" in message.splitlines()[0] and "Traceback" not in message


def deep(*numbers, kind):
    """A PNG of 4×4 equal pixels with 16 bits per channel."""
    return png(4, 4, (b"\0" + struct.pack(f">{len(numbers)}H", *numbers) * 4) * 4, bits=16, kind=kind)


def solid(mode, colour, **options):
    return lambda file: Image.new(mode, (40, 30), colour).save(file, **options)


def palette(file, **options):
    image = Image.new("P", (40, 30), 3)
    image.putpalette([0, 0, 0] * 3 + [10, 200, 30])
    image.save(file, **options)


ODD = {  # name: (file, how it is made, its colour)
    "grey": ("a.png", solid("L", 128), (128, 128, 128)),
    "one bit": ("a.png", solid("1", 1), (255, 255, 255)),
    "16 bits, grey PNG": ("a.png", lambda file: file.write_bytes(deep(0x8040, kind=0)), (128, 128, 128)),
    "16 bits, colour PNG": ("a.png", lambda file: file.write_bytes(deep(0xFF00, 0x8000, 0, kind=2)), (255, 128, 0)),
    "16 bits, grey PNG, half see-through": (
        "a.png",
        lambda file: file.write_bytes(deep(0, 0x8000, kind=4)),
        (127, 127, 127),
    ),
    "16 bits, TIFF": ("a.tif", solid("I;16", 0x8040), (128, 128, 128)),
    "32 bits, TIFF": ("a.tif", solid("I", 0x8040), (128, 128, 128)),
    "16 bits, PGM": ("a.pgm", lambda f: f.write_bytes(b"P5 4 4 65535\n" + b"\x80\x00" * 16), (128, 128, 128)),
    "CMYK JPEG": ("a.jpg", solid("CMYK", (0, 255, 255, 5)), (250, 0, 0)),
    "CMYK TIFF": ("a.tif", solid("CMYK", (0, 255, 255, 5)), (250, 0, 0)),
    "YCbCr JPEG": ("a.jpg", solid("YCbCr", (100, 128, 128)), (100, 100, 100)),
    "palette PNG": ("a.png", palette, (10, 200, 30)),
    "palette GIF": ("a.gif", palette, (10, 200, 30)),
    "palette with a see-through colour": ("a.png", lambda file: palette(file, transparency=3), (255, 255, 255)),
    "see-through": ("a.png", solid("RGBA", (9, 9, 9, 0)), (255, 255, 255)),
    "half see-through": ("a.png", solid("RGBA", (0, 0, 0, 128)), (127, 127, 127)),
    "grey and see-through": ("a.webp", solid("RGBA", (80, 80, 80, 255), lossless=True), (80, 80, 80)),
    "first of many frames": (
        "a.gif",
        lambda file: palette(file, save_all=True, append_images=[Image.new("RGB", (40, 30), "red")]),
        (10, 200, 30),
    ),
    "one pixel": ("a.png", lambda file: Image.new("RGB", (1, 1), (9, 8, 7)).save(file), (9, 8, 7)),
    "one line": ("a.png", lambda file: Image.new("RGB", (400, 1), (9, 8, 7)).save(file), (9, 8, 7)),
    "one column": ("a.bmp", lambda file: Image.new("RGB", (1, 300), (9, 8, 7)).save(file), (9, 8, 7)),
    "a wrong ending": (
        "a.jpg",
        lambda file: Image.new("RGB", (5, 5), (9, 8, 7)).save(file, format="PNG"),
        (9, 8, 7),
    ),
    "a name of many alphabets": ("Ünï ☃ 'x'.png", solid("RGB", (9, 8, 7)), (9, 8, 7)),
}


@pytest.mark.parametrize(("name", "make", "colour"), table(ODD))
def test_odd_pictures_load_as_what_they_are(tmp_path, name, make, colour):
    make(tmp_path / name)
    image = np.asarray(read_image(tmp_path / name)).astype(int)
    assert image.ndim == 3 and np.abs(image - colour).max() <= 3
    values = read_pictures([tmp_path / name], (8, 12))
    assert values.shape == (1, 3, 8, 12)
    assert torch.allclose(values[0].mean((1, 2)), torch.tensor(colour) / 127.5 - 1, atol=0.03)
    grey = read_pictures([tmp_path / name], (6, 6), channels=1)
    assert grey.shape == (1, 1, 6, 6) and grey.std() < 1e-3


# ---------------------------------------------------------------- folders


def empty(own):
    shutil.rmtree(own)
    own.mkdir()


def flat(own):
    for file in (own / "cat").iterdir():
        file.rename(own / file.name)
    shutil.rmtree(own / "cat"), shutil.rmtree(own / "dog")


def splits(own, *names, rename=None):
    """The folder as `train`, copied to the other splits; in the last of them a class has another name, or is gone."""
    own.rename(own.parent / "train")
    for name in names:
        shutil.copytree(own.parent / "train", own / name)
    if rename:
        (own / names[-1] / "dog").rename(own / names[-1] / rename)
    else:
        shutil.rmtree(own / names[-1] / "dog")
    return own


def hide(own):
    (own / "dog").rename(own / ".dog")


def few(own):
    for file in [*own.rglob("[1-3].png")]:
        file.unlink()


FOLDERS = {  # name: (what is done to a good one, words of the message)
    "empty": (empty, "too few class folders"),
    "pictures without class folders": (flat, "<folder>/<class>/<image>"),
    "one class": (lambda own: shutil.rmtree(own / "dog"), "too few class folders"),
    "one class is hidden": (hide, "too few class folders"),
    "a class without pictures": (lambda own: [file.unlink() for file in (own / "dog").iterdir()], "own/dog"),
    "a class of hidden files": (lambda own: [f.rename(f.with_name(f".{f.name}")) for f in (own / "dog").iterdir()], "own/dog"),
    "a class of other files": (lambda own: [f.rename(f.with_suffix(".txt")) for f in (own / "dog").iterdir()], "own/dog"),
    "folders in the class folders": (lambda own: (own / "dog").rename(own / "cat" / "dog"), "too few class folders"),
    "one picture per class": (few, "at least 3 pictures per class"),
    "no folder": (shutil.rmtree, "no such folder"),
    "a file": (lambda own: (shutil.rmtree(own), own.write_text("")), "no such folder"),
    "a test class of another name": (lambda own: splits(own, "train", "test", rename="elk"), "only in one of the two: dog, elk"),
    "a test class that is missing": (lambda own: splits(own, "train", "test"), "only in one of the two: dog"),
    "a validation class of another name": (lambda own: splits(own, "train", "val", rename="elk"), "own/val"),
    "a class of another case": (lambda own: splits(own, "train", "test", "val", rename="Dog"), "Dog, dog"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "expected"), table(FOLDERS))
def test_folders_that_are_no_dataset(own, spoil, expected):
    assert read_all(data_dir=own) == 8
    spoil(own)
    assert expected in complaint(lambda: read_all(data_dir=own))


def test_hidden_and_foreign_files_are_left_out(own):
    for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", "notes.txt", "labels.csv", ".gitkeep"):
        (own / "cat" / name).write_text("not a picture")
    (own / ".thumbnails").mkdir()
    Image.new("RGB", (8, 8)).save(own / ".thumbnails" / "0.png")
    (own / "readme.md").write_text("two classes")
    assert read_all(data_dir=own) == 8
    assert load_data("folder", "train", data_dir=own).id2label == {0: "cat", 1: "dog"}


@pytest.mark.parametrize(
    ("part", "label", "split"), [("test", 3, "train"), ("train", 9, "test"), ("test", 0, "validation")]
)
def test_labels_of_cifar_mean_the_same_in_both_halves(tmp_path, part, label, split):
    for half in ("train", "test"):
        for n in range(10):
            (tmp_path / "cifar10" / half / f"c{n}").mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "cifar10" / half / f"c{n}" / "0.png")
    load_data("CIFAR10", split, data_dir=tmp_path)
    (tmp_path / "cifar10" / part / f"c{label}").rename(tmp_path / "cifar10" / part / "other")
    message = complaint(lambda: load_data("CIFAR10", split, data_dir=tmp_path))
    assert f"c{label}, other" in message


def test_labels_of_imagenet_mean_the_same_in_both_halves(tmp_path):
    for half in ("train", "val"):
        for wnid in ("n01", "n02"):
            (tmp_path / "imagenet" / half / wnid).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "imagenet" / half / wnid / "0.JPEG")
    load_data("ImageNet", "test", data_dir=tmp_path)
    (tmp_path / "imagenet" / "val" / "n01").rename(tmp_path / "imagenet" / "val" / "n03")
    assert "n01, n03" in complaint(lambda: load_data("ImageNet", "test", data_dir=tmp_path))


OPTIONS = {  # name: (dataset, options, words of the message)
    "misspelt dataset": ("CIFAR", {}, "did you mean 'CIFAR10'?"),
    "dataset in small letters": ("imagenet", {}, "did you mean 'ImageNet'?"),
    "misspelt grid": ("digit_QA", {}, "did you mean 'digits_QA'?"),
    "dataset of another world": ("zzzz", {}, "choose one from the list"),
    "a very long dataset": ("toy" * 10_000, {}, "unknown dataset"),
    "no dataset": (None, {}, "unknown dataset None"),
    "empty dataset": ("", {}, "unknown dataset ''"),
    "a list of datasets": (["toy"], {}, "unknown dataset"),
    "split of torchvision": ("toy", {"split": "val"}, "did you mean 'validation'?"),
    "no split": ("toy", {"split": None}, "unknown split None"),
    "misspelt augmentation": ("toy", {"augment": ["rotate"]}, "did you mean 'rotation'?"),
    "augmentation as a word": ("toy", {"augment": "flip"}, "put the names in a list"),
    "augmentation as a number": ("toy", {"augment": 3}, "put the names in a list"),
    "no augmentation": ("toy", {"augment": None}, "put the names in a list"),
    "negative seed": ("toy", {"seed": -1}, "seed is out of range"),
    "huge seed": ("toy", {"seed": 2**64}, "seed is out of range"),
    "NaN seed": ("toy", {"seed": math.nan}, "seed is out of range"),
    "huge grid": ("toy", {"grid_size": 10**9}, "from 2 to 8"),
    "infinite grid": ("toy", {"grid_size": math.inf}, "from 2 to 8"),
    "huge class": ("toy", {"class_idx": 10**9}, "from 0 to 5"),
    "huge picture": ("shapes", {"image_size": 10**6}, "from 4 to 4096"),
    "NaN picture": ("shapes", {"image_size": math.nan}, "from 4 to 4096"),
    "width and height": ("shapes", {"image_size": (32, 32)}, "from 4 to 4096"),
    "negative length": ("toy", {"length": -5}, "length is out of range"),
    "huge length": ("toy", {"length": 10**12}, "length is out of range"),
    "half a picture": ("toy", {"length": 0.5}, "length is out of range"),
    "empty cells that are no number": ("toy", {"empty_cells": "half"}, "empty_cells does not fit"),
    "empty cells of a single picture": ("digits", {"empty_cells": 0.5}, "empty_cells does not fit"),
    "more than all cells empty": ("digits_QA", {"empty_cells": 1.5}, "empty_cells does not fit"),
    "shortcut that is no number": ("shapes", {"shortcut": "half"}, "shortcut does not fit"),
    "NaN shortcut": ("shapes", {"shortcut": math.nan}, "shortcut does not fit"),
    "negative shortcut": ("shapes", {"shortcut": -0.1}, "shortcut does not fit"),
    "data_dir that is a number": ("folder", {"data_dir": 5}, "data_dir is not a folder"),
    "data_dir that is a list": ("CIFAR10", {"data_dir": ["data"]}, "data_dir is not a folder"),
}


@pytest.mark.parametrize(("name", "options", "expected"), table(OPTIONS))
def test_options_of_load_data(name, options, expected):
    assert expected in complaint(lambda: load_data(name, **{"split": "train"} | options))


# ---------------------------------------------------------------- classifiers


CLASSIFIERS = {  # name: (arguments of build_classifier, words of the message)
    "misspelt architecture": ({"architecture": "convnet"}, "did you mean 'convnext'?"),
    "unknown architecture": ({"architecture": None}, "unknown architecture"),
    "misspelt size": ({"size": "bass"}, "did you mean 'base'?"),
    "size as a number": ({"size": 3}, "unknown size"),
    "zero pixels": ({"image_size": 0}, "do not tile"),
    "negative pixels": ({"image_size": -48}, "do not tile"),
    "pixels that are no whole number": ({"image_size": 48.0}, "a whole number, or (height, width)"),
    "pixels as text": ({"image_size": "48"}, "a whole number, or (height, width)"),
    "one of two sides": ({"image_size": (48,)}, "a whole number, or (height, width)"),
    "three sides": ({"image_size": (48, 48, 3)}, "a whole number, or (height, width)"),
    "no patch size": ({"patch_size": None}, "a whole number, or (height, width)"),
    "patches larger than the image": ({"image_size": 8, "patch_size": 16}, "do not tile"),
    "a billion patches": ({"image_size": 32_000, "patch_size": 1}, "number of patches is out of range"),
    "no channels": ({"num_channels": 0}, "num_channels is out of range"),
    "negative channels": ({"num_channels": -3}, "num_channels is out of range"),
    "channels as text": ({"num_channels": "RGB"}, "num_channels is out of range"),
    "no classes": ({"num_labels": 0}, "num_labels is out of range"),
    "half a class": ({"num_labels": 2.5}, "num_labels is out of range"),
    "classes that skip a number": ({"id2label": {0: "cat", 2: "dog"}}, "number them from 0 on"),
    "classes as a list": ({"id2label": ["cat", "dog"]}, "number them from 0 on"),
}


@pytest.mark.parametrize(("arguments", "expected"), table(CLASSIFIERS))
def test_classifiers_that_cannot_be_built(arguments, expected):
    assert expected in complaint(lambda: build_classifier(**arguments))


@pytest.fixture(scope="module")
def base_folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "base"
    base.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("number", [0, -1, 2.5, "ten", math.nan, 10**9, True])
def test_heads_that_cannot_be_made(base_folder, number):
    assert "num_labels is out of range" in complaint(lambda: load_classifier(base_folder, num_labels=number))


@pytest.mark.parametrize("name", ["", "nowhere", "a/b/c/d", "x" * 5000, None, 5, "\0", "two\nlines"])
def test_names_of_models_that_do_not_exist(base, name):
    assert "cannot load the classifier" in complaint(lambda: load_classifier(name))
    assert "cannot load the DiffMask" in complaint(lambda: VisionDiffMask.from_pretrained(name))


@pytest.mark.parametrize("size", [0, -12, 13, (12, 14), "12", None])
def test_sizes_that_a_classifier_cannot_take(base, size):
    complaint(lambda: with_image_size(base, size))


# ---------------------------------------------------------------- PatchView and explain


WHOLE = torch.zeros(2, 3, 12, 12)
IMAGES = {  # name: (what is given instead of [2, 3, 12, 12], what the message says it got)
    "another size": (torch.zeros(2, 3, 24, 24), "[2, 3, 24, 24]"),
    "not square": (torch.zeros(2, 3, 12, 24), "[2, 3, 12, 24]"),
    "1 channel": (torch.zeros(2, 1, 12, 12), "[2, 1, 12, 12]"),
    "2 channels": (torch.zeros(2, 2, 12, 12), "[2, 2, 12, 12]"),
    "4 channels": (torch.zeros(2, 4, 12, 12), "[2, 4, 12, 12]"),
    "channels last": (torch.zeros(2, 12, 12, 3), "[2, 12, 12, 3]"),
    "one image without a batch": (torch.zeros(3, 12, 12), "[3, 12, 12]"),
    "one batch too many": (torch.zeros(1, 2, 3, 12, 12), "[1, 2, 3, 12, 12]"),
    "no image": (torch.zeros(0, 3, 12, 12), "[0, 3, 12, 12]"),
    "one number": (torch.tensor(0.5), "[]"),
    "8 bits": (torch.zeros(2, 3, 12, 12, dtype=torch.uint8), "torch.uint8"),
    "16 bits": (torch.zeros(2, 3, 12, 12, dtype=torch.int16), "torch.int16"),
    "complex": (torch.zeros(2, 3, 12, 12, dtype=torch.complex64), "torch.complex64"),
    "switches": (torch.zeros(2, 3, 12, 12, dtype=torch.bool), "torch.bool"),
    "a NaN": (torch.where(torch.arange(12) == 7, math.nan, WHOLE), "NaN or infinite"),
    "an infinity": (torch.where(torch.arange(12) == 7, -math.inf, WHOLE), "NaN or infinite"),
    "an overflow": (WHOLE + 1e30, "NaN or infinite"),
    "numpy": (np.zeros((2, 3, 12, 12), dtype=np.float32), "float32"),
    "Pillow": (Image.new("RGB", (12, 12)), "Image"),
    "a dict": ({"pixel_values": WHOLE}, "dict"),
    "a file name": ("picture.png", "str"),
    "nothing": (None, "NoneType"),
}


@pytest.mark.parametrize("entry", ["encode", "explain", "forward"])
@pytest.mark.parametrize(("images", "got"), table(IMAGES))
def test_images_that_a_model_cannot_take(diffmask, images, got, entry):
    calls = {
        "encode": PatchView(diffmask.base).encode,
        "explain": diffmask.explain,
        "forward": lambda wrong: diffmask(wrong, layer=1),
    }
    assert f"got: {got}" in complaint(lambda: calls[entry](images))


@pytest.mark.parametrize("value", [0.0, -1.0, 1.0, 5.0])
def test_constant_pictures_are_explained(diffmask, value):
    shown = diffmask.explain(WHOLE + value)
    assert shown.kl.isfinite().all() and shown.mask.min() >= 0 and shown.mask.max() <= 1


NO_VIT = {
    "a name": "google/vit-base-patch16-224",
    "nothing": None,
    "a number": 3,
    "a class": torch.nn.Linear,
    "a layer": torch.nn.Linear(2, 2),
    "weights": {"vit.weight": torch.zeros(2)},
    "ConvNeXt": build_classifier("convnext", image_size=32, patch_size=4),
}


@pytest.mark.parametrize("model", table(NO_VIT))
def test_models_without_patches(diffmask, model):
    entries = (PatchView, VisionDiffMask.for_classifier, VisionDiffMask(diffmask.config).attach)
    for entry in entries:
        assert "is not a vision transformer" in complaint(lambda entry=entry: entry(model))


@pytest.mark.parametrize("layer", [-1, 6, 10**9, 1.0, math.nan, "last", [0], True])
def test_layers_that_do_not_exist(diffmask, pictures, layer):
    for call in (diffmask.explain, diffmask.forward):
        assert "expected: 0..5" in complaint(lambda call=call: call(pictures, layer=layer))


def test_a_step_of_training_has_a_layer(diffmask, pictures):
    assert "no such layer" in complaint(lambda: diffmask(pictures, layer=None))


EMBEDDINGS = {  # name: (what is given instead of [2, 9, 64], what the message says it got)
    "too few patches": (torch.zeros(2, 4, 64), "[2, 4, 64]"),
    "another width": (torch.zeros(2, 9, 32), "[2, 9, 32]"),
    "one batch too many": (torch.zeros(1, 2, 9, 64), "[1, 2, 9, 64]"),
    "no batch": (torch.zeros(9, 64), "[9, 64]"),
    "other pictures": (torch.zeros(3, 9, 64), "[3, 9, 64]"),
    "as a map": (torch.zeros(2, 64, 3, 3), "[2, 64, 3, 3]"),
    "whole numbers": (torch.zeros(2, 9, 64, dtype=torch.int64), "torch.int64"),
    "numpy": (np.zeros((2, 9, 64), dtype=np.float32), "float32"),
    "a list": ([[0.0]], "list"),
    "nothing": (None, "NoneType"),
}


@pytest.mark.parametrize(("embeddings", "got"), table(EMBEDDINGS))
def test_embeddings_that_a_model_cannot_take(base, embeddings, got):
    message = complaint(lambda: PatchView(base).logits(WHOLE, embeddings))
    assert f"got: {got}" in message and "expected: a float tensor [2, 9, 64]" in message


COINS = {  # name: (arguments of HardConcrete, words of the message)
    "zero temperature": ({"temperature": 0.0}, "temperature > 0"),
    "negative temperature": ({"temperature": -0.2}, "temperature > 0"),
    "NaN temperature": ({"temperature": math.nan}, "temperature > 0"),
    "infinite temperature": ({"temperature": math.inf}, "temperature > 0"),
    "temperature as text": ({"temperature": "cold"}, "temperature > 0"),
    "positive low": ({"low": 0.1}, "low < 0"),
    "infinite low": ({"low": -math.inf}, "low < 0"),
    "no low": ({"low": None}, "low < 0"),
    "small high": ({"high": 0.9}, "high >= 1"),
    "a switch": ({"high": True}, "high >= 1"),
    "location as a number": ({"log_alpha": 0.5}, "a float tensor"),
    "location in whole numbers": ({"log_alpha": torch.zeros(3, dtype=torch.int64)}, "a float tensor"),
    "no location": ({"log_alpha": None}, "a float tensor"),
}


@pytest.mark.parametrize(("arguments", "expected"), table(COINS))
def test_distributions_that_do_not_exist(arguments, expected):
    assert expected in complaint(lambda: HardConcrete(**{"log_alpha": torch.zeros(3)} | arguments))


@pytest.mark.parametrize("bounds", [(5, 0, 1), (1, 2, 3), (1, -1, 3), (math.nan, 0, 1), ("1", 0, 3), (1, 0, None)])
def test_multipliers_that_do_not_exist(bounds):
    assert "minimum <= start <= maximum" in complaint(lambda: Multiplier(2, *bounds, log_space=False))


def test_a_mask_without_an_answer_cannot_be_checked(diffmask, pictures):
    assert "nothing to check the mask against" in complaint(lambda: diffmask.explain(pictures, stop_early=True))


SETTINGS = {
    "unknown": {"epsilon": 0.1},
    "set by the classifier": {"hidden_size": 64},
    "more gates than states": {"num_gates": 7},
    "no gates": {"num_gates": 0},
    "half a gate": {"num_gates": 2.5},
    "ranks of a state behind the last gate": {"num_gates": 2, "herding_layer": 2},
    "text": {"temperature": "cold"},
    "nothing": {"eps": None},
    "a switch": {"eps": True},
    "text for a switch": {"normalize": "yes"},
    "a number for a switch": {"no_placeholder": 1},
    "NaN": {"mul_activation": math.nan},
    "infinite": {"add_activation": math.inf},
    "infinite eps": {"eps": math.inf},
    "negative eps": {"eps": -0.1},
    "zero eps": {"eps": 0},
    "whole KL": {"kl_quantile": 1.0},
    "zero temperature": {"temperature": 0.0},
    "NaN temperature": {"temperature": math.nan},
    "negative temperature": {"temperature": -0.2},
    "positive low": {"low": 0.1},
    "infinite low": {"low": -math.inf},
    "small high": {"high": 0.9},
    "negative alpha": {"alpha": -1.0},
    "huge alpha": {"alpha": 1e9},
    "alpha below its floor": {"alpha_min": 30.0},
    "infinite ceiling": {"alpha_max": math.inf},
    "a rank before there is a state": {"herding_layer": -2},
    "ranks of a layer that is not there": {"herding_layer": 6},
    "half a layer": {"herding_layer": 1.5},
    "a switch for a layer": {"herding_layer": True},
    "one for yes": {"keep_class": 1},
}


@pytest.mark.parametrize("wrong", table(SETTINGS))
def test_settings_of_a_diffmask(base, wrong):
    name = list(wrong)[-1]
    message = complaint(lambda: VisionDiffMask.for_classifier(base, **wrong))
    assert (name if not name.startswith("alpha") else "alpha") in message.splitlines()[0]


# ---------------------------------------------------------------- training


NUMBERS = {  # kind of run: settings that no run can use
    ClassifierSettings: {
        "lr": (-1e-3, 1e9, math.nan, math.inf, "high", None, True),
        "weight_decay": (-1.0, math.inf),
        "batch_size": (0, -4, 10**9, 2.5, "8", None),
        "num_epochs": (0, -1, math.nan, math.inf),
        "num_workers": (-1, 10**6),
        "log_every_n_steps": (0, 2**40),
        "warmup_steps": (-1, 10**12),
        "patience": (0, -3),
        "patch_dropout": (-0.1, 1.0, math.nan),
        "dataset": ("toi", None, 3),
        "size": ("huge",),
        "optimizer": ("adam",),
        "report_to": ("nobody",),
    },
    DiffMaskSettings: {
        "lr_placeholder": (-1.0, math.nan),
        "lr_alpha": (-1.0, math.inf),
        "adam_beta2": (-0.1, 1.0, math.nan),
        "gate_warmup_steps": (-1, 10**12),
        "sample_images": (-1, 10**9),
        "lr_decay": (-0.5, 2.0),
        "last_layer_share": (-0.5, 2.0),
        "eps": (0.0, -1.0, math.nan),
        "kl_quantile": (1.0, -0.5),
        "alpha": (-1.0, 1e6, math.nan),
        "mul_activation": (math.nan, math.inf),
        "base_model": ("ConvNeXt",),
    },
}
WRONG = [(kind, name, value) for kind, names in NUMBERS.items() for name, values in names.items() for value in values]


@pytest.mark.parametrize(("kind", "name", "value"), WRONG)
def test_settings_of_a_run(diffmask, toy, tmp_path, kind, name, value):
    chosen = settings(kind, **{name: value})
    train, model = (train_diffmask, diffmask) if kind is DiffMaskSettings else (train_classifier, diffmask.base)
    message = complaint(lambda: train(model, toy, toy, chosen, tmp_path / "out"))
    assert f"{name} is out of range" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"image_size": 24}, {"name": "digits", "image_size": 12}])
def test_pictures_that_a_diffmask_cannot_be_trained_on(diffmask, tmp_path, options):
    data = load_data(**{"name": "toy", "split": "train", "length": 40} | options)
    chosen = settings(DiffMaskSettings, "quick", max_steps=2, batch_size=8)
    message = complaint(lambda: train_diffmask(diffmask, data, data, chosen, tmp_path / "out"))
    assert "[B, 3, 12, 12]" in message and not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"image_size": 24}, "12×12 pixels"),
        ({"name": "digits", "image_size": 12}, "3 channels"),
        ({"grid_size": 4}, "10 classes"),
        ({"class_idx": 0}, "0 yellow"),
    ],
)
def test_pictures_and_labels_that_do_not_fit_a_classifier(base, tmp_path, options, got):
    data = load_data(**{"name": "toy", "split": "train", "image_size": 12, "length": 40} | options)
    chosen = settings(ClassifierSettings, "quick", max_steps=2, batch_size=8)
    message = complaint(lambda: train_classifier(base, data, data, chosen, tmp_path / "out"))
    assert got in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong", table({"nothing": None, "a name": "toy", "a list": [], "pictures": torch.zeros(4, 3, 12, 12)})
)
def test_what_is_no_dataset(diffmask, toy, tmp_path, wrong):
    jobs = ((train_classifier, diffmask.base, ClassifierSettings), (train_diffmask, diffmask, DiffMaskSettings))
    for train, model, kind in jobs:
        for pair in ((wrong, toy), (toy, wrong)):
            message = complaint(lambda: train(model, *pair, settings(kind, "quick", max_steps=1), tmp_path / "out"))  # noqa: B023
            assert "load_data" in message and not (tmp_path / "out").exists()
    for evaluate, model in ((evaluate_classifier, diffmask.base), (evaluate_diffmask, diffmask)):
        assert "load_data" in complaint(lambda: evaluate(model, wrong))  # noqa: B023


# ---------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def place(tmp_path_factory, base, toy):
    """A folder with a base, a DiffMask, a ConvNeXt, a finished run, own pictures and damaged ones."""
    root = tmp_path_factory.mktemp("place")
    base.save_pretrained(root / "base")
    model = load_classifier(root / "base")
    VisionDiffMask.for_classifier(model, normalize=True).save_pretrained(root / "mask")
    build_classifier("convnext", image_size=12, patch_size=2).save_pretrained(root / "convnext")
    shutil.copytree(root / "base", root / "run")
    (root / "run" / "settings.json").write_text("{}")
    for label in ("cat", "dog"):
        (root / "pictures" / label).mkdir(parents=True)
        for n in range(5):
            Image.new("RGB", (12, 12), (50 * n, 0, 0)).save(root / "pictures" / label / f"{n}.png")
    shutil.copytree(root / "pictures", root / "damaged")
    for file in (root / "damaged").rglob("*.png"):
        file.write_bytes(file.read_bytes()[:40])
    (root / "one" / "cat").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "file").write_text("something")
    floats(root / "nan.tif", math.nan)
    (root / "bomb.png").write_bytes(png(50_000, 50_000))
    return root


TRAIN = "train --from_pretrained base --dataset toy --image_size 12 --max_steps 1 --num_workers 0 --output_dir new"
BASE = "train-base --dataset toy --image_size 12 --max_steps 1 --num_workers 0 --output_dir new"
FOLDER = "train-base --dataset folder --image_size 12 --max_steps 1 --num_workers 0 --output_dir new"
SHOW = "explain --diffmask_checkpoint mask --dataset toy --sample_images 1 --output_dir new"
FILES = "explain --diffmask_checkpoint mask --output_dir new --images"
LINES = {  # name: (command line, words of the message)
    "misspelt job": ("trian", "did you mean 'train'?"),
    "job of another program": ("predict", "unknown job"),
    "option before the job": ("--dataset toy", "unknown job"),
    "misspelt option": ("train --datset toy", "did you mean '--dataset'?"),
    "option of another job": ("train --patience 3", "unknown option"),
    "stray word": ("train-base toy", "unknown option 'toy'"),
    "shortened option": ("train-base --batch 3", "did you mean '--batch_size'?"),
    "option without a value": ("train-base --lr", "expected one argument"),
    "misspelt dataset": ("train-base --dataset cifar", "did you mean 'CIFAR10'?"),
    "misspelt recipe": ("train --recipe quik", "did you mean 'quick'?"),
    "misspelt architecture": ("train-base --base_model Vit", "did you mean 'ViT'?"),
    "misspelt size": ("train-base --size smal", "did you mean 'small'?"),
    "misspelt optimizer": ("train-base --optimizer adamw", "did you mean 'AdamW'?"),
    "misspelt schedule": ("train-base --lr_schedule cosin", "did you mean 'cosine'?"),
    "misspelt split": ("explain --split tset", "did you mean 'test'?"),
    "number in words": (f"{BASE} --lr high", "'high'"),
    "half a number": (f"{BASE} --batch_size 2.5", "'2.5'"),
    "NaN lr": (f"{BASE} --lr nan", "lr is out of range"),
    "infinite lr": (f"{BASE} --lr inf", "lr is out of range"),
    "huge lr": (f"{BASE} --lr 1e9", "lr is out of range"),
    "huge batch": (f"{BASE} --batch_size 99999999999", "batch_size is out of range"),
    "no epochs": (f"{BASE} --num_epochs 0", "num_epochs is out of range"),
    "negative seed": (f"{BASE} --seed -1", "seed is out of range"),
    "huge seed": (f"{BASE} --seed 99999999999", "seed is out of range"),
    "huge grid": (f"{BASE} --grid_size 99", "grid_size is out of range"),
    "unknown class": (f"{BASE} --class_idx 6", "class_idx is out of range"),
    "zero pixels": (BASE.replace("12", "0"), "image_size is out of range"),
    "huge picture": (BASE.replace("12", "1000000"), "image_size is out of range"),
    "width and height": (BASE.replace("12", "12x12"), "'12x12'"),
    "zero patches": (f"{BASE} --patch_size 0", "do not tile"),
    "negative patches": (f"{BASE} --patch_size -4", "do not tile"),
    "patches that do not tile": (f"{BASE} --patch_size 5", "do not tile"),
    "too many patches": (f"{BASE.replace('12', '1024')} --patch_size 1", "number of patches"),
    "no patience": (f"{BASE} --patience 0", "patience is out of range"),
    "all patches dropped": (f"{BASE} --patch_dropout 1", "patch_dropout is out of range"),
    "too many processes": (f"{BASE} --num_workers 5000", "num_workers is out of range"),
    "shortcut in toy": (f"{BASE} --shortcut 0.5", "shortcut does not fit"),
    "zero eps": (f"{TRAIN} --eps 0", "eps is out of range"),
    "negative alpha": (f"{TRAIN} --alpha -1", "alpha is out of range"),
    "alpha below its floor": (f"{TRAIN} --alpha_min 50", "alpha is out of range"),
    "whole quantile": (f"{TRAIN} --kl_quantile 1", "kl_quantile is out of range"),
    "beta of one": (f"{TRAIN} --adam_beta2 1", "adam_beta2 is out of range"),
    "NaN gates": (f"{TRAIN} --mul_activation nan", "mul_activation is out of range"),
    "negative sample": (f"{TRAIN} --sample_images -1", "sample_images is out of range"),
    "no such base": (TRAIN.replace("base", "nowhere"), "cannot load the classifier"),
    "empty name of a base": (TRAIN.replace("_pretrained base", "_pretrained="), "cannot load the classifier"),
    "file as a base": (TRAIN.replace(" base", " file"), "cannot load the classifier"),
    "DiffMask as a base": (TRAIN.replace(" base", " mask"), "cannot load the classifier"),
    "ConvNeXt as a base": (TRAIN.replace(" base", " convnext"), "is not a vision transformer"),
    "base of other sizes": (TRAIN.replace("12", "24"), "12×12 pixels"),
    "base of other channels": (TRAIN.replace("toy", "digits"), "1 channel"),
    "base of other labels": (f"{TRAIN} --grid_size 2", "5 classes"),
    "base that counts something else": (f"{TRAIN} --class_idx 0", "red"),
    "labels that do not fit": ("eval-base --from_pretrained base --dataset folder --data_dir pictures", "2 classes"),
    "nothing to evaluate": ("eval-base", "nothing to evaluate"),
    "DiffMask to evaluate": ("eval-base --checkpoint mask --dataset toy", "cannot load the classifier"),
    "finished run, trained": (BASE.replace("new", "run"), "already holds a run"),
    "finished run, evaluated": (
        "eval-base --from_pretrained base --dataset toy --output_dir run",
        "already holds a run",
    ),
    "finished run, explained": (SHOW.replace("new", "run"), "already holds a run"),
    "file to write to": (BASE.replace("new", "file"), "the output folder is a file"),
    "folder under a file": (BASE.replace("new", "file/new"), "cannot save the run"),
    "explained under a file": (SHOW.replace("new", "file/new"), "cannot save the run"),
    "nothing to resume": (BASE.replace("new", "run") + " --checkpoint run/checkpoint-3", "nothing to resume"),
    "no DiffMask to resume": (TRAIN.replace("new", "run") + " --diffmask_checkpoint run", "nothing to resume"),
    "no own folder": (f"{FOLDER} --data_dir nowhere", "no such folder"),
    "empty folder": (f"{FOLDER} --data_dir empty", "too few class folders"),
    "one class": (f"{FOLDER} --data_dir one", "too few class folders"),
    "all pictures damaged": (f"{FOLDER} --data_dir damaged --skip_unreadable", "no picture for the train split"),
    "no ImageNet": (FOLDER.replace("folder", "ImageNet") + " --data_dir empty", "never downloaded"),
    "nothing to explain with": ("explain", "nothing to explain with"),
    "no such DiffMask": (SHOW.replace(" mask", " nowhere"), "cannot load the DiffMask"),
    "base as a DiffMask": (SHOW.replace(" mask", " base"), "cannot load the DiffMask"),
    "no such layer": (f"{SHOW} --layer 6", "no such layer"),
    "layer in words": (f"{SHOW} --layer last", "'last'"),
    "other pictures": (SHOW.replace("toy", "digits"), "not trained for this dataset"),
    "no such picture": (f"{FILES} none.png", "none.png"),
    "text as a picture": (f"{FILES} file", "cannot be read"),
    "folder as a picture": (f"{FILES} pictures", "cannot be read"),
    "NaN picture": (f"{FILES} nan.tif", "nan.tif"),
    "bomb": (f"{FILES} bomb.png", "decompression bomb"),
    "one damaged of two": (f"{FILES} pictures/cat/1.png damaged/cat/1.png", "damaged/cat/1.png"),
}


@pytest.mark.parametrize(("line", "expected"), table(LINES))
def test_mistakes_on_the_command_line(place, monkeypatch, capfd, line, expected):
    monkeypatch.chdir(place)
    monkeypatch.delenv("VDM_DATA_DIR", raising=False)
    before = contents(place)
    code = main(line.split())
    out, error = capfd.readouterr()
    assert code == 2 and out == "" and expected in error
    lines = error.splitlines()
    assert lines[0].startswith("error: ") and lines[-1].startswith("  what to do: ") and len(lines) == 5
    assert contents(place) == before  # nothing is written over, and nothing is left behind


@pytest.mark.parametrize("name", ["misspelt job", "NaN lr", "base as a DiffMask", "folder under a file", "bomb"])
def test_mistakes_in_a_process_of_their_own(place, monkeypatch, capfd, name):
    monkeypatch.chdir(place)
    line, expected = LINES[name]
    # forked, because a new Python needs seconds for its imports
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(line.split())))
    process.start()
    process.join(60)
    out, error = capfd.readouterr()
    assert process.exitcode == 2 and out == "" and expected in error and "Traceback" not in error


def test_a_mistake_as_a_program(place):
    """In a new Python, where every word on the screen counts."""
    line, expected = LINES["base as a DiffMask"]
    command = [sys.executable, "-m", "vdm_utils", *line.split()]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(command, cwd=place, env=paths, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and expected in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 5
