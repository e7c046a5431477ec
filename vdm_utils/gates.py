"""Differentiable coins: the hard concrete distribution, the networks that load them, and votes over layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Distribution, constraints

from vdm_utils.errors import VDMError


class HardConcrete(Distribution):
    """Hard concrete distribution on [0, 1] with probability mass at its ends (Louizos et al. 2018, section 2.2).

    A logistic sample is squashed by a sigmoid, stretched to (low, high), and clamped to [0, 1].

    Args:
        log_alpha: location, any shape; large keeps (1), small drops (0).
        temperature: > 0; small makes samples nearly binary.
        low, high: ends of the stretch, low < 0 < 1 <= high. With high = 1, as in the reference, P(z = 1) = 0 on paper;
            in 32-bit floats a sample rounds to exactly 1, without a gradient, once noise + log_alpha > 16.6 · temperature.
    Raises:
        VDMError: for anything else.
    """

    arg_constraints = {"log_alpha": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, log_alpha: torch.Tensor, temperature: float = 0.2, low: float = -0.2, high: float = 1.0):
        if not isinstance(log_alpha, torch.Tensor) or not log_alpha.is_floating_point():
            raise VDMError("log_alpha is no location of gates", where="HardConcrete", expected="a float tensor",
                           got=getattr(log_alpha, "dtype", type(log_alpha).__name__), fix="convert it")  # fmt: skip
        numbers = temperature, low, high
        finite = all(isinstance(n, Real) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
        if not (finite and temperature > 0 and low < 0 and high >= 1):
            raise VDMError("there is no such hard concrete distribution", where="HardConcrete",
                           expected="finite numbers, temperature > 0, low < 0 and high >= 1", got=numbers,
                           fix="change the one that does not fit")  # fmt: skip
        self.log_alpha, self.temperature, self.low, self.high = log_alpha, temperature, low, high
        super().__init__(batch_shape=log_alpha.shape, validate_args=False)

    def rsample(
        self,
        sample_shape: torch.Size = torch.Size(),  # noqa: B008 (torch's own signature)
        shared: int = 0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """A sample z of shape `sample_shape + log_alpha.shape` through which gradients reach log_alpha.

        `shared`: so many last dimensions have one random number in common. Every gate's own distribution stays what it was,
        but the gates of an image now open in the order of their log_alpha: the open ones are the top of a ranking.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        shape = (*shape[: len(shape) - shared], *[1] * shared)
        tiny = torch.finfo(self.log_alpha.dtype).eps
        u = torch.rand(shape, dtype=self.log_alpha.dtype, device=self.log_alpha.device, generator=generator)
        u = u.clamp(tiny, 1 - tiny)
        return hard_concrete_sample(self.log_alpha, u, self.temperature, self.low, self.high)

    @property
    def log_prob_nonzero(self) -> torch.Tensor:
        """log P(z ≠ 0), computed without leaving the log domain so that it never saturates to exactly 0 or -inf."""
        return F.logsigmoid(self.log_alpha - self.temperature * math.log(-self.low / self.high))

    @property
    def prob_nonzero(self) -> torch.Tensor:
        """P(z ≠ 0), in closed form."""
        return prob_nonzero(self.log_alpha, self.temperature, self.low, self.high)

    @property
    def prob_one(self) -> torch.Tensor:
        """P(z = 1): zero unless the stretch goes beyond 1."""
        if self.high == 1:
            return torch.zeros_like(self.log_alpha)
        return torch.sigmoid(self.log_alpha - self.temperature * math.log((1 - self.low) / (self.high - 1)))

    @property
    def mean(self) -> torch.Tensor:
        """E[z] = ∫₀¹ P(z > t) dt, by the midpoint rule on 512 points (error below 2·10⁻⁴; there is no closed form)."""
        t = (torch.arange(512, dtype=self.log_alpha.dtype, device=self.log_alpha.device) + 0.5) / 512
        fraction = (t - self.low) / (self.high - self.low)
        return torch.sigmoid(self.log_alpha.unsqueeze(-1) - self.temperature * torch.logit(fraction)).mean(-1)


def hard_concrete_sample(
    log_alpha: torch.Tensor, u: torch.Tensor, temperature: float = 0.2, low: float = -0.2, high: float = 1.0
) -> torch.Tensor:
    """Inverse-CDF sample of a hard concrete gate from uniform noise `u`: same shape as `log_alpha`, in [0, 1]."""
    concrete = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / temperature)
    stretched = concrete * (high - low) + low
    return stretched.clamp(0, 1)


def prob_nonzero(
    log_alpha: torch.Tensor, temperature: float = 0.2, low: float = -0.2, high: float = 1.0
) -> torch.Tensor:
    """Closed-form P(z ≠ 0) of a hard concrete gate: same shape as `log_alpha`, in (0, 1)."""
    return torch.sigmoid(log_alpha - temperature * math.log(-low / high))


# how much a gate listens to hints before training. Without a start it does not learn to: what an order is worth shows only when
# most patches follow it
MARGIN_START, RANK_START = -0.8, 1.0
# gates before the state of the ranks start wide open (this bias of the last layer). Of patches that are kept, the least certain vote
# decides which comes first: at their usual start such gates, which know nothing yet, would have the word
OPEN_START = 3.0


