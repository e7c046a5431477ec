"""An explanation reports what its own mask does; a saved DiffMask comes back with its own base or not at all."""

import copy
import json
import math
import shutil

import pytest
import torch
from conftest import randomize
from safetensors.torch import load_file
from torch.nn.functional import kl_div

from vdm_utils.diffmask import VisionDiffMask, VisionDiffMaskConfig
from vdm_utils.errors import VDMError
from vdm_utils.gates import MARGIN_START, OPEN_START, RANK_START, HardConcrete, herding_ranks
from vdm_utils.objective import class_margin
from vdm_utils.refine import refine
from vdm_utils.vit import build_classifier, fingerprint, load_classifier

FIELDS = ("mask", "masks_per_layer", "scores", "kept", "logits", "masked_logits", "kl")
GATES = dict(add_activation=0.0, mul_activation=3.0, normalize=True)
OTHER = {  # a value that differs from the default for every setting of the config
    "eps": 0.05, "kl_quantile": 0.9, "mul_activation": 6.0, "add_activation": 2.0, "temperature": 0.5, "low": -0.1,
    "high": 1.1, "normalize": True, "zero_start": True, "no_placeholder": True, "alpha": 10.0, "alpha_min": 1.0,
    "alpha_max": 50.0, "log_multiplier": True, "herding_layer": 2, "keep_class": True,
}  # fmt: skip


def count_forwards(monkeypatch, model):
    calls, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    return calls


# ---------------------------------------------------------------- what is shown is what is measured


