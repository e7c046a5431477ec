"""Datasets by name: pictures, and counting grids whose true explanation is known.

Everything a model sees is `{"pixel_values": float [C, H, W] in [-1, 1], "labels": int}` plus, on tasks whose true
explanation is known, `"truth": float [rows, cols]` with 1 on the cells that decide the label. An item depends only on
(seed, split, index) and, when it is augmented, on the epoch: never on the order or the batch in which it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
import torch

from vdm_utils import sources
from vdm_utils.errors import VDMError, check_integer, unknown_name
from vdm_utils.pictures import (
    AUGMENTATIONS,
    MOVES,
    NUMBERS,
    SPLITS,
    ImageSet,
    Pictures,
    augment_batch,
    hashed_uniform,
    move_pixels,
)
from vdm_utils.shapes import Shapes

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "SPLITS",
    "ImageSet",
    "Pictures",
    "augment_batch",
    "hashed_uniform",
    "load_data",
]

TOY_COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
TOY_RGB = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]])
EMPTY = 128  # mid grey, as good as 0 after normalisation, and no toy colour
CLASSIFICATION = ("shapes", "digits", "MNIST", "CIFAR10", "ImageNet", "folder")
DATASETS = ("toy", *CLASSIFICATION, *(f"{name}_QA" for name in CLASSIFICATION))


def place_counts(seed: int, stream: int, index: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts uniform on 0..cells and, for each, which cells hold the counted class: (count [B], truth [B, cells])."""
    u = hashed_uniform(seed, stream, index, cells + 1)
    count = np.floor(u[:, 0] * (cells + 1)).astype(np.int64)  # [B]
    rank = np.argsort(np.argsort(u[:, 1:], axis=1), axis=1)  # [B, cells] a random permutation each
    return count, rank < count[:, None]


