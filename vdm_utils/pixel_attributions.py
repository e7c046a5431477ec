"""Attribution methods that need nothing but the pixels and the output of a model, and three that need no model.

Signature and promises are those of `vdm_utils.attributions`, which lists these methods with all the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, Occlusion
from transformers import PreTrainedModel

from vdm_utils.errors import VDMError
from vdm_utils.pictures import hashed_uniform
from vdm_utils.vit import PatchView

INTEGRATION_STEPS = 32  # points on the path of integrated gradients; the paper finds 20 to 300 enough
RISE_MASKS = 256  # enough for 3×3 patches; the paper draws 4,000 to 8,000 for its 7×7 cells
RISE_KEPT = 0.5  # probability that a patch is kept, as in the paper
CENTRE_WIDTH = 0.5  # standard deviation of the centre prior, in half sides of the image
IMAGES_AT_ONCE = 128  # masked copies that go through the model in one call


@dataclass(frozen=True)
class Method:
    """An attribution method, which can be called as its `function`, where it comes from, and what it costs.

    forward, backward: passes of the image batch through the base when the target is left out, plus `forward_per_patch`
    for every patch of the grid.
    """

    function: Callable[..., torch.Tensor]
    paper: str
    forward: int
    backward: int = 0
    forward_per_patch: int = 0

    def __call__(
        self, model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.function(model, pixel_values, target)

    def passes(self, model: PreTrainedModel) -> tuple[int, int]:
        """(forward, backward) passes per call for this model's number of patches."""
        rows, cols = PatchView(model).grid
        return self.forward + self.forward_per_patch * rows * cols, self.backward


def check(model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None) -> PatchView:
    """The model's `PatchView`, once images and classes are known to fit it."""
    view, labels = PatchView(model), model.config.num_labels
    view.check(pixel_values)
    if target is None:
        return view
    one_each = (
        isinstance(target, torch.Tensor) and target.dtype == torch.long and target.shape == pixel_values.shape[:1]
    )
    if not one_each or target.min() < 0 or target.max() >= labels:
        raise VDMError("the target classes do not fit", where="vdm_utils.attributions", got=target,
                       expected=f"None or {len(pixel_values)} whole numbers in 0..{labels - 1}",
                       fix="leave the target out to explain the predicted classes")  # fmt: skip
    return view


def of_class(outputs: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    """The entry of outputs [..., B, C] of the target, or of the largest class, for each image: [..., B]."""
    target = outputs.argmax(-1) if target is None else target.expand(outputs.shape[:-1])
    return outputs.gather(-1, target[..., None])[..., 0]


@torch.no_grad()
def predicted(view: PatchView, pixel_values: torch.Tensor) -> torch.Tensor:
    """The predicted classes [B], by one forward pass."""
    with view.frozen():
        return view.model(pixel_values).logits.argmax(-1)


def integrated_gradients(
    model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None
) -> torch.Tensor:
    """Integrated gradients (Sundararajan et al. 2017) of the target's logit from the mean colour (0), by captum.

    Summed over the channels and pixels of a patch with their signs, so that the scores of an image add up to the
    difference of its logit from that of a plain image; a negative patch speaks against the target.
    """
    view = check(model, pixel_values, target)
    target = predicted(view, pixel_values) if target is None else target
    with view.frozen():
        pixels = IntegratedGradients(lambda images: model(images).logits).attribute(
            pixel_values.detach(), 0, target, n_steps=INTEGRATION_STEPS, internal_batch_size=len(pixel_values)
        )
    return F.avg_pool2d(pixels.detach().sum(1), view.patch_size, divisor_override=1)


def occlusion(model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """Occlusion (Zeiler and Fergus 2014) by captum: what the target's logit loses when a patch gets the mean colour (0)."""
    view = check(model, pixel_values, target)
    target = predicted(view, pixel_values) if target is None else target
    window, at_once = (view.num_channels, *view.patch_size), max(1, IMAGES_AT_ONCE // len(pixel_values))
    with view.frozen():
        pixels = Occlusion(lambda images: model(images).logits).attribute(
            pixel_values, window, window, 0, target, perturbations_per_eval=at_once
        )
    return F.avg_pool2d(pixels[:, 0], view.patch_size)  # the same on all pixels of a patch


@torch.no_grad()
def rise(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    target: torch.Tensor | None = None,
    masks: int = RISE_MASKS,
    seed: int = 0,
) -> torch.Tensor:
    """RISE (Petsiuk et al. 2018): the mean of P(target | masked image) · mask over random masks, divided by P(kept).

    A mask keeps each patch with probability 1/2 and gives the others the mean colour (0); all images get the same masks.
    """
    view = check(model, pixel_values, target)
    target = predicted(view, pixel_values) if target is None else target
    generator, total = torch.Generator().manual_seed(seed), 0.0
    kept = (torch.rand(masks, *view.grid, generator=generator) < RISE_KEPT).float().to(pixel_values.device)
    with view.frozen():
        for part in kept.split(max(1, IMAGES_AT_ONCE // len(pixel_values))):  # [m, rows, cols]
            shown = view.on_pixels(part)[:, None, None]  # [m, 1, 1, H, W]
            logits = model((shown.to(pixel_values.dtype) * pixel_values).flatten(0, 1)).logits.float()
            probability = of_class(logits.softmax(-1).unflatten(0, (len(part), -1)), target)  # [m, B]
            total = total + torch.einsum("mb,mrc->brc", probability, part)
    return total / (masks * RISE_KEPT)


# ---------------------------------------------------------------------- what needs no model


def random_scores(
    model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None, seed: int = 0
) -> torch.Tensor:
    """Uniform random numbers that depend only on the image's pixels and the seed: what any method has to beat."""
    rows, cols = check(model, pixel_values, target).grid
    marks = np.array([zlib.crc32(image.tobytes()) for image in pixel_values.detach().float().cpu().numpy()])
    scores = torch.from_numpy(hashed_uniform(seed, 0, marks, rows * cols))
    return scores.float().unflatten(1, (rows, cols)).to(pixel_values.device)


def centre_prior(
    model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None
) -> torch.Tensor:
    """A Gaussian around the middle of the image, the same for all: photographers put the object there (Tatler 2007)."""
    y, x = (((torch.arange(n) + 0.5) / n * 2 - 1).square() for n in check(model, pixel_values, target).grid)
    prior = (-(y[:, None] + x) / (2 * CENTRE_WIDTH**2)).exp()  # [rows, cols]
    return prior.repeat(len(pixel_values), 1, 1).to(pixel_values.device)


def edge_map(model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """Mean length of the picture's own gradient in a patch, over all channels: looks like an explanation and is none
    (Adebayo et al. 2018)."""
    view = check(model, pixel_values, target)
    slopes = torch.stack(torch.gradient(pixel_values.detach(), dim=(2, 3)))  # [2, B, C, H, W]
    return F.avg_pool2d(slopes.square().sum((0, 2)).sqrt(), view.patch_size)
