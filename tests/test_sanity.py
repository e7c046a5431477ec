"""Every check passes on a healthy explanation and fails on one that is broken in the way it looks for."""

import copy
import math

import pytest
import scipy.stats
import torch
from conftest import randomize
from torch.nn.functional import cross_entropy
from transformers import SiglipConfig, SiglipForImageClassification, ViTConfig

from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.gates import HardConcrete
from vdm_utils.notebook import checkpoint
from vdm_utils.sanity import (
    label_randomisation,
    likeness,
    mask_forms,
    model_randomisation,
    new_gates,
    parts_of,
    placebo_leakage,
    randomised,
    rank_correlation,
    same_gates,
    seed_stability,
)
from vdm_utils.training import DiffMaskSettings, settings, train_diffmask
from vdm_utils.vit import build_classifier, fingerprint


def shipped(task, count):
    """A shipped DiffMask and a batch of test pictures of its task."""
    return VisionDiffMask.from_pretrained(checkpoint(task, "diffmask")), load_data(task, "test").batch(range(count))


@pytest.fixture(scope="module")
def toy_pair():
    return shipped("toy", 100)


@pytest.fixture(scope="module")
def shapes_pair():
    return shipped("shapes", 40)


def edges(model, pixel_values):
    """A map that never asks the classifier: how much neighbouring pixels differ, per patch of 4×4."""
    steps = pixel_values.diff(dim=-1, append=pixel_values[..., -1:]).abs().mean(1)  # [B, H, W]
    return torch.nn.functional.avg_pool2d(steps, 4)


def trained_for(steps, folder):
    """A `retrain` for shapes that takes that many steps."""

    def retrain(model):
        chosen = settings(DiffMaskSettings, "pictures", dataset="shapes", max_steps=steps, log_every_n_steps=1000)
        diffmask = VisionDiffMask.for_classifier(model, **chosen.config())
        data = [load_data("shapes", split, length=32) for split in ("train", "validation")]
        train_diffmask(diffmask, *data, chosen, folder)
        return diffmask

    return retrain


# ---------------------------------------------------------------- rank correlation


def test_rank_correlation_is_that_of_scipy():
    scores, other = torch.randn(20, 3, 4), torch.randint(0, 4, (20, 3, 4)).float()  # with ties
    expected = [scipy.stats.spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(scores, other)]
    assert rank_correlation(scores, other).tolist() == pytest.approx(expected, abs=1e-6)
    assert rank_correlation(scores, scores.exp()).tolist() == pytest.approx([1] * 20)
    assert rank_correlation(scores, torch.ones(20, 3, 4)).isnan().all()


def test_likeness_counts_a_lost_order_as_none_and_a_turned_one_as_the_contrary():
    scores = torch.rand(4, 3, 3)
    assert likeness(scores, scores) == pytest.approx(1) and likeness(scores, -scores) == pytest.approx(-1)
    after = torch.cat([scores[:2], torch.zeros(2, 3, 3)])
    assert likeness(scores, after) == pytest.approx(0.5)
    assert likeness(after, scores) == pytest.approx(1)  # two pictures had nothing to lose
    with pytest.raises(VDMError, match="constant on every picture"):
        likeness(torch.zeros(4, 3, 3), scores)


@pytest.mark.parametrize("patches, expected", [(9, 0.29), (64, 0.10)])
def test_absolute_values_would_make_random_maps_alike(patches, expected):
    """The figures of `likeness`."""
    rho = rank_correlation(torch.rand(1000, 1, patches), torch.rand(1000, 1, patches))
    assert rho.abs().mean().item() == pytest.approx(expected, abs=0.01) and abs(rho.mean()) < 0.02


# ---------------------------------------------------------------- model randomisation


def siglip():
    small = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=12, patch_size=4
    )
    return SiglipForImageClassification(SiglipConfig(vision_config=small, num_labels=5))


@pytest.mark.parametrize("make", [lambda: build_classifier(image_size=12, patch_size=4), siglip], ids=["ViT", "SigLIP"])
def test_weights_are_drawn_anew_from_the_head_down(make):
    model = randomize(make())
    mark, parts = fingerprint(model), parts_of(model)
    layers = [f"layer {k}" for k in range(len(parts) - 2, 0, -1)]
    assert list(parts) == ["head", *layers, "embeddings"]
    assert sorted(sum(parts.values(), [])) == sorted(model.state_dict())
    assert any("patch_embedding" in name for name in parts["embeddings"]) and all(parts.values())
    assert all(".0." in name for name in parts["layer 1"]) and any("classifier" in name for name in parts["head"])
    for last, depth in enumerate(parts):
        fresh = randomised(model, depth, seed=3).state_dict()
        changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, fresh[name])}
        assert changed == set(sum(list(parts.values())[: last + 1], []))
    assert fingerprint(model) == mark and fingerprint(randomised(model, seed=3)) == fingerprint(
        randomised(model, seed=3)
    )
    assert fingerprint(randomised(model, seed=3)) != fingerprint(randomised(model, seed=4))
    with pytest.raises(VDMError, match="did you mean 'embeddings'"):
        randomised(model, "embedding")


