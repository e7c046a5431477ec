"""From a saved Hugging Face classifier to a trained mask and back: one mechanism, whatever the backbone.

All weights are random and nothing is downloaded: tiny models stand in for those of the Hub, and a ViT-B/16 for the paper's.
"""

import pytest
import torch
import transformers as hf
from conftest import randomize
from test_vit import SMALL, SQUARE, TEXT, VIEWS

from vdm_utils.data import ImageSet
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.training import (
    ClassifierSettings,
    DiffMaskSettings,
    dropped_patches,
    settings,
    train_classifier,
    train_diffmask,
)
from vdm_utils.vit import PatchView, build_classifier, fingerprint, load_classifier, with_image_size

NO_LABELS = {key: value for key, value in SQUARE.items() if key != "num_labels"}
TOKENS = TEXT | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
IMAGE_AND_TEXT = {"vision_config": NO_LABELS, "text_config": TOKENS, "projection_dim": 16, "num_labels": 5}
BACKBONES = {name: make for name, (make, _) in VIEWS.items()} | {
    "BEiT, relative positions": lambda: hf.BeitForImageClassification(
        hf.BeitConfig(**SQUARE, use_relative_position_bias=True, use_absolute_position_embeddings=True)
    ),
    "ViT-MSN": lambda: hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**SQUARE)),
    "I-JEPA": lambda: hf.IJepaForImageClassification(hf.IJepaConfig(**SQUARE)),  # no prefix token at all
    "CLIP": lambda: hf.CLIPForImageClassification(hf.CLIPConfig(**IMAGE_AND_TEXT)),
    "MetaCLIP 2": lambda: hf.MetaClip2ForImageClassification(hf.MetaClip2Config(**IMAGE_AND_TEXT)),
}
# models with a table of position embeddings, and a size to stretch it to; DINOv2 knows square tables only
STRETCHED = dict.fromkeys(["ViT", "DeiT", "DeiT with teacher", "ViT-MSN", "I-JEPA"], (32, 48))
STRETCHED |= dict.fromkeys(["DINOv2", "DINOv2 with registers"], (48, 48))
REFUSED = {
    "Hiera": lambda: hf.HieraForImageClassification(
        hf.HieraConfig(image_size=[32, 32], patch_size=[3, 3], patch_stride=[4, 4], embed_dim=16, depths=[1, 1], num_heads=[1, 2],
                       masked_unit_size=[4, 4], query_stride=[2, 2], num_query_pool=1)
    ),
    "LeViT": lambda: hf.LevitForImageClassification(
        hf.LevitConfig(image_size=64, hidden_sizes=[16] * 3, num_attention_heads=[2] * 3, depths=[1] * 3, key_dim=[8] * 3)
    ),
    "Perceiver": lambda: hf.PerceiverForImageClassificationLearned(
        hf.PerceiverConfig(d_latents=32, num_latents=8, image_size=32)
    ),
    "ImageGPT": lambda: hf.ImageGPTForImageClassification(
        hf.ImageGPTConfig(n_embd=32, n_layer=2, n_head=2, vocab_size=17, n_positions=64)
    ),
    # its input is a list of flattened patches
    "SigLIP 2": lambda: hf.Siglip2ForImageClassification(
        hf.Siglip2Config(vision_config={**SMALL, "patch_size": 8, "num_patches": 16}, text_config=TEXT)
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request, tmp_path_factory):
    """A classifier that was saved and loaded again."""
    made = randomize(BACKBONES[request.param](), std=0.2)
    folder = tmp_path_factory.mktemp("backbone")
    made.save_pretrained(folder)
    loaded = load_classifier(folder)
    assert type(loaded) is type(made) and fingerprint(loaded) == fingerprint(made)
    return loaded


def some_pictures(model, count=4):
    """A dataset of random pictures that the model takes."""
    images = torch.randint(256, (count, 3, *PatchView(model).image_size), dtype=torch.uint8)
    return ImageSet("noise", "train", images, torch.zeros(count, dtype=torch.int64), ["a", "b", "c", "d", "e"])


def pieces(diffmask):
    """What a training step moves: every gate, the placeholder and the multipliers, as flat copies."""
    parts = {f"gate {k}": gate.parameters() for k, gate in enumerate(diffmask.gates)}
    parts |= {"placeholder": [diffmask.placeholder], "multiplier": diffmask.multiplier.parameters()}
    return {name: torch.cat([p.detach().flatten().clone() for p in part]) for name, part in parts.items()}


def train_steps(model, folder, count=2, **changes):
    """A DiffMask of the model after `count` real steps on its last mask, with the pictures and what it was before."""
    data = some_pictures(model)
    chosen = settings(DiffMaskSettings, "quick", max_steps=count, batch_size=2, last_layer_share=1.0, **changes)
    diffmask = VisionDiffMask.for_classifier(model, **chosen.config())
    before = pieces(diffmask)
    train_diffmask(diffmask, data, data, chosen, folder)
    return diffmask, data.batch(range(4))["pixel_values"], before


def test_trained_saved_and_loaded(backbone, tmp_path):
    mark = fingerprint(backbone)
    diffmask, pixel_values, before = train_steps(backbone, tmp_path / "mask")
    moved = [name for name, weights in pieces(diffmask).items() if not torch.equal(weights, before[name])]
    assert moved == list(before) and fingerprint(backbone) == mark
    loaded = VisionDiffMask.from_pretrained(tmp_path / "mask")  # finds the classifier by itself
    assert loaded.base is not backbone and fingerprint(loaded.base) == mark
    ours, theirs = diffmask.explain(pixel_values), loaded.explain(pixel_values)
    assert ours.mask.shape == (4, *PatchView(backbone).grid) and len(ours.mask.unique()) > 4
    for field in ("mask", "masks_per_layer", "scores", "logits", "masked_logits", "kl"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


def test_a_pass_can_be_left_early(backbone):
    """At every depth the same mask as of the whole pass, and not a layer beyond what the gate looks at."""
    diffmask = randomize(VisionDiffMask.for_classifier(backbone, normalize=True, herding_layer=1), std=0.2)
    view, ran = diffmask.view, []
    pixel_values = torch.randn(2, 3, *view.image_size)
    hooks = [layer.register_forward_hook(lambda *_, k=k: ran.append(k)) for k, layer in enumerate(view.layers)]
    for depth in range(view.num_states):
        whole = diffmask.explain(pixel_values, layer=depth, check=False)
        ran.clear()
        early = diffmask.explain(pixel_values, layer=depth, check=False, stop_early=True)
        assert ran == list(range(depth - 1)) and early.logits is None
        for ours, theirs in (
            (early.scores, whole.scores),
            (early.masks_per_layer, whole.masks_per_layer[:, : depth + 1]),
        ):
            assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.equal(early.mask, diffmask.explain(pixel_values, check=False, stop_early=True).mask)
    for hook in hooks:
        hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())  # ours are gone as well


def change_patches(pixel_values, view, chosen):
    """Other pixels inside the patches where `chosen` [rows, cols] is true."""
    pixel_mask = chosen.repeat_interleave(view.patch_size[0], 0).repeat_interleave(view.patch_size[1], 1)
    return torch.where(pixel_mask, torch.randn_like(pixel_values), pixel_values)


@torch.no_grad()
def assert_only_kept_patches_matter(model):
    diffmask = VisionDiffMask.for_classifier(model)
    view, (rows, cols) = diffmask.view, diffmask.view.grid
    pixel_values = torch.randn(2, 3, *view.image_size)
    kept = torch.zeros(rows, cols, dtype=torch.bool)
    kept[0, 1] = kept[0, 3] = kept[-1, 0] = True  # other patches when rows and columns are swapped

    def masked(pictures):
        return diffmask.masked_logits(pictures, view.encode(pictures), kept.float().expand(2, -1, -1))

    expected = masked(pixel_values)
    elsewhere, inside = (change_patches(pixel_values, view, chosen) for chosen in (~kept, kept))
    assert not torch.allclose(view.encode(elsewhere).logits, view.encode(pixel_values).logits, atol=1e-3)
    assert torch.allclose(masked(elsewhere), expected, atol=1e-5)
    assert not torch.allclose(masked(inside), expected, atol=1e-3)


def test_only_kept_patches_matter(backbone):
    assert_only_kept_patches_matter(backbone)


@pytest.mark.parametrize("name", STRETCHED)
def test_pictures_of_another_size(name):
    model = randomize(BACKBONES[name](), std=0.2).eval()
    height, width = STRETCHED[name]
    other, pixel_values = with_image_size(model, (height, width)), torch.randn(2, 3, 32, 32)
    assert PatchView(other).grid == (height // 8, width // 8)
    assert_only_kept_patches_matter(other)
    same = with_image_size(model, 32)  # stretched by a factor of 1, prefix tokens included
    assert torch.allclose(same(pixel_values).logits, model(pixel_values).logits, atol=1e-4)


@pytest.mark.parametrize("name", ["SigLIP", "CLIP", "MetaCLIP 2", "BEiT"])
def test_image_sizes_that_cannot_be_changed_are_refused(name):
    with pytest.raises(VDMError, match="cannot take another image size"):
        with_image_size(BACKBONES[name](), (32, 48))


@pytest.mark.parametrize("name", ["SigLIP", "CLIP", "BEiT, relative positions"])
def test_patches_cannot_be_left_out_of_every_classifier(name):
    model = BACKBONES[name]()
    with pytest.raises(VDMError, match="patches cannot be left out"), dropped_patches(model, 0.5):
        pytest.fail("it let a training begin")


def test_a_classifier_without_a_loss_is_refused(tmp_path):
    model = BACKBONES["DeiT with teacher"]()
    data = ImageSet("any", "train", torch.zeros(9, 3, 32, 32, dtype=torch.uint8), torch.arange(9) % 5, list("abcde"))
    with pytest.raises(VDMError, match="computes no loss"):
        train_classifier(model, data, data, settings(ClassifierSettings, max_steps=1), tmp_path)


def test_a_backbone_without_a_head_gets_one(backbone, tmp_path):
    body = randomize(hf.AutoModel.from_config(backbone.config), std=0.2)  # what most repositories of the Hub hold
    body.save_pretrained(tmp_path)
    with pytest.raises(VDMError, match="classifier"):
        load_classifier(tmp_path)
    model = load_classifier(tmp_path, num_labels=3)
    assert (
        type(model) is type(backbone) or "Teacher" in type(backbone).__name__
    )  # of a body nobody knows that it had two heads
    assert VisionDiffMask.for_classifier(model).explain(
        torch.randn(1, 3, *PatchView(model).image_size)
    ).logits.shape == (1, 3)
    weights, found = body.state_dict(), 0
    for name, weight in model.state_dict().items():
        own = next((other for other in weights if name == other or name.endswith("." + other)), None)
        found += own is not None
        assert own is None or torch.equal(weight, weights[own]), name
    assert found >= 10


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused(name):
    with pytest.raises(VDMError, match="not a vision transformer with one patch grid"):
        VisionDiffMask.for_classifier(REFUSED[name]())


def test_at_the_size_of_the_paper(tmp_path):
    """ViT-B/16 at 224×224: 196 patches, 14 gates; one training step and one explanation."""
    model = build_classifier("vit", "base", 224, 16)
    model.save_pretrained(tmp_path / "base")
    model = load_classifier(tmp_path / "base")
    diffmask, pixel_values, before = train_steps(model, tmp_path / "mask", 1, eps=1e-6)
    assert [name for name, new in pieces(diffmask).items() if torch.equal(new, before[name])] == []
    loaded = VisionDiffMask.from_pretrained(tmp_path / "mask", base=model)
    shown = loaded.explain(pixel_values[:1])
    assert shown.mask.shape == (1, 14, 14) and shown.masks_per_layer.shape == (1, 14, 14, 14)
    assert torch.equal(shown.mask, diffmask.explain(pixel_values[:1]).mask) and 0 < shown.kept < 1
