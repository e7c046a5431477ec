"""The data is what it says it is: counting tasks with a true explanation, equal on every machine."""

import hashlib
import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from sklearn.datasets import load_digits
from torch.nn.functional import pad

from vdm_utils import data, sources
from vdm_utils import pictures as pictures_module
from vdm_utils.__main__ import parse
from vdm_utils.data import AUGMENTATIONS, augment_batch, hashed_uniform, load_data
from vdm_utils.errors import VDMError
from vdm_utils.pictures import move_pixels
from vdm_utils.settings import ClassifierSettings
from vdm_utils.shapes import SHAPES, inside

COLOURS = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)]  # red … cyan


def pixels(batch):
    return ((batch["pixel_values"] + 1) * 127.5).round().to(torch.uint8)


def tiles(images, side):
    """[B, C, H, W] → [B, rows, cols, C, h, w]."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, side, height // side, side, width // side)
    return cut.permute(0, 2, 4, 1, 3, 5)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---------------------------------------------------------------- counting tasks


@pytest.mark.parametrize(
    ("grid_size", "class_idx", "cell"), [(2, 0, 16), (3, 3, 4), (4, 1, 1), (5, 2, 7), (6, 4, 3), (7, 5, 2), (8, 0, 5)]
)
def test_toy_grids_count_one_colour(grid_size, class_idx, cell):
    toy = load_data("toy", "test", grid_size=grid_size, class_idx=class_idx, image_size=grid_size * cell, length=50)
    assert toy.image_size == (grid_size * cell,) * 2 and toy.patch_size == cell and len(toy) == 50
    assert toy.num_labels == grid_size**2 + 1 == len(toy.id2label)
    batch = toy.batch(range(50))
    cells = tiles((batch["pixel_values"] + 1) / 2, grid_size)
    colour = cells[..., 0, 0]  # [B, rows, cols, 3]
    assert torch.equal(cells, colour[..., None, None].expand_as(cells))  # every cell is of one colour
    is_colour = (colour[..., None, :] == torch.tensor(COLOURS).float()).all(-1)  # [B, rows, cols, 6]
    assert (is_colour.sum(-1) == 1).all()
    assert torch.equal(batch["truth"], is_colour[..., class_idx].float())
    assert torch.equal(batch["labels"], batch["truth"].sum((1, 2)).long())


def test_toy_is_drawn_uniformly():
    toy = load_data("toy", "train", image_size=3)  # one pixel per cell
    batch = toy.batch(range(10_000))
    assert chisquare(batch["labels"].bincount(minlength=10)).pvalue > 0.01  # no count is rare
    assert chisquare(batch["truth"].sum(0).flatten()).pvalue > 0.01  # nor is a place
    others = ((pixels(batch) // 255) * torch.tensor([1, 2, 4])[:, None, None]).sum(1)[batch["truth"] == 0]
    assert chisquare(others.bincount()[[1, 2, 4, 5, 6]]).pvalue > 0.01  # nor one of the five other colours


def test_digit_grids_count_one_digit():
    digits, grids = load_data("digits", "test"), load_data("digits_QA", "test", class_idx=7, length=2000)
    source = {image.numpy().tobytes(): int(label) for image, label in zip(digits.images, digits.classes)}
    batch = grids.batch(range(2000))
    assert grids.image_size == (48, 48) and grids.num_channels == 1
    assert chisquare(batch["labels"].bincount(minlength=10)).pvalue > 0.01
    assert torch.equal(batch["labels"], batch["truth"].sum((1, 2)).long())
    for grid, truth in zip(tiles(pixels(batch), 3)[:200], batch["truth"]):
        shown = [tile.numpy().tobytes() for row in grid for tile in row]
        assert len(set(shown)) == 9  # no picture twice
        assert [source[tile] == 7 for tile in shown] == truth.flatten().bool().tolist()
    used = {tile.numpy().tobytes() for tile in tiles(pixels(batch), 3).flatten(0, 2)}
    assert len(used) == len(source)  # and every picture is used


def test_digits_are_those_of_scikit_learn():
    splits = [load_data("digits", split) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [1078, 270, 449]  # 60/15/25 %, together all of them: disjoint
    ours = [(image[0, ::2, ::2].numpy().tobytes(), int(y)) for s in splits for image, y in zip(s.images, s.classes)]
    digits = load_digits()
    theirs = [((x * 255 / 16).round().astype(np.uint8).tobytes(), int(y)) for x, y in zip(digits.images, digits.target)]
    assert sorted(ours) == sorted(theirs)
    doubled = splits[0].images[0, 0]
    assert torch.equal(doubled, doubled[::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1))
    values = splits[0].batch(range(1078))["pixel_values"]
    assert values.shape == (1078, 1, 16, 16) and (values.min(), values.max()) == (-1, 1)
    assert load_data("digits", "test", image_size=24)[0]["pixel_values"].shape == (1, 24, 24)


# ---------------------------------------------------------------- an item depends only on (seed, split, index, epoch)


@pytest.mark.parametrize("augment", [(), AUGMENTATIONS])
@pytest.mark.parametrize("name", ["toy", "shapes", "digits", "digits_QA", "shapes_QA"])
def test_an_item_is_the_same_however_it_is_asked_for(name, augment):
    drawn, again = (load_data(name, "train", augment=augment, image_size=24) for _ in range(2))
    batch, backwards = drawn.batch(range(6)), again.batch(range(5, -1, -1))
    assert same(batch, {key: value.flip(0) for key, value in backwards.items()})
    items, listed = [drawn[i] for i in range(6)], again.__getitems__(list(range(6)))
    for collected in (items, listed):
        assert same(batch, torch.utils.data.default_collate(collected))
    assert same(drawn[-1], drawn[len(drawn) - 1])


@pytest.mark.parametrize("name", ["toy", "shapes", "digits_QA", "shapes_QA"])
def test_seeds_and_splits_draw_other_pictures(name):
    drawn = [load_data(name, split, seed=seed).batch(range(20)) for split in data.SPLITS for seed in (123, 124)]
    for first in range(6):
        for second in range(first):
            assert not torch.equal(drawn[first]["truth"], drawn[second]["truth"])


@pytest.mark.parametrize(("name", "checksum"), [("toy", "0247f37cb13c528f"), ("digits_QA", "34951548bf26dfc9")])
def test_pictures_are_equal_on_every_machine(name, checksum):
    batch = load_data(name, "validation", class_idx=5, seed=7).batch([0, 1, 999])
    content = pixels(batch).numpy().tobytes() + bytes(batch["labels"].tolist())
    assert hashlib.sha256(content).hexdigest()[:16] == checksum


def test_hashed_uniform_is_uniform_in_every_direction():
    index = np.arange(4000)
    streams = np.concatenate(
        [hashed_uniform(seed, stream, index, 3) for seed in (0, 2**32 - 1) for stream in (0, 1)], 1
    )
    assert streams.shape == (4000, 12) and streams.min() >= 0 and streams.max() < 1
    assert np.abs(np.corrcoef(streams.T) - np.eye(12)).max() < 0.06  # columns, streams and seeds: 3.8 sigma of 1/√4000
    assert np.abs(np.corrcoef(streams[1:].T, streams[:-1].T)).max() > 0.99  # of itself only …
    assert np.abs(np.corrcoef(streams[1:].T, streams[:-1].T)[:12, 12:]).max() < 0.06  # … neighbours are unrelated
    assert all(chisquare(np.histogram(column, 20, (0, 1))[0]).pvalue > 0.001 for column in streams.T)


# ---------------------------------------------------------------- image folders and downloads


def write_folder(root, part, per_class, size=8, mode="RGB"):
    """`<root>/<part>/c0 … c9/*.jpg`: picture n of class c is a solid 20·c, in its last channel 5·n."""
    for label in range(10):
        folder = root / part / f"c{label}"
        folder.mkdir(parents=True)
        for n in range(per_class):
            Image.new(mode, (size, size), (20 * label, 0, 5 * n) if mode == "RGB" else 20 * label).save(
                folder / f"{n:03}.jpg", quality=100, subsampling=0
            )


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty working folder where nothing can be downloaded; returns the calls of torchvision's datasets."""
    calls = []

    def dataset(root, train, download):
        calls.append((root, download))
        raise RuntimeError("no files")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VDM_DATA_DIR", raising=False)
    monkeypatch.setattr(sources, "CIFAR10", dataset)
    monkeypatch.setattr(sources, "MNIST", dataset)
    return calls


