"""Faithfulness and agreement with a truth, against cases worked out by hand."""

import itertools
import math

import pytest
import torch
from conftest import randomize
from scipy.spatial.distance import jensenshannon
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
)

from vdm_utils.errors import VDMError
from vdm_utils.metrics import (
    FILLS,
    deletion_curves,
    insertion_curves,
    iou_at_k,
    jensen_shannon,
    logits_without,
    mass_accuracy,
    on_grid,
    patch_iou,
    pointing_game,
    share_below,
    smallest_masks,
    top_patches,
    truth_report,
)
from vdm_utils.objective import kl_divergence
from vdm_utils.vit import PatchView, build_classifier

SQUARE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=12, patch_size=4,
              num_labels=5)  # fmt: skip
ARCHITECTURES = {
    "DeiT": lambda: DeiTForImageClassification(DeiTConfig(**SQUARE)),
    "DINOv2": lambda: Dinov2ForImageClassification(Dinov2Config(**SQUARE)),
    "DINOv2 with registers": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SQUARE, num_register_tokens=3)
    ),
    "BEiT without bias": lambda: BeitForImageClassification(BeitConfig(**SQUARE)),
    "SigLIP": lambda: SiglipForImageClassification(SiglipConfig(vision_config=SQUARE, num_labels=5)),
}


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
    deletion_curves(model, pictures, scores, important_first=True, points=7, batch_size=2)
    assert model.training and len(seen) == 8 and torch.equal(seen[0], pictures)
    for image in range(2):
        order = scores[image].flatten().argsort(descending=True).tolist()
        for step, changed in enumerate(seen[1:], start=1):
            gone = (changed[image] != 2).all(0).view(2, 4, 4, 4).permute(0, 2, 1, 3).flatten(2)  # [rows, cols, 16]
            assert torch.equal(gone.all(-1), gone.any(-1))
            assert set(gone.all(-1).flatten().nonzero()[:, 0].tolist()) == set(order[:step])
    assert seen[-1].min() >= -1