class Grids(Pictures):
    """What both counting tasks share: square grids of cells, counted cells as `truth`, and cells that are left empty."""

    has_truth = True
    empty_cells = 0.0  # share of the grids of which a random share of the cells is left empty

    def _count(self, index: np.ndarray, pixels: torch.Tensor, truth: np.ndarray) -> dict[str, torch.Tensor]:
        """The item of every grid: `pixels` uint8 [B, C, H, W], `truth` [B, N], and as label how many are true.

        Counted or not, a cell is left empty with the same probability, and the label counts what is left. As counts are
        uniform, so are those of the cells that are left: how many there are does not give the label away.
        """
        side = self.grid_size
        if self.empty_cells:
            u = hashed_uniform(self.seed + 7919 * self.epoch, 13, index, truth.shape[1] + 2)
            filled = u[:, 2:] >= np.where(u[:, :1] < self.empty_cells, u[:, 1:2], 0.0)  # [B, N]
            rows, cols = (torch.arange(n) * side // n for n in pixels.shape[-2:])  # the cell of every row and column
            plane = torch.from_numpy(filled).view(-1, 1, side, side)[:, :, rows][..., cols]
            pixels = torch.where(plane, pixels, EMPTY)
            truth = truth & filled
        return {
            "pixels": pixels,
            "labels": torch.from_numpy(truth.sum(axis=1)),
            "truth": torch.from_numpy(truth).float().view(-1, side, side),
        }


class ToyGrids(Grids):
    """The counting task of the reference's toy experiment: solid-colour cells, label = how many have one colour.

    A cell is one patch, unless cells do not fill the image evenly. Counts are uniform on 0..grid_size², so that no label is
    rare; the other cells take one of the five other colours each. `truth` is 1 on the counted cells.
    """

    def __init__(self, split: str, *, length: int, grid_size: int, class_idx: int, image_size: int, seed: int, augment):
        super().__init__("toy", split, length, seed, augment)
        self.grid_size, self.class_idx, self.image_size = grid_size, class_idx, (image_size, image_size)
        even = image_size // grid_size if image_size % grid_size == 0 else None
        self.patch_size = even or max(size for size in range(1, 17) if image_size % size == 0)
        self.id2label = {n: f"{n} {TOY_COLOURS[class_idx]}" for n in range(grid_size**2 + 1)}

    def colours(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts [B], truth [B, N] and colour indices [B, N] of the images at `index`."""
        cells, stream = self.grid_size**2, SPLITS.index(self.split)
        count, truth = place_counts(self.seed, stream, index, cells)
        other = np.floor(hashed_uniform(self.seed, 100 + stream, index, cells) * 5).astype(np.int64)
        other += other >= self.class_idx  # five colours, the counted one left out
        return count, truth, np.where(truth, self.class_idx, other)

    def _draw(self, index):
        _, truth, colour = self.colours(index)
        side = self.grid_size
        cells = TOY_RGB[torch.from_numpy(colour)].view(-1, side, side, 3).permute(0, 3, 1, 2)  # [B, 3, G, G]
        place = torch.arange(self.image_size[0]) * side // self.image_size[0]  # the cell of every row and column
        pixels = cells[:, :, place][:, :, :, place].contiguous()
        return self._count(index, pixels.to(torch.uint8), truth)


class CountingGrids(Grids):
    """Grids of pictures; the label is how many show class `class_idx` (the reference's CIFAR10_QA, for any dataset).

    Counts are uniform on 0..grid_size²; no picture stands twice in one grid; `truth` is 1 on the counted cells.
    `cell_moves`: augmentations that move every picture within its own cell.
    """

    cell_moves: Sequence[str] = ()

    def __init__(self, pictures: Pictures, *, length: int, grid_size: int, class_idx: int, seed: int, augment=()):
        super().__init__(f"{pictures.name}_QA", pictures.split, length, seed, augment)
        self.pictures, self.grid_size, self.class_idx = pictures, grid_size, class_idx
        is_counted = pictures.classes.numpy() == class_idx
        self.counted, self.others = np.flatnonzero(is_counted), np.flatnonzero(~is_counted)
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
        _, truth = place_counts(self.seed, stream, index, cells)
        u = hashed_uniform(self.seed, 200 + stream, index, 2 * cells)
        counted = self.counted[_distinct(u[:, :cells], len(self.counted))]  # [B, N]
        others = self.others[_distinct(u[:, cells:], len(self.others))]
        tiles = self.pictures._draw(np.where(truth, counted, others).ravel())["pixels"]  # [B·N, C, h, w]
        if self.cell_moves:
            place = (index[:, None] * cells + np.arange(cells)).ravel()
            u = torch.from_numpy(hashed_uniform(self.seed + 7919 * self.epoch, 12, place, NUMBERS))
            tiles = move_pixels(tiles.float(), self.cell_moves, u).round().to(torch.uint8)
        batch, (_, channels, height, width) = len(index), tiles.shape
        grid = tiles.view(batch, side, side, channels, height, width).permute(0, 3, 1, 4, 2, 5)
        return self._count(index, grid.reshape(batch, channels, side * height, side * width), truth)


def _distinct(u: np.ndarray, population: int) -> np.ndarray:
    """Turn uniforms [B, n] into n distinct integers below `population` per row (Floyd's algorithm).

    Every set of n is equally likely. Which of them comes first is not: a small population's last ones come late in a row.
    """
    chosen = np.empty(u.shape, dtype=np.int64)
    for column, last in enumerate(range(population - u.shape[1], population)):
        candidate = np.floor(u[:, column] * (last + 1)).astype(np.int64)
        taken = (chosen[:, :column] == candidate[:, None]).any(axis=1)
        chosen[:, column] = np.where(taken, last, candidate)
    return chosen


def load_data(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    grid_size: int = 3,
    class_idx: int = 3,
    augment: Sequence[str] = (),
    augment_cells: bool = False,
    empty_cells: float = 0.0,
    seed: int = 123,
    length: int | None = None,
    shortcut: float = 0.0,
    skip_unreadable: bool = False,
) -> Pictures:
    """A dataset by name: one of `DATASETS`.

    Args:
        name: `toy`, `shapes`, `digits`, `MNIST`, `CIFAR10`, `ImageNet`, `folder` (your own pictures), or one of the last
            six plus `_QA` for counting grids of it.
        split: `train`, `validation` or `test`; the test split is the source's own where it has one.
        data_dir: where MNIST, CIFAR10 and ImageNet are looked for first; then `$VDM_DATA_DIR`, then `data`, then, for the
            first two, a download. For `folder`: the folder with one sub-folder per class.
        image_size: side in pixels of the square picture; the source's own size by default (toy: 16 per cell; pictures
            read from files of any size: 224).
        grid_size: cells per side of a counting grid, 2–8 (toy and `_QA`).
        class_idx: the class that is counted (toy: colour 0–5).
        augment: names from `AUGMENTATIONS`, on the training split only.
        augment_cells: flip, shift, rotate and stretch every picture of a `_QA` grid within its cell, and not the grid as a whole.
        empty_cells: share of the training grids (toy and `_QA`) of which a random share of the cells is left empty; the
            label counts what is left. A classifier that knows empty cells can be asked which ones it does without.
        seed: of drawn images and of augmentation.
        length: number of drawn items (toy, shapes and `_QA`; 50,000 for training, 1,000 otherwise).
        shortcut: share of the training and validation pictures of `shapes` with a tag that gives the class away. The
            test split has none, as the world outside a careless collection.
        skip_unreadable: leave damaged picture files out, with a warning each, instead of raising.
    Raises:
        VDMError: for an unknown name, a size that does not fit, a class that does not exist, or missing files.
    """
    where = "load_data"
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS, where)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS, where)
    if isinstance(augment, str) or not isinstance(augment, Iterable):
        raise VDMError("augment is not a list", where=where, expected="a list of names, such as ['flip', 'noise']",
                       got=repr(augment), fix="put the names in a list")  # fmt: skip
    for one in augment:
        if one not in AUGMENTATIONS:
            raise unknown_name("augmentation", one, AUGMENTATIONS, where)
    check_integer("seed", seed, 0, 2**32 - 1, where)
    augment = tuple(augment) if split == "train" else ()
    length = (50_000 if split == "train" else 1_000) if length is None else length
    check_integer("length", length, 1, 10**9, where)
    if not isinstance(data_dir, (str, os.PathLike, type(None))):
        raise VDMError("data_dir is not a folder", where=where, expected="a path or None", got=repr(data_dir),
                       fix="name a folder")  # fmt: skip
    source = name.removesuffix("_QA")
    counting = name == "toy" or name.endswith("_QA")
    if counting:
        check_integer("grid_size", grid_size, 2, 8, where)
    if image_size is not None:
        check_integer("image_size", image_size, grid_size if name == "toy" else 4, 4096, where)
    if not isinstance(shortcut, Real) or not 0 <= shortcut <= 1 or (shortcut and source != "shapes"):
        raise VDMError("shortcut does not fit", where=where, expected="a share from 0 to 1, for shapes", got=f"{shortcut} for {name}",
                       fix="leave shortcut out, or use shapes")  # fmt: skip
    if not isinstance(empty_cells, Real) or not 0 <= empty_cells <= 1 or (empty_cells and not counting):
        raise VDMError("empty_cells does not fit", where=where, expected="a share from 0 to 1, for a counting dataset",
                       got=f"{empty_cells} for {name}", fix="leave empty_cells out, or use toy or a _QA dataset")  # fmt: skip
    empty_cells = empty_cells if split == "train" else 0.0
    if name == "toy":
        check_integer("class_idx", class_idx, 0, len(TOY_COLOURS) - 1, where)
        grids = ToyGrids(split, length=length, grid_size=grid_size, class_idx=class_idx,
                         image_size=image_size or 16 * grid_size, seed=seed, augment=augment)  # fmt: skip
        grids.empty_cells = empty_cells
        return grids
    if source == "shapes":
        # a grid needs a store of pictures to draw its cells from
        pictures = Shapes(
            split, length=10_000 if counting else length, seed=seed, shortcut=shortcut if split != "test" else 0.0
        )
    elif source == "digits":
        pictures = sources.digits(split, seed)
    elif source in ("MNIST", "CIFAR10"):
        pictures = sources.downloadable(source, split, data_dir, seed, skip_unreadable)
    else:
        read = sources.imagenet if source == "ImageNet" else sources.own_folder
        side = image_size or 224
        pictures = read(split, data_dir, side=-(-side // grid_size) if counting else side, seed=seed,
                        skip_unreadable=skip_unreadable)  # fmt: skip
    if counting:
        check_integer("class_idx", class_idx, 0, pictures.num_labels - 1, where)
        pictures = CountingGrids(pictures, length=length, grid_size=grid_size, class_idx=class_idx, seed=seed)
        pictures.empty_cells = empty_cells
        if augment_cells:
            pictures.cell_moves = [move for move in MOVES if move in augment]
            augment = tuple(other for other in augment if other not in MOVES)
    if image_size is not None:
        pictures.image_size = (image_size, image_size)
    pictures.augment = augment
    return pictures