@pytest.fixture
def cifar(offline, tmp_path):
    write_folder(tmp_path / "elsewhere" / "cifar10", "train", 20)
    write_folder(tmp_path / "elsewhere" / "cifar10", "test", 3)
    return tmp_path / "elsewhere"


def test_image_folder_is_split_without_overlap(cifar):
    seen = {}
    for split, count in [("train", 180), ("validation", 20), ("test", 30)]:
        pictures = load_data("CIFAR10", split, data_dir=cifar)
        assert len(pictures) == count and pictures.image_size == (8, 8)
        assert pictures.id2label == {n: f"c{n}" for n in range(10)}
        batch = pictures.batch(range(count))
        middle = pixels(batch)[:, :, 4, 4].float()
        assert torch.equal((middle[:, 0] / 20).round().long(), batch["labels"])
        seen[split] = {(int(y), round(float(blue) / 5)) for y, blue in zip(batch["labels"], middle[:, 2])}
        assert len(seen[split]) == count
    assert not seen["train"] & seen["validation"] and len(seen["train"] | seen["validation"]) == 200
    assert seen["test"] == {(label, n) for label in range(10) for n in range(3)}
    other_seed = load_data("CIFAR10", "validation", data_dir=cifar, seed=9)  # a seed must never mix the splits
    assert torch.equal(other_seed.images, load_data("CIFAR10", "validation", data_dir=cifar).images)


@pytest.mark.parametrize("found_by", ["data_dir", "VDM_DATA_DIR", "data"])
def test_where_pictures_are_looked_for(cifar, offline, monkeypatch, found_by):
    options = {"data_dir": cifar} if found_by == "data_dir" else {"data_dir": "nowhere"}
    if found_by == "VDM_DATA_DIR":
        monkeypatch.setenv("VDM_DATA_DIR", str(cifar))
    elif found_by == "data":
        cifar.rename("data")
    assert len(load_data("CIFAR10", "test", **options)) == 30
    assert not offline  # torchvision was not even asked


