"""How good is a mask? Agreement with a known truth, and what the classifier says when patches are taken away."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from vdm_utils.data import Pictures
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.objective import kl_divergence
from vdm_utils.vit import PatchStates, PatchView


def on_grid(truth: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A truth [B, rows, cols] of any resolution on the patch grid: the mean over each patch, [B, *grid]."""
    truth = truth.float()
    return (
        truth if tuple(truth.shape[-2:]) == tuple(grid) else F.interpolate(truth[:, None], size=grid, mode="area")[:, 0]
    )


def patch_iou(mask: torch.Tensor, truth: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Intersection over union of the kept patches (mask > threshold) with the true ones, per image: [B].

    Two empty sets agree: 1.
    """
    kept, true = mask > threshold, on_grid(truth, mask.shape[-2:]) > 0.5
    shared, either = (kept & true).sum((1, 2)), (kept | true).sum((1, 2))
    return torch.where(either > 0, shared / either.clamp(min=1), torch.ones_like(shared, dtype=torch.float))


def jensen_shannon(mask: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Jensen–Shannon divergence in nats (0..log 2) between mask and truth, each normalised to sum 1: [B].

    As in De Cao et al. 2020. NaN where the truth is empty: there is no distribution to compare with. A mask of zeros is
    no distribution either, and counts as the worst one (log 2) where something is true.
    """
    true = on_grid(truth, mask.shape[-2:]).flatten(1)
    p = mask.flatten(1) / mask.flatten(1).sum(1, keepdim=True).clamp(min=1e-12)
    q = true / true.sum(1, keepdim=True).clamp(min=1e-12)
    middle = (p + q) / 2

    def relative_entropy(a):
        return torch.where(a > 0, a * (a / middle).log(), torch.zeros_like(a)).sum(1)

    divergence = (relative_entropy(p) + relative_entropy(q)) / 2
    divergence = torch.where(p.sum(1) > 0, divergence, torch.full_like(divergence, math.log(2)))
    return torch.where(q.sum(1) > 0, divergence, torch.full_like(divergence, math.nan))


def mass_accuracy(mask: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Share of the mask's mass that lies on the true pixels, per image: [B], 0..1; NaN for an empty truth or mask.

    `truth` may be finer than the mask: every patch counts by the share of it that is true.
    """
    true = on_grid(truth, mask.shape[-2:])
    share = (mask * true).sum((1, 2)) / mask.sum((1, 2))
    return torch.where(true.sum((1, 2)) > 0, share, torch.full_like(share, math.nan))


@torch.no_grad()
def deletion_curves(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    scores: torch.Tensor,
    important_first: bool,
    points: int = 29,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace more and more patches by uniform noise, in the order of `scores` [B, rows, cols].

    The fractions replaced are i / (points + 1) for i = 1..points. Returns the probability of the class predicted for the
    whole picture and the KL from the whole picture's output in nats, both [B, points]. A good ranking makes the
    probability fall fast with the important patches first, and hold long with the unimportant ones first.
    """
    view = PatchView(model)
    view.check(pixel_values)
    batch, (rows, cols) = len(pixel_values), view.grid
    order = scores.flatten(1).argsort(dim=1, descending=important_first)
    rank = order.argsort(dim=1).view(batch, 1, rows, cols)  # 0 goes first
    rank = F.interpolate(rank.float(), size=pixel_values.shape[-2:], mode="nearest")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(pixel_values.shape, generator=generator).to(pixel_values.device) * 2 - 1
    with view.frozen():
        whole = model(pixel_values).logits.float()
        predicted = whole.argmax(-1, keepdim=True)
        probability, kl = [], []
        for point in range(1, points + 1):
            gone = rank < round(rows * cols * point / (points + 1))
            logits = model(torch.where(gone, noise, pixel_values)).logits.float()
            probability.append(logits.softmax(-1).gather(1, predicted)[:, 0])
            kl.append(kl_divergence(whole, logits))
    return torch.stack(probability, 1), torch.stack(kl, 1)


@torch.no_grad()
def truth_report(diffmask: VisionDiffMask, data: Pictures, batch_size: int = 250) -> dict[str, float]:
    """What the shown masks of a dataset with a known truth are worth; every value is a mean over images.

    `iou`, `js` and `mass` as above; `kl` in nats; `feasible`: share with KL ≤ ε; `kept`: mask mean; `kept_true` and
    `kept_other`: mean of the mask on the true patches and on the others. `truth_feasible`: share on which the *true* mask,
    with the learned placeholder, keeps KL ≤ ε; well below 1 the classifier itself is unsure where only the truth is left.
    """
    collected: dict[str, list[torch.Tensor]] = {}
    for batch in DataLoader(data, batch_size):
        pixel_values = batch["pixel_values"].to(diffmask.device)
        shown = diffmask.explain(pixel_values)
        mask = shown.mask.cpu()
        true = on_grid(batch["truth"], mask.shape[-2:]) > 0.5
        given_truth = diffmask.masked_logits(pixel_values, diffmask.view.encode(pixel_values), true.to(diffmask.device))
        truth_kl = kl_divergence(shown.logits, given_truth).cpu()
        values = {
            "iou": patch_iou(mask, batch["truth"]),
            "js": jensen_shannon(mask, batch["truth"]),
            "mass": mass_accuracy(mask, batch["truth"]),
            "kl": shown.kl.cpu(),
            "feasible": (shown.kl.cpu() <= diffmask.config.eps).float(),
            "truth_feasible": (truth_kl <= diffmask.config.eps).float(),
            "kept": shown.kept.cpu(),
            "kept_true": mask[true],
            "kept_other": mask[~true],
        }
        for name, value in values.items():
            collected.setdefault(name, []).append(value)
    return {name: torch.cat(parts).nanmean().item() for name, parts in collected.items()}


@torch.no_grad()
def smallest_masks(diffmask: VisionDiffMask, pixel_values: torch.Tensor, batch_size: int = 512) -> torch.Tensor:
    """All smallest binary masks of one picture [C, H, W] with KL ≤ ε: bool [M, N], by trying every one of the 2^N.

    Meant for grids of at most 16 patches; the full mask always qualifies, so M ≥ 1.
    """
    states = diffmask.view.encode(pixel_values[None])
    count = states.embeddings.shape[1]
    if count > 16:
        raise VDMError("too many patches to try every mask", where="smallest_masks", expected="at most 16", got=count,
                       fix="use a smaller grid")  # fmt: skip
    masks = (torch.arange(2**count)[:, None] >> torch.arange(count)) & 1  # [2^N, N]
    kl = []
    for part in masks.split(batch_size):
        pictures = pixel_values.expand(len(part), -1, -1, -1)
        same = PatchStates(states.embeddings.expand(len(part), -1, -1), [], states.logits, states.grid)
        kl.append(kl_divergence(states.logits, diffmask.masked_logits(pictures, same, part)))
    enough = torch.cat(kl) <= diffmask.config.eps
    enough[-1] = True  # everything kept: KL is 0 up to rounding
    size = masks.sum(1)
    return masks[enough & (size == size[enough].min())].bool()
