"""The methods to compare with, against definitions computed by hand or the library that they replace."""

import copy
import sys

import numpy as np
import pytest
import torch
from conftest import randomize
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from test_vit import VIEWS, hooks, state_of

from vdm_utils import attributions
from vdm_utils.attributions import (
    METHODS,
    Method,
    attention_rollout,
    attention_weights,
    centre_prior,
    chefer_relevance,
    diffmask_method,
    edge_map,
    grad_cam,
    integrated_gradients,
    layer_cam,
    legrad,
    occlusion,
    random_scores,
    rise,
)
from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.metrics import patch_iou
from vdm_utils.notebook import checkpoint
from vdm_utils.vit import PatchView, build_classifier, fingerprint, load_classifier

WITHOUT_MODEL = {"Random", "Centre prior", "Edge map"}
WITHOUT_CLASS = WITHOUT_MODEL | {"Attention rollout"}
OTHERS = ["DeiT with teacher", "DINOv2 with registers", "BEiT", "SigLIP", "wide picture"]

every_method = pytest.mark.parametrize("name", METHODS)


def scaled(scores):
    """Each image's scores on 0..1, as the grad-cam library does."""
    scores = scores - scores.amin((1, 2), keepdim=True)
    return scores / (1e-7 + scores.amax((1, 2), keepdim=True))


def close(ours, theirs):
    return torch.allclose(ours, theirs, atol=1e-5, rtol=1e-3)


# ---------------------------------------------------------------- what every method promises


@every_method
def test_one_score_per_patch_image_by_image(base, pictures, name):
    scores = METHODS[name](base, pictures)
    assert scores.shape == (8, 3, 3) and scores.dtype == torch.float and not scores.requires_grad
    single = torch.cat([METHODS[name](base, picture[None]) for picture in pictures])
    assert close(scores, single) and close(scores[:3], METHODS[name](base, pictures[:3]))
    assert (scores.flatten(1).std(1) > 1e-4).sum() >= 6


@every_method
def test_the_target_is_the_predicted_class_unless_told_otherwise(base, pictures, name):
    predicted = base(pictures).logits.argmax(-1)
    scores, other = METHODS[name](base, pictures), METHODS[name](base, pictures, (predicted + 1) % 10)
    assert close(scores, METHODS[name](base, pictures, predicted))
    assert torch.equal(scores, other) == (name in WITHOUT_CLASS)


@every_method
def test_the_model_comes_out_as_it_went_in(pictures, name, capfd):
    model = randomize(build_classifier(image_size=12, patch_size=4)).train()
    model.vit.embeddings.dropout.p = 0.5  # which must not act, whatever the mode
    expected = METHODS[name](copy.deepcopy(model).eval(), pictures)
    model.vit.layers[1].requires_grad_(False).eval()
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)  # that a caller has collected
    model.vit.layers[2].register_forward_hook(lambda *_: None)
    given, before = pictures.clone().requires_grad_(), (state_of(model), model.config._attn_implementation)
    with torch.no_grad():
        assert close(METHODS[name](model, given), expected)
    assert (state_of(model), model.config._attn_implementation) == before
    assert (model.classifier.weight.grad == 1).all() and given.grad is None and torch.equal(given, pictures)
    assert torch.is_grad_enabled() and "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WITHOUT_MODEL])
