"""The methods to compare with, against definitions computed by hand."""

import copy

import pytest
import torch
from conftest import randomize
from transformers import SiglipConfig, SiglipForImageClassification, SiglipVisionConfig

from vdm_utils import attributions
from vdm_utils.attributions import attention_rollout, attention_weights, grad_cam
from vdm_utils.vit import build_classifier, fingerprint

METHODS = [attention_rollout, grad_cam]


@pytest.mark.parametrize("method", METHODS)
def test_one_score_per_patch_image_by_image(base, pictures, method):
    scores = method(base, pictures)
    assert scores.shape == (8, 3, 3) and scores.min() >= 0 and not scores.requires_grad
    single = torch.cat([method(base, picture[None]) for picture in pictures])
    assert torch.allclose(scores, single, atol=1e-5, rtol=1e-4)
    assert (scores.flatten(1).std(1) > 1e-4).sum() >= 6


@pytest.mark.parametrize("method", METHODS)
def test_the_model_comes_out_as_it_went_in(pictures, method):
    model = randomize(build_classifier(image_size=12, patch_size=4)).train()
    model.vit.layers[1].requires_grad_(False)
    before = fingerprint(model), [p.requires_grad for p in model.parameters()], model.config._attn_implementation
    method(model, pictures)
    after = fingerprint(model), [p.requires_grad for p in model.parameters()], model.config._attn_implementation
    assert before == after and all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_pictures_need_not_be_square(method):
    model = randomize(build_classifier(image_size=(8, 20), patch_size=4))
    assert method(model, torch.randn(3, 3, 8, 20)).shape == (3, 2, 5)


def test_attention_weights_are_those_of_the_model(base, pictures):
    taken = attention_weights(base, pictures)
    model = copy.deepcopy(base)
    model.set_attn_implementation("eager")
    expected = model(pictures, output_attentions=True).attentions
    assert len(taken) == len(expected) == 4
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(taken, expected))


def test_rollout_of_known_attention(base, pictures, monkeypatch):
    """Two layers by hand: (A₂ + I)/2 · (A₁ + I)/2, the first row without its first entry."""
    torch.manual_seed(1)
    first, second = (torch.rand(8, 2, 10, 10).softmax(-1) for _ in range(2))

    monkeypatch.setattr(attributions, "attention_weights", lambda model, pixel_values: [first, second])
    scores = attention_rollout(base, pictures)
    for image in range(8):
        a, b = ((m[image, 0] + m[image, 1]) / 2 for m in (first, second))
        by_hand = ((b + torch.eye(10)) / 2 @ ((a + torch.eye(10)) / 2))[0, 1:].view(3, 3)
        assert torch.allclose(scores[image], by_hand, atol=1e-6)


def test_rollout_without_a_class_token():
    vision = SiglipVisionConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=16)  # fmt: skip
    model = SiglipForImageClassification(SiglipConfig(vision_config=vision.to_dict(), num_labels=3)).eval()
    scores = attention_rollout(model, torch.randn(2, 3, 8, 8))
    assert scores.shape == (2, 2, 2) and torch.allclose(
        scores.sum((1, 2)), torch.ones(2), atol=1e-5
    )  # mean of stochastic rows


def test_grad_cam_by_the_definition(base, pictures):
    target = torch.arange(8)
    states = copy.deepcopy(base)(pictures, output_hidden_states=True)  # which leaves hooks behind
    activations = states.hidden_states[-2]  # the input of the last layer
    for image in range(8):
        (gradient,) = torch.autograd.grad(states.logits[image, target[image]], activations, retain_graph=True)
        weights = gradient[image, 1:].mean(0)
        by_hand = torch.stack([(weights * patch).sum().clamp(min=0) for patch in activations[image, 1:]]).view(3, 3)
        assert torch.allclose(grad_cam(base, pictures, target)[image], by_hand, atol=1e-4, rtol=1e-3)
    predicted = states.logits.argmax(-1)
    assert torch.equal(grad_cam(base, pictures), grad_cam(base, pictures, predicted))
    assert not torch.allclose(grad_cam(base, pictures), grad_cam(base, pictures, (predicted + 1) % 10))