@pytest.mark.parametrize("aggregated", [True, False])
@pytest.mark.parametrize("layer", [None, 0, 3])
def test_kl_and_class_are_those_of_the_mask_that_is_shown(diffmask, base, pictures, layer, aggregated):
    shown = diffmask.explain(pictures, layer=layer, aggregated=aggregated)
    keep = shown.mask.flatten(1)[..., None]  # [B, N, 1]
    with torch.no_grad():
        embeddings = base.vit.embeddings.patch_embeddings(pictures)
        blended = keep * embeddings + (1 - keep) * diffmask.placeholder
        cls = base.vit.embeddings.cls_token.expand(8, -1, -1)  # never masked; positions come afterwards
        tokens = torch.cat([cls, blended], 1) + base.vit.embeddings.position_embeddings
        for block in base.vit.layers:
            tokens = block(tokens)
        by_hand = base.classifier(base.vit.layernorm(tokens)[:, 0])
        whole = base(pictures).logits
    assert torch.allclose(shown.masked_logits, by_hand, atol=1e-5) and torch.equal(shown.logits, whole)
    divergence = kl_div(by_hand.log_softmax(-1), whole.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(shown.kl, divergence, rtol=0.01, atol=2e-6) and shown.kl.max() > 0.005
    assert torch.allclose(shown.kept, shown.mask.mean((1, 2)))


def test_depths_and_single_votes(diffmask, pictures):
    states = diffmask.view.encode(pictures)
    with torch.no_grad():
        log_alpha = [gate(states.embeddings, hidden) for gate, hidden in zip(diffmask.gates, states.hidden)]
    votes = torch.stack([torch.sigmoid(a - 0.2 * torch.tensor(0.2).log()) for a in log_alpha], 1).view(8, 6, 3, 3)
    product, alone = diffmask.explain(pictures), diffmask.explain(pictures, aggregated=False)
    assert torch.allclose(alone.masks_per_layer, votes, atol=1e-6)
    assert torch.allclose(product.masks_per_layer, votes.cumprod(1), atol=1e-6)
    assert votes.std() > 0.1 and product.mask.shape == (8, 3, 3)
    for shown, aggregated in ((product, True), (alone, False)):
        assert torch.equal(shown.mask, shown.masks_per_layer[:, -1])  # the last by default
        for layer in range(6):
            one = diffmask.explain(pictures, layer=layer, aggregated=aggregated, check=False)
            assert torch.equal(one.mask, shown.masks_per_layer[:, layer])
            assert torch.allclose(one.scores, shown.masks_per_layer[:, layer].log(), atol=1e-5)


def test_scores_rank_patches_where_the_mask_is_saturated(base, pictures):
    diffmask = VisionDiffMask.for_classifier(base, **GATES | {"add_activation": 40.0, "mul_activation": 10.0})
    with torch.no_grad():
        for sign in (1, -1):
            for gate in diffmask.gates:
                gate.add = 40.0 * sign
            shown = diffmask.explain(pictures[:1])
            assert (
                len(shown.mask.unique()) == 1 and len(shown.scores.unique()) == 9
            )  # ties in the mask, none in the scores


def test_rows_are_rows(toy):
    model = randomize(build_classifier(image_size=(8, 20), patch_size=4)).eval()
    diffmask = VisionDiffMask.for_classifier(model, **GATES)
    pixels = torch.zeros(1, 3, 8, 20)
    before = diffmask.explain(pixels, layer=0)
    pixels[..., 4:8, 12:16] = 1  # row 1, column 3
    after = diffmask.explain(pixels, layer=0)  # gate 0 sees the embedding alone
    assert (after.mask != before.mask).nonzero().tolist() == [[0, 1, 3]]
    enlarged = after.pixel_mask(16, 40)
    assert torch.equal(enlarged, after.mask.repeat_interleave(8, 1).repeat_interleave(8, 2))


def test_a_picture_is_explained_alike_alone_and_in_a_batch(diffmask, pictures):
    together = diffmask.explain(pictures)
    for n in (0, 5):
        alone = diffmask.explain(pictures[n : n + 1])
        for field in FIELDS:
            assert torch.allclose(getattr(alone, field)[0], getattr(together, field)[n], atol=1e-5), field


def test_cost_in_passes_of_the_base(diffmask, pictures, monkeypatch):
    calls = count_forwards(monkeypatch, diffmask.base)
    unchecked = diffmask.explain(pictures, check=False)
    assert len(calls) == 1 and unchecked.kl is None and unchecked.masked_logits is None
    checked = diffmask.explain(pictures)
    assert len(calls) == 3 and torch.equal(checked.mask, unchecked.mask)
    diffmask(pictures, layer=5)
    assert len(calls) == 5
    assert torch.equal(checked.kl, diffmask.explain(pictures).kl)  # nothing is sampled


# ---------------------------------------------------------------- the training objective


def test_gradient_reaches_what_is_learned_and_not_the_base(diffmask, pictures):
    diffmask(pictures, layer=2).loss.backward()
    for k, gate in enumerate(diffmask.gates):
        assert all((p.grad is not None and p.grad.abs().sum() > 0) == (k <= 2) for p in gate.parameters())
    assert diffmask.placeholder.grad.abs().sum() > 0 and diffmask.multiplier.parameter.grad[2] != 0
    assert all(parameter.grad is None for parameter in diffmask.base.parameters())
    assert not any(name.startswith(("view", "base")) for name, _ in diffmask.named_parameters())


@pytest.mark.parametrize("layer", [0, 5])
def test_the_drawn_mask_multiplies_the_votes_up_to_the_layer(diffmask, pictures, monkeypatch, layer):
    used = []
    original = diffmask.masked_logits
    monkeypatch.setattr(diffmask, "masked_logits", lambda *inputs: used.append(inputs[2]) or original(*inputs))
    output = diffmask(pictures, layer=layer)
    again = diffmask(pictures, layer=layer)
    assert used[0].shape == (8, 9)  # patches only: [CLS] has no gate
    assert not torch.equal(used[0], used[1]) and torch.equal(output.l0, again.l0)  # a new draw; L0 is in closed form
    closed = diffmask.explain(pictures, layer=layer)
    assert torch.allclose(output.l0, closed.kept, atol=1e-6)
    draws = torch.stack([diffmask(pictures, layer=layer) and used[-1].detach() > 0 for _ in range(150)]).float().mean(0)
    assert (draws.view(8, 3, 3) - closed.mask).abs().mean() < 0.05  # P(z ≠ 0) of the draws is the mask
    same = diffmask.masked_logits(pictures, diffmask.view.encode(pictures), used[0]).argmax(-1)
    assert torch.equal(output.unchanged, (same == closed.logits.argmax(-1)).float())


def test_a_block_of_patches_shares_one_vote_and_one_draw(diffmask, pictures, monkeypatch):
    """A 3×3 grid in squares of 2×2: one of four patches, two of two, and one of one."""
    used, original = [], diffmask.masked_logits
    monkeypatch.setattr(diffmask, "masked_logits", lambda *inputs: used.append(inputs[2]) or original(*inputs))
    torch.manual_seed(0)
    outputs = [diffmask(pictures, layer=3, block=2) for _ in range(300)]
    drawn = torch.stack(used).view(300, 8, 3, 3)
    squares = [drawn[..., :2, :2], drawn[..., :2, 2:], drawn[..., 2:, :2], drawn[..., 2:, 2:]]
    assert all((square == square[..., :1, :1]).all() for square in squares)
    log_alpha = diffmask.votes(diffmask.view.encode(pictures), 3).log_alpha.view(8, 4, 3, 3)
    means = [log_alpha[..., r, c].mean((2, 3)) for r in (slice(0, 2), slice(2, 3)) for c in (slice(0, 2), slice(2, 3))]
    closed = torch.stack([HardConcrete(mean).log_prob_nonzero.sum(1).exp() for mean in means], 1)  # [B, squares]
    realised = torch.stack([(square[..., 0, 0] > 0).float().mean(0) for square in squares], 1)
    assert (realised - closed).abs().mean() < 0.04
    of_patches = (closed * torch.tensor([4, 2, 2, 1])).sum(1) / 9  # a square counts as its patches do
    assert torch.allclose(outputs[0].l0, of_patches, atol=1e-5)
    outputs[0].loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in diffmask.gates[3].parameters())