def test_nothing_is_left_behind_by_an_exception(pictures, monkeypatch, name):
    model = randomize(build_classifier(image_size=12, patch_size=4)).train()
    before = state_of(model), model.config._attn_implementation
    monkeypatch.setattr(model.vit.layers[-1].mlp, "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        METHODS[name](model, pictures, torch.zeros(8, dtype=torch.long))
    assert (state_of(model), model.config._attn_implementation) == before


@every_method
def test_pictures_need_not_be_square(name):
    model = randomize(build_classifier(image_size=(8, 20), patch_size=4))
    assert METHODS[name](model, torch.randn(3, 3, 8, 20)).shape == (3, 2, 5)


@every_method
def test_half_precision(base, pictures, name):
    model = copy.deepcopy(base).bfloat16()
    scores = METHODS[name](model, pictures.bfloat16())
    assert scores.shape == (8, 3, 3) and scores.isfinite().all()


@every_method
def test_what_does_not_fit_is_refused(base, pictures, name):
    with pytest.raises(VDMError, match="images do not fit"):
        METHODS[name](base, torch.zeros(1, 3, 16, 16))
    for target in (
        torch.full((8,), 10),
        torch.full((8,), -1),
        torch.zeros(7, dtype=torch.long),
        torch.zeros(8),
        [0] * 8,
    ):
        with pytest.raises(VDMError, match="target classes do not fit"):
            METHODS[name](base, pictures, target)


@every_method
@pytest.mark.parametrize("shape", [(12, 12), (8, 20)])
def test_cost_is_what_the_list_says(name, shape):
    model, passes = randomize(build_classifier(image_size=shape, patch_size=4)).eval(), {"forward": 0, "backward": 0}

    def count(module, inputs, output):
        passes["forward"] += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: passes.update(backward=passes["backward"] + len(gradient)))

    model.vit.layers[-1].register_forward_hook(count)  # every pass goes through the last layer
    METHODS[name](model, torch.randn(3, 3, *shape))
    assert (passes["forward"] / 3, passes["backward"] / 3) == METHODS[name].passes(model)


def test_only_three_methods_ignore_the_weights(base, pictures):
    other = randomize(copy.deepcopy(base), seed=1)
    same = {name for name in METHODS if torch.equal(METHODS[name](base, pictures), METHODS[name](other, pictures))}
    assert same == WITHOUT_MODEL


@pytest.mark.parametrize("view", OTHERS)
@pytest.mark.parametrize("name", ["Attention rollout", "Chefer et al.", "LeGrad", "Grad-CAM", "LayerCAM", "Occlusion"])
def test_other_architectures(view, name):
    make, grid = VIEWS[view]
    model = randomize(make(), std=0.2).eval()
    images = torch.randn(2, 3, *PatchView(model).image_size)
    before = state_of(model), getattr(model.config, "vision_config", model.config)._attn_implementation
    scores = METHODS[name](model, images)
    assert scores.shape == (2, *grid) and scores.isfinite().all() and scores.std() > 0
    assert close(scores[1:], METHODS[name](model, images[1:]))
    assert (state_of(model), getattr(model.config, "vision_config", model.config)._attn_implementation) == before


# ---------------------------------------------------------------- attention


def by_hand(model, images):
    """What the model itself returns with its attention: logits [B, C], attentions and hidden states that have gradients."""
    model = copy.deepcopy(model).eval()  # which leaves hooks behind
    model.set_attn_implementation("eager")
    return model(images, output_attentions=True, output_hidden_states=True)


def test_attention_weights_are_those_of_the_model(base, pictures):
    taken, expected = attention_weights(base, pictures), by_hand(base, pictures).attentions
    assert len(taken) == len(expected) == 4
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(taken, expected))


def test_a_model_that_hides_its_attention_is_refused(base, pictures):
    model = copy.deepcopy(base)
    model.vit.layers[0].attention.register_forward_hook(lambda module, inputs, output: (output[0], None))
    for method in (attention_rollout, chefer_relevance, legrad):
        with pytest.raises(VDMError, match="does not show its attention"):
            method(model, pictures)
    assert hooks(model) == 1


def test_rollout_of_known_attention(base, pictures, monkeypatch):
    """Two layers by hand: (A₂ + I)/2 · (A₁ + I)/2, the first row without its first entry."""
    first, second = (torch.rand(8, 2, 10, 10).softmax(-1) for _ in range(2))
    monkeypatch.setattr(attributions, "attention_weights", lambda model, pixel_values: [first, second])
    scores = attention_rollout(base, pictures)
    for image in range(8):
        a, b = ((m[image, 0] + m[image, 1]) / 2 for m in (first, second))
        expected = ((b + torch.eye(10)) / 2 @ ((a + torch.eye(10)) / 2))[0, 1:].view(3, 3)
        assert torch.allclose(scores[image], expected, atol=1e-6)