def test_gates_that_are_kept_pass(toy_pair):
    diffmask, batch = toy_pair
    mark = fingerprint(diffmask.base)
    depths = ["head", "layer 1", "embeddings"]
    check = model_randomisation(same_gates(diffmask), diffmask.base, batch["pixel_values"][:40], depths)
    column = check.table["rank correlation"]
    assert check.passed and check.value == column["embeddings"] <= check.limit == 0.2
    assert column["head"] == pytest.approx(1)  # gates read hidden states, and none of them knows the head
    assert list(check.table.index) == depths
    # with six colours one random network in twenty orders them nearly as the trained one does
    assert check.table.loc["embeddings", "lowest"] < -0.2 and check.table.loc["embeddings", "highest"] > 0.5
    assert fingerprint(diffmask.base) == mark


def test_a_map_that_ignores_the_classifier_fails(shapes_pair):
    diffmask, batch = shapes_pair
    check = model_randomisation(edges, diffmask.base, batch["pixel_values"], draws=2)
    assert list(check.table.index) == ["head", "layer 4", "layer 3", "layer 2", "layer 1", "embeddings"]
    assert not check.passed and check.table["rank correlation"].tolist() == pytest.approx([1] * 6)
    assert model_randomisation(edges, diffmask.base, batch["pixel_values"], ["embeddings"], 1, limit=1.0).passed


def test_gates_that_are_trained_again_pass(shapes_pair, tmp_path):
    diffmask, batch = shapes_pair
    method = new_gates(diffmask, trained_for(5, tmp_path))
    assert torch.equal(method(diffmask.base, batch["pixel_values"]), diffmask.explain(batch["pixel_values"]).scores)
    check = model_randomisation(method, diffmask.base, batch["pixel_values"], ["embeddings"], draws=1)
    assert check.passed and list(check.table.index) == ["embeddings"]


def test_a_training_that_ignores_the_classifier_fails(shapes_pair):
    diffmask, batch = shapes_pair
    method = new_gates(diffmask, lambda model: diffmask)  # whatever it is given, the same masks come out
    assert not model_randomisation(method, diffmask.base, batch["pixel_values"], ["embeddings"], draws=1).passed


# ---------------------------------------------------------------- shuffled labels


