"""How good is a mask? Agreement with a known truth, and what the classifier says when patches are taken away."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from vdm_utils.data import Pictures
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError, unknown_name
from vdm_utils.objective import kl_divergence
from vdm_utils.vit import PatchStates, PatchView


def on_grid(truth: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A truth [B, rows, cols] of any resolution on the patch grid: the mean over each patch, [B, *grid]."""
    rows, cols = (_overlap(*sides).to(truth.device) for sides in zip(truth.shape[-2:], grid))
    return rows @ truth.float() @ cols.T


def _overlap(cells: int, patches: int) -> torch.Tensor:
    """Which share of every patch lies in which cell, [patches, cells], where both fill the same length."""
    patch, cell = torch.arange(patches)[:, None] * cells, torch.arange(cells) * patches
    return (torch.minimum(patch + cells, cell + patches) - torch.maximum(patch, cell)).clamp(min=0) / cells


def patch_iou(mask: torch.Tensor, truth: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Intersection over union of the kept patches (mask > threshold) with the true ones, per image: [B].

    Two empty sets agree: 1.
    """
    kept, true = mask > threshold, on_grid(truth, mask.shape[-2:]) > 0.5
    shared, either = (kept & true).sum((1, 2)), (kept | true).sum((1, 2))
    return (shared / either).where(either > 0, 1)


def check_scores(scores: torch.Tensor, where: str) -> None:
    """Raise `VDMError` unless there is a number for every patch: [B, rows, cols] without NaN."""
    if scores.dim() != 3 or scores.isnan().any():
        raise VDMError("these scores are no ranking", where=where, expected="numbers [B, rows, cols]",
                       got=f"{list(scores.shape)}, NaN among them: {bool(scores.isnan().any())}", fix="give one number per patch")  # fmt: skip


def patch_ranks(scores: torch.Tensor) -> torch.Tensor:
    """The place of every patch in the order of `scores` [B, rows, cols], 0 for the largest: int64 [B, N]."""
    check_scores(scores, "patch_ranks")
    return scores.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # equal ones in reading order


def share_below(scores: torch.Tensor) -> torch.Tensor:
    """For every patch the share of patches with lower `scores` [B, rows, cols], equal ones counting half: [B, N] in 0..1."""
    x = scores.flatten(1).contiguous()
    ordered = x.sort(1).values
    lower, lower_or_equal = torch.searchsorted(ordered, x), torch.searchsorted(ordered, x, right=True)
    return (lower + lower_or_equal).double() / (2 * x.shape[1])


def top_patches(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The patches with the largest `scores` [B, rows, cols]: bool [B, S, rows, cols] for `counts` [S] or [B, S]."""
    return (patch_ranks(scores)[:, None] < counts[..., None]).unflatten(-1, scores.shape[1:])


def iou_at_k(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """`patch_iou` of the k patches with the largest scores, told the number k of true ones: [B], NaN where k = 0."""
    count = (on_grid(truth, scores.shape[-2:]) > 0.5).sum((1, 2))
    return patch_iou(top_patches(scores, count[:, None])[:, 0].float(), truth).where(count > 0, math.nan)


def pointing_game(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """1 where the patch with the largest score touches the truth, else 0 (Zhang et al. 2018): [B]; NaN for an empty truth."""
    check_scores(scores, "pointing_game")
    true = on_grid(truth, scores.shape[-2:]).flatten(1)
    hit = (true.gather(1, scores.flatten(1).argmax(1, keepdim=True))[:, 0] > 0).float()
    return hit.where(true.sum(1) > 0, math.nan)


def jensen_shannon(mask: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Jensen–Shannon divergence in nats (0..log 2) between mask and truth, each normalised to sum 1: [B].

    As in De Cao et al. 2020. NaN where the truth is empty: there is no distribution to compare with. A mask of zeros is
    no distribution either, and counts as the worst one (log 2) where something is true.
    """
    true = on_grid(truth, mask.shape[-2:]).flatten(1)
    smallest = torch.finfo(torch.float32).tiny
    p, q = (mass / mass.sum(1, keepdim=True).clamp(min=smallest) for mass in (mask.flatten(1).float(), true))
    middle = (p + q) / 2

    def relative_entropy(a):
        return (a * (a / middle).log()).where(a > 0, 0).sum(1)

    divergence = (relative_entropy(p) + relative_entropy(q)) / 2
    return divergence.where(p.sum(1) > 0, math.log(2)).where(q.sum(1) > 0, math.nan)


def mass_accuracy(mask: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Share of the mask's mass that lies on the true pixels, per image: [B], 0..1; NaN for an empty truth or mask.

    `truth` may be finer than the mask: every patch counts by the share of it that is true.
    """
    true = on_grid(truth, mask.shape[-2:])
    return ((mask * true).sum((1, 2)) / mask.sum((1, 2))).where(true.sum((1, 2)) > 0, math.nan)


# What stands where patches were taken away.
FILLS = ("placeholder", "mean colour", "token removal", "noise")


@torch.no_grad()
def logits_without(
    model: PreTrainedModel | VisionDiffMask,
    pixel_values: torch.Tensor,
    gone: torch.Tensor,
    fill: str = "noise",
    seed: int = 0,
    batch_size: int = 128,
) -> torch.Tensor:
    """What a classifier says of pictures [B, C, H, W] without some of their patches: logits [B, S, C].

    No fill is neutral: each makes pictures that the classifier was not trained on (Jain et al. 2022, arXiv 2204.08945).

    Args:
        model: the classifier, or the VisionDiffMask around it, which the first fill needs.
        gone: bool [B, S, N], S sets of patches to take away for every picture.
        fill: `placeholder`: the learned one, in place of the embeddings. `mean colour`: 0 in normalised units.
            `token removal`: nothing, the sequence is shorter. `noise`: uniform over the normalised range −1..1, the same in
            all sets of a picture, as in the Vision DiffMask paper.
        batch_size: how many pictures, each with one set taken away, the model sees at once.
    Raises:
        VDMError: for an unknown fill, a fill that the model has not got, or sets that do not fit the patch grid.
    """
    if fill not in FILLS:
        raise unknown_name("fill", fill, FILLS, "logits_without")
    base = model.base if isinstance(model, VisionDiffMask) else model
    view = PatchView(base)
    view.check(pixel_values)
    batch, patches = len(pixel_values), view.grid[0] * view.grid[1]
    if gone.dim() != 3 or (gone.shape[0], gone.shape[2]) != (batch, patches):
        raise VDMError("one entry per patch is needed", where="logits_without", expected=f"[{batch}, sets, {patches}]",
                       got=list(gone.shape), fix="use the patch grid of the classifier")  # fmt: skip
    answer = _answer(model, view, pixel_values, fill, seed, batch_size)
    sets = gone.to(pixel_values.device).transpose(0, 1).flatten(0, 1)  # [S·B, N]: sets of equal size stand together
    with view.frozen():
        rows = torch.arange(len(sets), device=sets.device).split(batch_size)
        logits = torch.cat([answer(row % batch, sets[row]).float() for row in rows])
    return logits.unflatten(0, (-1, batch)).transpose(0, 1)


def _answer(model, view: PatchView, pixel_values: torch.Tensor, fill: str, seed: int, batch_size: int) -> Callable:
    """A function (which pictures [M], patches taken from them bool [M, N]) -> logits [M, C]."""
    if fill == "token removal":
        return lambda chosen, gone: view.logits_without_tokens(pixel_values[chosen], gone)
    if fill == "placeholder":
        if not isinstance(model, VisionDiffMask):
            raise VDMError("there is no placeholder", where="logits_without", expected="a VisionDiffMask", got=type(model).__name__,
                           fix="pass the VisionDiffMask, or use another fill")  # fmt: skip
        embeddings = torch.cat([view.encode(part).embeddings for part in pixel_values.split(batch_size)])

        def with_placeholder(chosen, gone):
            states = PatchStates(embeddings[chosen], [], None, view.grid)
            return model.masked_logits(pixel_values[chosen], states, ~gone)

        return with_placeholder
    uniform = torch.rand(pixel_values.shape, generator=torch.Generator().manual_seed(seed)).to(pixel_values)
    canvas = uniform * 2 - 1 if fill == "noise" else torch.zeros_like(pixel_values)

    def painted(chosen, gone):
        where = view.on_pixels(gone.view(-1, 1, *view.grid))
        return view.model(torch.where(where, canvas[chosen], pixel_values[chosen])).logits

    return painted


def deletion_curves(
    model: PreTrainedModel | VisionDiffMask,
    pixel_values: torch.Tensor,
    scores: torch.Tensor,
    important_first: bool,
    points: int = 29,
    seed: int = 0,
    fill: str = "noise",
    batch_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take more and more patches away, in the order of `scores` [B, rows, cols].

    The fractions taken are i / (points + 1) for i = 1..points; `fill` and the rest as for `logits_without`. Returns the
    probability of the class predicted for the whole picture and the KL from its output in nats, both [B, points]; the area
    under a curve is the mean of its points. With the important patches first a good ranking makes the probability fall
    fast, and with the unimportant ones first it holds long.
    """
    rank = patch_ranks(scores if important_first else -scores.double())
    share = torch.arange(points + 1, dtype=torch.double, device=rank.device) / (points + 1)
    gone = rank[:, None] < (rank.shape[1] * share).round()[:, None]  # [B, 1 + points, N]
    logits = logits_without(model, pixel_values, gone, fill, seed, batch_size)
    whole = logits[:, 0]  # nothing is gone yet
    probability = logits.softmax(-1)[torch.arange(len(whole)), :, whole.argmax(-1)]
    return probability[:, 1:], kl_divergence(whole[:, None], logits)[:, 1:]


def insertion_curves(*args, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Put patches back, the most important first, where all were gone; arguments as for `deletion_curves`.

    These are the pictures of deleting the unimportant ones first, met in the opposite order: the areas are equal.
    """
    return tuple(curve.flip(1) for curve in deletion_curves(*args, important_first=False, **options))


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
    count = math.prod(diffmask.view.grid)
    if count > 16:
        raise VDMError("too many patches to try every mask", where="smallest_masks", expected="at most 16", got=count,
                       fix="use a smaller grid")  # fmt: skip
    masks = ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1).bool()  # [2^N, N], the last keeps everything
    logits = logits_without(diffmask, pixel_values[None], ~masks[None], "placeholder", batch_size=batch_size)[0].cpu()
    enough, size = kl_divergence(logits[-1], logits) <= diffmask.config.eps, masks.sum(1)
    return masks[enough & (size == size[enough].min())]
