"""Can this explanation be trusted at all? Checks to pass before its faithfulness is worth measuring."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError, unknown_name
from vdm_utils.metrics import check_scores, patch_iou, share_below
from vdm_utils.objective import kl_divergence
from vdm_utils.vit import PatchView

# (classifier, pixel_values [B, C, H, W]) -> scores [B, rows, cols]
Method = Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Check:
    """What a check found: whether it `passed`, the `value` that was held against the `limit`, and all numbers behind it."""

    passed: bool
    value: float
    limit: float
    table: pd.DataFrame


def rank_correlation(scores: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation of two score maps [B, rows, cols], per picture: [B], −1..1; NaN where one is constant."""
    a, b = share_below(scores) - 0.5, share_below(other) - 0.5  # ranks among equals, but for a factor, with mean 0
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def likeness(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean rank correlation over the pictures on which `before` ranks anything; a constant map `after` has none: 0.

    Its absolute value is not taken: an order turned round is another explanation. With absolute values even two random
    maps would look alike (0.29 on average on 9 patches, 0.10 on 64), and a method could fail for having few patches.
    """
    for scores in (before, after):
        check_scores(scores, "sanity check")
    ranked = before.flatten(1).amax(1) > before.flatten(1).amin(1)
    if not ranked.any():
        raise VDMError("the explanation is constant on every picture", where="sanity check", expected="scores that differ",
                       got="one value per picture", fix="use other pictures, or another method")  # fmt: skip
    return rank_correlation(before[ranked], after[ranked]).nan_to_num(0).mean().item()


def parts_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """The names of a classifier's weights, part by part, from its head down to its embeddings."""
    view, place = PatchView(model), {module: name for name, module in model.named_modules()}
    prefixes = {f"layer {k + 1}": place[layer] + "." for k, layer in reversed(list(enumerate(view.layers)))}
    prefixes["embeddings"] = place[view.projection].rpartition(".")[0] + "."
    names = list(model.state_dict())
    head = [name for name in names if not name.startswith(tuple(prefixes.values()))]  # everything after the last layer
    return {"head": head} | {part: [n for n in names if n.startswith(prefix)] for part, prefix in prefixes.items()}


def randomised(model: PreTrainedModel, down_to: str = "embeddings", seed: int = 0) -> PreTrainedModel:
    """A copy of a classifier with fresh weights from its head down to a part (see `parts_of`); by default all are fresh."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(copy.deepcopy(model.config))
    parts, weights, start = parts_of(model), model.state_dict(), fresh.state_dict()
    if down_to not in parts:
        raise unknown_name("part", down_to, parts, "randomised")
    for name in itertools.chain(*list(parts.values())[: list(parts).index(down_to) + 1]):
        weights[name] = start[name]
    fresh.load_state_dict(weights)
    fresh.name_or_path = ""  # its weights are not those of the checkpoint
    return fresh.to(model.device, model.dtype).eval()


def model_randomisation(
    method: Method,
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    depths: Sequence[str] | None = None,
    draws: int = 20,
    limit: float = 0.2,
) -> Check:
    """Does the explanation change when what the classifier has learned is erased? (Adebayo et al. 2018, arXiv 1810.03292)

    The weights are drawn anew from the head down, part after part (`depths`, names from `parts_of`; all by default). The
    table has the rank correlation with the scores before (see `likeness`): mean, lowest and highest of several draws,
    because on pictures made of few colours one random network may well order them as the trained one does. `value` is the
    mean at the last depth, by default the embeddings, where nothing learned is left; it must not exceed `limit`.
    """
    before, rows = method(model, pixel_values), {}
    for depth in depths or parts_of(model):
        alike = [likeness(before, method(randomised(model, depth, seed), pixel_values)) for seed in range(draws)]
        rows[depth] = {"rank correlation": sum(alike) / draws, "lowest": min(alike), "highest": max(alike)}
    value = rows[depth]["rank correlation"]
    return Check(value <= limit, value, limit, pd.DataFrame.from_dict(rows, orient="index"))


def same_gates(diffmask: VisionDiffMask) -> Method:
    """The gates of a DiffMask as a method for any classifier of the same shape, also one that they were not trained on."""

    def method(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        config = copy.deepcopy(diffmask.config)
        config.base_fingerprint = ""  # another base is the point here
        moved = VisionDiffMask(config)
        moved.load_state_dict(diffmask.state_dict())
        moved.attach(model)
        return moved.to(model.device).eval().explain(pixel_values, check=False).scores

    return method


def new_gates(diffmask: VisionDiffMask, retrain: Callable[[PreTrainedModel], VisionDiffMask]) -> Method:
    """A DiffMask as a method that trains new gates for every other classifier: `retrain` gives one for a classifier."""

    def method(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        own = diffmask if model is diffmask.base else retrain(model)
        return own.explain(pixel_values, check=False).scores

    return method


def label_randomisation(
    diffmask: VisionDiffMask, shuffled: VisionDiffMask, pixel_values: torch.Tensor, limit: float = 0.9
) -> Check:
    """Does the explanation change when the labels meant nothing? (Adebayo et al. 2018, section 3.2)

    `diffmask` explains a classifier trained on true labels, `shuffled` one trained on shuffled labels. `value` is the mean
    patch IoU of their masks, cut at 0.5, over the pictures of which `diffmask` keeps anything; it must not exceed `limit`.
    Sets are compared, because a DiffMask answers with a set: the rank correlation of the scores, which the table has too,
    also judges the order inside it, which nobody asked for. On the toy task masks of shuffled labels reach an IoU of 0.82 in
    15 trainings, those of another seed with the right labels 1.00.
    """
    ours, theirs = (one.explain(pixel_values, check=False) for one in (diffmask, shuffled))
    some = (ours.mask > 0.5).any(2).any(1)
    if not some.any():
        raise VDMError("the explanation keeps nothing on every picture", where="sanity check", expected="masks that keep something",
                       got="empty masks", fix="use other pictures, or another method")  # fmt: skip
    value = patch_iou(theirs.mask, ours.mask > 0.5)[some].mean().item()
    facts = {"IoU": value, "rank correlation": likeness(ours.scores, theirs.scores)}
    return Check(value <= limit, value, limit, pd.DataFrame({"shuffled labels": facts}).T)


@torch.no_grad()
def placebo_leakage(
    diffmask: VisionDiffMask,
    pixel_values: torch.Tensor,
    masks: torch.Tensor | None = None,
    others: torch.Tensor | None = None,
    limit: float = 0.05,
    seed: int = 0,
) -> Check:
    """Does a mask speak for its picture's class when it is laid on a picture without that class?

    The mask of every picture, with the DiffMask's placeholder, is laid on a constant picture (the mean colour), on noise and
    on a picture of another predicted class. The table says how often the classifier then predicts the class of the mask's own
    picture, and how often it would by chance. `value` is the largest excess over chance and must not exceed `limit`.

    Chance is not 1/C: classes need not be equally frequent, and all strange pictures may be taken for the same one. It is the
    agreement that remains when the masks' classes are dealt out anew, on average over all ways to do so: the frequency of the
    class that was predicted (on another picture: among the classes that are not that picture's own).

    Args:
        masks: [B, rows, cols] in 0..1; the DiffMask's own masks of these pictures by default.
        others: the other pictures; by default these ones again. On a counting task take pictures without a counted cell: of
            five cells, a mask that keeps two really leaves two, and a classifier that says so has read the picture.
    """
    own = diffmask.view.encode(pixel_values).logits.argmax(-1)
    masks = diffmask.explain(pixel_values, check=False).mask if masks is None else masks
    others = pixel_values if others is None else others
    theirs = diffmask.view.encode(others).logits.argmax(-1)
    pairs = (own[:, None] != theirs).nonzero()
    if not len(pairs):
        raise VDMError("all pictures are of one class", where="placebo_leakage", expected="at least two predicted classes",
                       got=1, fix="use other pictures")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    mine, other = pairs[torch.randint(len(pairs), (len(own),), generator=generator)].T
    noise = torch.rand(pixel_values.shape, generator=generator).to(pixel_values) * 2 - 1
    everyone, none = torch.arange(len(own)), torch.full_like(own, -1)
    placebos = {  # pictures, whose mask lies on each, and which class it cannot be
        "constant": (torch.zeros_like(noise), everyone, none),
        "noise": (noise, everyone, none),
        "other class": (others[other], mine, theirs[other]),
    }
    frequency = F.pad(own.bincount(minlength=diffmask.base.config.num_labels) / len(own), (0, 1))  # none of class −1
    rows = {}
    for name, (pictures, whose, excluded) in placebos.items():
        said = diffmask.masked_logits(pictures, diffmask.view.encode(pictures), masks[whose]).argmax(-1)
        chance = torch.where(said == excluded, 0, frequency[said] / (1 - frequency[excluded])).mean().item()
        rows[name] = {"class of the mask": (said == own[whose]).float().mean().item(), "chance": chance}
    value = max(row["class of the mask"] - row["chance"] for row in rows.values())
    return Check(value <= limit, value, limit, pd.DataFrame.from_dict(rows, orient="index"))


def seed_stability(masks: Sequence[torch.Tensor], limit: float = 0.85, seed: int = 0) -> Check:
    """Do DiffMasks that differ in their seed alone keep the same patches?

    `masks`: two or more, each [B, rows, cols] in 0..1, of the same pictures; a patch is kept above 0.5. The table has the IoU of
    every pair, and that of two masks of the same sizes with the patches at random places. `value`, the mean over pairs,
    must reach `limit`; 0.85 suits a task with one true answer, such as the toy task.
    """
    if len(masks) < 2 or any(mask.shape != masks[0].shape for mask in masks):
        raise VDMError("these masks cannot be compared", where="seed_stability", expected="two or more [B, rows, cols]",
                       got=[list(mask.shape) for mask in masks], fix="mask the same pictures with every DiffMask")  # fmt: skip
    generator, rows = torch.Generator().manual_seed(seed), {}
    for (i, one), (j, two) in itertools.combinations(enumerate(masks), 2):
        many = one.flatten(1).repeat(20, 1)  # 20 draws
        places = torch.rand(many.shape, generator=generator).argsort(1).to(many.device)
        moved = many.gather(1, places).unflatten(1, one.shape[1:])
        iou, by_chance = patch_iou(one, two > 0.5).mean(), patch_iou(moved, two.repeat(20, 1, 1) > 0.5).mean()
        rows[f"{i + 1} and {j + 1}"] = {"IoU": iou.item(), "at random": by_chance.item()}
    value = sum(row["IoU"] for row in rows.values()) / len(rows)
    return Check(value >= limit, value, limit, pd.DataFrame.from_dict(rows, orient="index"))


@torch.no_grad()
def mask_forms(diffmask: VisionDiffMask, pixel_values: torch.Tensor, limit: float = 0.02, seed: int = 0) -> Check:
    """Is the mask that is shown the mask that was trained, and does it survive a threshold?

    Training draws every gate, an explanation shows P(z ≠ 0), and figures cut it at 0.5. For each of the three the table has
    the fraction kept (z ≠ 0 in the drawn mask), its mean distance from the expected one of the same picture, the mean KL in
    nats and the share of pictures whose class is unchanged. `value` is the largest distance and must not exceed `limit`: it
    is large where gates are undecided.
    """
    states = diffmask.view.encode(pixel_values)
    votes = diffmask.votes(states)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = votes.rsample().prod(dim=1)
    expected = votes.log_prob_nonzero.sum(dim=1).exp()  # [B, N]
    forms = {
        "expected": (expected, expected),
        "drawn": (drawn, drawn > 0),
        "above 0.5": (expected > 0.5, expected > 0.5),
    }
    rows = {}
    for name, (mask, keeps) in forms.items():
        logits, kept = diffmask.masked_logits(pixel_values, states, mask), keeps.float().mean(1)
        unchanged = (logits.argmax(-1) == states.logits.argmax(-1)).float()
        kl = kl_divergence(states.logits.float(), logits.float())
        numbers = {"kept": kept, "distance": (kept - expected.mean(1)).abs(), "kl": kl, "unchanged": unchanged}
        rows[name] = {key: value.mean().item() for key, value in numbers.items()}
    value = max(row["distance"] for row in rows.values())
    return Check(value <= limit, value, limit, pd.DataFrame.from_dict(rows, orient="index"))