def test_shared_noise_draws_level_sets_of_one_ranking(diffmask, pictures, monkeypatch):
    masks, original = [], diffmask.masked_logits
    monkeypatch.setattr(diffmask, "masked_logits", lambda *inputs: masks.append(inputs[2]) or original(*inputs))
    log_alpha = diffmask.votes(diffmask.view.encode(pictures), 0).log_alpha[:, 0]  # [B, N] of the first gate
    for shared in (True, False):
        masks.clear()
        for _ in range(50):
            diffmask(pictures, layer=0, shared_noise=shared)
        ranked = torch.stack(masks).gather(-1, log_alpha.argsort(-1).expand(50, -1, -1))
        assert (ranked.diff(dim=-1) >= 0).all() == shared


def test_without_a_placeholder_patches_become_zero(base, pictures):
    diffmask = VisionDiffMask.for_classifier(base, no_placeholder=True)
    states = diffmask.view.encode(pictures)
    nothing = diffmask.masked_logits(pictures, states, torch.zeros(8, 9))
    with torch.no_grad():
        assert torch.equal(nothing, diffmask.view.logits(pictures, torch.zeros_like(states.embeddings)))
    assert diffmask.placeholder is None and "placeholder" not in diffmask.state_dict()
    half = torch.tensor([[1.0] * 4 + [0.0] * 5]).expand(8, 9)
    kept = torch.cat([states.embeddings[:, :4], torch.zeros(8, 5, 64)], 1)
    with torch.no_grad():
        assert torch.equal(diffmask.masked_logits(pictures, states, half), diffmask.view.logits(pictures, kept))


def test_from_grey_nothing_kept_is_an_empty_picture(base, pictures):
    diffmask = VisionDiffMask.for_classifier(base)
    diffmask.start_grey()
    states = diffmask.view.encode(pictures)
    with torch.no_grad():
        nothing, empty = (
            diffmask.masked_logits(pictures, states, torch.zeros(8, 9)),
            base(torch.zeros_like(pictures)).logits,
        )
    torch.testing.assert_close(nothing, empty)
    assert diffmask.placeholder.requires_grad  # it is only where it starts
    with pytest.raises(VDMError, match="no placeholder to start"):
        VisionDiffMask.for_classifier(base, no_placeholder=True).start_grey()


def test_a_new_diffmask_starts_as_configured(base):
    diffmask = VisionDiffMask.for_classifier(base, alpha=7.0)
    assert diffmask.config.num_gates == len(diffmask.gates) == 6 and diffmask.config.hidden_size == 64
    assert diffmask.multiplier.value.tolist() == [7.0] * 6
    bound = (6 / 65) ** 0.5  # Xavier for one row of 64; a mean-embedding start is far worse (METHOD.md)
    assert diffmask.placeholder.shape == (64,) and 0.9 * bound < diffmask.placeholder.abs().max() <= bound


def test_a_half_precision_base_can_be_explained(base, pictures):
    half = copy.deepcopy(base).bfloat16()
    shown = VisionDiffMask.for_classifier(half, **GATES).explain(pictures.bfloat16())
    assert shown.kl.isfinite().all() and shown.mask.shape == (8, 3, 3)


