"""Vision DiffMask: which patches can be replaced by a placeholder without changing what the classifier says?"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from vdm_utils.checkpoints import load_saved, refuse_misfits, save_classifier, write_checksums
from vdm_utils.errors import VDMError, check_integer
from vdm_utils.gates import (
    MARGIN_START,
    OPEN_START,
    RANK_START,
    GateNetwork,
    HardConcrete,
    combine_votes,
    herding_ranks,
    log_alphas,
)
from vdm_utils.objective import (
    Multiplier,
    class_margin,
    expected_l0,
    kl_divergence,
    kl_in_budget,
    lagrangian,
    mask_embeddings,
)
from vdm_utils.vit import PatchStates, PatchView, fingerprint, load_classifier


class VisionDiffMaskConfig(PreTrainedConfig):
    """Everything needed to rebuild a `VisionDiffMask` around its base.

    Args:
        hidden_size: d of the base (set by `VisionDiffMask.for_classifier`).
        num_gates: K; they look at the first K hidden states of the base, at all of them by default.
        eps: ε, the KL in nats that a masked image may cost.
        kl_quantile: which quantile of a batch's KL the multipliers hold at ε; 0 means the mean, as in the paper.
        mul_activation, add_activation: log_alpha = mul · tanh(·) + add.
        temperature, low, high: of the hard concrete distribution.
        normalize, zero_start: LayerNorm on gate inputs; last gate layer starts at zero, so every gate starts at `add`.
        herding_layer: gates that look at this state or a later one also see each patch's rank in it (`herding_ranks`); −1: none do.
        keep_class: a picture whose class could change for less than ε has to keep that instead (`kl_to_change`), and the gates
            that see ranks, or else all, see how sure the class is.
        no_placeholder: replace by zeros instead of a learned vector.
        alpha, alpha_min, alpha_max, log_multiplier: start and bounds of the multipliers, and whether ρ = log α is learned.
        base_name_or_path, base_fingerprint: which classifier this explains; a path is relative to the saved folder.
    """

    model_type = "vision_diffmask"

    hidden_size: int = 64
    num_gates: int = 6
    eps: float = 0.1
    kl_quantile: float = 0.0
    mul_activation: float = 15.0
    add_activation: float = 8.0
    temperature: float = 0.2
    low: float = -0.2
    high: float = 1.0
    normalize: bool = False
    zero_start: bool = False
    herding_layer: int = -1
    keep_class: bool = False
    no_placeholder: bool = False
    alpha: float = 20.0
    alpha_min: float = 0.0
    alpha_max: float = 200.0
    log_multiplier: bool = False
    base_name_or_path: str = ""
    base_fingerprint: str = ""


def check_numbers(config: VisionDiffMaskConfig, where: str) -> None:
    """Raise `VDMError` for a setting of another type, and for a number with which there is no objective or no gate."""
    for name, kind in VisionDiffMaskConfig.__annotations__.items():
        value = getattr(config, name)
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not {"float": number, "bool": isinstance(value, bool)}.get(kind, True):
            raise VDMError(f"{name} is out of range", where=where, expected="a finite number" if kind == "float" else "True or False",
                           got=repr(value), fix=f"change {name}")  # fmt: skip
    lowest = 1e-6 if config.log_multiplier else 0.0
    for name, holds, expected in (
        ("eps", config.eps > 0, "a positive number"),
        ("kl_quantile", 0 <= config.kl_quantile < 1, "0 <= kl_quantile < 1"),
        ("temperature", config.temperature > 0, "a positive number"),
        ("low", config.low < 0, "a negative number"),
        ("high", config.high >= 1, "at least 1"),
        ("herding_layer", type(config.herding_layer) is int and -1 <= config.herding_layer < config.num_gates,
         f"a state from 0 to {config.num_gates - 1}, or -1"),
        ("alpha", lowest <= config.alpha_min <= config.alpha <= config.alpha_max,
         f"{lowest} <= alpha_min <= alpha <= alpha_max"),
    ):  # fmt: skip
        if not holds:
            raise VDMError(f"{name} is out of range", where=where, expected=expected, got=getattr(config, name),
                           fix=f"change {name}")  # fmt: skip


@dataclass(frozen=True)
class Explanation:
    """What an image can do without. B images, K gates, a grid of rows × cols patches.

    mask: [B, rows, cols] in [0, 1], P(z ≠ 0); 1 = kept.  masks_per_layer: [B, K, rows, cols].
    scores: [B, rows, cols] log P(z ≠ 0), unsaturated at both ends: rank patches by it.
    kept: [B] mean of the mask.  logits: [B, C] on the whole images; None with `stop_early`, and K is then `layer` + 1.
    masked_logits: [B, C], kl: [B] in nats: of *this* mask, blended as shown; None with `check=False`.
    """

    mask: torch.Tensor
    masks_per_layer: torch.Tensor
    scores: torch.Tensor
    kept: torch.Tensor
    logits: torch.Tensor | None
    masked_logits: torch.Tensor | None = None
    kl: torch.Tensor | None = None

    def pixel_mask(self, height: int, width: int) -> torch.Tensor:
        """The mask enlarged to pixels, [B, height, width]; every pixel takes its patch's value."""
        return F.interpolate(self.mask[:, None], size=(height, width), mode="nearest")[:, 0]