def test_masks_of_a_classifier_that_learned_shuffled_labels(shapes_pair, tmp_path):
    diffmask, batch = shapes_pair
    model, data = randomised(diffmask.base).train(), load_data("shapes", "train").batch(range(48))
    labels = data["labels"][torch.randperm(48)]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(5):
        loss = cross_entropy(model(data["pixel_values"]).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shuffled = trained_for(5, tmp_path)(model.eval())
    check = label_randomisation(diffmask, shuffled, batch["pixel_values"])
    assert check.passed and check.value == check.table.loc["shuffled labels", "IoU"]
    itself = label_randomisation(diffmask, diffmask, batch["pixel_values"])  # labels made no difference
    assert not itself.passed and itself.table.loc["shuffled labels"].tolist() == pytest.approx([1, 1])
    ours, theirs = (one.explain(batch["pixel_values"], check=False).mask > 0.5 for one in (diffmask, shuffled))
    overlap = [(a & b).sum() / (a | b).sum() for a, b in zip(ours, theirs) if a.any()]  # picture by picture
    assert check.value == pytest.approx(torch.stack(overlap).mean().item())


def test_masks_that_keep_nothing_cannot_be_compared_with_those_of_shuffled_labels(shapes_pair):
    empty = VisionDiffMask.for_classifier(shapes_pair[0].base, add_activation=-10.0, zero_start=True)
    with pytest.raises(VDMError, match="keeps nothing on every picture"):
        label_randomisation(empty, shapes_pair[0], shapes_pair[1]["pixel_values"])


# ---------------------------------------------------------------- leakage


class Brightest(torch.nn.Module):
    """Class n: the n-th of 3×3 patches is the brightest."""

    name_or_path, device = "", torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.config = ViTConfig(image_size=12, patch_size=4, hidden_size=4, num_hidden_layers=1, num_labels=9)
        self.patch_embeddings = torch.nn.Conv2d(3, 4, 4, stride=4)
        torch.nn.init.constant_(self.patch_embeddings.weight, 1 / 48)  # the mean of the patch
        torch.nn.init.zeros_(self.patch_embeddings.bias)
        self.layers = torch.nn.ModuleList([torch.nn.Identity()])

    def forward(self, pixel_values):
        tokens = self.layers[0](self.patch_embeddings(pixel_values).flatten(2).transpose(1, 2))
        return type("Output", (), {"logits": 50 * tokens.mean(-1)})


@pytest.fixture
def brightest():
    """A DiffMask whose placeholder is darker than any patch, and 90 pictures, ten of each class."""
    diffmask = VisionDiffMask.for_classifier(Brightest())
    torch.nn.init.constant_(diffmask.placeholder, -2.0)
    pictures, label = 0.5 * torch.rand(90, 3, 3, 3), torch.arange(90) % 9
    pictures.flatten(2).scatter_add_(2, label[:, None, None].expand(-1, 3, 1), torch.ones(90, 3, 1))
    return diffmask, pictures.repeat_interleave(4, 2).repeat_interleave(4, 3) - 0.5, label


def test_masks_that_write_the_class_down_fail(brightest):
    """A mask of one patch at the class's own place: whatever lies below, the classifier reads the mask."""
    diffmask, pictures, label = brightest
    masks = torch.nn.functional.one_hot(label, 9).view(90, 3, 3).float()
    check = placebo_leakage(diffmask, pictures, masks)
    assert not check.passed and check.value > 0.8 and check.limit == 0.05
    assert check.table["class of the mask"].tolist() == [1, 1, 1]
    assert check.table["chance"].tolist() == pytest.approx([1 / 9] * 3, abs=0.02)
    whole = placebo_leakage(diffmask, pictures, torch.ones(90, 3, 3))  # a mask that hides nothing says nothing
    assert whole.passed and whole.table.loc["other class"].tolist() == [0, 0]


def test_a_classifier_with_a_favourite_class_does_not_leak(brightest):
    """Two thirds of the pictures are of class 0, and every strange picture is: agreement far above 1/9, and all of it chance."""
    diffmask, pictures, label = brightest
    chosen = torch.cat([torch.arange(90), torch.arange(0, 90, 9).repeat(17)])
    pictures, label = pictures[chosen], label[chosen]
    frequency = (label == 0).float().mean().item()
    check = placebo_leakage(diffmask, pictures, torch.zeros(len(chosen), 3, 3))
    assert frequency > 0.6 and check.passed and check.value == pytest.approx(0, abs=0.02)
    assert check.table.loc["constant"].tolist() == pytest.approx([frequency, frequency], abs=1e-6)


def test_chance_is_the_mean_over_ways_to_deal_the_classes_out(diffmask, pictures, toy):
    pictures = toy.batch(range(96))["pixel_values"]
    masks = diffmask.explain(pictures).mask
    check = placebo_leakage(diffmask, pictures, masks)
    own = diffmask.base(pictures).logits.argmax(-1)
    grey = torch.zeros_like(pictures)
    said = diffmask.masked_logits(grey, diffmask.view.encode(grey), masks).argmax(-1)
    dealt = (said == own[torch.rand(2000, 96).argsort(1)]).float().mean().item()
    assert check.table.loc["constant", "chance"] == pytest.approx(dealt, abs=0.005)
    assert check.table.loc["constant", "class of the mask"] == pytest.approx((said == own).float().mean().item())


def test_the_shipped_masks_do_not_leak(toy_pair):
    diffmask, batch = toy_pair
    pictures, empty = batch["pixel_values"], batch["truth"].sum((1, 2)) == 0
    check = placebo_leakage(diffmask, pictures, others=pictures[empty])
    assert check.passed and check.table["class of the mask"].max() < 0.2
    # a picture with more counted cells is no placebo: what the mask leaves of it may well be the smaller number
    assert not placebo_leakage(diffmask, pictures).passed
    with pytest.raises(VDMError, match="all pictures are of one class"):
        placebo_leakage(diffmask, pictures[empty])


# ---------------------------------------------------------------- stability


def test_the_same_patches_from_every_seed_pass(toy_pair):
    diffmask, batch = toy_pair
    shown = diffmask.explain(batch["pixel_values"], check=False).mask
    other = copy.deepcopy(diffmask)  # as another seed of a stable training would: other numbers, the same patches
    with torch.no_grad():
        for parameter in other.gates.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape))
    check = seed_stability([shown, other.explain(batch["pixel_values"], check=False).mask, batch["truth"]])
    assert check.passed and check.value == pytest.approx(check.table["IoU"].mean()) and check.limit == 0.85
    assert list(check.table.index) == ["1 and 2", "1 and 3", "2 and 3"] and check.table["at random"].max() < 0.6


