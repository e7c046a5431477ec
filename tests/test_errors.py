"""Whatever a user gets wrong ends in a VDMError that says what, where, expected, got, and what to do, in five lines."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vdm_utils import data, sources
from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError, unknown_name
from vdm_utils.metrics import smallest_masks
from vdm_utils.notebook import checkpoint, start
from vdm_utils.training import ClassifierSettings, DiffMaskSettings, settings
from vdm_utils.vit import build_classifier, load_classifier


def refused(call, *expected):
    """`call` raises a VDMError of at most five lines that contains every word of `expected`."""
    with pytest.raises(VDMError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) <= 5 and "what to do: " in message and "got: " in message
    for words in expected:
        assert words in message


# ---------------------------------------------------------------- the message


def test_a_message_has_its_parts_in_order():
    error = VDMError("it broke", where="here", expected="a", got=torch.zeros(2), fix="mend it")
    assert str(error).splitlines() == [
        "it broke", "  where: here", "  expected: a", "  got: tensor([0., 0.])", "  what to do: mend it",
    ]  # fmt: skip
    assert isinstance(error, ValueError) and str(VDMError("it broke", got=0)) == "it broke\n  got: 0"
    assert len(str(VDMError("x", got="y" * 10_000))) < 350


def test_a_message_stays_short_whatever_was_got():
    assert len(str(VDMError("it broke", where="here", expected="a", got=torch.zeros(30, 3), fix="b")).splitlines()) <= 5


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("toi", "toy"), ("cifar10", "CIFAR10"), ("CIFAR_QA", "CIFAR10_QA"), ("Digits", "digits"), (7, None)],
)
def test_the_nearest_name_is_suggested(name, nearest):
    message = str(unknown_name("dataset", name, data.DATASETS, "load_data"))
    assert all(known in message for known in data.DATASETS)
    assert f"did you mean {nearest!r}?" in message if nearest else "choose one from the list" in message


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("toi", {}, "did you mean 'toy'"),
        ("toy", {"split": "trian"}, "did you mean 'train'"),
        ("toy", {"augment": ["blurr"]}, "did you mean 'blur'"),
        *[("toy", {"grid_size": wrong}, "from 2 to 8") for wrong in (0, 1, 9, -3, 2.5, True, "3", None)],
        *[("toy", {"class_idx": wrong}, "from 0 to 5") for wrong in (-1, 6, 0.5, True)],
        ("digits_QA", {"class_idx": 10}, "from 0 to 9"),
        *[("toy", {"image_size": wrong}, "image_size") for wrong in (0, -12, 2, 12.0, (12, 12))],
        ("toy", {"shortcut": 0.5}, "shortcut does not fit"),
        ("shapes", {"shortcut": 1.5}, "shortcut does not fit"),
        ("folder", {"data_dir": "nowhere"}, "no such folder"),
        ("ImageNet", {"data_dir": "nowhere"}, "never downloaded"),
        *[("toy", {"seed": wrong}, "seed is out of range") for wrong in (-1, 2**32, 1.5, None)],
        ("toy", {"length": 0}, "length is out of range"),
        ("digits_QA", {"split": "validation", "grid_size": 8}, "use a smaller grid_size"),
    ],
)
def test_wrong_options_of_a_dataset(name, options, expected):
    refused(lambda: load_data(name, **{"split": "train"} | options), expected)


def damage_nothing(folder):
    shutil.rmtree(folder.parent)


def damage_classes(folder):
    for label in range(6, 10):
        shutil.rmtree(folder / f"c{label}")


def damage_files(folder):
    for file in (folder / "c4").iterdir():
        file.unlink()


def damage_text(folder):
    (folder / "c4" / "0.jpg").write_text("not a picture")


def damage_end(folder):
    file = folder / "c4" / "0.jpg"
    file.write_bytes(file.read_bytes()[:-200])


def damage_size(folder):
    Image.new("RGB", (16, 8)).save(folder / "c4" / "0.jpg")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_nothing, ["is not here and cannot be downloaded", "VDM_DATA_DIR"]),
        (damage_classes, ["half unpacked", "got: 6"]),
        (damage_files, ["holds no image", "c4"]),
        (damage_text, ["cannot be read", "c4/0.jpg"]),
        (damage_end, ["cannot be read", "c4/0.jpg"]),
        (damage_size, ["different sizes", "(8, 8)", "(8, 16)"]),
    ],
)
def test_damaged_image_folders(tmp_path, monkeypatch, damage, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VDM_DATA_DIR", raising=False)

    def no_download(root, train, download):
        raise RuntimeError("no network")

    monkeypatch.setattr(sources, "CIFAR10", no_download)
    generator = np.random.default_rng(0)
    for label in range(10):
        folder = tmp_path / "here" / "cifar10" / "train" / f"c{label}"
        folder.mkdir(parents=True)
        for n in range(2):
            Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{n}.jpg")
    assert len(load_data("CIFAR10", "train", data_dir="here")) == 18
    damage(folder.parent)
    refused(lambda: load_data("CIFAR10", "train", data_dir="here"), *expected)


# ---------------------------------------------------------------- models and their input


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.zeros(2, 3, 12, 13), "[2, 3, 12, 13]"),
        (torch.zeros(2, 1, 12, 12), "[2, 1, 12, 12]"),
        (torch.zeros(3, 12, 12), "[3, 12, 12]"),
        (torch.full((2, 3, 12, 12), math.nan), "NaN or infinite"),
        (torch.full((2, 3, 12, 12), -math.inf), "NaN or infinite"),
        (torch.zeros(2, 3, 12, 12, dtype=torch.uint8), "torch.uint8"),
        (np.zeros((2, 3, 12, 12), dtype=np.float32), "float32"),
        ([[0.0]], "list"),
    ],
    ids=["width", "channels", "no batch", "NaN", "infinite", "integers", "numpy", "a list"],
)
def test_wrong_images(diffmask, wrong, got):
    for call in (diffmask.view.encode, diffmask.explain, lambda images: diffmask(images, layer=0)):
        refused(lambda call=call: call(wrong), "[B, 3, 12, 12]", f"got: {got}")


@pytest.mark.parametrize("layer", [-1, 6, 2.0, "last", True])
def test_wrong_layers(diffmask, pictures, layer):
    refused(lambda: diffmask.explain(pictures, layer=layer), "0..5", repr(layer))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 0.1},
        {"alpha": -1.0},
        {"temperature": 0.0},
        {"low": 0.1},
        {"eps": -1.0},
        {"hidden_size": 8},
    ],
    ids=str,
)
def test_wrong_settings_of_a_diffmask(base, pictures, wrong):
    refused(lambda: VisionDiffMask.for_classifier(base, **wrong).explain(pictures), next(iter(wrong)))


def test_a_diffmask_without_a_base_says_so(diffmask, pictures):
    alone = VisionDiffMask(diffmask.config)
    for call in (lambda: alone.base, lambda: alone.explain(pictures), lambda: alone(pictures, layer=0)):
        refused(call, "no classifier attached", "for_classifier")


@pytest.mark.parametrize("load", [load_classifier, VisionDiffMask.from_pretrained])
@pytest.mark.parametrize("damage", ["missing", "empty", "no weights", "broken weights", "pickle only"])
def test_folders_that_cannot_be_loaded(base, diffmask, tmp_path, load, damage):
    folder = tmp_path / "model"
    (base if load is load_classifier else diffmask).save_pretrained(folder)
    load(folder)
    weights = folder / "model.safetensors"
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage == "empty":
        (folder / "config.json").unlink(), weights.unlink()
    elif damage == "broken weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
        if damage == "pickle only":
            torch.save(base.state_dict(), folder / "pytorch_model.bin")
    refused(lambda: load(folder), "cannot load the", str(folder))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"architecture": "vitt"}, "did you mean 'vit'"),
        ({"size": "smal"}, "did you mean 'small'"),
        ({"image_size": 48, "patch_size": 20}, "do not tile"),
        ({"image_size": (48, 40)}, "do not tile"),
        ({"patch_size": 0}, "do not tile"),
    ],
)
def test_classifiers_that_cannot_be_built(options, expected):
    refused(lambda: build_classifier(**options), expected)


# ---------------------------------------------------------------- training and notebooks


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *[(ClassifierSettings, {"lr": wrong}) for wrong in (-1e-3, math.nan, math.inf)],
        *[(ClassifierSettings, {name: 0}) for name in ("batch_size", "num_epochs", "log_every_n_steps")],
        *[(DiffMaskSettings, {"eps": wrong}) for wrong in (0, -0.1, math.nan)],
        *[(DiffMaskSettings, {"kl_quantile": wrong}) for wrong in (-0.1, 1.0)],
        *[(DiffMaskSettings, {name: -1}) for name in ("lr_alpha", "lr_placeholder", "batch_size")],
        *[(DiffMaskSettings, {"alpha": wrong}) for wrong in (-1, 201, math.nan)],
        (DiffMaskSettings, {"alpha_min": 30.0}),
        (DiffMaskSettings, {"alpha_min": 0.0, "log_multiplier": True}),
        (ClassifierSettings, {"batch_size": 2.5}),
        (ClassifierSettings, {"num_workers": -1}),
        (ClassifierSettings, {"patch_dropout": 2.0}),
        (ClassifierSettings, {"patch_masking": -0.1}),
        (DiffMaskSettings, {"block_share": 1.5}),
        (DiffMaskSettings, {"block_size": 0}),
        (ClassifierSettings, {"weight_decay": -1.0}),
        (ClassifierSettings, {"warmup_steps": -1}),
        (ClassifierSettings, {"optimizer": "SGD"}),
        (DiffMaskSettings, {"adam_beta2": 1.5}),
        (DiffMaskSettings, {"gate_warmup_steps": -1}),
        (DiffMaskSettings, {"mul_activation": math.nan}),
    ],
)
def test_wrong_numbers_of_a_run(kind, wrong):
    (name,) = set(wrong) - {"log_multiplier"}
    refused(lambda: kind(**wrong).validate(), "alpha" if name.startswith("alpha") else name, "out of range")


def test_wrong_names_of_a_notebook(diffmask, monkeypatch):
    refused(lambda: settings(DiffMaskSettings, "quik"), "did you mean 'quick'")
    refused(lambda: checkpoint("toi", "base"), "toi/base", "name a task")
    monkeypatch.setenv("VDM_PROFILE", "papr")
    refused(start, "did you mean 'paper'", "$VDM_PROFILE")


def test_every_mask_can_be_tried_on_small_grids_only():
    large = VisionDiffMask.for_classifier(build_classifier(image_size=20, patch_size=4))
    refused(lambda: smallest_masks(large, torch.zeros(3, 20, 20)), "at most 16", "25")