@dataclass
class DiffMaskOutput(ModelOutput):
    """`loss` to minimise (the multiplier's share of it to maximise); of the sampled mask, each [B]: `kl` in nats, `l0`
    the expected fraction kept, `unchanged` 1 where the predicted class is the same."""

    loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    l0: torch.Tensor | None = None
    unchanged: torch.Tensor | None = None


class VisionDiffMask(PreTrainedModel):
    """K gate networks, a placeholder and K Lagrange multipliers around a frozen classifier.

    The classifier is `base`; it is not part of the state dict, so a checkpoint holds what was learned and the
    fingerprint of what it was learned on.
    """

    config_class = VisionDiffMaskConfig
    main_input_name = "pixel_values"

    def __init__(self, config: VisionDiffMaskConfig):
        super().__init__(config)
        d, activation = config.hidden_size, (config.mul_activation, config.add_activation)
        self.gates = nn.ModuleList(
            GateNetwork(d, *activation, config.normalize, config.zero_start, self._hints_of_gate(k))
            for k in range(config.num_gates)
        )
        for gate in self.gates[: max(0, config.herding_layer)]:
            nn.init.constant_(gate.outer.bias, OPEN_START)
        self.placeholder = None
        if not config.no_placeholder:
            self.placeholder = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, d))[0])
        self.multiplier = Multiplier(
            config.num_gates, config.alpha, config.alpha_min, config.alpha_max, config.log_multiplier
        )
        # per gate, running averages of (share of classes unchanged, fraction kept): saved, so that a resumed run agrees
        self.register_buffer("running", torch.tensor([[0.0], [1.0]]).repeat(1, config.num_gates))
        self._view: PatchView | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: every module starts itself, so that a checkpoint's start does not depend on transformers."""

    def _hints_of_gate(self, k: int) -> list[float]:
        """What gate k is told beside states, by its weight at the start: the margin of the class, the rank of the patch."""
        if k < self.config.herding_layer:
            return []  # a gate that knew the margin but no ranks would close for every picture that the classifier is sure of
        return [MARGIN_START] * self.config.keep_class + [RANK_START] * (self.config.herding_layer >= 0)

    @classmethod
    def for_classifier(cls, model: PreTrainedModel, **config) -> VisionDiffMask:
        """A fresh `VisionDiffMask` around `model`; keyword arguments are those of `VisionDiffMaskConfig`."""
        view = PatchView(model)
        where = "VisionDiffMask.for_classifier"
        known = VisionDiffMaskConfig().to_dict()
        for key in config:
            if key not in known or key == "hidden_size":
                raise VDMError(f"unknown setting {key!r}", where=where, expected="a field of VisionDiffMaskConfig other than "
                               "the one that the classifier sets", got=key, fix="check the spelling, or leave it out")  # fmt: skip
        config = {"num_gates": view.num_states} | config
        check_integer("num_gates", config["num_gates"], 1, view.num_states, where)
        settings = VisionDiffMaskConfig(hidden_size=view.hidden_size, **config)
        check_numbers(settings, where)
        diffmask = cls(settings)
        name = str(model.name_or_path or "")  # of a folder the whole path: the working folder may change
        diffmask.config.base_name_or_path = os.path.abspath(name) if os.path.isdir(name) else name
        diffmask.attach(model)
        return diffmask.to(model.device)

    def attach(self, model: PreTrainedModel) -> None:
        """Set the base; raises `VDMError` when its weights are not those that the gates were trained on."""
        view, mark = PatchView(model), fingerprint(model)
        if self.config.base_fingerprint not in ("", mark):
            raise VDMError("this is not the classifier that was explained", where="VisionDiffMask.attach",
                           expected=f"{self.config.base_name_or_path or 'a base'} with weights {self.config.base_fingerprint[:12]}…",
                           got=f"{model.name_or_path or type(model).__name__} with weights {mark[:12]}…",
                           fix="load the base this DiffMask was trained on, or train a new DiffMask")  # fmt: skip
        self.config.base_fingerprint = mark
        self._view = view

    @torch.no_grad()
    def start_grey(self) -> None:
        """Let the placeholder begin as what the classifier sees in an empty, mid-grey patch, instead of as noise.

        A classifier that was shown empty cells knows what that means; from noise, the placeholder may learn to mean the object.
        """
        if self.placeholder is None:
            raise VDMError("there is no placeholder to start", where="VisionDiffMask.start_grey", expected="a learned placeholder",
                           got="no_placeholder", fix="leave one of the two out")  # fmt: skip
        grey = self.placeholder.new_zeros(1, self.view.num_channels, *self.view.image_size)
        self.placeholder.copy_(self.view.encode(grey).embeddings[0].mean(0))

    @property
    def base(self) -> PreTrainedModel:
        """The frozen classifier."""
        return self.view.model

    @property
    def view(self) -> PatchView:
        """The way into the frozen classifier."""
        if self._view is None:
            raise VDMError("no classifier attached", where="VisionDiffMask", expected="a base", got="none",
                           fix="use VisionDiffMask.for_classifier(model) or from_pretrained(folder, base=model)")  # fmt: skip
        return self._view

    def _apply(self, fn, recurse=True):
        # `.to(device)` has to take the base along although it is not a submodule
        if getattr(self, "_view", None) is not None:
            self.base._apply(fn)
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------------ votes

    def _check_layer(self, layer: int, where: str, fix: str) -> None:
        gates = self.config.num_gates
        if type(layer) is not int or not 0 <= layer < gates:
            raise VDMError("no such layer", where=where, expected=f"0..{gates - 1}", got=repr(layer), fix=fix)

    def votes(self, states: PatchStates, upto: int | None = None) -> HardConcrete:
        """The votes of gates 0..upto (all by default) as one distribution of shape [B, k, N]."""
        last = self.config.num_gates - 1 if upto is None else upto
        dtype = self.multiplier.parameter.dtype  # of the gates, whatever the precision of the base
        # under autocast the noise would be drawn in bfloat16 too, and end at ±4.8: gates beyond it would never flip, nor learn
        with torch.autocast(states.embeddings.device.type, enabled=False):
            hidden = [state.to(dtype) for state in states.hidden[: last + 1]]
            hints = []  # each [B, N], in the order of `_hints_of_gate`
            if self.config.keep_class:
                hints.append(class_margin(states.logits.to(dtype))[:, None].expand(hidden[0].shape[:2]))
            if 0 <= self.config.herding_layer <= last:
                hints.append(herding_ranks(hidden[self.config.herding_layer]))
            hints = torch.stack(hints, -1) if hints else None
            log_alpha = log_alphas(self.gates[: last + 1], states.embeddings.to(dtype), hidden, hints)
        return HardConcrete(torch.stack(log_alpha, dim=1), self.config.temperature, self.config.low, self.config.high)

    def masked_logits(self, pixel_values: torch.Tensor, states: PatchStates, mask: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] with the patches blended by `mask` [B, N] or [B, rows, cols]."""
        embeddings = states.embeddings.to(self.multiplier.parameter.dtype)
        placeholder = torch.zeros_like(embeddings[0, 0]) if self.placeholder is None else self.placeholder
        blended = mask_embeddings(embeddings, mask.flatten(1).to(embeddings.dtype), placeholder)
        return self.view.logits(pixel_values, blended)

    def forward(
        self, pixel_values: torch.Tensor, layer: int, block: int = 1, shared_noise: bool = False
    ) -> DiffMaskOutput:
        """One draw of the objective at depth `layer` (0..K−1): votes 0..layer sampled, multiplied and applied.

        `block` > 1: the patches of a block × block square share one vote, the mean of their log_alpha, and one draw.
        `shared_noise`: all patches of an image share one random number per gate (`HardConcrete.rsample`).
        One backward pass through `loss` gives the descent direction of gates and placeholder and the ascent
        direction of the multiplier.
        """
        self._check_layer(layer, "VisionDiffMask.forward", "name a layer: every step of training draws one")
        states = self.view.encode(pixel_values)
        votes, (rows, cols) = self.votes(states, layer), states.grid
        plane = votes.log_alpha.unflatten(-1, states.grid)  # [B, k, rows, cols]
        shared = F.avg_pool2d(plane, block, ceil_mode=True)  # a square over the edge counts the patches it has
        votes = HardConcrete(shared, votes.temperature, votes.low, votes.high)
        drawn = votes.rsample(shared=2 * shared_noise).prod(dim=1, keepdim=True)

        def on_patches(squares: torch.Tensor) -> torch.Tensor:  # [B, 1, squares down, squares across] → [B, N]
            return F.interpolate(squares, scale_factor=block, mode="nearest")[:, 0, :rows, :cols].flatten(1)

        mask = on_patches(drawn)
        masked_logits = self.masked_logits(pixel_values, states, mask)
        kl = kl_divergence(states.logits.float(), masked_logits.float())  # [B]
        l0 = expected_l0(on_patches(votes.log_prob_nonzero.sum(dim=1, keepdim=True)))  # [B]
        cost = kl_in_budget(kl, states.logits.float(), self.config.eps) if self.config.keep_class else kl  # [B]
        primal = lagrangian(l0.mean(), cost.mean(), self.multiplier.value[layer], self.config.eps)
        # a mean within ε still lets single images break the promise; a high quantile holds for nearly all of them
        constrained = cost.detach().quantile(self.config.kl_quantile) if self.config.kl_quantile else cost.mean()
        dual = self.multiplier.dual_objective(layer, constrained - self.config.eps)
        # the dual term's value is taken out again so that the reported loss is the Lagrangian itself
        unchanged = (masked_logits.argmax(-1) == states.logits.argmax(-1)).float()
        return DiffMaskOutput(primal + dual - dual.detach(), kl.detach(), l0.detach(), unchanged)

    @torch.no_grad()
    def explain(
        self,
        pixel_values: torch.Tensor,
        layer: int | None = None,
        aggregated: bool = True,
        check: bool = True,
        stop_early: bool = False,
    ) -> Explanation:
        """Masks for images [B, C, H, W]: one forward pass of the base, and one more to check the mask.

        Args:
            layer: depth 0..K−1 whose mask is shown; the last by default.
            aggregated: the product of the votes up to `layer` (the explanation) or that gate's vote alone.
            check: run the base on the masked images as well, for `kl` and `masked_logits`.
            stop_early: leave the base after the state that gate `layer` looks at. The same mask for a part of a pass, but
                without the base's answer there is nothing to check it against: it wants `check=False`.
        """
        if layer is not None:
            self._check_layer(layer, "VisionDiffMask.explain", "leave layer out to see the final mask")
        if stop_early and self.config.keep_class:
            raise VDMError("these gates ask how sure the answer is", where="VisionDiffMask.explain", expected="the whole pass",
                           got="stop_early", fix="leave stop_early out, or train without keep_class")  # fmt: skip
        if stop_early and check:
            raise VDMError("nothing to check the mask against", where="VisionDiffMask.explain", expected="check=False beside stop_early",
                           got="check=True", fix="leave one of the two out")  # fmt: skip
        last = self.config.num_gates - 1 if layer is None else layer
        upto = last if stop_early else None
        states = self.view.encode(pixel_values, upto)
        log_prob = combine_votes(self.votes(states, upto).log_prob_nonzero, aggregated)  # [B, K, N]
        log_prob = log_prob.unflatten(-1, states.grid)  # [B, K, rows, cols]
        scores = log_prob[:, last]
        mask = scores.exp()
        masked_logits = self.masked_logits(pixel_values, states, mask) if check else None
        kl = kl_divergence(states.logits.float(), masked_logits.float()) if check else None
        return Explanation(mask, log_prob.exp(), scores, mask.mean(dim=(1, 2)), states.logits, masked_logits, kl)

    # ------------------------------------------------------------------ checkpoints

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save gates, placeholder, multipliers and config, with checksums; the base by name, by relative path, or, when it
        was never saved, next to them in `base/`."""
        folder, name = Path(save_directory), self.config.base_name_or_path
        if not name:
            save_classifier(self.base, folder / "base")
            stored = "base"
            self.config.base_fingerprint = fingerprint(
                self.base
            )  # its precision may have changed since it was attached
        elif Path(name).is_dir():
            stored = os.path.relpath(os.path.realpath(name), os.path.realpath(folder))  # wherever links lead
        else:
            stored = name  # a Hub name
        self.config.base_name_or_path = stored
        try:
            super().save_pretrained(folder, **kwargs)
            write_checksums(folder)
        finally:
            self.config.base_name_or_path = name or str(folder / "base")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, base: PreTrainedModel | None = None, **kwargs
    ) -> VisionDiffMask:
        """Load a saved `VisionDiffMask` and its base (or attach `base`), and check that the two belong together.

        Raises:
            VDMError: when there is no such folder or Hub name, its files cannot be read or were altered after they were saved
                (`verify_checksums`), weights are missing or unknown, or it was trained on another base.
        """
        where, source = "VisionDiffMask.from_pretrained", str(pretrained_model_name_or_path)
        diffmask, misfits = load_saved(super().from_pretrained, source, "DiffMask", where, **kwargs)
        refuse_misfits(misfits, source, "DiffMask", where)
        check_numbers(diffmask.config, where)
        name = diffmask.config.base_name_or_path
        if not diffmask.config.base_fingerprint or not (name or base):
            raise VDMError("cannot load the DiffMask: it does not say which classifier it explains", where=where,
                           expected="base_name_or_path and base_fingerprint", got="none", fix="train it again")  # fmt: skip
        if base is None:
            beside = (Path(source) / name).resolve()
            name = str(beside) if beside.is_dir() else name
            base = load_classifier(name)
            diffmask.config.base_name_or_path = name
        diffmask.attach(base)
        return diffmask.to(base.device).eval()
