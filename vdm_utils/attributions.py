"""What Vision DiffMask is compared with: attribution methods of one signature, listed in `METHODS`.

Each is `(model, pixel_values [B, C, H, W], target [B] or None) -> scores [B, rows, cols]`, larger where a patch matters
more; the target is the predicted class by default. An image's scores do not depend on its batch, the model is left as it
was, and images or classes that it does not take raise `VDMError`. Here stand the methods that look at attention and
gradients inside the model; `vdm_utils.pixel_attributions` has the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.pixel_attributions import (
    INTEGRATION_STEPS,
    RISE_MASKS,
    Method,
    centre_prior,
    check,
    edge_map,
    integrated_gradients,
    occlusion,
    of_class,
    random_scores,
    rise,
)
from vdm_utils.vit import PatchView, fingerprint


def to_grid(tokens: torch.Tensor, view: PatchView) -> torch.Tensor:
    """Values [B, T] or [B, T, d] of all tokens as [B, rows, cols] or [B, rows, cols, d], without prefix tokens."""
    rows, cols = view.grid
    return tokens[:, -rows * cols :].unflatten(1, (rows, cols))


@contextmanager
def kept_attention(view: PatchView) -> Iterator[list[torch.Tensor]]:
    """A list that one forward pass in this block fills with the attention [B, heads, T, T] of every layer.

    Taken with hooks of our own: `output_attentions=True` (transformers 5.23) leaves some behind on the model.
    """
    seen: list[torch.Tensor] = []

    def keep(module, inputs, output):
        if isinstance(output, tuple) and len(output) > 1 and getattr(output[1], "ndim", 0) == 4:
            seen.append(output[1])

    usual = view.model.config._attn_implementation
    with ExitStack() as stack:
        stack.callback(view.model.set_attn_implementation, usual)
        view.model.set_attn_implementation("eager")  # fused attention never forms its weights
        for module in view.layers.modules():
            stack.enter_context(module.register_forward_hook(keep))
        yield seen
        if len(seen) != len(view.layers):
            raise VDMError("this model does not show its attention", where=type(view.model).__name__, got=len(seen),
                           expected=f"the weights of {len(view.layers)} layers", fix="use another method")  # fmt: skip


@torch.no_grad()
def attention_weights(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The attention [B, heads, T, T] of every layer, the first one first."""
    view = check(model, pixel_values)
    with view.frozen(), kept_attention(view) as seen:
        model(pixel_values)
    return seen