class GateNetwork(nn.Module):
    """g_k([h_0; h_k]) → log_alpha: a two-layer perceptron 2d → d/4 → 1 (Vision DiffMask, section 3).

    Args:
        hidden_size: d.
        mul, add: log_alpha = mul · tanh(·) + add, so |log_alpha − add| ≤ mul.
        normalize: LayerNorm without weights on each input. The embeddings of a trained ViT have norm 24–60: without
            it the inner tanh is saturated before training starts.
        zero_start: the last layer starts at zero, so that every gate starts at log_alpha = add, wherever it looks.
        hints: the last layer also sees so many numbers that no patch knows of itself; these are their weights at the start.
    """

    def __init__(
        self, hidden_size: int, mul: float, add: float, normalize: bool, zero_start: bool, hints: Sequence[float] = ()
    ):
        super().__init__()
        self.mul, self.add, self.normalize, self.num_hints = mul, add, normalize, len(hints)
        self.inner = nn.Linear(2 * hidden_size, max(1, hidden_size // 4))
        self.outer = nn.Linear(self.inner.out_features + self.num_hints, 1)
        if zero_start:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)
        with torch.no_grad():
            self.outer.weight[0, self.inner.out_features :] = torch.tensor(hints)

    def prepare(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, N, d] as this network takes them: it has no weights here, so gates can share the work."""
        return F.layer_norm(states, states.shape[-1:]) if self.normalize else states

    def forward(
        self, embeddings: torch.Tensor, hidden: torch.Tensor, hints: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`embeddings` h_0 and `hidden` h_k, both [B, N, d], and `hints` [B, N, at least those of this gate] → log_alpha [B, N]."""
        seen = torch.cat([self.prepare(embeddings), self.prepare(hidden)], dim=-1)  # [B, N, 2d]
        return self.vote(self.inner(seen), hints)

    def vote(self, inner: torch.Tensor, hints: torch.Tensor | None = None) -> torch.Tensor:
        """From what the first layer makes of both inputs, [B, N, d/4], to log_alpha [B, N]."""
        seen = torch.tanh(inner)
        if self.num_hints:
            seen = torch.cat([seen, hints[..., : self.num_hints].to(seen.dtype)], dim=-1)
        return self.mul * torch.tanh(self.outer(seen).squeeze(-1)) + self.add


def log_alphas(
    gates: Sequence[GateNetwork],
    embeddings: torch.Tensor,
    hidden: Sequence[torch.Tensor],
    hints: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """What gates say that look at the same h_0 (`embeddings`) and each at its own state: log_alpha [B, N] per gate.

    W [h_0; h_k] = W₀ h_0 + W_k h_k, and W₀ h_0 is one product for all of them: nothing is put side by side first.
    """
    d = embeddings.shape[-1]
    to_first = torch.cat([gate.inner.weight[:, :d] for gate in gates])  # [gates · d/4, d]
    bias = torch.cat([gate.inner.bias for gate in gates])
    of_first = F.linear(gates[0].prepare(embeddings), to_first, bias).chunk(len(gates), dim=-1)
    each = zip(gates, of_first, hidden)
    return [gate.vote(own + F.linear(gate.prepare(h), gate.inner.weight[:, d:]), hints) for gate, own, h in each]


def herding_ranks(states: torch.Tensor) -> torch.Tensor:
    """Which patches stand best for all: hidden states [B, N, d] → ranks [B, N], from 1 (taken first) down to −1.

    Kernel herding (Chen, Welling and Smola 2010, arXiv 1203.3472): again and again the patch is taken that is most like the whole
    picture, and least like those that were taken. With this kernel each of them brings the patches so far as near to the
    whole as one patch can, in maximum mean discrepancy (how Kim et al. 2016 choose prototypes). Gaussian kernel on
    normalised states; its bandwidth is the mean squared distance in the picture.

    A gate votes on one patch and cannot know which others will stay. Ranks tell it how well it can be spared.
    """
    count = states.shape[1]
    states = F.layer_norm(states, states.shape[-1:])
    likeness = states @ states.transpose(1, 2)  # [B, N, N]; all states are of one length, so it stands for the distance
    spread = (likeness.diagonal(dim1=1, dim2=2).mean(1) - likeness.mean((1, 2))).clamp(min=1e-6)
    kernel = torch.exp((likeness - states.shape[-1]) / spread[:, None, None])
    to_all = kernel.mean(2)  # [B, N]
    to_taken = torch.zeros_like(to_all)
    order, pictures = [], torch.arange(len(states), device=states.device)
    for taken in range(1, count + 1):
        best = (to_all - to_taken / taken).argmax(1)  # [B]
        order.append(best)
        to_taken = to_taken + kernel[pictures, best]
        to_all[pictures, best] = -math.inf  # not twice
    ranks = torch.linspace(1, -1, count, dtype=states.dtype, device=states.device).expand_as(to_all)
    return torch.empty_like(to_all).scatter_(1, torch.stack(order, dim=1), ranks)


def combine_votes(log_prob: torch.Tensor, aggregated: bool = True) -> torch.Tensor:
    """Votes of K gates [B, K, N] → what each depth says: the product of the votes so far, or each vote alone.

    In the log domain a product is a sum: `aggregated` is a cumulative sum over layers (paper, section 3).
    """
    return log_prob.cumsum(dim=1) if aggregated else log_prob