def test_other_patches_from_every_seed_fail(toy_pair):
    diffmask, batch = toy_pair
    shown = diffmask.explain(batch["pixel_values"], check=False).mask
    moved = shown.flatten(1).gather(1, torch.rand(100, 9).argsort(1)).view(100, 3, 3)
    check = seed_stability([shown, moved])
    assert not check.passed and check.value == pytest.approx(check.table["at random"].item(), abs=0.06)
    assert seed_stability([shown, moved], limit=0.2).passed


def test_random_masks_overlap_as_the_hypergeometric_says():
    """k common patches of 5 and 3 among 9: IoU k / (8 − k)."""
    one, two = (torch.zeros(400, 9) for _ in range(2))
    one[:, :5] = two[:, 2:5] = 1
    check = seed_stability([one.view(-1, 3, 3), two.view(-1, 3, 3)])
    expected = sum(scipy.stats.hypergeom(9, 5, 3).pmf(k) * k / (8 - k) for k in range(4))
    assert check.table["at random"].item() == pytest.approx(expected, abs=0.01)
    assert check.value == pytest.approx(3 / 5)


@pytest.mark.parametrize("masks", [[torch.rand(4, 3, 3)], [torch.rand(4, 3, 3), torch.rand(5, 3, 3)]])
def test_masks_of_different_pictures_are_refused(masks):
    with pytest.raises(VDMError, match="cannot be compared"):
        seed_stability(masks)


# ---------------------------------------------------------------- forms of a mask


def test_a_decided_mask_is_the_same_in_every_form(toy_pair):
    diffmask, batch = toy_pair
    check = mask_forms(diffmask, batch["pixel_values"])
    shown = diffmask.explain(batch["pixel_values"])
    assert check.passed and check.limit == 0.02 and (check.table["unchanged"] == 1).all()
    expected = [shown.kept.mean().item(), 0, shown.kl.mean().item(), 1]
    assert check.table.loc["expected"].tolist() == pytest.approx(expected, abs=1e-5)
    binary = (shown.mask > 0.5).float()
    logits = diffmask.masked_logits(batch["pixel_values"], diffmask.view.encode(batch["pixel_values"]), binary)
    assert check.table.loc["above 0.5", "kept"] == pytest.approx(binary.mean().item())
    divergence = (shown.logits.softmax(-1) * (shown.logits.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    assert check.table.loc["above 0.5", "kl"] == pytest.approx(divergence.item(), abs=1e-5)


def test_undecided_gates_fail(base, pictures):
    diffmask = VisionDiffMask.for_classifier(
        base, add_activation=0.0, mul_activation=0.1
    )  # log_alpha near 0 everywhere
    state = torch.get_rng_state()
    check = mask_forms(diffmask, pictures)
    keep = torch.sigmoid(torch.tensor(-0.2 * math.log(0.2))).item() ** 6  # six votes, each as good as a coin
    assert not check.passed and check.value == pytest.approx(keep, abs=0.01)
    assert check.table["kept"]["above 0.5"] == 0 and check.table["kept"]["drawn"] > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_undecided_gates_cannot_hide_in_a_mean(toy_pair, monkeypatch):
    """Nearly even chances: one half of the pictures above 0.5, the other below, so that the mean over all is right."""
    diffmask, batch = toy_pair
    log_alpha = torch.full((100, 1, 9), -0.2 * math.log(5))  # P(z ≠ 0) = 1/2
    log_alpha[:50] += 0.4
    log_alpha[50:] -= 0.4
    monkeypatch.setattr(diffmask, "votes", lambda states: HardConcrete(log_alpha))
    check = mask_forms(diffmask, batch["pixel_values"])
    assert check.table["kept"].tolist() == pytest.approx([0.5] * 3, abs=0.03)
    assert not check.passed and check.table["distance"]["above 0.5"] == pytest.approx(0.4, abs=0.01)


def test_the_drawn_mask_keeps_what_is_expected(base, toy):
    """P(z ≠ 0) is the probability of what training draws, over 96 · 9 patches."""
    diffmask = VisionDiffMask.for_classifier(base, add_activation=1.5, mul_activation=3.0, normalize=True)
    table = mask_forms(diffmask, toy.batch(range(96))["pixel_values"]).table
    assert 0.2 < table["kept"]["expected"] < 0.8 and table["kl"]["drawn"] != table["kl"]["expected"]
    assert table["kept"]["drawn"] == pytest.approx(table["kept"]["expected"], abs=0.04)


def test_a_method_that_breaks_down_does_not_pass():
    with pytest.raises(VDMError, match="no ranking"):
        likeness(torch.rand(4, 3, 3), torch.full((4, 3, 3), math.nan))


def test_drawing_new_weights_leaves_the_global_random_state_alone(base):
    state = torch.get_rng_state()
    randomised(base, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