def attention_rollout(
    model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention rollout (Abnar and Zuidema 2020): Π_l (A_l + I) / 2, with A_l the mean over heads.

    The row of the first prefix token ([CLS]), or the mean over rows where a model has none. It knows no classes: `target`
    is ignored.
    """
    view, attentions = check(model, pixel_values, target), attention_weights(model, pixel_values)
    identity = torch.eye(attentions[0].shape[-1], device=pixel_values.device)
    flow = identity
    for attention in attentions:  # [B, heads, T, T], from the first layer to the last
        flow = (attention.mean(1) + identity) / 2 @ flow
    rows, cols = view.grid
    return to_grid(flow[:, 0] if len(identity) > rows * cols else flow.mean(1), view)


@torch.enable_grad()
def chefer_relevance(
    model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradient-weighted attention (Chefer et al. 2021, section 3): R ← R + Ā R from R = I, with Ā = mean_heads (∇A ⊙ A)⁺.

    ∇A is the gradient of the target's logit. The head of a ViT reads [CLS] alone, and the scores are that row of R. Other
    heads read more or other tokens: DeiT also the distillation token, DINOv2 also the patches, SigLIP and BEiT only the
    patches. There the scores are the mean of the rows that are read, weighted by Σ|∇A| of the row in the last layer: a
    token that the head does not read has no gradient there.
    """
    view = check(model, pixel_values, target)
    with view.frozen(), kept_attention(view) as attentions:
        logits = model(pixel_values.detach().requires_grad_()).logits
    gradients = torch.autograd.grad(of_class(logits, target).sum(), attentions)
    relevance = torch.eye(attentions[0].shape[-1], device=logits.device)
    for attention, gradient in zip(attentions, gradients, strict=True):  # [B, heads, T, T]
        relevance = relevance + (gradient * attention.detach()).relu().mean(1).float() @ relevance
    read = gradients[-1].float().abs().sum((1, 3))  # [B, T]
    read = read / read.sum(1, keepdim=True).clamp(min=1e-12)
    return to_grid((read[:, None] @ relevance)[:, 0], view)


@torch.enable_grad()
def legrad(model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """LeGrad (Bousselham et al. 2025): the mean over layers, heads and rows of (∂s_l / ∂A_l)⁺.

    s_l is the target's logit when the head reads the output of layer l instead of that of the last layer. The head pools
    as the model does, so a ViT's reads [CLS] (the authors' code for CLIP takes the mean over all tokens).
    """
    view, outputs = check(model, pixel_values, target), []

    def cut(module, inputs):  # s_l must not see the attention of earlier layers
        return inputs[0].detach().requires_grad_(), *inputs[1:]

    def keep(module, inputs, output):
        outputs.append(output)

    def all_at_once(module, inputs, output):  # the head gets the outputs of all layers as one batch [L · B, T, d]
        return torch.cat(outputs)

    with view.frozen(), kept_attention(view) as attentions, ExitStack() as stack:
        for layer in view.layers:
            stack.enter_context(layer.register_forward_pre_hook(cut))
            stack.enter_context(layer.register_forward_hook(keep))
        stack.enter_context(view.layers[-1].register_forward_hook(all_at_once))
        logits = model(pixel_values).logits.unflatten(0, (len(view.layers), -1))  # [L, B, C]
    target = logits[-1].argmax(-1) if target is None else target
    gradients = torch.autograd.grad(of_class(logits, target).sum(), attentions)
    return to_grid(torch.stack([gradient.relu().mean((1, 2)) for gradient in gradients]).mean(0), view)


@torch.enable_grad()
def grad_cam(model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """Grad-CAM (Selvaraju et al. 2017) on the input of the last layer.

    ReLU(Σ_c w_c a_c) with activations a [B, N, d] of the patches and w [B, d] the mean over patches of the gradient of
    the target's logit. One layer earlier than the output, because the last layer's patches no longer reach [CLS].
    """
    view, seen = check(model, pixel_values, target), []
    with view.frozen(), view.layers[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        logits = model(pixel_values.detach().requires_grad_()).logits
    (gradient,) = torch.autograd.grad(of_class(logits, target).sum(), seen)
    weights = to_grid(gradient, view).mean((1, 2), keepdim=True)  # [B, 1, 1, d]
    return (weights * to_grid(seen[0].detach(), view)).sum(-1).relu()


class LogitsOnly(torch.nn.Module):
    """A model as the grad-cam library wants it: logits come out that NumPy knows, and gradients of the caller stay."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits.float()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: the weights are frozen."""


@torch.enable_grad()
def layer_cam(model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """LayerCAM (Jiang et al. 2021) of the grad-cam library, on the input of the last layer: Σ_c (∂s / ∂a_c)⁺ a_c.

    Grad-CAM weighs a channel equally on all patches; here every patch has weights of its own. The library scales each
    image's scores to 0..1.

    Raises:
        VDMError: where the library is not installed.
    """
    view = check(model, pixel_values, target)
    try:
        from pytorch_grad_cam import LayerCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise VDMError("LayerCAM needs the grad-cam library", where="layer_cam", expected="grad-cam", got=error,
                       fix="pip install 'vdm-utils[compare]'") from error  # fmt: skip
    tap = torch.nn.Identity()  # the library sees outputs of modules only, and its hooks stay off the model

    def through(module, inputs):
        return tap(inputs[0].float()).to(inputs[0].dtype), *inputs[1:]

    with view.frozen(), view.layers[-1].register_forward_pre_hook(through):
        cam = LayerCAM(LogitsOnly(model), [tap], lambda tokens: to_grid(tokens, view).permute(0, 3, 1, 2))
        cam.get_target_width_height = lambda images: view.grid[::-1]  # it would enlarge the map to pixels
        classes = None if target is None else [ClassifierOutputTarget(label) for label in target.tolist()]
        scores = cam(pixel_values.detach().requires_grad_(), classes)
    return torch.from_numpy(scores).to(pixel_values.device)


METHODS = {
    "Attention rollout": Method(attention_rollout, "Abnar and Zuidema 2020, arXiv 2005.00928", 1),
    "Chefer et al.": Method(chefer_relevance, "Chefer et al. 2021, arXiv 2103.15679", 1, 1),
    "LeGrad": Method(legrad, "Bousselham et al. 2025, arXiv 2404.03214", 1, 1),
    "Grad-CAM": Method(grad_cam, "Selvaraju et al. 2017, arXiv 1610.02391", 1, 1),
    "LayerCAM": Method(layer_cam, "Jiang et al. 2021, IEEE TIP 30", 1, 1),
    "Integrated gradients": Method(
        integrated_gradients, "Sundararajan et al. 2017, arXiv 1703.01365", INTEGRATION_STEPS + 1, INTEGRATION_STEPS
    ),
    "Occlusion": Method(occlusion, "Zeiler and Fergus 2014, arXiv 1311.2901", 2, forward_per_patch=1),
    "RISE": Method(rise, "Petsiuk et al. 2018, arXiv 1806.07421", RISE_MASKS + 1),
    "Random": Method(random_scores, "no paper", 0),
    "Centre prior": Method(centre_prior, "Tatler 2007, Journal of Vision 7", 0),
    "Edge map": Method(edge_map, "Adebayo et al. 2018, arXiv 1810.03292", 0),
}


def diffmask_method(diffmask: VisionDiffMask) -> Method:
    """Vision DiffMask as a method: log P(z ≠ 0) after all votes, without the second pass that checks the mask.

    It explains the whole output distribution, so `target` is ignored. The method raises `VDMError` for another model than
    the base that `diffmask` was trained on.
    """

    def scores(model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        check(model, pixel_values, target)
        if model is not diffmask.base and fingerprint(model) != fingerprint(diffmask.base):
            raise VDMError("this is not the classifier that was explained", where="diffmask_method", got=type(model).__name__,
                           expected=f"the base of the DiffMask, {diffmask.config.base_name_or_path or type(diffmask.base).__name__}",
                           fix="call it with diffmask.base, or train a DiffMask on this model")  # fmt: skip
        return diffmask.explain(pixel_values, check=False).scores

    return Method(scores, "Nalmpantis et al. 2023, arXiv 2304.06391", 1)
