"""`shapes`: small pictures drawn by the package that look like photographs and whose object mask is known to the pixel."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from vdm_utils.pictures import SPLITS, Pictures, hashed_uniform

SHAPES = ("circle", "ring", "crescent", "half moon", "triangle", "square", "cross", "star", "heart", "arrow")
SIDE, TAG, PIECES, CELLS = 32, 4, 7, 6  # pixels of a picture and of a tag; pieces of clutter; texture cells per side
# one colour per class for the tags of the shortcut, far apart from each other
TAG_RGB = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0.5, 0], [0.5, 0, 1],
                        [1, 1, 1], [0, 0, 0]])  # fmt: skip


def inside(kind: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Which points of the plane belong to shape number `kind`; every shape fills about the unit disc, y points down."""
    radius = (x**2 + y**2).sqrt()
    match SHAPES[kind]:
        case "circle":
            return radius < 0.85
        case "ring":
            return (radius < 0.95) & (radius > 0.55)
        case "crescent":
            return (radius < 0.95) & ((x - 0.45) ** 2 + y**2 > 0.7**2)
        case "half moon":
            return (x**2 + (y + 0.4) ** 2 < 0.9**2) & (y > -0.4)
        case "triangle":  # three half-planes at 120°
            return torch.maximum(y, 0.866 * x.abs() - 0.5 * y) < 0.5
        case "square":
            return torch.maximum(x.abs(), y.abs()) < 0.7
        case "cross":
            return (torch.minimum(x.abs(), y.abs()) < 0.27) & (torch.maximum(x.abs(), y.abs()) < 0.9)
        case "star":
            # the straight edge from an outer corner (angle 0) to an inner one (angle π/5), in polar coordinates
            corner, inner, outer = math.pi / 5, 0.42, 1.0
            angle = (torch.atan2(y, x) % (2 * corner) - corner).abs()  # 0 at inner, π/5 at outer corners
            angle = corner - angle
            edge = inner * outer * math.sin(corner) / (outer * angle.sin() + inner * (corner - angle).sin())
            return radius < edge
        case "heart":
            a, b = 1.25 * x, 0.15 - 1.25 * y
            return (a**2 + b**2 - 1) ** 3 < a**2 * b**3
        case _:  # arrow
            head = (y > -0.95) & (y < 0) & (x.abs() < 0.75 * (y + 0.95))
            return head | ((x.abs() < 0.24) & (y >= 0) & (y < 0.9))


