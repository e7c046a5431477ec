"""Faithfulness and agreement with a truth, against cases worked out by hand."""

import itertools
import math

import pytest
import torch
from conftest import randomize
from scipy.spatial.distance import jensenshannon

from vdm_utils.metrics import deletion_curves, jensen_shannon, mass_accuracy, patch_iou, smallest_masks, truth_report
from vdm_utils.objective import kl_divergence
from vdm_utils.vit import build_classifier


class OnePatch(torch.nn.Module):
    """Says class 1 exactly as surely as the patch in the middle of 3×3 is bright."""

    def __init__(self, model):
        super().__init__()
        self.config, self.vit = model.config, model.vit

    def forward(self, pixel_values):
        middle = pixel_values[:, :, 4:8, 4:8].mean((1, 2, 3))
        logits = torch.stack([torch.zeros_like(middle), 8 * middle], dim=1)
        return type("Output", (), {"logits": logits})


@pytest.fixture
def bright():
    """The model above, and four pictures of which it says class 1."""
    return OnePatch(build_classifier(image_size=12, patch_size=4)), torch.full((4, 3, 12, 12), 0.9)


def test_deletion_curve_of_a_model_with_one_patch(bright):
    model, pictures = bright
    scores = torch.zeros(4, 3, 3)
    scores[:, 1, 1] = 1
    sure = torch.sigmoid(torch.tensor(8 * 0.9))
    first, kl_first = deletion_curves(model, pictures, scores, important_first=True, points=8)
    last, kl_last = deletion_curves(model, pictures, scores, important_first=False, points=8)
    assert first.shape == kl_first.shape == (4, 8)  # one to eight of nine patches gone
    assert torch.allclose(last, sure.expand(4, 8)) and kl_last.abs().max() < 1e-5
    assert (first < sure - 0.05).all() and (kl_first > 0.01).all()  # noise of mean 0 instead of 0.9
    expected = sure * (sure / first).log() + (1 - sure) * ((1 - sure) / (1 - first)).log()
    assert torch.allclose(kl_first, expected, atol=1e-4)
    assert torch.equal(first, first[:, :1].expand(4, 8))  # the same noise at every point


def test_deletion_takes_patches_one_after_the_other():
    model = randomize(build_classifier(image_size=(8, 16), patch_size=4)).train()
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pictures, scores = torch.full((2, 3, 8, 16), 2.0), torch.rand(2, 2, 4)  # brighter than any noise
    deletion_curves(model, pictures, scores, important_first=True, points=7)
    assert model.training and len(seen) == 8 and torch.equal(seen[0], pictures)
    for image in range(2):
        order = scores[image].flatten().argsort(descending=True).tolist()
        for step, changed in enumerate(seen[1:], start=1):
            gone = (changed[image] != 2).all(0).view(2, 4, 4, 4).permute(0, 2, 1, 3).flatten(2)  # [rows, cols, 16]
            assert torch.equal(gone.all(-1), gone.any(-1))
            assert set(gone.all(-1).flatten().nonzero()[:, 0].tolist()) == set(order[:step])
    assert seen[-1].min() >= -1


def test_mass_accuracy_by_hand():
    mask = torch.tensor(
        [[[1.0, 0.5], [0.5, 0.0]], [[0.2, 0.2], [0.2, 0.2]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1], [1, 1]]]
    )
    truth = torch.zeros(4, 4, 4)
    truth[0, :2, :2] = 1  # the first patch
    truth[1, :, :1] = 1  # half of the left patches
    truth[2, 0, 0] = 1
    accuracy = mass_accuracy(mask, truth)
    assert accuracy[:2].tolist() == pytest.approx([0.5, 0.25])
    assert math.isnan(accuracy[2]) and math.isnan(accuracy[3])  # an empty mask, an empty truth


def test_iou_by_hand():
    mask = torch.tensor([[[0.9, 0.6], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    truth = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    assert patch_iou(mask, truth).tolist() == pytest.approx(
        [1 / 3, 1, 0]
    )  # two kept, two true, one shared; both empty; missed
    assert patch_iou(mask, truth, threshold=0.4).tolist() == pytest.approx([2 / 3, 1, 0])
    finer = truth.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(patch_iou(mask, finer), patch_iou(mask, truth))


def test_jensen_shannon_is_that_of_scipy():
    mask, truth = torch.rand(20, 3, 3), (torch.rand(20, 3, 3) < 0.5).float()
    truth[:, 0, 0] = 1
    expected = [jensenshannon(m.flatten(), t.flatten()) ** 2 for m, t in zip(mask.double(), truth)]
    assert torch.allclose(jensen_shannon(mask, truth), torch.tensor(expected).float(), atol=1e-5)
    assert jensen_shannon(truth, truth).abs().max() < 1e-6
    worst = jensen_shannon(torch.stack([1 - truth[0], torch.zeros(3, 3)]), truth[:1].expand(2, -1, -1))
    assert worst.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)  # disjoint, and empty
    assert jensen_shannon(mask[:1], torch.zeros(1, 3, 3)).isnan().all()


def test_truth_report_measures_the_shown_masks(diffmask, toy):
    report = truth_report(diffmask, toy, batch_size=40)
    batch = toy.batch(range(96))
    shown, truth = diffmask.explain(batch["pixel_values"]), batch["truth"]
    own = diffmask.masked_logits(batch["pixel_values"], diffmask.view.encode(batch["pixel_values"]), truth)
    expected = {
        "iou": patch_iou(shown.mask, truth), "js": jensen_shannon(shown.mask, truth), "mass": mass_accuracy(shown.mask, truth),
        "kl": shown.kl, "feasible": (shown.kl <= 0.1).float(), "kept": shown.kept, "kept_true": shown.mask[truth > 0.5],
        "kept_other": shown.mask[truth < 0.5], "truth_feasible": (kl_divergence(shown.logits, own) <= 0.1).float(),
    }  # fmt: skip
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        assert report[name] == pytest.approx(value.nanmean().item(), abs=1e-5), name


def test_smallest_masks_are_all_of_them_and_enough(diffmask, pictures):
    diffmask.config.eps = 0.3
    for picture in pictures[:3]:
        found = {tuple(mask.tolist()) for mask in smallest_masks(diffmask, picture)}
        states = diffmask.view.encode(picture[None])
        enough = {}
        for mask in itertools.product([False, True], repeat=9):
            masked = diffmask.masked_logits(picture[None], states, torch.tensor([mask]))
            if all(mask) or kl_divergence(states.logits, masked) <= 0.3:
                enough.setdefault(sum(mask), set()).add(mask)
        assert found == enough[min(enough)]