def test_grids_of_a_folder(cifar):
    grids = load_data("CIFAR10_QA", "train", data_dir=cifar, grid_size=4, class_idx=9, image_size=48, length=40)
    batch = grids.batch(range(40))
    assert batch["pixel_values"].shape == (40, 3, 48, 48) and grids.id2label[16] == "16 × c9"
    red = tiles(pixels(batch), 4)[..., 0, 6, 6]  # [B, rows, cols]
    assert torch.equal(red > 170, batch["truth"].bool())


def test_grey_folder_and_torchvision_files(offline, tmp_path, monkeypatch):
    write_folder(tmp_path / "data" / "mnist", "test", 1, mode="L")
    grey = load_data("MNIST", "test")
    assert grey.num_channels == 1 and grey.images[:, 0, 0, 0].tolist() == [20 * n for n in range(10)]

    class Torchvision:
        classes = list("abcdefghij")
        targets = [n % 10 for n in range(20)]

        def __init__(self, root, train, download):
            offline.append((root, download))
            self.data = np.zeros((20, 4, 4, 3), dtype=np.uint8)  # [M, H, W, C]
            self.data[:, 0, 3, 1] = np.arange(20)
            if root != "b" and not download:
                raise RuntimeError("not here")

    monkeypatch.setattr(sources, "CIFAR10", Torchvision)
    monkeypatch.setenv("VDM_DATA_DIR", "b")
    found = load_data("CIFAR10", "test", data_dir="a")
    assert offline == [("a", False), ("b", False)]  # in this order, and nothing was downloaded
    assert found.images[:, 1, 0, 3].tolist() == list(range(20)) and found.id2label[9] == "j"
    monkeypatch.delenv("VDM_DATA_DIR")
    load_data("CIFAR10", "test", data_dir="a")
    places = [("a", False), ("data", False), (str(sources.PROJECT_DATA), False)]
    assert offline[2:] == [*places, ("a", True)]  # only when there is nothing anywhere


@pytest.mark.parametrize(("name", "mode"), [("CIFAR10", "RGB"), ("MNIST", "L")])
def test_damaged_files_of_an_image_folder_are_named_or_left_out(offline, tmp_path, caplog, name, mode):
    for part in ("train", "test"):
        write_folder(tmp_path / name.lower(), part, 20, mode=mode)
    damaged = {"train": ("c3/007.jpg", "c9/019.jpg"), "test": ("c0/000.jpg",)}
    for part, files in damaged.items():
        for file in files:
            (tmp_path / name.lower() / part / file).write_bytes(b"damaged")
    with pytest.raises(VDMError, match="c0/000.jpg"):
        load_data(name, "test", data_dir=tmp_path)
    kept = [load_data(name, split, data_dir=tmp_path, skip_unreadable=True) for split in data.SPLITS]
    assert len(kept[0]) + len(kept[1]) == 198 and len(kept[2]) == 199
    assert all(file in caplog.text for files in damaged.values() for file in files)
    for found in kept:  # the labels of the others stay theirs
        red = pixels(found.batch(range(len(found))))[:, 0, 4, 4].float()
        assert torch.equal((red / 20).round().long(), found.classes)
    grids = load_data(f"{name}_QA", "test", data_dir=tmp_path, grid_size=2, length=4, skip_unreadable=True)
    assert len(grids.pictures) == 199
    for file in tmp_path.rglob("*.jpg"):
        file.write_bytes(b"damaged")
    with pytest.raises(VDMError, match="no image can be read"):
        load_data(name, "test", data_dir=tmp_path, skip_unreadable=True)


def test_what_comes_from_torchvision_has_no_files_to_leave_out(cifar, tmp_path, caplog):
    for line, works in (("--data_dir elsewhere", True), ("--data_dir nowhere", False)):
        for dataset in ("CIFAR10", "CIFAR10_QA"):
            caplog.clear()
            parse(ClassifierSettings, "train-base", f"--dataset {dataset} {line} --skip_unreadable".split())
            assert (not caplog.records) == works
            assert works or "--skip_unreadable has no effect here" in caplog.text


@pytest.mark.parametrize(("part", "split"), [("train", "train"), ("train", "validation"), ("test", "test")])
def test_a_half_unpacked_image_folder_is_pointed_out(cifar, caplog, monkeypatch, part, split):
    few = {"train": 20, "test": 3}
    monkeypatch.setattr(sources, "PUBLISHED", {"CIFAR10": few})
    load_data("CIFAR10", split, data_dir=cifar)
    assert not caplog.records  # nothing is missing
    (cifar / "cifar10" / part / "c7" / "000.jpg").unlink()
    assert len(load_data("CIFAR10", split, data_dir=cifar)) > 0
    (message,) = (record.getMessage() for record in caplog.records)
    assert f"{few[part] - 1} pictures in c7" in message and f"{few[part]} per class" in message
    assert f"cifar10/{part}" in message


def test_an_image_folder_without_a_class_is_refused(cifar):
    for half in ("train", "test"):
        shutil.rmtree(cifar / "cifar10" / half / "c9")
        with pytest.raises(VDMError, match="half unpacked"):
            load_data("CIFAR10", "train" if half == "train" else "test", data_dir=cifar)
        (cifar / "cifar10" / half / "c9").mkdir()
    with pytest.raises(VDMError, match="a class folder holds no image"):
        load_data("CIFAR10", "train", data_dir=cifar)