def test_rollout_without_a_class_token():
    model, images = randomize(VIEWS["SigLIP"][0](), std=0.2).eval(), torch.randn(2, 3, 32, 32)
    first, second, third = (a.mean(1) / 2 + torch.eye(16) / 2 for a in attention_weights(model, images))
    scores = attention_rollout(model, images)
    assert torch.allclose(scores, (third @ second @ first).mean(1).view(2, 4, 4), atol=1e-6)
    assert scores.sum((1, 2)).tolist() == pytest.approx([1, 1], abs=1e-5)  # rows of attention add up to 1


def relevance_by_hand(model, images, target):
    """R [B, T, T] of Chefer et al., head by head and image by image, and the last layer's ∇A [B, heads, T, T]."""
    output, relevance = by_hand(model, images), []
    for image, label in enumerate(target):
        gradients = torch.autograd.grad(output.logits[image, label], output.attentions, retain_graph=True)
        matrix = torch.eye(output.attentions[0].shape[-1])
        for attention, gradient in zip(output.attentions, gradients):
            heads = [(a * g).clamp(min=0) for a, g in zip(attention[image], gradient[image])]
            matrix = matrix + sum(heads) / len(heads) @ matrix
        relevance.append((matrix, gradients[-1][image]))
    return tuple(torch.stack(part) for part in zip(*relevance))


def test_chefer_by_the_definition(base, pictures):
    target = torch.arange(8)
    relevance, _ = relevance_by_hand(base, pictures, target)
    assert close(chefer_relevance(base, pictures, target), relevance[:, 0, 1:].view(8, 3, 3))


@pytest.mark.parametrize(
    ("name", "prefix", "read"),
    [
        ("DeiT with teacher", 2, {0, 1}),
        ("DINOv2 with registers", 5, {0, *range(5, 21)}),  # the head skips the four registers
        ("BEiT", 1, set(range(1, 17))),
        ("SigLIP", 0, set(range(16))),
    ],
)
def test_chefer_takes_the_rows_that_the_head_reads(name, prefix, read):
    model, images, target = randomize(VIEWS[name][0](), std=0.2).eval(), torch.randn(2, 3, 32, 32), torch.tensor([1, 4])
    relevance, last = relevance_by_hand(model, images, target)
    scores = chefer_relevance(model, images, target)
    for image in range(2):
        size = last[image].abs().sum((0, 2))
        assert set(size.nonzero().flatten().tolist()) == read
        expected = sum(size[row] / size.sum() * relevance[image, row] for row in read)
        assert close(scores[image], expected[prefix:].view(4, 4))


def test_legrad_by_the_definition(base, pictures):
    target, output = torch.arange(8), by_hand(base, pictures)
    maps = []
    for hidden, attention in zip(output.hidden_states[1:], output.attentions, strict=True):
        logits = base.classifier(base.vit.layernorm(hidden)[:, 0])
        (gradient,) = torch.autograd.grad(logits[range(8), target].sum(), attention, retain_graph=True)
        maps.append(sum(head.clamp(min=0).sum(1) for head in gradient.unbind(1)) / (4 * 10))  # 4 heads, 10 rows
    expected = (sum(maps) / 4)[:, 1:].view(8, 3, 3)
    assert close(legrad(base, pictures, target), expected)


def test_legrad_pools_as_the_model_does():
    """SigLIP's head takes the mean over patches."""
    model, images = randomize(VIEWS["SigLIP"][0](), std=0.2).eval(), torch.randn(2, 3, 32, 32)
    output, maps = by_hand(model, images), []
    target = output.logits.argmax(-1)
    for hidden, attention in zip(output.hidden_states[1:], output.attentions, strict=True):
        logits = model.classifier(model.vision_model.post_layernorm(hidden).mean(1))
        (gradient,) = torch.autograd.grad(logits[range(2), target].sum(), attention, retain_graph=True)
        maps.append(gradient.clamp(min=0).mean((1, 2)).view(2, 4, 4))
    assert close(legrad(model, images), sum(maps) / 3)


# ---------------------------------------------------------------- class activation maps


def test_grad_cam_by_the_definition(base, pictures):
    target, output = torch.arange(8), by_hand(base, pictures)
    activations = output.hidden_states[-2]  # the input of the last layer
    for image in range(8):
        (gradient,) = torch.autograd.grad(output.logits[image, target[image]], activations, retain_graph=True)
        weights = gradient[image, 1:].mean(0)
        expected = torch.stack([(weights * patch).sum().clamp(min=0) for patch in activations[image, 1:]]).view(3, 3)
        assert torch.allclose(grad_cam(base, pictures, target)[image], expected, atol=1e-4, rtol=1e-3)