class Shapes(Pictures):
    """32×32 colour pictures of ten shapes at any place, size, angle and colour, over textured and cluttered backgrounds.

    `truth` is the object's mask, [32, 32]. `shortcut` plants a tag of 4×4 pixels in a corner of that share of the
    pictures, in a colour that stands for the class: a classifier can then cheat without ever looking at the shape.
    """

    has_truth = True
    patch_size = 4
    image_size = (SIDE, SIDE)

    def __init__(self, split: str, *, length: int, seed: int, augment=(), shortcut: float = 0.0):
        super().__init__("shapes", split, length, seed, augment)
        self.shortcut, self.id2label = shortcut, dict(enumerate(SHAPES))

    def uniform(self, purpose: int, index: np.ndarray, count: int) -> torch.Tensor:
        """Uniform numbers [B, count] of an image, another set for every purpose."""
        stream = 1000 + 10 * SPLITS.index(self.split) + purpose
        return torch.from_numpy(hashed_uniform(self.seed, stream, index, count)).float()

    @property
    def classes(self) -> torch.Tensor:
        """The class of every picture, int64 [length]."""
        return self._class(np.arange(len(self)))

    def _class(self, index: np.ndarray) -> torch.Tensor:
        return (self.uniform(0, index, 1)[:, 0] * len(SHAPES)).long().clamp(max=len(SHAPES) - 1)

    def tagged(self, index: np.ndarray) -> torch.Tensor:
        """Which pictures carry a tag: bool [B]."""
        return self.uniform(1, np.asarray(index), 2)[:, 0] < self.shortcut

    def _draw(self, index):
        batch, label, u = len(index), self._class(index), self.uniform(2, index, 12)
        ground, mask = self._background(index, u[:, :3]), self._object(label, u[:, 3:7])
        # at least 0.35 away from the background's colour in every channel
        colour = (u[:, :3] * 0.6 + 0.2 + 0.35 + 0.3 * u[:, 7:10]) % 1
        picture = torch.where(mask[:, None], colour[:, :, None, None], ground)
        grain = self.uniform(3, index, SIDE * SIDE).view(batch, 1, SIDE, SIDE) - 0.5
        pixels = ((picture + 0.16 * grain).clamp(0, 1) * 255).round().to(torch.uint8)
        if self.shortcut:
            corner = (self.uniform(1, index, 2)[:, 1] * 4).long().clamp(max=3)
            for n, (top, left) in enumerate([(0, 0), (0, SIDE - TAG), (SIDE - TAG, 0), (SIDE - TAG, SIDE - TAG)]):
                here = self.tagged(index) & (corner == n)
                tag = (TAG_RGB[label[here]] * 255).to(torch.uint8)[:, :, None, None].expand(-1, -1, TAG, TAG)
                pixels[here, :, top : top + TAG, left : left + TAG] = tag
        return {"pixels": pixels, "labels": label, "truth": mask.float()}

    def _object(self, label: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Object masks, bool [B, 32, 32], from four uniforms per picture: size, place (2) and angle."""
        radius = 7 + 5 * u[:, 0]  # pixels
        margin = radius[:, None] * 0.9
        centre = margin + (SIDE - 2 * margin) * u[:, 1:3]
        angle = 2 * math.pi * u[:, 3]
        place = torch.arange(SIDE) + 0.5
        dx = ((place[None, :] - centre[:, :1]) / radius[:, None])[:, None, :]  # [B, 1, W]
        dy = ((place[None, :] - centre[:, 1:]) / radius[:, None])[:, :, None]  # [B, H, 1]
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        x, y = cos * dx + sin * dy, cos * dy - sin * dx  # [B, H, W]
        mask = torch.empty(x.shape, dtype=torch.bool)
        for kind in label.unique().tolist():
            mask[label == kind] = inside(kind, x[label == kind], y[label == kind])
        return mask

    def _background(self, index: np.ndarray, colour: torch.Tensor) -> torch.Tensor:
        """Cloudy texture with stripes and pieces of clutter, [B, 3, 32, 32] in about 0..1."""
        batch = len(index)
        clouds = self.uniform(4, index, 3 * CELLS * CELLS).view(batch, 3, CELLS, CELLS)
        clouds = F.interpolate(clouds, size=(SIDE, SIDE), mode="bilinear", align_corners=True) - 0.5
        ground = (colour * 0.6 + 0.2)[:, :, None, None] + 0.5 * clouds
        u = self.uniform(5, index, 4 + 8 * PIECES)
        place = torch.arange(SIDE) + 0.5
        x, y = place[None, None, :], place[None, :, None]
        angle, pitch, phase, strength = (v[:, None, None] for v in u[:, :4].T)
        wave = (x * (2 * math.pi * angle).cos() + y * (2 * math.pi * angle).sin()) * (0.4 + pitch) + 6.3 * phase
        ground = ground + 0.15 * strength[:, None] * wave.sin()[:, None]
        for piece in u[:, 4:].view(batch, PIECES, 8).unbind(1):  # bars, from short blobs to long strokes
            cx, cy, turn, length, width = (v[:, None, None] for v in piece[:, :5].T)
            cos, sin = (math.pi * turn).cos(), (math.pi * turn).sin()
            along = (x - SIDE * cx) * cos + (y - SIDE * cy) * sin  # [B, H, W]
            across = (y - SIDE * cy) * cos - (x - SIDE * cx) * sin
            bar = (along.abs() < 1 + 4 * length) & (across.abs() < 0.6 + 1.2 * width)
            ground = torch.where(bar[:, None], piece[:, 5:, None, None], ground)
        return ground