# ---------------------------------------------------------------- drawn shapes


def test_shapes_stand_out_and_their_mask_is_exact():
    shapes = load_data("shapes", "test")
    batch = shapes.batch(range(400))
    image, mask = batch["pixel_values"], batch["truth"].bool()
    assert image.shape == (400, 3, 32, 32) and mask.shape == (400, 32, 32) and shapes.num_labels == 10
    assert chisquare(shapes.classes.bincount(minlength=10)).pvalue > 0.01
    assert torch.equal(shapes.classes[:400], batch["labels"])
    area = mask.float().mean((1, 2))
    assert area.min() > 0.02 and area.max() < 0.5 and not mask.all(0).any() and mask.any(0).float().mean() > 0.85
    for picture, object_ in zip(image, mask):  # one colour with some grain inside, many outside
        assert picture[:, object_].std(1).max() < 0.13 < picture[:, ~object_].std(1).max()


def test_every_shape_has_its_own_form():
    grid = (torch.arange(200) - 99.5) / 99.5
    forms = torch.stack([inside(kind, grid[None, :], grid[:, None]) for kind in range(len(SHAPES))])
    disc = grid[None, :] ** 2 + grid[:, None] ** 2 <= 1.1
    assert not (forms & ~disc).any()
    shared = (forms[:, None] & forms[None]).sum((2, 3)) / (forms[:, None] | forms[None]).sum((2, 3))
    assert (shared - torch.eye(len(SHAPES))).max() < 0.85
    area = forms.sum((1, 2)) * (2 / 199) ** 2 / np.pi  # of a disc of radius 1, in units of π
    by_name = dict(zip(SHAPES, area.tolist()))
    expected = {"circle": 0.85**2, "ring": 0.95**2 - 0.55**2, "half moon": 0.9**2 / 2, "square": 1.4**2 / np.pi,
                "triangle": 3 * 3**0.5 / 4 / np.pi, "cross": (4 * 0.54 * 0.9 - 0.54**2) / np.pi,
                "star": 5 * 0.42 * np.sin(np.pi / 5) / np.pi}  # fmt: skip
    for name, value in expected.items():
        assert by_name[name] == pytest.approx(value, rel=0.02), name


def test_the_shortcut_gives_the_class_away_in_training_only():
    plain, cheat = load_data("shapes", "train"), load_data("shapes", "train", shortcut=0.7)
    index = np.arange(500)
    before, after, tagged = pixels(plain.batch(index)), pixels(cheat.batch(index)), cheat.tagged(index)
    assert 0.6 < tagged.float().mean() < 0.8 and not plain.tagged(index).any()
    changed = (before != after).any(1)  # [B, H, W]
    assert not changed[~tagged].any() and changed[tagged].flatten(1).any(1).all()
    assert changed[tagged].sum((1, 2)).max() <= 16 and not changed[:, 4:28].any() and not changed[:, :, 4:28].any()
    colours = {}
    for image, label, where in zip(after[tagged], cheat.batch(index)["labels"][tagged].tolist(), changed[tagged]):
        colours.setdefault(label, set()).add(tuple(image[:, where][:, 0].tolist()))
    assert len(colours) == 10 and all(len(seen) == 1 for seen in colours.values())  # one colour per class …
    assert len(set.union(*colours.values())) == 10  # … and another one for each
    assert same(
        load_data("shapes", "test").batch(range(50)), load_data("shapes", "test", shortcut=1.0).batch(range(50))
    )
    assert load_data("shapes", "validation", shortcut=1.0).tagged(index).all()


# ---------------------------------------------------------------- sizes that do not fit the grid


def test_a_toy_grid_fills_an_image_that_it_does_not_divide():
    toy = load_data("toy", "test", image_size=224, length=20)
    batch = toy.batch(range(20))
    assert batch["pixel_values"].shape == (20, 3, 224, 224) and toy.patch_size == 16
    small = load_data("toy", "test", image_size=3, length=20).batch(range(20))
    assert torch.equal(small["truth"], batch["truth"])
    for cell, pixel in [(0, 0), (0, 74), (1, 75), (1, 149), (2, 150), (2, 223)]:
        assert torch.equal(batch["pixel_values"][:, :, pixel, pixel], small["pixel_values"][:, :, cell, cell])


def test_a_grid_of_pictures_is_scaled_as_a_whole():
    native, scaled = (load_data("digits_QA", "test", image_size=size, length=20) for size in (None, 224))
    small, large = native.batch(range(20)), scaled.batch(range(20))
    assert large["pixel_values"].shape == (20, 1, 224, 224) and torch.equal(small["truth"], large["truth"])
    back = torch.nn.functional.interpolate(large["pixel_values"], size=48, mode="area")
    assert (back - small["pixel_values"]).abs().mean() < 0.12
    digits = load_data("digits", "train", image_size=32)
    assert digits.images.shape[-1] == 16 and digits[0]["pixel_values"].shape == (1, 32, 32)  # scaled when asked for


# ---------------------------------------------------------------- a user's own folder, and ImageNet


