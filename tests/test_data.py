"""The data is what it says it is: counting tasks with a true explanation, equal on every machine."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from sklearn.datasets import load_digits
from torch.nn.functional import pad

from vdm_utils import data
from vdm_utils.data import AUGMENTATIONS, augment_batch, hashed_uniform, load_data

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
@pytest.mark.parametrize("name", ["toy", "digits", "digits_QA"])
def test_an_item_is_the_same_however_it_is_asked_for(name, augment):
    drawn, again = (load_data(name, "train", augment=augment, image_size=24) for _ in range(2))
    batch, backwards = drawn.batch(range(6)), again.batch(range(5, -1, -1))
    assert same(batch, {key: value.flip(0) for key, value in backwards.items()})
    items, listed = [drawn[i] for i in range(6)], again.__getitems__(list(range(6)))
    for collected in (items, listed):
        assert same(batch, torch.utils.data.default_collate(collected))
    assert same(drawn[-1], drawn[len(drawn) - 1])


@pytest.mark.parametrize("name", ["toy", "digits_QA"])
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
    monkeypatch.setattr(data, "CIFAR10", dataset)
    monkeypatch.setattr(data, "MNIST", dataset)
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

    monkeypatch.setattr(data, "CIFAR10", Torchvision)
    monkeypatch.setenv("VDM_DATA_DIR", "b")
    found = load_data("CIFAR10", "test", data_dir="a")
    assert offline == [("a", False), ("b", False)]  # in this order, and nothing was downloaded
    assert found.images[:, 1, 0, 3].tolist() == list(range(20)) and found.id2label[9] == "j"
    monkeypatch.delenv("VDM_DATA_DIR")
    load_data("CIFAR10", "test", data_dir="a")
    assert offline[2:] == [("a", False), ("data", False), ("a", True)]  # only when there is nothing anywhere


# ---------------------------------------------------------------- augmentations


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
    return augment_batch(images, [name], seed, np.arange(len(images)))


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
    monkeypatch.setattr(data, "hashed_uniform", lambda seed, stream, index, count: np.full((len(index), count), u))
    assert augment(name, torch.rand(2, 3, 16, 16)).isfinite().all()