# ---------------------------------------------------------------- checkpoints


def same_explanation(first, second, pictures):
    return all(torch.equal(getattr(first.explain(pictures), f), getattr(second.explain(pictures), f)) for f in FIELDS)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def saved_base(base, tmp_path):
    """The base in a folder of its own: (folder, model)."""
    model = copy.deepcopy(base)
    model.save_pretrained(tmp_path / "run" / "base")
    model.name_or_path = str(tmp_path / "run" / "base")
    return tmp_path / "run" / "base", model


def test_a_checkpoint_finds_its_base_by_relative_path_after_a_move(saved_base, pictures, tmp_path, monkeypatch):
    folder, model = saved_base
    diffmask = VisionDiffMask.for_classifier(model, **GATES)
    diffmask.save_pretrained(tmp_path / "run" / "mask")
    assert config_of(tmp_path / "run" / "mask")["base_name_or_path"] == "../base"
    assert diffmask.config.base_name_or_path == str(folder)  # saving changes nothing in memory
    (tmp_path / "run").rename(tmp_path / "moved")
    loaded = VisionDiffMask.from_pretrained(tmp_path / "moved" / "mask")
    assert same_explanation(diffmask, loaded, pictures) and not loaded.training
    loaded.save_pretrained(tmp_path / "again")  # a loaded one can be saved elsewhere
    assert same_explanation(diffmask, VisionDiffMask.from_pretrained(tmp_path / "again"), pictures)
    monkeypatch.chdir(tmp_path / "moved" / "mask")
    assert same_explanation(diffmask, VisionDiffMask.from_pretrained("."), pictures)


def test_a_base_that_was_never_saved_goes_inside_the_checkpoint(base, diffmask, pictures, tmp_path):
    diffmask.save_pretrained(tmp_path / "mask")
    assert config_of(tmp_path / "mask")["base_name_or_path"] == "base"
    shutil.move(tmp_path / "mask", tmp_path / "elsewhere")
    loaded = VisionDiffMask.from_pretrained(tmp_path / "elsewhere")
    assert same_explanation(diffmask, loaded, pictures) and fingerprint(loaded.base) == fingerprint(base)
    weights = load_file(tmp_path / "elsewhere" / "model.safetensors")
    assert set(weights) == set(diffmask.state_dict())  # what was learned, and nothing of the base
    assert {name.split(".")[0] for name in weights} == {"gates", "placeholder", "multiplier", "running"}


def test_a_wrong_base_is_refused_by_name(saved_base, base, tmp_path):
    folder, model = saved_base
    VisionDiffMask.for_classifier(model).save_pretrained(tmp_path / "mask")
    other = copy.deepcopy(base)
    other.classifier.bias.data[0] += 1e-3
    other.name_or_path = "another-base"
    expected = rf"(?s)not the classifier that was explained.*base with weights {fingerprint(model)[:12]}.*another-base"
    with pytest.raises(VDMError, match=expected):
        VisionDiffMask.from_pretrained(tmp_path / "mask", base=other)
    with pytest.raises(VDMError, match="not the classifier"):
        VisionDiffMask.from_pretrained(tmp_path / "mask").attach(other)
    VisionDiffMask.from_pretrained(tmp_path / "mask", base=model)
    other.save_pretrained(folder)  # written over behind its back
    with pytest.raises(VDMError, match="not the classifier"):
        VisionDiffMask.from_pretrained(tmp_path / "mask")


def test_a_base_from_the_hub_is_kept_by_name(base, tmp_path):
    model = copy.deepcopy(base)
    model.name_or_path = "someone/some-vit"
    VisionDiffMask.for_classifier(model).save_pretrained(tmp_path / "mask")
    assert config_of(tmp_path / "mask")["base_name_or_path"] == "someone/some-vit"
    assert not (tmp_path / "mask" / "base").exists()
    with pytest.raises(VDMError, match="someone/some-vit"):  # not here, and the tests are offline
        VisionDiffMask.from_pretrained(tmp_path / "mask")


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_survives_a_checkpoint(base, tmp_path, name):
    assert set(OTHER) == set(VisionDiffMaskConfig.__annotations__) - {
        "model_type", "hidden_size", "num_gates", "base_name_or_path", "base_fingerprint"
    }  # fmt: skip
    changes = {name: OTHER[name]} | ({"alpha_min": 1.0} if name == "log_multiplier" else {})
    assert getattr(VisionDiffMaskConfig(), name) != OTHER[name]
    VisionDiffMask.for_classifier(base, **changes).save_pretrained(tmp_path)
    loaded = VisionDiffMask.from_pretrained(tmp_path, base=base).config
    assert all(getattr(loaded, key) == value for key, value in changes.items())
    assert loaded.num_gates == 6 and loaded.base_fingerprint == fingerprint(base)