def paint(file, colour=(200, 30, 30), size=(40, 30), mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file)
    return file


@pytest.fixture
def own(tmp_path):
    """20 red and 20 blue pictures, each of its own size, and things that are none."""
    for n in range(20):
        paint(tmp_path / "own" / "red" / f"{n}.png", (255 - n, 0, 0), (30 + n, 50 - n))
        paint(tmp_path / "own" / "blue" / f"{n}.png", (0, 0, 255 - n), (50 - n, 30 + n))
    (tmp_path / "own" / "red" / "notes.txt").write_text("not a picture")
    (tmp_path / "own" / "red" / "._0.png").write_text("hidden")
    (tmp_path / "own" / ".cache").mkdir()
    return tmp_path / "own"


def test_own_folder(own):
    seen = []
    for split, count in [("train", 32), ("validation", 4), ("test", 4)]:
        pictures = load_data("folder", split, data_dir=own, image_size=24)
        assert len(pictures) == count and pictures.id2label == {0: "blue", 1: "red"}
        batch = pictures.batch(range(count))
        assert batch["pixel_values"].shape == (count, 3, 24, 24)
        middle = pixels(batch)[:, :, 12, 12]
        assert torch.equal(middle[:, 0] > middle[:, 2], batch["labels"].bool())
        assert batch["labels"].sum() == count // 2  # every class in every split
        seen += [tuple(colour) for colour in middle.tolist()]
    assert len(seen) == len(set(seen)) == 40  # no picture is in two splits
    assert load_data("folder", "test", data_dir=own).image_size == (224, 224)
    grids = load_data("folder_QA", "train", data_dir=own, image_size=50, grid_size=3, class_idx=1, length=30)
    batch = grids.batch(range(30))
    red = pixels(batch)[:, 0, 8::17, 8::17] > 100
    assert batch["pixel_values"].shape == (30, 3, 50, 50) and torch.equal(red, batch["truth"].bool())


def test_own_folder_with_its_own_splits(own):
    for split in ("train", "val", "test"):
        for name in ("red", "blue"):
            for n in range(10 if split == "train" else 3):
                paint(own.parent / "splits" / split / name / f"{split}{n}.png")
    root = own.parent / "splits"
    stems = {s: {f.stem for f in load_data("folder", s, data_dir=root).files} for s in data.SPLITS}
    assert [len(stems[s]) for s in data.SPLITS] == [10, 3, 3]
    assert stems["validation"] == {"val0", "val1", "val2"} and stems["test"] == {"test0", "test1", "test2"}
    (root / "val").rename(root / "unused")
    stems = {s: {f.stem for f in load_data("folder", s, data_dir=root).files} for s in data.SPLITS}
    assert len(stems["train"]) < 10 <= len(stems["train"] | stems["validation"])
    assert all(stem.startswith("train") for stem in stems["validation"]) and len(stems["test"]) == 3


