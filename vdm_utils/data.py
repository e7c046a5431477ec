"""Datasets by name: pictures, and counting grids whose true explanation is known.

Everything a model sees is `{"pixel_values": float [C, H, W] in [-1, 1], "labels": int}` plus, on tasks whose true
explanation is known, `"truth": float [rows, cols]` with 1 on the cells that decide the label. An item depends only on
(seed, split, index) and, when it is augmented, on the epoch: never on the order or the batch in which it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, MNIST
from torchvision.transforms.v2 import functional as transforms

from vdm_utils.errors import VDMError, unknown_name

SPLITS = ("train", "validation", "test")
AUGMENTATIONS = ("flip", "shift", "rotation", "blur", "noise")  # applied in this order, before normalisation
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TOY_COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
TOY_RGB = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]])
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def hashed_uniform(seed: int, stream: int, index: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of shape [B, count] that depend only on (seed, stream, index) and their column.

    SplitMix64 (Steele, Lea and Flood 2014) over a counter: as random as the task needs, vectorised, and equal on
    every machine and for every batch, which a stateful generator is not.
    """
    with np.errstate(over="ignore"):  # 64-bit wrap-around is the algorithm
        golden = np.uint64(0x9E3779B97F4A7C15)

        def mix(value: np.ndarray) -> np.ndarray:
            value = value + golden
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return value ^ (value >> np.uint64(31))

        base = mix(np.uint64(seed) * np.uint64(1_000_003) + np.uint64(stream))
        rows = mix(base ^ np.asarray(index).astype(np.uint64)[:, None])  # [B, 1]
        bits = mix(rows + golden * np.arange(1, count + 1, dtype=np.uint64)[None, :])  # [B, count]
    return (bits >> np.uint64(11)) * 2.0**-53


class Pictures(Dataset):
    """A dataset of pictures with the facts that a model needs; subclasses fill `_draw`.

    Attributes: `name`, `split`, `id2label` {int: str}, `image_size` (height, width) in pixels, `num_channels`,
    `patch_size` in pixels (a sensible one for a model trained from scratch), `has_truth`.
    """

    has_truth = False
    patch_size = 4
    num_channels = 3

    def __init__(self, name: str, split: str, length: int, seed: int, augment: Sequence[str] = ()):
        self.name, self.split, self.length, self.seed = name, split, length, seed
        self.augment, self.epoch = tuple(augment), 0

    def __len__(self) -> int:
        return self.length

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer, so that an augmented picture differs from epoch to epoch and a resumed run agrees."""
        self.epoch = epoch

    def _draw(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        """`{"pixels": uint8 [B, C, H, W], "labels": int64 [B]}` plus `"truth"` float [B, rows, cols]."""
        raise NotImplementedError

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The items at `indices`, stacked: `pixel_values` [B, C, H, W], `labels` [B] and perhaps `truth`."""
        index = np.asarray(indices, dtype=np.int64)
        if index.size and (index.min() < -len(self) or index.max() >= len(self)):
            raise IndexError(f"index out of range: {self.name}/{self.split} has {len(self)} items")
        index = index % max(len(self), 1)
        drawn = self._draw(index)
        pixels = drawn.pop("pixels").float() / 255
        if self.augment:
            pixels = augment_batch(pixels, self.augment, self.seed + 7919 * self.epoch, index)
        return {"pixel_values": (pixels - 0.5) / 0.5, **drawn}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.batch([index]).items()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """A whole batch at once: what torch's DataLoader calls, so that drawing is vectorised over the batch."""
        batch = self.batch(indices)
        return [{key: value[i] for key, value in batch.items()} for i in range(len(indices))]


