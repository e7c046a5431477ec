"""What every dataset is: pictures drawn by index, equal on every machine, scaled, augmented and normalised in one place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

SPLITS = ("train", "validation", "test")
MOVES = ("flip", "shift", "rotation", "stretch")
AUGMENTATIONS = (*MOVES, "blur", "noise")  # applied in this order, before normalisation
NUMBERS = 9  # random numbers that augmenting a picture takes
STRETCH = 0.15


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
        """`{"pixels": uint8 [B, C, H, W], "labels": int64 [B]}` plus `"truth"` float [B, rows, cols].

        Pixels of another size than `image_size` are scaled to it afterwards.
        """
        raise NotImplementedError

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The items at `indices`, stacked: `pixel_values` [B, C, H, W], `labels` [B] and perhaps `truth`."""
        index = np.asarray(indices, dtype=np.int64)
        if index.size and (index.min() < -len(self) or index.max() >= len(self)):
            raise IndexError(f"index out of range: {self.name}/{self.split} has {len(self)} items")
        index = index % max(len(self), 1)
        drawn = self._draw(index)
        pixels = drawn.pop("pixels")
        if tuple(pixels.shape[-2:]) != self.image_size:
            pixels = transforms.resize(pixels, list(self.image_size), antialias=True)
        pixels = pixels.float() / 255
        if self.augment:
            pixels, truth = augment_batch(
                pixels, self.augment, self.seed + 7919 * self.epoch, index, drawn.get("truth")
            )
            drawn |= {} if truth is None else {"truth": truth}
        return {"pixel_values": (pixels - 0.5) / 0.5, **drawn}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.batch([index]).items()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """A whole batch at once: what torch's DataLoader calls, so that drawing is vectorised over the batch."""
        batch = self.batch(indices)
        return [{key: value[i] for key, value in batch.items()} for i in range(len(indices))]


def augment_batch(
    pixels: torch.Tensor, names: Sequence[str], seed: int, index: np.ndarray, truth: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Augment float images [B, C, H, W] in [0, 1]; the numbers drawn depend on (seed, index) alone.

    flip: left-right with probability 1/2. shift: up to 1/8 of the side each way, edges reflected. rotation: ±20°.
    stretch: width and height by ±15 % each, and a slant of up to 15 % of the height, as handwriting differs.
    blur: Gaussian, kernel 3, sigma 0.1–2. noise: Gaussian with standard deviation 1 *in normalised units*, as in the
    reference, where images span −1..1.

    A `truth` [B, rows, cols] is moved along with its image: afterwards it says which share of every cell is true.
    """
    u = torch.from_numpy(hashed_uniform(seed, 11, index, NUMBERS))  # [B, 9], in 64 bits: in 32 it could round up to 1
    moves = [name for name in MOVES if name in names]
    if truth is not None and moves:  # one more channel of the picture
        channels, cells = pixels.shape[1], tuple(truth.shape[-2:])
        on_pixels = F.interpolate(truth[:, None].float(), size=pixels.shape[-2:], mode="nearest-exact")
        moved = move_pixels(torch.cat([pixels, on_pixels], dim=1), moves, u)
        pixels, truth = moved[:, :channels], F.interpolate(moved[:, channels:], size=cells, mode="area")[:, 0]
    elif moves:
        pixels = move_pixels(pixels, moves, u)
    if "blur" in names:
        sigmas = (0.1 + 1.9 * u[:, 4]).tolist()
        pixels = torch.stack([transforms.gaussian_blur(p, [3, 3], [s, s]) for p, s in zip(pixels, sigmas, strict=True)])
    if "noise" in names:
        seeds = (u[:, 5] * 2**31).long().tolist()
        noise = [torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
        pixels = pixels + 0.5 * torch.stack(noise)  # 0.5 in [0, 1] is 1 after normalisation
    return pixels, truth


def move_pixels(pixels: torch.Tensor, names: Sequence[str], u: torch.Tensor) -> torch.Tensor:
    """The augmentations that move pixels [B, C, H, W] to other places, from uniforms [B, 9]."""
    batch, _, height, width = pixels.shape
    if "flip" in names:
        pixels = torch.where((u[:, 0] < 0.5)[:, None, None, None], pixels.flip(-1), pixels)
    if "shift" in names:
        pad = max(1, min(height, width) // 8)
        padded = F.pad(pixels, (pad,) * 4, mode="reflect")
        top, left = ((u[:, 1:3] * (2 * pad + 1)).long()).unbind(1)
        rows = (top[:, None] + torch.arange(height))[:, None, :, None]  # [B, 1, H, 1]
        cols = (left[:, None] + torch.arange(width))[:, None, None, :]  # [B, 1, 1, W]
        channels = torch.arange(pixels.shape[1])[None, :, None, None]
        pixels = padded[torch.arange(batch)[:, None, None, None], channels, rows, cols]
    if {"rotation", "stretch"} & set(names):
        angle = torch.deg2rad(u[:, 3] * 40 - 20) * ("rotation" in names)
        wide, high, slant = (STRETCH * (2 * u[:, 6:9] - 1) * ("stretch" in names)).unbind(1)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        turn = torch.stack([cos, -sin, sin, cos], dim=1).unflatten(1, (2, 2))
        turn = turn @ torch.stack([1 + wide, slant, zero, 1 + high], dim=1).unflatten(1, (2, 2))
        side = torch.tensor([width, height], dtype=turn.dtype)
        turn = turn * side / side[:, None]  # places count in half widths and half heights
        place = F.affine_grid(F.pad(turn, (0, 1)).to(pixels.dtype), list(pixels.shape), align_corners=False)
        pixels = F.grid_sample(pixels, place, align_corners=False)  # bilinear, black outside
    return pixels


class ImageSet(Pictures):
    """Pictures held in memory: `images` uint8 [M, C, H, W], `classes` int64 [M]."""

    def __init__(self, name, split, images: torch.Tensor, classes: torch.Tensor, names, *, seed=0, augment=()):
        super().__init__(name, split, len(images), seed, augment)
        self.images, self.classes, self.id2label = images, classes, dict(enumerate(names))
        self.image_size, self.num_channels = tuple(images.shape[-2:]), images.shape[1]

    def _draw(self, index):
        chosen = torch.from_numpy(index)
        return {"pixels": self.images[chosen], "labels": self.classes[chosen]}