def test_grad_cam_is_that_of_the_library(base, pictures):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = copy.deepcopy(base)

        def forward(self, images):
            return self.model(images).logits

    wrapped = Logits()
    cam = GradCAM(wrapped, [wrapped.model.vit.layers[-2]], lambda x: x[:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2))
    cam.get_target_width_height = lambda images: (3, 3)
    theirs = torch.from_numpy(cam(pictures, [ClassifierOutputTarget(label) for label in range(8)]))
    ours = grad_cam(base, pictures, torch.arange(8))
    assert close(scaled(ours), theirs) and (theirs.amax((1, 2)) > 0.99).sum() >= 6


def test_layer_cam_by_the_definition(base, pictures):
    output = by_hand(base, pictures)
    activations, predicted = output.hidden_states[-2], output.logits.amax(-1).sum()
    (gradient,) = torch.autograd.grad(predicted, activations)
    expected = (gradient.relu() * activations).sum(-1)[:, 1:].relu().view(8, 3, 3)
    assert close(layer_cam(base, pictures), scaled(expected)) and expected.std() > 0


def test_without_the_library_layer_cam_says_how_to_get_it(base, pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(VDMError, match=r"pip install 'vdm-utils\[compare\]'"):
        layer_cam(base, pictures)
    assert grad_cam(base, pictures).shape == (8, 3, 3)


# ---------------------------------------------------------------- pixels


def test_integrated_gradients_by_the_definition(base, pictures):
    """∫ ∂s/∂x(αx) dα · x by Gauss-Legendre quadrature, summed over the 4×4 pixels and 3 channels of a patch."""
    points, weights = np.polynomial.legendre.leggauss(32)
    target, total = torch.arange(8), torch.zeros_like(pictures)
    for point, weight in zip((points + 1) / 2, weights / 2):
        between = (pictures * point).float().requires_grad_()
        total += weight * torch.autograd.grad(base(between).logits[range(8), target].sum(), between)[0]
    patches = (total * pictures).unflatten(3, (3, 4)).unflatten(2, (3, 4))  # [B, C, rows, 4, cols, 4]
    scores = integrated_gradients(base, pictures, target)
    assert torch.allclose(scores, patches.sum((1, 3, 5)), atol=1e-3, rtol=1e-3)
    assert scores.min() < 0 < scores.max()


def test_integrated_gradients_add_up_to_the_difference():
    model = randomize(build_classifier(image_size=12, patch_size=4), std=0.05).eval()
    images, target = torch.randn(4, 3, 12, 12), torch.tensor([0, 3, 3, 9])
    with torch.no_grad():
        difference = (model(images).logits - model(torch.zeros_like(images)).logits)[range(4), target]
    assert integrated_gradients(model, images, target).sum((1, 2)).tolist() == pytest.approx(
        difference.tolist(), rel=0.01
    )


@torch.no_grad()
def test_occlusion_by_the_definition(base, pictures):
    target, whole = torch.arange(8), base(pictures).logits
    scores = occlusion(base, pictures, target)
    for row, col in np.ndindex(3, 3):
        changed = pictures.clone()
        changed[:, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = 0
        assert close(scores[:, row, col], (whole - base(changed).logits)[range(8), target])


@torch.no_grad()
def test_rise_by_the_definition(base, pictures):
    target, pictures = torch.arange(3), pictures[:3]
    kept = (torch.rand(7, 3, 3, generator=torch.Generator().manual_seed(5)) < 0.5).float()
    expected = torch.zeros(3, 3, 3)
    for mask in kept:
        pixels = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
        probability = base(pictures * pixels).logits.softmax(-1)[range(3), target]
        expected += probability[:, None, None] * mask / (7 * 0.5)
    assert close(rise(base, pictures, target, masks=7, seed=5), expected)
    assert not close(rise(base, pictures, target, masks=7, seed=6), expected)


# ---------------------------------------------------------------- without a model


def test_random_scores_are_uniform_and_seeded(base, toy):
    images = toy.batch(range(96))["pixel_values"]
    scores = random_scores(base, images)
    assert scores.min() >= 0 and scores.max() < 1 and abs(scores.mean() - 0.5) < 0.05 and scores.std() > 0.25
    assert torch.equal(random_scores(base, images.flip(0)).flip(0), scores)  # whatever the place in the batch
    assert len(scores.flatten(1).unique(dim=0)) == len(images.flatten(1).unique(dim=0)) > 80
    assert not torch.equal(random_scores(base, images, seed=1), scores)


def test_centre_prior_by_hand():
    model = build_classifier(image_size=(4, 12), patch_size=4)
    scores = centre_prior(model, torch.zeros(2, 3, 4, 12))
    side = np.exp(-((2 / 3) ** 2) / (2 * 0.5**2))  # patch centres at −2/3, 0 and 2/3 of the half side
    assert torch.allclose(scores, torch.tensor([[[side, 1, side]]] * 2).float())


def test_edge_map_by_hand():
    model, picture = build_classifier(image_size=8, patch_size=4), torch.zeros(1, 3, 8, 8)
    picture[0, 0, 4:] = 1  # a red lower half: the central difference is 1/2 in the rows above and below the edge
    assert torch.allclose(edge_map(model, picture), torch.full((1, 2, 2), 0.5 / 4))
    picture[0, :, 4:, 4:] = 0.5
    scores = edge_map(model, picture)[0]
    assert (scores[0, 0], scores[1, 0]) != (scores[0, 1], scores[1, 1]) and scores.min() > 0
    assert edge_map(model, torch.ones(1, 3, 8, 8)).abs().max() == 0


# ---------------------------------------------------------------- Vision DiffMask among them


def test_diffmask_is_a_method(diffmask, base, pictures):
    method = diffmask_method(diffmask)
    assert isinstance(method, Method) and method.passes(base) == (1, 0)
    calls = []
    handle = base.register_forward_hook(lambda *_: calls.append(1))
    scores = method(base, pictures, torch.zeros(8, dtype=torch.long))
    handle.remove()
    assert torch.equal(scores, diffmask.explain(pictures).scores) and len(calls) == 1
    assert torch.equal(method(copy.deepcopy(base), pictures), scores)  # the same weights are the same classifier
    other = randomize(copy.deepcopy(base), seed=1)
    assert fingerprint(other) != fingerprint(base)
    with pytest.raises(VDMError, match="not the classifier that was explained"):
        method(other, pictures)
    with pytest.raises(VDMError, match="images do not fit"):
        method(base, torch.zeros(1, 3, 16, 16))


@pytest.fixture(scope="module")
def toy_test():
    """The shipped toy base and DiffMask, and 500 test grids with their truth."""
    base, batch = load_classifier(checkpoint("toy", "base")), load_data("toy", "test").batch(range(500))
    diffmask = VisionDiffMask.from_pretrained(checkpoint("toy", "diffmask"), base=base)
    return diffmask, batch["pixel_values"], batch["truth"]


def iou_at_k(scores, truth):
    """Mean IoU with the truth of the k highest scores, k the number of true patches."""
    rank = scores.flatten(1).argsort(dim=1, descending=True).argsort(dim=1)
    chosen = rank < truth.flatten(1).sum(1, keepdim=True)
    return patch_iou(chosen.view_as(truth).float(), truth).mean().item()


def test_methods_find_the_truth_of_the_toy_task(toy_test):
    diffmask, images, truth = toy_test
    methods = METHODS | {"Vision DiffMask": diffmask_method(diffmask)}
    names = ("Vision DiffMask", "Occlusion", "Attention rollout", "LeGrad", "Random", "Centre prior", "Edge map")
    iou = {name: iou_at_k(methods[name](diffmask.base, images), truth) for name in names}
    assert iou["Occlusion"] >= 0.95 and iou["Vision DiffMask"] >= 0.95
    assert (
        max(iou["Random"], iou["Centre prior"], iou["Edge map"])
        < 0.55
        < 0.65
        < min(iou["Attention rollout"], iou["LeGrad"])
    )


def test_a_constant_classifier_gets_no_nan(base, pictures):
    model = copy.deepcopy(base)
    model.classifier.weight.data.zero_()
    assert chefer_relevance(model, pictures).isfinite().all()
