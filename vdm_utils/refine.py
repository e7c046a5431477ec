"""Masks that keep their promise on every picture: an order of the patches, and as few of the first as the classifier needs.

`cut_to_fit` takes the order of the gate networks (or of any other method) and asks the classifier how many: one forward pass for
each size that is tried, and so few masks to choose from that there is little room for luck.

Gate networks are *amortised*: one rule for all pictures, one forward pass for each. Where no such rule can be learned from the
hidden states (CIFAR-10 in notebook 05), the same game can still be played for every picture by itself (the comparison of De
Cao et al. 2020, section 2.3). Many masks suffice, and one search finds one of them by chance; `refine` searches several times,
ranks a patch by how often it was found, and cuts that order to fit. It costs hundreds of passes; judge such a mask by another
fill than the one it was made with (`metrics.deletion_curves`).
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch

from vdm_utils.diffmask import Explanation, VisionDiffMask, VisionDiffMaskConfig, check_numbers
from vdm_utils.errors import VDMError, check_integer
from vdm_utils.gates import HardConcrete, combine_votes
from vdm_utils.metrics import top_patches
from vdm_utils.objective import Multiplier, expected_l0, kl_divergence, lagrangian
from vdm_utils.vit import PatchStates

# |log_alpha| to begin with: a gate that the networks have closed for good would get no gradient
LARGEST_START = 1.0
PRICE, LOWEST_PRICE, HIGHEST_PRICE, PRICE_LR = 2.0, 1.0, 100.0, 0.1
# the last steps are a tenth as long as the first
SLOWEST = 0.1


def promise_held(whole: torch.Tensor, masked: torch.Tensor, kl: torch.Tensor, eps: float) -> torch.Tensor:
    """Whether KL [B] ≤ ε and the class is the same, for logits [B, C] of whole and of masked pictures: bool [B]."""
    return (kl <= eps) & (masked.argmax(-1) == whole.argmax(-1))


def _epsilon(diffmask: VisionDiffMask, eps: float | None, where: str) -> float:
    eps = diffmask.config.eps if eps is None else eps
    check_numbers(VisionDiffMaskConfig(eps=eps), where)
    return eps


@torch.no_grad()
def cut_to_fit(
    diffmask: VisionDiffMask,
    pixel_values: torch.Tensor,
    sizes: int = 16,
    eps: float | None = None,
    scores: torch.Tensor | None = None,
) -> Explanation:
    """Explain images [B, C, H, W] with as few patches, in the order of the gate networks, as keep the promise.

    So many `sizes` are tried, at equal distances from nothing upwards; the smallest with KL ≤ ε and an unchanged class is
    shown, or everything. One forward pass for each size, and one for the whole picture.

    Args:
        eps: the KL in nats that a masked image may cost; by default the one that the gate networks were trained for.
        scores: another order, [B, rows, cols], large values first (`attributions.METHODS` give some); by default log P(z ≠ 0)
            of the gate networks.
    Returns:
        An `Explanation` whose `mask` is 0 or 1, and is the one that was checked; `scores` are those of the order,
        `masks_per_layer` those of the gate networks.
    """
    check_integer("sizes", sizes, 1, 10**4, "cut_to_fit")
    eps = _epsilon(diffmask, eps, "cut_to_fit")
    states = diffmask.view.encode(pixel_values)
    log_prob = combine_votes(diffmask.votes(states).log_prob_nonzero).unflatten(-1, states.grid)  # [B, K, rows, cols]
    scores = log_prob[:, -1] if scores is None else scores
    if scores.shape != log_prob[:, -1].shape:
        raise VDMError("these scores are not an order of the patches", where="cut_to_fit", expected=list(log_prob[:, -1].shape),
                       got=list(scores.shape), fix="give one score for every patch of every picture")  # fmt: skip
    whole = states.logits.float()
    best = [torch.ones_like(log_prob[:, -1]), whole.clone(), torch.zeros_like(whole[:, 0])]
    counts = torch.arange(sizes, device=scores.device) * scores[0].numel() / sizes
    for mask in top_patches(scores, counts.ceil().flip(0)).to(best[0].dtype).unbind(1):  # ever smaller
        logits = diffmask.masked_logits(pixel_values, states, mask).float()
        kl = kl_divergence(whole, logits)
        holds = promise_held(whole, logits, kl, eps)
        for kept, found in zip(best, (mask, logits, kl)):
            kept[holds] = found[holds]
    mask, masked_logits, kl = best
    return Explanation(mask, log_prob.exp(), scores, mask.mean(dim=(1, 2)), states.logits, masked_logits, kl)


def refine(
    diffmask: VisionDiffMask,
    pixel_values: torch.Tensor,
    steps: int = 50,
    searches: int = 8,
    lr: float = 0.3,
    seed: int = 0,
    eps: float | None = None,
    from_nothing: bool = False,
) -> Explanation:
    """Explain images [B, C, H, W] with gates of their own that start from what the gate networks say, or from nothing.

    Every step draws one mask per picture and plays the game of `objective`, with one multiplier per picture: a forward pass
    and a backward pass. All `searches` begin at the same place and differ in their draws. What they found is averaged, and
    that order is cut to fit; so is the one of the gate networks, which stays where it needs fewer patches. So the promise
    holds for every picture, at worst with everything kept.

    Searches that begin at the same mask end near it and near each other: a small set. Those that begin with every patch as
    likely as any other end far apart, and a patch that is found by most of them is one that the classifier reads: an order. They
    get lost where few masks are enough (shapes), because half of the patches at random cost too much there to begin with.

    Args:
        steps: of each search.
        lr: of log_alpha, in Adam.
        seed: of the draws; torch's global random state is left alone.
        eps: the KL in nats that a masked image may cost; by default the one that the gate networks were trained for.
        from_nothing: the gate networks have no say, in the start or in the answer.
    Returns:
        An `Explanation` as of `cut_to_fit`. `scores` are log P(z ≠ 0) of a gate that is drawn from one of the searches, or of
        the gate networks.
    """
    check_integer("steps", steps, 1, 10**6, "refine")
    check_integer("searches", searches, 1, 10**4, "refine")
    eps = _epsilon(diffmask, eps, "refine")
    config, states = diffmask.config, diffmask.view.encode(pixel_values)
    if from_nothing:
        start = torch.zeros_like(states.embeddings[:, :, 0])  # [B, N]
    else:
        before = cut_to_fit(diffmask, pixel_values, eps=eps)
        odds = torch.logit(before.scores.flatten(1).exp(), eps=1e-6)
        start = odds + config.temperature * math.log(-config.low / config.high)  # the inverse of P(z ≠ 0), [B, N]
        start = start.clamp(-LARGEST_START, LARGEST_START)
    generator = torch.Generator(start.device).manual_seed(seed)
    found = [_search(diffmask, pixel_values, states, start, eps, steps, lr, generator) for _ in range(searches)]
    scores = torch.stack(found).mean(0).log().float().unflatten(-1, states.grid)
    searched = cut_to_fit(diffmask, pixel_values, eps=eps, scores=scores)
    if from_nothing:
        return searched
    larger = searched.kept > before.kept  # [B]
    for new, old in ((getattr(searched, fact.name), getattr(before, fact.name)) for fact in fields(Explanation)):
        new[larger] = old[larger]
    return searched


def _search(
    diffmask: VisionDiffMask,
    pixel_values: torch.Tensor,
    states: PatchStates,
    start: torch.Tensor,
    eps: float,
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """P(z ≠ 0) of gates [B, N] that began at log_alpha = `start`: one game for each picture. In float64, where an open gate
    is still told from a wide open one."""
    config, whole = diffmask.config, states.logits.float()  # [B, C]
    log_alpha = start.clone().requires_grad_()
    multiplier = Multiplier(len(start), PRICE, LOWEST_PRICE, HIGHEST_PRICE, log_space=True).to(start.device)
    players = [log_alpha, multiplier.parameter]
    groups = [{"params": players[:1], "lr": lr}, {"params": players[1:], "lr": PRICE_LR, "maximize": True}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    slow_down = [lambda step: 1 - (1 - SLOWEST) * step / steps, lambda step: 1.0]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, slow_down)
    for _ in range(steps):
        gates = HardConcrete(log_alpha, config.temperature, config.low, config.high)
        drawn = gates.rsample(generator=generator)
        kl = kl_divergence(whole, diffmask.masked_logits(pixel_values, states, drawn).float())  # [B]
        primal = lagrangian(expected_l0(gates.log_prob_nonzero), kl, multiplier.value, eps)  # [B]
        dual = multiplier.dual_objective(slice(None), kl - eps)  # [B]
        # not backward(): the placeholder is not a player here
        log_alpha.grad, multiplier.parameter.grad = torch.autograd.grad((primal + dual).sum(), players)
        optimizer.step()
        schedule.step()
        multiplier.clamp_()
    return HardConcrete(log_alpha.detach().double(), config.temperature, config.low, config.high).prob_nonzero