def without_by_hand(diffmask, picture, gone, fill, noise):
    """Logits of one picture [3, 12, 12] without the patches in the list `gone`, by a ViT taken apart."""
    vit, embeddings = diffmask.base.vit, diffmask.base.vit.embeddings
    canvas = {"noise": noise, "mean colour": torch.zeros_like(picture)}.get(fill, picture)
    changed = picture.clone()
    for patch in gone:
        row, col = 4 * (patch // 3), 4 * (patch % 3)
        changed[:, row : row + 4, col : col + 4] = canvas[:, row : row + 4, col : col + 4]
    patches = embeddings.patch_embeddings(changed[None])[0]
    if fill == "placeholder":
        patches = torch.stack([diffmask.placeholder if n in gone else patches[n] for n in range(9)])
    tokens = torch.cat([embeddings.cls_token[0], patches]) + embeddings.position_embeddings[0]
    if fill == "token removal":
        tokens = torch.stack([tokens[0], *(tokens[1 + n] for n in range(9) if n not in gone)])
    for layer in vit.layers:
        tokens = layer(tokens[None])[0]
    return diffmask.base.classifier(vit.layernorm(tokens[None])[:, 0])[0]


@pytest.mark.parametrize("fill", FILLS)
@torch.no_grad()
def test_curves_are_those_of_a_plain_loop(diffmask, pictures, fill):
    scores = torch.rand(8, 3, 3)
    noise = torch.rand(pictures.shape, generator=torch.Generator().manual_seed(5)) * 2 - 1
    curves = deletion_curves(diffmask, pictures, scores, True, points=4, seed=5, fill=fill, batch_size=7)
    for image in range(8):
        whole = diffmask.base(pictures[image][None]).logits[0]
        order = sorted(range(9), key=lambda n: -scores[image].flatten()[n])
        for point, count in enumerate([2, 4, 5, 7]):  # 9/5, 18/5, 27/5 and 36/5
            logits = without_by_hand(diffmask, pictures[image], order[:count], fill, noise[image])
            assert curves[0][image, point].item() == pytest.approx(logits.softmax(-1)[whole.argmax()].item(), abs=1e-4)
            assert curves[1][image, point].item() == pytest.approx(kl_divergence(whole, logits).item(), abs=1e-3)
    assert curves[1].std() > 0.01


@pytest.mark.parametrize("fill", FILLS)
def test_nothing_gone_is_the_whole_picture(diffmask, base, pictures, fill):
    nothing = torch.zeros(8, 2, 9, dtype=torch.bool)
    logits = logits_without(diffmask, pictures, nothing, fill)
    assert logits.shape == (8, 2, 10)
    assert torch.allclose(logits, base(pictures).logits[:, None].expand(-1, 2, -1), atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_removed_token_is_not_seen(name):
    """What stands in a removed patch makes no difference; what stands in the others does; no trace is left."""
    model = randomize(ARCHITECTURES[name](), std=0.2).train()
    pictures, gone = torch.randn(2, 3, 12, 12), torch.zeros(2, 3, 9, dtype=torch.bool)
    gone[:, 0, 0] = gone[0, 1, [4, 5]] = gone[1, 1, 4] = True  # sets of different sizes, and an empty one
    logits = logits_without(model, pictures, gone, "token removal")
    inside, outside = pictures.clone(), pictures.clone()
    inside[:, :, :4, :4] += 1  # patch 0
    outside[:, :, :4, 4:8] += 1  # patch 1
    again, other = (logits_without(model, changed, gone, "token removal") for changed in (inside, outside))
    assert torch.allclose(again[:, 0], logits[:, 0], atol=1e-5) and not torch.allclose(
        again[:, 1], logits[:, 1], atol=1e-3
    )
    assert not torch.allclose(other, logits, atol=1e-3) and not torch.allclose(logits[:, 0], logits[:, 2], atol=1e-3)
    assert torch.allclose(logits[:, 2], model.eval()(pictures).logits, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("bias", ["use_relative_position_bias", "use_shared_relative_position_bias"])
def test_tokens_stay_where_layers_look_positions_up(bias):
    model = BeitForImageClassification(BeitConfig(**SQUARE, **{bias: True}))
    with pytest.raises(VDMError, match="cannot be left out[^?]*positions inside the layers"):
        logits_without(model, torch.randn(1, 3, 12, 12), torch.ones(1, 1, 9, dtype=torch.bool), "token removal")


def test_a_mean_over_no_patch_is_refused(base, pictures):
    everything = torch.ones(8, 1, 9, dtype=torch.bool)
    assert logits_without(base, pictures, everything, "token removal").isfinite().all()  # [CLS] is left
    model = randomize(ARCHITECTURES["SigLIP"]())
    with pytest.raises(VDMError, match="says nothing without patches"):
        logits_without(model, pictures, everything, "token removal")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fill": "noisy"}, "did you mean 'noise'"),
        ({"fill": "placeholder"}, "there is no placeholder"),
        ({"scores": torch.rand(8, 4, 4)}, "one entry per patch"),
        ({"scores": torch.full((8, 3, 3), math.nan)}, "no ranking"),
        ({"scores": torch.rand(8, 9)}, "no ranking"),
    ],
)
def test_what_cannot_be_taken_away_is_refused(base, pictures, change, message):
    with pytest.raises(VDMError, match=message):
        deletion_curves(base, pictures, **{"scores": torch.rand(8, 3, 3), "important_first": True, **change})


def test_insertion_puts_the_most_important_patch_back_first(bright):
    model, pictures = bright
    scores, sure = torch.rand(4, 3, 3), torch.sigmoid(torch.tensor(8 * 0.9))
    scores[:, 1, 1] = 2
    right, kl = insertion_curves(model, pictures, scores, points=8)
    wrong, _ = insertion_curves(model, pictures, -scores, points=8)
    assert torch.allclose(right, sure.expand(4, 8)) and kl.max() < 1e-5
    assert (wrong < sure - 0.05).all()
    scores[:, 1, 1], scores[:, 0, 0] = 2, 3  # second
    second, _ = insertion_curves(model, pictures, scores, points=8)
    assert torch.equal(second[:, 1:], right[:, 1:]) and (second[:, 0] < sure - 0.05).all()


def test_top_patches_by_hand():
    scores = torch.tensor([[[0.1, 0.4], [0.3, 0.2]], [[-1.0, -2.0], [-3.0, -4.0]]])
    first = [[[0, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 1], [1, 1]]]
    assert top_patches(scores, torch.tensor([0, 1, 3]))[0].int().tolist() == first
    own = top_patches(scores, torch.tensor([[1], [2]]))
    assert own[:, 0].int().tolist() == [[[0, 1], [0, 0]], [[1, 1], [0, 0]]]


def test_iou_at_k_by_hand():
    scores = torch.tensor([[[0.9, 0.8], [0.7, 0.1]]]).expand(4, -1, -1)
    truth = torch.tensor([[[1.0, 1], [0, 0]], [[1, 0], [0, 1]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]])
    iou = iou_at_k(scores, truth)
    assert iou[:3].tolist() == pytest.approx([1, 1 / 3, 0]) and iou[3].isnan()
    assert torch.equal(iou_at_k(10 * scores - 99, truth)[:3], iou[:3])  # ranks alone count


def test_pointing_game_by_hand():
    case = torch.zeros(4, 2, 2)
    case[:, 1, 0] = 1
    objects = torch.zeros(4, 4, 4)
    objects[0, 3, 1] = 1  # one pixel of the patch below left
    objects[1, :2] = 1  # the upper half
    objects[2, :, :2] = 1  # the left half
    hits = pointing_game(case, objects)
    assert hits[:3].tolist() == [1, 0, 1] and hits[3].isnan()


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


@pytest.mark.parametrize("cells", [(3, 3), (2, 3), (32, 32), (6, 9), (56, 28)])
def test_a_truth_on_the_grid_is_the_mean_over_every_patch(cells):
    """Also where cells and patches do not divide: 3×3 cells on 14×14 patches, as at the size of the paper."""
    truth, grid = (torch.rand(4, *cells) > 0.5).float(), (14, 7)
    fine = truth.repeat_interleave(14, 1).repeat_interleave(7, 2)  # [4, cells · patches, …]
    by_hand = fine.unflatten(1, (14, cells[0])).unflatten(3, (7, cells[1])).mean((2, 4))
    assert torch.allclose(on_grid(truth, grid), by_hand, atol=1e-6)
    assert ((on_grid(truth, grid) == 0) == (by_hand == 0)).all()  # nothing true is exactly 0
    assert torch.equal(on_grid(truth, cells), truth)


def test_share_below_is_that_of_all_pairs():
    scores = torch.randint(-3, 3, (50, 3, 4)).float().log()  # ties, −inf; NaN for negative numbers
    scores = scores.nan_to_num(nan=7.0)
    x = scores.flatten(1)
    assert torch.equal(
        share_below(scores), (x[:, :, None] - x[:, None]).nan_to_num(0).sign().add(1).double().mean(2) / 2
    )


def test_tiny_masks_are_distributions_too():
    truth = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    for size in (1.0, 1e-13, 1e-30):
        assert jensen_shannon(size * truth, truth).item() == pytest.approx(0, abs=1e-6)
        assert jensen_shannon(size * (1 - truth), truth).item() == pytest.approx(math.log(2), abs=1e-6)


def test_scores_that_are_no_numbers_are_refused():
    broken = torch.full((2, 3, 3), math.nan)
    for measure in (pointing_game, iou_at_k):
        with pytest.raises(VDMError, match="no ranking"):
            measure(broken, torch.ones(2, 3, 3))


def test_pixels_beyond_the_last_patch_belong_to_none():
    """SigLIP so400m: 384 pixels, patches of 14, 27 of them and six pixels left."""
    config = SQUARE | {"image_size": 14, "patch_size": 4}
    model = randomize(SiglipForImageClassification(SiglipConfig(vision_config=config, num_labels=5))).eval()
    view, pictures = PatchView(model), torch.randn(1, 3, 14, 14)
    before = view.encode(pictures).embeddings
    for patch in range(9):
        gone = torch.zeros(1, 3, 3, dtype=torch.bool)
        gone.view(-1)[patch] = True
        painted = torch.where(view.on_pixels(gone)[:, None], torch.zeros(()), pictures)
        changed = (view.encode(painted).embeddings != before).any(-1)
        assert changed.nonzero().tolist() == [[0, patch]]


@pytest.mark.parametrize("fill", FILLS)
def test_no_more_pictures_than_asked_for_are_seen_at_once(diffmask, pictures, fill, monkeypatch):
    seen, forward = [], diffmask.base.forward
    monkeypatch.setattr(diffmask.base, "forward", lambda x, **options: seen.append(len(x)) or forward(x, **options))
    logits_without(diffmask, pictures, torch.rand(8, 2, 9) > 0.5, fill, batch_size=3)
    assert max(seen) <= 3


def test_a_patch_that_is_half_true_is_not_a_true_one():
    truth = torch.zeros(1, 4, 4)
    truth[0, 0, :2] = 1  # half of the first patch of 2×2
    assert patch_iou(torch.zeros(1, 2, 2), truth).item() == 1