def test_settings_reach_the_gates(base):
    diffmask = VisionDiffMask.for_classifier(base, **OTHER | {"zero_start": True})
    gate = diffmask.gates[3]
    *others, margin, rank = gate.outer.weight[0].tolist()
    assert (gate.mul, gate.add, gate.normalize, set(others)) == (6.0, 2.0, True, {0.0})
    assert (margin, rank) == pytest.approx((MARGIN_START, RANK_START))
    assert [gate.outer.in_features - gate.inner.out_features for gate in diffmask.gates] == [0, 0, 2, 2, 2, 2]
    diffmask = VisionDiffMask.for_classifier(base, **OTHER | {"herding_layer": -1})  # no ranks: all are told the margin
    assert [gate.num_hints for gate in diffmask.gates] == [1] * 6
    assert diffmask.multiplier.log_space and diffmask.multiplier.bounds == pytest.approx((0, 3.912), abs=1e-3)
    votes = diffmask.votes(diffmask.view.encode(torch.zeros(1, 3, 12, 12)))
    assert (votes.temperature, votes.low, votes.high) == (0.5, -0.1, 1.1) and votes.batch_shape == (1, 6, 9)


def test_fewer_gates_look_at_the_first_states(base, pictures, tmp_path):
    options = {**GATES, "herding_layer": 1, "keep_class": True, "no_placeholder": True}
    every = randomize(VisionDiffMask.for_classifier(base, **options), std=0.2)
    three = VisionDiffMask.for_classifier(base, num_gates=3, **options)
    three.gates.load_state_dict(every.gates[:3].state_dict())
    three.save_pretrained(tmp_path)
    shown, same = (
        VisionDiffMask.from_pretrained(tmp_path, base=base).explain(pictures),
        every.explain(pictures, layer=2),
    )
    assert shown.masks_per_layer.shape == (len(pictures), 3, 3, 3) and shown.mask.std() > 0.01
    assert torch.allclose(shown.mask, same.mask, atol=1e-6) and torch.allclose(shown.kl, same.kl, atol=1e-5)


def test_gates_keep_more_of_an_answer_that_is_less_sure(base, pictures):
    """Before training a gate says nothing but what it is told: an unsure class keeps more, a patch that stands for others stays."""
    diffmask = VisionDiffMask.for_classifier(
        base, zero_start=True, keep_class=True, herding_layer=2, add_activation=0.0
    )
    states = diffmask.view.encode(pictures)
    margin = class_margin(states.logits)
    with torch.no_grad():
        log_alpha = diffmask.votes(states).log_alpha  # [B, K, N]
    alone, ranked = log_alpha[:, 0], log_alpha[:, 2]
    assert torch.allclose(
        alone, torch.full_like(alone, 15 * math.tanh(OPEN_START))
    )  # sees no ranks yet, is told nothing
    told = MARGIN_START * margin[:, None] + RANK_START * herding_ranks(states.hidden[2])
    assert torch.allclose(ranked, 15 * torch.tanh(told), atol=1e-4) and margin.std() > 0.01
    with pytest.raises(VDMError, match="how sure"):
        diffmask.explain(pictures, check=False, stop_early=True)


def test_gates_without_ranks_leave_the_order_to_those_that_see_them(base, pictures):
    """Of kept patches the least certain vote decides which comes first: gates that have learned a little, but see no ranks, must
    not have it."""
    sharp = {"mul_activation": 60.0, "add_activation": 30.0}
    diffmask = VisionDiffMask.for_classifier(base, zero_start=True, herding_layer=2, num_gates=3, **sharp)
    with torch.no_grad():
        for gate in diffmask.gates[:2]:
            gate.outer.weight.normal_(std=0.02)
        ranked = diffmask.votes(diffmask.view.encode(pictures)).log_alpha[:, 2]
    order = diffmask.explain(pictures, check=False).scores.flatten(1)
    for scores, vote in zip(order, ranked):
        kept = vote > 2
        assert kept.sum() > 3 and torch.equal(scores[kept].argsort(), vote[kept].argsort())