def test_imagenet_layout(tmp_path):
    for part, count in (("train", 10), ("val", 2)):
        for wnid in ("n01", "n02"):
            for n in range(count):
                paint(tmp_path / "imagenet" / part / wnid / f"{part}{n}.JPEG")
    loaded = {split: load_data("ImageNet", split, data_dir=tmp_path, image_size=32) for split in data.SPLITS}
    assert [len(loaded[split]) for split in data.SPLITS] == [18, 2, 4] and loaded["test"].id2label == {
        0: "n01",
        1: "n02",
    }
    assert loaded["test"][3]["pixel_values"].shape == (3, 32, 32)
    assert all(f.stem.startswith("val") for f in loaded["test"].files)
    assert all(f.stem.startswith("train") for f in loaded["validation"].files)
    (tmp_path / "imagenet" / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\n")
    assert load_data("ImageNet", "test", data_dir=tmp_path).id2label == {0: "tench", 1: "goldfish"}


def test_pictures_of_every_mode(tmp_path):
    red = (250, 0, 0)
    files = {
        "grey.png": ("L", 128, (128, 128, 128)), "bits.png": ("1", 1, (255, 255, 255)), "cmyk.jpg": ("CMYK", (0, 255, 255, 5), red),
        "clear.png": ("RGBA", (9, 9, 9, 0), (255, 255, 255)), "half.png": ("LA", (0, 255), (0, 0, 0)),
        "deep.png": ("I;16", 128 * 256, (128, 128, 128)), "palette.gif": ("P", 0, None), "plain.webp": ("RGB", red, red),
    }  # fmt: skip
    for name, (mode, colour, expected) in files.items():
        image = sources.read_image(paint(tmp_path / name, colour, mode=mode))
        assert image.mode == "RGB" and image.size == (40, 30), name
        if expected:
            assert np.abs(np.asarray(image)[15, 20].astype(int) - expected).max() < 12, name
    sideways = Image.new("RGB", (40, 30))
    exif = sideways.getexif()
    exif[0x0112] = 6  # turned by a quarter
    sideways.save(tmp_path / "turned.jpg", exif=exif)
    assert sources.read_image(tmp_path / "turned.jpg").size == (30, 40)
    assert sources.read_image(tmp_path / "plain.webp", channels=1).mode == "L"


def test_damaged_files_are_named_or_left_out(own, caplog):
    whole = (own / "red" / "3.png").read_bytes()
    (own / "red" / "3.png").write_bytes(whole[: len(whole) // 2])
    (own / "blue" / "5.png").write_bytes(b"")
    with pytest.raises(VDMError, match=r"(3|5)\.png"):
        for split in data.SPLITS:
            found = load_data("folder", split, data_dir=own, image_size=8)
            found.batch(range(len(found)))
    kept = [load_data("folder", split, data_dir=own, image_size=8, skip_unreadable=True) for split in data.SPLITS]
    assert sum(map(len, kept)) == 38 and "3.png" in caplog.text and "5.png" in caplog.text
    for found in kept:
        found.batch(range(len(found)))


# ---------------------------------------------------------------- augmentations


def test_the_truth_moves_with_its_picture():
    # where a shape is drawn white on black, picture and truth are the same thing
    mask = load_data("shapes", "train").batch(range(60))["truth"]
    for names in (["flip"], ["shift"], ["rotation"], ["stretch"], ["flip", "shift", "rotation", "blur", "noise"]):
        index = np.arange(60)
        moved, truth = augment_batch(mask[:, None], names, 3, index, mask)
        assert truth.shape == mask.shape and not torch.equal(truth, mask)
        expected = augment_batch(mask[:, None], [n for n in names if n not in ("blur", "noise")], 3, index)[0][:, 0]
        assert torch.allclose(truth, expected, atol=1e-5)
        if names[-1] != "noise":
            assert torch.allclose(moved[:, 0], truth, atol=1e-5)
    assert torch.equal(augment_batch(mask[:, None], ["blur", "noise"], 3, index, mask)[1], mask)


def test_cells_can_move_by_themselves():
    options = {"length": 60, "augment": ["flip", "shift", "rotation"]}
    plain = load_data("digits_QA", "train", length=60).batch(range(60))
    grids = load_data("digits_QA", "train", augment_cells=True, **options)
    moved = grids.batch(range(60))
    assert torch.equal(moved["truth"], plain["truth"]) and not torch.equal(moved["pixel_values"], plain["pixel_values"])
    ink = [tiles(p["pixel_values"] + 1, 3).sum((3, 4, 5)) for p in (plain, moved)]  # [B, 3, 3]
    assert torch.corrcoef(torch.stack([i.flatten() for i in ink]))[0, 1] > 0.9  # every digit is still in its cell
    grids.set_epoch(1)
    assert not torch.equal(grids.batch(range(60))["pixel_values"], moved["pixel_values"])
    again = load_data("digits_QA", "train", augment_cells=True, **options)
    assert torch.equal(again.batch([7])["pixel_values"][0], moved["pixel_values"][7])
    test = load_data("digits_QA", "test", augment_cells=True, **options).batch(range(60))
    assert torch.equal(test["pixel_values"], load_data("digits_QA", "test", length=60).batch(range(60))["pixel_values"])


@pytest.mark.parametrize(("name", "cell"), [("toy", 16), ("digits_QA", 16)])
def test_cells_can_be_left_empty_and_are_not_counted(name, cell):
    options = {"length": 4000, "image_size": 3 * cell}
    plain = load_data(name, "train", **options).batch(range(4000))
    grids = load_data(name, "train", empty_cells=0.5, **options)
    some = grids.batch(range(4000))
    before, after = (tiles(pixels(batch), 3).flatten(3) for batch in (plain, some))  # [B, 3, 3, pixels]
    empty = (after == data.EMPTY).all(-1)
    assert not (before == data.EMPTY).all(-1).any() and torch.equal(after[~empty], before[~empty])
    assert torch.equal(some["truth"], plain["truth"] * ~empty)
    assert torch.equal(some["labels"], some["truth"].sum((1, 2)).long())
    # about half of the grids are as they were, and a cell is left empty whether it is counted or not
    assert 0.4 < empty.flatten(1).any(1).float().mean() < 0.5
    shares = [empty[plain["truth"] == counted].float().mean() for counted in (0, 1)]
    assert abs(shares[0] - 0.25) < 0.02 and abs(shares[1] - shares[0]) < 0.02
    # how many cells are left does not give the label away: every count of them is equally likely
    left = 9 - empty.sum((1, 2))
    for filled in (2, 4, 6):
        counts = some["labels"][left == filled].bincount(minlength=filled + 1)
        assert counts.sum() > 100 and chisquare(counts).pvalue > 0.01
    grids.set_epoch(1)
    assert not torch.equal(grids.batch(range(20))["labels"], some["labels"][:20])
    for split in ("validation", "test"):
        assert same(*(load_data(name, split, empty_cells=share).batch(range(20)) for share in (0.0, 1.0)))


def test_the_truth_of_a_grid_moves_too():
    options = {"grid_size": 4, "length": 64}
    plain, flipped = (load_data("toy", "train", augment=names, **options).batch(range(64)) for names in ((), ("flip",)))
    changed = (plain["pixel_values"] != flipped["pixel_values"]).flatten(1).any(1)
    assert 16 < changed.sum() < 48
    assert torch.equal(flipped["truth"][changed], plain["truth"][changed].flip(-1))
    assert torch.equal(flipped["truth"][~changed], plain["truth"][~changed])
    turned = load_data("digits_QA", "train", augment=["rotation"], **options).batch(range(64))["truth"]
    assert turned.shape == (64, 4, 4) and turned.min() >= 0 and turned.max() <= 1 + 1e-6
    assert ((turned > 0.05) & (turned < 0.95)).any()  # shares of cells


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_only_training_pictures_are_augmented(name):
    for split in data.SPLITS:
        plain, augmented = load_data("digits", split), load_data("digits", split, augment=[name])
        differ = not torch.equal(plain.batch(range(20))["pixel_values"], augmented.batch(range(20))["pixel_values"])
        assert differ == (split == "train")
    augmented = load_data("digits", "train", augment=[name])
    epochs = []
    for epoch in (0, 1, 0):
        augmented.set_epoch(epoch)
        epochs.append(augmented.batch(range(20))["pixel_values"])
    assert not torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[0], epochs[2])
    other = load_data("digits", "train", augment=[name], seed=5).batch(range(20))["pixel_values"]
    assert not torch.equal(other, epochs[0])


def augment(name, images, seed=1):
    return augment_batch(images, [name], seed, np.arange(len(images)))[0]


def test_flip():
    images = torch.rand(100, 3, 4, 6)
    flipped = augment("flip", images)
    changed = (flipped != images).flatten(1).any(1)
    assert torch.equal(flipped[changed], images[changed].flip(-1)) and 35 < changed.sum() < 65
    assert torch.equal(augment("flip", flipped), images)


def test_shift():
    images = torch.rand(200, 1, 16, 24)
    padded = pad(images, (2, 2, 2, 2), mode="reflect")  # an eighth of the shorter side
    shifted = augment("shift", images)
    windows = [padded[..., top : top + 16, left : left + 24] for top in range(5) for left in range(5)]
    used = torch.stack([(shifted == window).flatten(1).all(1) for window in windows])  # [25, B]
    assert (used.sum(0) == 1).all() and used.any(1).all()


def test_rotation():
    ramp = torch.arange(64.0).expand(200, 1, 64, 64) / 63  # brightness grows to the right
    middle = augment("rotation", ramp)[:, 0, 24:40, 24:40]
    down, right = middle[:, -1].mean(1) - middle[:, 0].mean(1), middle[..., -1].mean(1) - middle[..., 0].mean(1)
    angles = torch.rad2deg(torch.atan2(down, right))
    assert angles.abs().max() < 20.5 and angles.min() < -18 and angles.max() > 18
    assert angles.std() == pytest.approx(40 / 12**0.5, abs=1)  # of a uniform distribution


def test_rotation_keeps_right_angles():
    images = torch.zeros(1, 1, 40, 80)
    images[..., 15:25, 35:45] = 1  # a square in a picture that is none
    turned = move_pixels(images, ["rotation"], torch.full((1, 9), 1.0))  # by 20°
    centred = turned[0, 0] > 0.5
    assert centred.sum() == pytest.approx(100, abs=8)
    rows, cols = centred.nonzero().float().T
    assert rows.mean() == pytest.approx(19.5, abs=0.1) and cols.mean() == pytest.approx(39.5, abs=0.1)
    spread = torch.cov(torch.stack([rows, cols]))
    assert spread[0, 0].item() == pytest.approx(spread[1, 1].item(), rel=0.1)


def test_stretch():
    ramp = torch.arange(96.0).expand(400, 1, 64, 96)
    middle = augment("stretch", ramp / 96)[:, 0, 20:44, 30:66] * 96  # brightness grows to the right
    wide, slant = middle.diff(dim=2).mean((1, 2)) - 1, middle.diff(dim=1).mean((1, 2))  # in pixels, whatever the sides
    tall = augment("stretch", ramp.mT / 96)[:, 0, 30:66, 20:44] * 96  # brightness grows downwards
    high, none = tall.diff(dim=1).mean((1, 2)) - 1, tall.diff(dim=2).mean((1, 2))
    assert none.abs().max() < 1e-3  # no slant of rows: that would be a rotation
    for amount in (wide, slant, high):
        assert amount.abs().max() < 0.151 and amount.min() < -0.14 and amount.max() > 0.14
        assert amount.std() == pytest.approx(0.3 / 12**0.5, abs=0.01)  # of a uniform distribution
    assert torch.corrcoef(torch.stack([wide, slant, high])).triu(1).abs().max() < 0.15


def test_blur():
    images = torch.rand(50, 1, 16, 16)
    ratio = augment("blur", images).var((1, 2, 3)) / images.var((1, 2, 3))
    assert (ratio <= 1.001).all() and ratio.min() < 0.3 and ratio.max() > 0.9  # sigma 0.1 does next to nothing
    step = (torch.arange(16) >= 8).float().expand(50, 1, 16, 16)
    assert torch.equal(augment("blur", step)[..., :7], step[..., :7])  # kernel 3 reaches one pixel


def test_noise():
    plain, noisy = (load_data("toy", "train", augment=names, length=50) for names in ((), ("noise",)))
    noise = noisy.batch(range(50))["pixel_values"] - plain.batch(range(50))["pixel_values"]
    assert noise.std() == pytest.approx(1, abs=0.01) and noise.mean() == pytest.approx(0, abs=0.01)
    rows = noise.view(150, -1)  # every channel of every picture has its own
    assert (torch.corrcoef(rows) - torch.eye(150)).abs().max() < 0.15


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_ends_of_the_random_range_are_allowed(monkeypatch, name, u):
    # met for real, when 32 bits rounded up to 1: load_data("toy", "train", augment=["shift"]), set_epoch(15), item 21448
    monkeypatch.setattr(
        pictures_module, "hashed_uniform", lambda seed, stream, index, count: np.full((len(index), count), u)
    )
    assert augment(name, torch.rand(2, 3, 16, 16)).isfinite().all()


def test_an_empty_cell_is_empty_to_its_border():
    """Also where cells do not fill the picture evenly."""
    grids = load_data("toy", "train", grid_size=2, image_size=82, empty_cells=1.0)
    pixels = grids.batch(range(200))["pixel_values"]
    for rows in (slice(0, 41), slice(41, 82)):
        for cols in (slice(0, 41), slice(41, 82)):
            cell = pixels[:, :, rows, cols].flatten(2)
            assert (cell == cell[..., :1]).all()


def test_a_download_does_not_wait_for_ever(tmp_path):
    waits = []

    class Silent:
        def __init__(self, *place, **options):
            waits.append(socket.getdefaulttimeout())
            raise TimeoutError

    with pytest.raises(TimeoutError):
        sources.download(Silent, tmp_path, "train")
    assert waits == [sources.SECONDS] and socket.getdefaulttimeout() is None


def test_the_last_picture_is_the_last():
    digits = load_data("digits", "test")
    assert len(digits.batch([len(digits) - 1, -len(digits)])["labels"]) == 2
    for index in (len(digits), -len(digits) - 1):
        with pytest.raises(IndexError):
            digits.batch([index])


def test_torchvisions_files_are_split_without_overlap(offline, monkeypatch):
    class Torchvision:
        classes, targets = list("abcdefghij"), [n % 10 for n in range(20)]

        def __init__(self, root, train, download):
            self.data = np.full((20, 4, 4, 3), 100, dtype=np.uint8) * (not train)
            self.data[:, 0, 0, 0] = np.arange(20) + 100 * (not train)

    monkeypatch.setattr(sources, "CIFAR10", Torchvision)
    seen = {
        name: set(load_data("CIFAR10", name).images[:, 0, 0, 0].tolist()) for name in ("train", "validation", "test")
    }
    assert seen["test"] == set(range(100, 120))  # torchvision's own
    assert len(seen["validation"]) == 2 and seen["train"] | seen["validation"] == set(range(20))
    assert not seen["train"] & seen["validation"]


def test_an_object_is_turned_by_any_angle():
    shapes, arrow = load_data("shapes", "test"), torch.tensor([SHAPES.index("arrow")] * 2)
    up, down = shapes._object(arrow, torch.tensor([[1.0, 0.5, 0.5, 0.0], [1.0, 0.5, 0.5, 0.5]]))
    assert (down != up.flip(0, 1)).sum() <= 4 and (up != up.flip(0)).sum() > 40


def test_an_object_stands_out_from_its_background_in_every_channel():
    shapes = load_data("shapes", "test")
    batch, ground = shapes.batch(range(200)), 0.6 * shapes.uniform(2, np.arange(200), 12)[:, :3] + 0.2
    mask = batch["truth"][:, None]
    colour = ((batch["pixel_values"] + 1) / 2 * mask).sum((2, 3)) / mask.sum((2, 3))
    assert (colour - ground).abs().min() > 0.3


def test_area_of_the_arrow():
    grid = (torch.arange(200) - 99.5) / 99.5
    area = inside(SHAPES.index("arrow"), grid[None, :], grid[:, None]).sum().item() * (2 / 199) ** 2
    assert area == pytest.approx(0.75 * 0.95**2 + 0.48 * 0.9, rel=0.02)


def test_grids_have_sensible_cells_and_patches():
    assert len(load_data("shapes_QA", "test", length=5).pictures) == 10_000
    assert all(load_data(name, "test", length=5).patch_size == 8 for name in ("digits_QA", "shapes_QA"))


def test_fine_detail_is_averaged_and_not_skipped():
    stripes = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    stripes[..., ::4] = 255
    pictures = data.ImageSet("stripes", "test", stripes, torch.zeros(1).long(), ["a", "b"])
    pictures.image_size = (8, 8)
    shown = (pictures[0]["pixel_values"] + 1) / 2
    assert shown.mean() == pytest.approx(0.25, abs=0.03) and shown.std() < 0.1


def test_a_wide_picture_file_stays_upright(tmp_path):
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 20:] = 255  # right half
    Image.fromarray(image).save(tmp_path / "wide.png")
    (found,) = sources.read_pictures([tmp_path / "wide.png"], (10, 20))
    assert found.shape == (3, 10, 20) and (found[..., 12:] > 0.9).all() and (found[..., :8] < -0.9).all()


def test_cells_of_a_folder_are_read_at_least_as_large_as_they_are_shown(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for n in range(50):
            Image.new("RGB", (40, 40)).save(tmp_path / name / f"{n}.png")
    grids = load_data("folder_QA", "train", data_dir=tmp_path, image_size=50, length=5, class_idx=0)
    assert grids.pictures.image_size == (17, 17) and grids.image_size == (50, 50)
