"""What Vision DiffMask minimises: few kept patches, and an output distribution that has not moved.

max over α ≥ 0, min over gates and placeholder:  E[fraction kept] + α · (KL(f(x) ‖ f(x masked)) − ε)
"""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

from vdm_utils.errors import VDMError


def mask_embeddings(embeddings: torch.Tensor, mask: torch.Tensor, placeholder: torch.Tensor) -> torch.Tensor:
    """e' = z·e + (1 − z)·b: patches [B, N, d] blended with the placeholder [d] by the mask [B, N]."""
    z = mask.unsqueeze(-1)
    return z * embeddings + (1 - z) * placeholder


def kl_divergence(logits: torch.Tensor, masked_logits: torch.Tensor) -> torch.Tensor:
    """KL(f(x) ‖ f(x masked)) in nats, per image: [B, C], [B, C] → [B]."""
    log_p = F.log_softmax(logits, dim=-1)
    log_q = F.log_softmax(masked_logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def kl_to_change(logits: torch.Tensor) -> torch.Tensor:
    """The smallest KL(f(x) ‖ ·) in nats, per image, at which another class is as likely: [B, C] → [B], at most log 2.

    As long as a mask costs less, the predicted class cannot change. It is the KL to the distribution that gives the two
    likeliest classes, p₁ and p₂, their mean each, and leaves all others alone.
    """
    two = F.log_softmax(logits, dim=-1).topk(2, dim=-1).values  # [B, 2]
    mean = two.logsumexp(-1, keepdim=True) - math.log(2)
    return (two.exp() * (two - mean)).sum(-1).clamp(min=0)


def kl_in_budget(kl: torch.Tensor, logits: torch.Tensor, eps: float) -> torch.Tensor:
    """KL [B] in a currency of which every image has ε: KL · ε / min(ε, `kl_to_change`), for `logits` [B, C] on whole images.

    At most ε exactly where the KL is at most ε and too small to change the class. The rate ends at ten: nothing keeps the class
    of a tie, and one such image would drown all the others of a batch.
    """
    return kl * eps / kl_to_change(logits).clamp(eps / 10, eps)


def class_margin(logits: torch.Tensor) -> torch.Tensor:
    """How sure the class is, on a scale for gates, per image: [B, C] → [B], 1 if sure, −1 from a `kl_to_change` of 0.013 on."""
    share = kl_to_change(logits) / math.log(2)
    return (1 + share.clamp(min=1e-6).log() / 2).clamp(min=-1)


def expected_l0(log_prob: torch.Tensor) -> torch.Tensor:
    """Expected fraction of patches kept: mean over patches of P(z ≠ 0), from its log [B, N] → [B].

    The probability, not its logarithm: the mean of a logarithm rewards only patches that are already nearly gone.
    """
    return log_prob.exp().mean(dim=-1)


def lagrangian(l0: torch.Tensor, kl: torch.Tensor, multiplier: torch.Tensor | float, epsilon: float) -> torch.Tensor:
    """The saddle point's value: sparsity + α · (KL − ε)."""
    return l0 + multiplier * (kl - epsilon)


class Multiplier(nn.Module):
    """One Lagrange multiplier α_k ≥ 0 per gate, kept in [minimum, maximum] after every optimizer step.

    `log_space`: the parameter is ρ = log α, so that α grows and shrinks by a factor per step instead of by a constant.
    The floor matters: with α near 0 a mask that has overshot gets no signal to come back. All α_k are one parameter, so
    Adam's momentum carries a price on for some steps after its gate was drawn: drawn once in K steps, it moves at about 1/√K of the
    speed that it would have if drawn in every step, and not at 1/K.
    """

    def __init__(self, count: int, start: float, minimum: float, maximum: float, log_space: bool):
        super().__init__()
        ordered = all(isinstance(n, Real) for n in (start, minimum, maximum)) and 0 <= minimum <= start <= maximum
        if not ordered or (log_space and minimum <= 0):
            raise VDMError("there is no such multiplier", where="Multiplier", got=f"{minimum}, {start}, {maximum}",
                           expected="0 <= minimum <= start <= maximum (0 < in log space)", fix="change the start or its bounds")  # fmt: skip
        self.log_space = log_space
        self.bounds = (math.log(minimum), math.log(maximum)) if log_space else (minimum, maximum)
        self.parameter = nn.Parameter(torch.full((count,), math.log(start) if log_space else float(start)))

    @property
    def value(self) -> torch.Tensor:
        """α, shape [K]."""
        return (self.parameter.exp() if self.log_space else self.parameter).detach()

    def dual_objective(self, layer: int | slice, violation: torch.Tensor) -> torch.Tensor:
        """A scalar (a slice: one for each) whose gradient is KL − ε on the parameter of `layer`: *ascend* it (maximize=True)."""
        return self.parameter[layer] * violation.detach()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Project back onto the allowed interval."""
        self.parameter.clamp_(*self.bounds)
