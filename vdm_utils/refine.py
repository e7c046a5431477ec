"""Masks that keep their promise on every picture: the order of the gates cut to fit, or gates of its own for every picture.

The gate networks rank the patches. `cut_to_fit` asks the classifier how many of the first are needed: one forward pass for each
size that is tried, and so few masks to choose from that there is little room for luck.

Gate networks are *amortised*: one rule for all pictures, one forward pass for each. Where no such rule can be learned from the
hidden states (CIFAR-10 in notebook 05), the same game can still be played for every picture by itself (the comparison of De
Cao et al. 2020, section 2.3). It costs hundreds of passes, and it may find what is true of this picture by chance only, so judge
such a mask by another fill than the one it was made with (`metrics.deletion_curves`).
"""

from __future__ import annotations

import math

import torch

from vdm_utils.diffmask import Explanation, VisionDiffMask, VisionDiffMaskConfig, check_numbers
from vdm_utils.errors import check_integer
from vdm_utils.gates import HardConcrete, combine_votes
from vdm_utils.metrics import top_patches
from vdm_utils.objective import Multiplier, expected_l0, kl_divergence, lagrangian

# |log_alpha| to begin with: a gate that the networks have closed for good would get no gradient
LARGEST_START = 1.0
PRICE, LOWEST_PRICE, HIGHEST_PRICE, PRICE_LR = 2.0, 1.0, 100.0, 0.1
# the last steps are a tenth as long as the first
SLOWEST = 0.1


def promise_held(whole: torch.Tensor, masked: torch.Tensor, kl: torch.Tensor, eps: float) -> torch.Tensor:
    """Whether KL [B] ≤ ε and the class is the same, for logits [B, C] of whole and of masked pictures: bool [B]."""
    return (kl <= eps) & (masked.argmax(-1) == whole.argmax(-1))


@torch.no_grad()
def cut_to_fit(
    diffmask: VisionDiffMask, pixel_values: torch.Tensor, sizes: int = 16, eps: float | None = None
) -> Explanation:
    """Explain images [B, C, H, W] with as few patches, in the order of the gate networks, as keep the promise.

    So many `sizes` are tried, at equal distances from nothing upwards; the smallest with KL ≤ ε and an unchanged class is
    shown, or everything. One forward pass for each size, and one for the whole picture.

    Args:
        eps: the KL in nats that a masked image may cost; by default the one that the gate networks were trained for.
    Returns:
        An `Explanation` whose `mask` is 0 or 1, and is the one that was checked; `scores` and `masks_per_layer` are those of
        the gate networks.
    """
    check_integer("sizes", sizes, 1, 10**4, "cut_to_fit")
    eps = diffmask.config.eps if eps is None else eps
    check_numbers(VisionDiffMaskConfig(eps=eps), "cut_to_fit")
    states = diffmask.view.encode(pixel_values)
    log_prob = combine_votes(diffmask.votes(states).log_prob_nonzero).unflatten(-1, states.grid)  # [B, K, rows, cols]
    scores, whole = log_prob[:, -1], states.logits.float()
    best = [torch.ones_like(scores), whole.clone(), torch.zeros_like(whole[:, 0])]
    counts = torch.arange(sizes, device=scores.device) * scores[0].numel() / sizes
    for mask in top_patches(scores, counts.ceil().flip(0)).to(scores.dtype).unbind(1):  # ever smaller
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
    steps: int = 100,
    lr: float = 0.15,
    seed: int = 0,
    eps: float | None = None,
) -> Explanation:
    """Explain images [B, C, H, W] with gates of their own that start from what the gate networks say.

    Every step draws one mask per picture and plays the game of `objective`, with one multiplier per picture; then the gates
    are closed or opened (P(z ≠ 0) > ½), and the smallest such mask with KL ≤ ε and an unchanged class is kept. So the promise
    holds for every picture, at worst with everything kept. Three forward passes and one backward pass per step.

    Args:
        lr: of log_alpha, in Adam. A longer search with a smaller one ranks the patches better.
        seed: of the draws; torch's global random state is left alone.
        eps: the KL in nats that a masked image may cost; by default the one that the gate networks were trained for.
    Returns:
        An `Explanation` whose `mask` is 0 or 1, and is the one that was checked. `scores` are log P(z ≠ 0) of its gates,
        `masks_per_layer` those of the gate networks, before refinement.
    """
    check_integer("steps", steps, 1, 10**6, "refine")
    config, states = diffmask.config, diffmask.view.encode(pixel_values)
    eps = config.eps if eps is None else eps
    check_numbers(VisionDiffMaskConfig(eps=eps), "refine")
    stretch = config.temperature, config.low, config.high
    whole = states.logits.float()  # [B, C]

    def cost(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, C] of the masked pictures, and their KL [B]."""
        logits = diffmask.masked_logits(pixel_values, states, mask).float()
        return logits, kl_divergence(whole, logits)

    with torch.no_grad():
        log_prob = combine_votes(diffmask.votes(states).log_prob_nonzero)  # [B, K, N]
    odds = torch.logit(log_prob[:, -1].exp(), eps=1e-6)
    log_alpha = odds + config.temperature * math.log(-config.low / config.high)  # the inverse of P(z ≠ 0), [B, N]
    log_alpha = log_alpha.clamp(-LARGEST_START, LARGEST_START).requires_grad_()
    multiplier = Multiplier(len(odds), PRICE, LOWEST_PRICE, HIGHEST_PRICE, log_space=True).to(odds.device)
    players = [log_alpha, multiplier.parameter]
    groups = [{"params": players[:1], "lr": lr}, {"params": players[1:], "lr": PRICE_LR, "maximize": True}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    slow_down = [lambda step: 1 - (1 - SLOWEST) * step / steps, lambda step: 1.0]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, slow_down)
    generator = torch.Generator(odds.device).manual_seed(seed)
    # to begin with everything is kept, and nothing has changed
    best = [torch.ones_like(odds), torch.zeros_like(odds), whole.clone(), torch.zeros_like(whole[:, 0])]
    for _ in range(steps):
        gates = HardConcrete(log_alpha, *stretch)
        kl = cost(gates.rsample(generator=generator))[1]  # [B]
        primal = lagrangian(expected_l0(gates.log_prob_nonzero), kl, multiplier.value, eps)  # [B]
        dual = multiplier.dual_objective(slice(None), kl - eps)  # [B]
        # not backward(): the placeholder is not a player here
        log_alpha.grad, multiplier.parameter.grad = torch.autograd.grad((primal + dual).sum(), players)
        optimizer.step()
        schedule.step()
        multiplier.clamp_()
        with torch.no_grad():
            scores = HardConcrete(log_alpha, *stretch).log_prob_nonzero
            mask = (scores.exp() > 0.5).to(odds.dtype)
            logits, kl = cost(mask)
            holds = promise_held(whole, logits, kl, eps)
            smaller = holds & (mask.sum(1) < best[0].sum(1))
            for kept, found in zip(best, (mask, scores, logits, kl)):
                kept[smaller] = found[smaller]
    mask, scores, masked_logits, kl = best
    mask, scores, per_layer = (x.unflatten(-1, states.grid) for x in (mask, scores, log_prob.exp()))
    return Explanation(mask, per_layer, scores, mask.mean(dim=(1, 2)), states.logits, masked_logits, kl)