def augment_batch(pixels: torch.Tensor, names: Sequence[str], seed: int, index: np.ndarray) -> torch.Tensor:
    """Augment float images [B, C, H, W] in [0, 1]; the numbers drawn depend on (seed, index) alone.

    flip: left-right with probability 1/2. shift: up to 1/8 of the side each way, edges reflected. rotation: ±20°.
    blur: Gaussian, kernel 3, sigma 0.1–2. noise: Gaussian with standard deviation 1 *in normalised units*, as in the
    reference, where images span −1..1.
    """
    batch, _, height, width = pixels.shape
    u = torch.from_numpy(hashed_uniform(seed, 11, index, 6))  # [B, 6], in 64 bits: in 32 it could round up to 1
    if "flip" in names:
        pixels = torch.where((u[:, 0] < 0.5)[:, None, None, None], pixels.flip(-1), pixels)
    if "shift" in names:
        pad = max(1, min(height, width) // 8)
        padded = torch.nn.functional.pad(pixels, (pad,) * 4, mode="reflect")
        top, left = ((u[:, 1:3] * (2 * pad + 1)).long()).unbind(1)
        rows = (top[:, None] + torch.arange(height))[:, None, :, None]  # [B, 1, H, 1]
        cols = (left[:, None] + torch.arange(width))[:, None, None, :]  # [B, 1, 1, W]
        channels = torch.arange(pixels.shape[1])[None, :, None, None]
        pixels = padded[torch.arange(batch)[:, None, None, None], channels, rows, cols]
    if "rotation" in names:
        angles = (u[:, 3] * 40 - 20).tolist()
        bilinear = transforms.InterpolationMode.BILINEAR
        pixels = torch.stack([transforms.rotate(p, a, bilinear) for p, a in zip(pixels, angles, strict=True)])
    if "blur" in names:
        sigmas = (0.1 + 1.9 * u[:, 4]).tolist()
        pixels = torch.stack([transforms.gaussian_blur(p, [3, 3], [s, s]) for p, s in zip(pixels, sigmas, strict=True)])
    if "noise" in names:
        seeds = (u[:, 5] * 2**31).long().tolist()
        noise = [torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
        pixels = pixels + 0.5 * torch.stack(noise)  # 0.5 in [0, 1] is 1 after normalisation
    return pixels


def place_counts(seed: int, stream: int, index: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts uniform on 0..cells and, for each, which cells hold the counted class: (count [B], truth [B, cells])."""
    u = hashed_uniform(seed, stream, index, cells + 1)
    count = np.floor(u[:, 0] * (cells + 1)).astype(np.int64)  # [B]
    rank = np.argsort(np.argsort(u[:, 1:], axis=1), axis=1)  # [B, cells] a random permutation each
    return count, rank < count[:, None]


class ToyGrids(Pictures):
    """The counting task of the reference's toy experiment: solid-colour cells, label = how many have one colour.

    A cell is one patch. Counts are uniform on 0..grid_size², so that no label is rare; the other cells take one of
    the five other colours each. `truth` is 1 on the counted cells.
    """

    has_truth = True

    def __init__(self, split: str, *, length: int, grid_size: int, class_idx: int, cell_size: int, seed: int, augment):
        super().__init__("toy", split, length, seed, augment)
        self.grid_size, self.class_idx, self.patch_size = grid_size, class_idx, cell_size
        self.image_size = (grid_size * cell_size, grid_size * cell_size)
        self.id2label = {n: f"{n} {TOY_COLOURS[class_idx]}" for n in range(grid_size**2 + 1)}

    def colours(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts [B], truth [B, N] and colour indices [B, N] of the images at `index`."""
        cells, stream = self.grid_size**2, SPLITS.index(self.split)
        count, truth = place_counts(self.seed, stream, index, cells)
        other = np.floor(hashed_uniform(self.seed, 100 + stream, index, cells) * 5).astype(np.int64)
        other += other >= self.class_idx  # five colours, the counted one left out
        return count, truth, np.where(truth, self.class_idx, other)

    def _draw(self, index):
        count, truth, colour = self.colours(index)
        side = self.grid_size
        cells = TOY_RGB[torch.from_numpy(colour)].view(-1, side, side, 3).permute(0, 3, 1, 2)  # [B, 3, G, G]
        pixels = cells.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
        return {
            "pixels": pixels.to(torch.uint8),
            "labels": torch.from_numpy(count),
            "truth": torch.from_numpy(truth).float().view(-1, side, side),
        }


class ImageSet(Pictures):
    """Pictures held in memory: `images` uint8 [M, C, H, W], `classes` int64 [M]."""

    def __init__(self, name, split, images: torch.Tensor, classes: torch.Tensor, names, *, seed=0, augment=()):
        super().__init__(name, split, len(images), seed, augment)
        self.images, self.classes, self.id2label = images, classes, dict(enumerate(names))
        self.image_size, self.num_channels = tuple(images.shape[-2:]), images.shape[1]

    def _draw(self, index):
        chosen = torch.from_numpy(index)
        return {"pixels": self.images[chosen], "labels": self.classes[chosen]}


class CountingGrids(Pictures):
    """Grids of pictures; the label is how many show class `class_idx` (the reference's CIFAR10_QA, for any dataset).

    Counts are uniform on 0..grid_size²; no picture stands twice in one grid; `truth` is 1 on the counted cells.
    """

    has_truth = True

    def __init__(self, pictures: ImageSet, *, length: int, grid_size: int, class_idx: int, seed: int, augment=()):
        super().__init__(f"{pictures.name}_QA", pictures.split, length, seed, augment)
        self.pictures, self.grid_size, self.class_idx = pictures, grid_size, class_idx
        is_counted = pictures.classes == class_idx
        self.counted, self.others = torch.where(is_counted)[0].numpy(), torch.where(~is_counted)[0].numpy()
        cells = grid_size**2
        if min(len(self.counted), len(self.others)) < cells:
            raise VDMError(
                "not enough pictures for a grid without repeats",
                where=f"{self.name}, {self.split} split, class {class_idx}",
                expected=f"{cells} of the class and {cells} of the others",
                got=f"{len(self.counted)} and {len(self.others)}",
                fix="use a smaller grid_size",
            )
        height, width = pictures.image_size
        self.image_size, self.num_channels = (grid_size * height, grid_size * width), pictures.num_channels
        self.patch_size = 8 if min(height, width) >= 16 else 4
        self.id2label = {n: f"{n} × {pictures.id2label[class_idx]}" for n in range(cells + 1)}

    def _draw(self, index):
        cells, side, stream = self.grid_size**2, self.grid_size, SPLITS.index(self.split)
        count, truth = place_counts(self.seed, stream, index, cells)
        u = hashed_uniform(self.seed, 200 + stream, index, 2 * cells)
        counted = self.counted[_distinct(u[:, :cells], len(self.counted))]  # [B, N]
        others = self.others[_distinct(u[:, cells:], len(self.others))]
        tiles = self.pictures.images[torch.from_numpy(np.where(truth, counted, others))]  # [B, N, C, h, w]
        batch, _, channels, height, width = tiles.shape
        grid = tiles.view(batch, side, side, channels, height, width).permute(0, 3, 1, 4, 2, 5)
        return {
            "pixels": grid.reshape(batch, channels, side * height, side * width),
            "labels": torch.from_numpy(count),
            "truth": torch.from_numpy(truth).float().view(batch, side, side),
        }


def _distinct(u: np.ndarray, population: int) -> np.ndarray:
    """Turn uniforms [B, n] into n distinct integers below `population` per row (Floyd's algorithm)."""
    chosen = np.empty(u.shape, dtype=np.int64)
    for column, last in enumerate(range(population - u.shape[1], population)):
        candidate = np.floor(u[:, column] * (last + 1)).astype(np.int64)
        taken = (chosen[:, :column] == candidate[:, None]).any(axis=1)
        chosen[:, column] = np.where(taken, last, candidate)
    return chosen


# ---------------------------------------------------------------- sources of pictures


def _digits(split: str, seed: int) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits (8×8, 0..16), each pixel doubled to 16×16; 60/15/25 % splits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
    pixels = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    order = np.random.default_rng(0).permutation(len(pixels))  # the split itself never depends on `seed`
    bounds = {"train": (0, 1078), "validation": (1078, 1348), "test": (1348, 1797)}[split]
    part = torch.from_numpy(order[slice(*bounds)])
    classes = torch.from_numpy(digits.target.astype(np.int64))
    pictures = ImageSet("digits", split, pixels[part], classes[part], [str(d) for d in range(10)], seed=seed)
    pictures.patch_size = 2
    return pictures


def read_image_folder(folder: Path, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Read `<folder>/<class>/<image>`: uint8 [M, C, H, W], class indices [M], class names (sorted)."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    images, classes = [], []
    for label, name in enumerate(names):
        files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise VDMError("a class folder holds no image", where=f"{folder}/{name}", expected="image files", got="none",
                           fix="remove the folder or unpack the data again")  # fmt: skip
        for file in files:
            try:
                with Image.open(file) as image:
                    images.append(np.asarray(image.convert("RGB" if channels == 3 else "L")))
            except (UnidentifiedImageError, OSError) as error:
                raise VDMError("an image cannot be read", where=str(file), expected="a JPEG or PNG file", got=error,
                               fix="replace or delete this file") from error  # fmt: skip
        classes += [label] * len(files)
    if len(names) < 2:
        raise VDMError("too few class folders", where=str(folder), expected="at least 2", got=len(names),
                       fix="lay the images out as <folder>/<class>/<image>")  # fmt: skip
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        raise VDMError("images of different sizes", where=str(folder), expected="one size",
                       got=sorted(sizes)[:4], fix="resize them to one size first")  # fmt: skip
    stacked = torch.from_numpy(np.stack(images))
    stacked = stacked.permute(0, 3, 1, 2) if channels == 3 else stacked[:, None]
    return stacked.contiguous(), torch.tensor(classes), names


def _search_path(data_dir: str | os.PathLike | None) -> list[Path]:
    """Where downloaded data is looked for, in order."""
    candidates = [data_dir, os.environ.get("VDM_DATA_DIR"), "data"]
    return [Path(c) for c in candidates if c]


def _downloadable(name: str, split: str, data_dir, seed: int) -> ImageSet:
    """MNIST or CIFAR10: an image folder, else torchvision's own files, else torchvision's download."""
    dataset = {"MNIST": MNIST, "CIFAR10": CIFAR10}[name]
    channels = 1 if name == "MNIST" else 3
    part = "test" if split == "test" else "train"
    places = _search_path(data_dir)
    images = None
    for place in places:
        folder = place / name.lower()
        if (folder / part).is_dir():
            images, classes, names = read_image_folder(folder / part, channels)
            if len(names) != 10:
                raise VDMError("data only half unpacked", where=str(folder / part), expected="10 class folders",
                               got=len(names), fix="unpack the data again")  # fmt: skip
            break
    else:
        for attempt, place in enumerate([*places, places[0]]):
            last = attempt == len(places)  # nothing found anywhere: download to the first place
            try:
                found = dataset(str(place), train=part == "train", download=last)
            except Exception as error:  # torchvision raises RuntimeError, URLError, OSError … depending on the failure
                if last:
                    raise VDMError(f"{name} is not here and cannot be downloaded", expected=f"{name.lower()}/{part}/<class>/* "
                                   f"or torchvision's files in {', '.join(map(str, places))}", got=f"{type(error).__name__}: {error}",
                                   fix="unpack it there, set VDM_DATA_DIR, or use toy or digits, which need no files") from error  # fmt: skip
                continue
            images = torch.as_tensor(found.data)
            images = images[:, None] if channels == 1 else images.permute(0, 3, 1, 2).contiguous()
            classes, names = torch.as_tensor(found.targets), found.classes
            break
    if split != "test":  # a tenth of the training images is held out; which ones never depends on `seed`
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
        cut = len(images) // 10
        chosen = order[:cut] if split == "validation" else order[cut:]
        images, classes = images[chosen], classes[chosen]
    return ImageSet(name, split, images, classes, list(names), seed=seed)


SOURCES = {"digits": _digits, "MNIST": _downloadable, "CIFAR10": _downloadable}
DATASETS = ("toy", *SOURCES, *(f"{name}_QA" for name in SOURCES))


def load_data(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    grid_size: int = 3,
    class_idx: int = 3,
    augment: Sequence[str] = (),
    seed: int = 123,
    length: int | None = None,
) -> Pictures:
    """A dataset by name: one of `DATASETS`.

    Args:
        name: `toy`, `digits`, `MNIST`, `CIFAR10`, or one of the last three plus `_QA` for counting grids of it.
        split: `train`, `validation` or `test`; the test split is the source's own where it has one.
        data_dir: where MNIST and CIFAR10 are looked for first; then `$VDM_DATA_DIR`, then `data`, then a download.
        image_size: side in pixels of the square picture; the source's own size by default (toy: 16 per cell).
        grid_size: cells per side of a counting grid, 2–8 (toy and `_QA`).
        class_idx: the class that is counted (toy: colour 0–5).
        augment: names from `AUGMENTATIONS`, on the training split only.
        seed: of drawn images and of augmentation.
        length: number of drawn items (toy and `_QA`; 50,000 for training, 1,000 otherwise).
    Raises:
        VDMError: for an unknown name, a size that does not fit, a class that does not exist, or missing files.
    """
    where = "load_data"
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS, where)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS, where)
    for one in augment:
        if one not in AUGMENTATIONS:
            raise unknown_name("augmentation", one, AUGMENTATIONS, where)
    _check_integer("seed", seed, 0, 2**32 - 1, where)
    augment = tuple(augment) if split == "train" else ()
    length = (50_000 if split == "train" else 1_000) if length is None else length
    _check_integer("length", length, 1, 10**9, where)
    counting = name == "toy" or name.endswith("_QA")
    if counting:
        _check_integer("grid_size", grid_size, 2, 8, where)
        _check_integer("class_idx", class_idx, 0, 5 if name == "toy" else 9, where)
    if image_size is not None:
        _check_integer("image_size", image_size, grid_size if name == "toy" else 4, 4096, where)
    if name == "toy":
        cell = 16 if image_size is None else image_size // grid_size
        if cell * grid_size != (image_size or cell * grid_size):
            raise VDMError("the cells do not fill the image", where=where, expected=f"a multiple of {grid_size}",
                           got=f"image_size {image_size}", fix="change image_size or grid_size")  # fmt: skip
        return ToyGrids(split, length=length, grid_size=grid_size, class_idx=class_idx, cell_size=cell, seed=seed,
                        augment=augment)  # fmt: skip
    source = name.removesuffix("_QA")
    pictures = _digits(split, seed) if source == "digits" else _downloadable(source, split, data_dir, seed)
    if image_size is not None:
        side = image_size // grid_size if counting else image_size
        if side * (grid_size if counting else 1) != image_size:
            raise VDMError("the cells do not fill the image", where=where, expected=f"a multiple of {grid_size}",
                           got=f"image_size {image_size}", fix="change image_size or grid_size")  # fmt: skip
        if pictures.image_size != (side, side):
            pictures.images = transforms.resize(pictures.images, [side, side], antialias=True)
            pictures.image_size = (side, side)
    if counting:
        return CountingGrids(
            pictures, length=length, grid_size=grid_size, class_idx=class_idx, seed=seed, augment=augment
        )
    pictures.augment = augment
    return pictures


def _check_integer(name: str, value: object, low: int, high: int, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise VDMError(f"{name} is out of range", where=where, expected=f"a whole number from {low} to {high}",
                       got=repr(value), fix=f"change {name}")  # fmt: skip
