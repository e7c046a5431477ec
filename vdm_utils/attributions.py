"""What Vision DiffMask is compared with: attribution methods of one signature.

Each is `(model, pixel_values [B, C, H, W], target [B] or None) -> scores [B, rows, cols]`, larger where a patch matters
more; the target is the predicted class by default. The model is left as it was.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from vdm_utils.vit import PatchView


@torch.no_grad()
def attention_weights(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The attention [B, heads, T, T] of every layer, the first one first.

    Taken with hooks of our own: `output_attentions=True` (transformers 5.23) leaves some behind on the model.
    """
    view, seen = PatchView(model), {}
    view.check(pixel_values)

    def keep(layer: int):
        def hook(module, inputs, output):
            if isinstance(output, tuple) and len(output) > 1 and getattr(output[1], "ndim", 0) == 4:
                seen[layer] = output[1]

        return hook

    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")  # fused attention never forms its weights
    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, usual)
        stack.enter_context(view.frozen())
        for number, layer in enumerate(view.layers):
            for module in layer.modules():
                stack.callback(module.register_forward_hook(keep(number)).remove)
        model(pixel_values)
    return [seen[number] for number in range(len(view.layers))]


def attention_rollout(
    model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention rollout (Abnar and Zuidema 2020): Π_l (A_l + I) / 2, with A_l the mean over heads. One forward pass.

    The row of the first prefix token ([CLS]), or the mean over rows where a model has none. It knows no classes: `target`
    is ignored.
    """
    attentions, (rows, cols) = attention_weights(model, pixel_values), PatchView(model).grid
    tokens = attentions[0].shape[-1]
    flow = torch.eye(tokens, device=pixel_values.device)
    for attention in attentions:  # [B, heads, T, T], from the first layer to the last
        flow = (attention.mean(1) + torch.eye(tokens, device=flow.device)) / 2 @ flow
    received = flow[:, 0] if tokens > rows * cols else flow.mean(1)  # [B, T]
    return received[:, -rows * cols :].unflatten(1, (rows, cols))


def grad_cam(model: PreTrainedModel, pixel_values: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """Grad-CAM (Selvaraju et al. 2017) on the input of the last layer. Two forward passes and one backward.

    ReLU(Σ_c w_c a_c) with activations a [B, N, d] of the patches and w [B, d] the mean over patches of the gradient of
    the target's logit. One layer earlier than the output, because the last layer's patches no longer reach [CLS].
    """
    view = PatchView(model)
    states = view.encode(pixel_values)
    target = states.logits.argmax(-1) if target is None else target
    seen = {}
    handle = view.layers[-1].register_forward_pre_hook(lambda module, inputs: seen.update(activations=inputs[0]))
    try:
        with torch.enable_grad():
            logits = view.logits(pixel_values, states.embeddings.clone().requires_grad_())
            chosen = logits.gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, seen["activations"])
    finally:
        handle.remove()
    patches = states.embeddings.shape[1]
    activations, gradient = seen["activations"].detach()[:, -patches:], gradient[:, -patches:]
    weights = gradient.mean(dim=1, keepdim=True)  # [B, 1, d]
    return (weights * activations).sum(-1).relu().unflatten(1, states.grid)