def test_the_base_moves_along_to_another_precision(base, pictures):
    diffmask = VisionDiffMask.for_classifier(copy.deepcopy(base), **GATES)
    expected = diffmask.explain(pictures).kl
    diffmask.double()
    assert next(diffmask.base.parameters()).dtype == torch.float64
    assert torch.allclose(diffmask.explain(pictures.double()).kl.float(), expected, atol=1e-5)


def test_under_autocast_gates_are_drawn_in_full_precision(base, pictures):
    """In bfloat16 the noise would end at ±4.8, and a gate that starts at 8, as the reference's do, would never drop a patch."""
    diffmask = VisionDiffMask.for_classifier(base, add_activation=8.0, zero_start=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = diffmask.view.encode(pictures)
        drawn = diffmask.votes(states).rsample((2000,))
    assert states.logits.dtype == torch.bfloat16 and drawn.dtype == torch.float32
    dropped = (drawn == 0).float().mean().item()
    assert 1e-4 < dropped < 5e-4  # 1 − P(z ≠ 0) = 2.4e-4


def test_a_loaded_diffmask_goes_where_its_base_is(base, diffmask, tmp_path, monkeypatch):
    """`meta` stands in for a GPU; weights there have no values, so the fingerprint is left out."""
    diffmask.save_pretrained(tmp_path)
    mark = fingerprint(base)
    monkeypatch.setattr("vdm_utils.diffmask.fingerprint", lambda model: mark)
    loaded = VisionDiffMask.from_pretrained(tmp_path, base=copy.deepcopy(base).to("meta"))
    assert loaded.device.type == loaded.base.device.type == "meta"


def test_a_base_is_found_through_links_and_from_other_folders(base, tmp_path, monkeypatch):
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "runs").symlink_to(tmp_path / "disk" / "runs")
    base.save_pretrained(tmp_path / "work" / "base")
    monkeypatch.chdir(tmp_path / "work")
    diffmask = VisionDiffMask.for_classifier(load_classifier("base"))
    diffmask.save_pretrained("runs/mask")
    assert fingerprint(VisionDiffMask.from_pretrained("runs/mask").base) == fingerprint(base)
    monkeypatch.chdir(tmp_path)  # and a relative name means nothing any more
    diffmask.save_pretrained("elsewhere")
    assert fingerprint(VisionDiffMask.from_pretrained("elsewhere").base) == fingerprint(base)


def test_a_base_that_was_never_saved_is_saved_as_it_is_now(tmp_path):
    diffmask = VisionDiffMask.for_classifier(build_classifier(image_size=12, patch_size=4)).to(torch.bfloat16)
    diffmask.save_pretrained(tmp_path)
    assert VisionDiffMask.from_pretrained(tmp_path).base.dtype == torch.bfloat16


def test_a_search_starts_from_what_the_gates_say(base, pictures):
    """With steps of no length the searches of `refine` end where they began: at the gates."""
    diffmask = VisionDiffMask.for_classifier(base, add_activation=2.2, mul_activation=0.3, normalize=True)
    before = diffmask.explain(pictures, check=False).mask
    refined = refine(diffmask, pictures, steps=1, searches=1, lr=1e-9, eps=1e3)
    assert 0.4 < before.min() < before.max() < 0.75  # where nothing is drawn towards the middle
    assert torch.allclose(refined.scores.exp(), before, atol=1e-4)


def test_kl_of_a_half_precision_base_is_in_full_precision(base, pictures):
    half = copy.deepcopy(base).bfloat16()
    shown = VisionDiffMask.for_classifier(half, add_activation=0.0, mul_activation=3.0).explain(pictures.bfloat16())
    assert shown.masked_logits.dtype == torch.bfloat16 and shown.kl.dtype == torch.float32


def test_a_new_diffmask_is_where_its_base_is(base, monkeypatch):
    monkeypatch.setattr("vdm_utils.diffmask.fingerprint", lambda model: "mark")
    assert VisionDiffMask.for_classifier(copy.deepcopy(base).to("meta")).device.type == "meta"
