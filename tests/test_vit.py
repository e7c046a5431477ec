"""A model's patch embeddings are seen and replaced, whatever the architecture, and the model never notices."""

import copy
import json
import logging

import pytest
import torch
from conftest import randomize
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.errors import VDMError
from vdm_utils.vit import (
    CONVNEXT_SIZES,
    VIT_SIZES,
    PatchView,
    build_classifier,
    fingerprint,
    load_classifier,
    mimetic_start,
    with_image_size,
)

LAYERS, WIDTH = 3, 32
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
SQUARE = SMALL | {"image_size": 32, "patch_size": 8, "num_labels": 5}
TEXT = SMALL | {"vocab_size": 50, "num_hidden_layers": 2}
VIEWS = {  # name: (model, grid)
    "ViT": (lambda: ViTForImageClassification(ViTConfig(**SQUARE)), (4, 4)),
    "DeiT": (lambda: DeiTForImageClassification(DeiTConfig(**SQUARE)), (4, 4)),
    "DeiT with teacher": (lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SQUARE)), (4, 4)),
    "DINOv2": (lambda: Dinov2ForImageClassification(Dinov2Config(**SQUARE)), (4, 4)),
    "DINOv2 with registers": (
        lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**SQUARE, num_register_tokens=4)),
        (4, 4),
    ),
    "BEiT": (lambda: BeitForImageClassification(BeitConfig(**SQUARE)), (4, 4)),
    "SigLIP": (
        lambda: SiglipForImageClassification(SiglipConfig(vision_config=SQUARE, text_config=TEXT, num_labels=5)),
        (4, 4),
    ),
    "wide picture": (lambda: wide(patch_size=8), (4, 6)),
    "tall patches": (lambda: wide(patch_size=(16, 8)), (2, 6)),
}


def wide(patch_size):
    config = SQUARE | {"image_size": (32, 48), "patch_size": patch_size}
    return ViTForImageClassification(ViTConfig(**config))


@pytest.fixture(scope="module", params=VIEWS)
def case(request):
    """(model, pixel values of two pictures, grid)"""
    make, grid = VIEWS[request.param]
    model = randomize(make(), std=0.2).eval()
    view = PatchView(model)
    return model, torch.randn(2, 3, *view.image_size), grid


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def state_of(model):
    """All that a caller could notice: mode, requires_grad, hooks and gradients of every part, and the weights."""
    parts = [(m.training, [(p.requires_grad, p.grad is None) for p in m.parameters(False)]) for m in model.modules()]
    return parts, hooks(model), fingerprint(model)


# ---------------------------------------------------------------- seeing


def test_states_are_those_of_the_model(case):
    model, pixel_values, grid = case
    with torch.no_grad():
        plain = model(pixel_values, output_hidden_states=True)
    states = PatchView(model).encode(pixel_values.clone().requires_grad_())
    count = grid[0] * grid[1]
    assert states.grid == grid and PatchView(model).num_states == len(states.hidden) == LAYERS + 2
    assert all(hidden.shape == (2, count, WIDTH) for hidden in states.hidden)
    assert torch.equal(states.logits, plain.logits)
    assert states.hidden[0] is states.embeddings and not any(state.requires_grad for state in states.hidden)
    own = [hidden[:, hidden.shape[1] - count :] for hidden in plain.hidden_states]  # prefix tokens come first
    assert len(own) == LAYERS + 1  # the input of every layer and the output of the last
    for ours, theirs in zip(states.hidden[1:], own, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_row_n_of_the_states_is_patch_n_in_reading_order(case):
    model, pixel_values, (rows, cols) = case
    view, count = PatchView(model), rows * cols
    height, width = view.image_size[0] // rows, view.image_size[1] // cols
    before = view.encode(pixel_values[:1])
    for patch in (0, cols - 1, cols, count - 1):
        row, col = divmod(patch, cols)
        changed = pixel_values[:1].clone()
        changed[..., row * height : (row + 1) * height, col * width : (col + 1) * width] += 1
        after = view.encode(changed)
        for k in (0, 1):  # before attention mixes them, only this patch can differ
            differs = (after.hidden[k] - before.hidden[k]).abs().amax((0, 2)) > 1e-6
            assert differs.nonzero().flatten().tolist() == [patch]


# ---------------------------------------------------------------- replacing


def test_replaced_embeddings_are_all_the_model_sees(case):
    model, pixel_values, _ = case
    view, other = PatchView(model), torch.randn_like(pixel_values)
    states, of_other = view.encode(pixel_values), view.encode(other)
    with torch.no_grad():
        assert torch.equal(view.logits(pixel_values, states.embeddings), states.logits)
        assert torch.equal(view.logits(pixel_values, of_other.embeddings), of_other.logits)
    assert not torch.allclose(of_other.logits, states.logits, atol=1e-3)


def test_gradient_reaches_every_patch_and_no_weight(case):
    model, pixel_values, _ = case
    view = PatchView(model)
    embeddings = view.encode(pixel_values).embeddings.requires_grad_()
    view.logits(pixel_values, embeddings).log_softmax(-1)[:, 0].sum().backward()
    assert (embeddings.grad.abs().amax(-1) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    step = torch.zeros_like(embeddings)
    step[1, 3] = 1e-3 * embeddings.grad[1, 3] / embeddings.grad[1, 3].norm()
    with torch.no_grad():
        plus, minus = (view.logits(pixel_values, embeddings + s).log_softmax(-1)[:, 0] for s in (step, -step))
    slope = embeddings.grad[1, 3].norm().item()
    assert (plus - minus)[1].item() / 2e-3 == pytest.approx(slope, rel=0.05, abs=1e-3)
    assert (plus - minus)[0] == 0  # a picture's patches move nothing in another picture


# ---------------------------------------------------------------- leaving no trace


def test_the_model_comes_out_as_it_went_in(case):
    model, pixel_values, _ = case
    model = copy.deepcopy(model)
    model.train()
    next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)).eval()  # a mixture has to survive too
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    before = state_of(model)
    diffmask = VisionDiffMask.for_classifier(model)
    states = diffmask.view.encode(pixel_values)
    diffmask.view.logits(pixel_values, states.embeddings)
    shown = diffmask.explain(pixel_values)
    assert shown.mask.shape == (2, *states.grid)
    diffmask(pixel_values, layer=2).loss.backward()
    assert state_of(model) == before


@pytest.mark.parametrize("job", ["encode", "logits"])
def test_nothing_is_left_behind_by_an_exception(base, pictures, monkeypatch, job):
    model = copy.deepcopy(base).train()
    view, before = PatchView(model), state_of(model)
    embeddings = view.encode(pictures).embeddings
    monkeypatch.setattr(view.layers[-1], "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        view.encode(pictures) if job == "encode" else view.logits(pictures, embeddings)
    assert state_of(model) == before


def test_dropout_is_off_whatever_the_mode():
    config = ViTConfig(**SQUARE, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model, pixel_values = randomize(ViTForImageClassification(config)).train(), torch.randn(2, 3, 32, 32)
    view = PatchView(model)
    states = view.encode(pixel_values)
    assert torch.equal(states.logits, view.encode(pixel_values).logits)
    assert torch.equal(states.logits, view.logits(pixel_values, states.embeddings))
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        "ViT",
        "BEiT",
        "SigLIP",
    ],
)
def test_half_precision(name, dtype):
    model, pixel_values = randomize(VIEWS[name][0](), std=0.1).eval().to(dtype), torch.randn(2, 3, 32, 32)
    view = PatchView(model)
    states = view.encode(pixel_values.to(dtype))
    with torch.no_grad():
        assert torch.equal(states.logits, model(pixel_values.to(dtype)).logits) and states.logits.dtype == dtype
        # gates and placeholder are float32: what they blend has to be taken as well
        assert torch.equal(view.logits(pixel_values.to(dtype), states.embeddings.float()), states.logits)


@pytest.mark.parametrize(
    "make",
    [
        lambda: build_classifier("convnext", "tiny", 32, 4),
        lambda: SwinForImageClassification(
            SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        lambda: torch.nn.Linear(2, 2),
    ],
    ids=["ConvNeXt", "Swin", "not of transformers"],
)
def test_models_without_one_patch_grid_are_refused(make):
    with pytest.raises(VDMError, match="not a vision transformer with one patch grid"):
        PatchView(make())


# ---------------------------------------------------------------- fingerprints, building and loading


def test_fingerprint_sees_every_bit(base):
    marks = {fingerprint(base), fingerprint(copy.deepcopy(base).bfloat16())}
    for name in ("vit.embeddings.cls_token", "vit.layers.3.mlp.fc2.bias", "classifier.weight"):
        changed = copy.deepcopy(base)
        weight = changed.get_parameter(name).data.view(torch.int32)
        weight.view(-1)[-1] ^= 1  # the lowest bit of the last number
        marks.add(fingerprint(changed))
    weight = torch.randn(2, 6)
    others = [torch.nn.ParameterDict(named) for named in ({"a": weight}, {"b": weight}, {"a": weight.view(3, 4)})]
    assert len(marks) == 5 and len({fingerprint(model) for model in others}) == 3  # names and shapes count as well
    assert fingerprint(copy.deepcopy(base).train()) == fingerprint(base)
    assert all(len(mark) == 64 for mark in marks)


def test_a_saved_classifier_comes_back(base, pictures, tmp_path, caplog):
    base.save_pretrained(tmp_path)
    loaded = load_classifier(tmp_path)
    assert fingerprint(loaded) == fingerprint(base) and loaded.config.id2label == base.config.id2label
    assert torch.equal(loaded(pictures).logits, base(pictures).logits) and not loaded.training
    with caplog.at_level(logging.WARNING):
        assert load_classifier(tmp_path, num_labels=10).num_labels == 10 and not caplog.records
        other = load_classifier(tmp_path, num_labels=4)
    assert "new head" in caplog.text
    assert other(pictures).logits.shape == (8, 4)
    kept = {name: weight for name, weight in base.state_dict().items() if not name.startswith("classifier")}
    assert all(torch.equal(other.state_dict()[name], weight) for name, weight in kept.items())


@pytest.mark.parametrize(("wanted", "told"), [
    ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}, []), ({"image_mean": 0.5}, []), ({}, []),
    ({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.5] * 3}, ["image_mean"]),
    ({"image_mean": 0, "image_std": 1}, ["image_mean", "image_std"]),
    ({"image_mean": [0.0] * 3, "image_std": [0.5, 0.5, 1]}, ["image_mean", "image_std"]),
])  # fmt: skip
def test_a_model_that_wants_other_numbers_says_so(base, tmp_path, caplog, wanted, told):
    base.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(wanted))
    with caplog.at_level(logging.WARNING):
        load_classifier(tmp_path)
    assert [record.getMessage().split("with ")[1].split()[0] for record in caplog.records] == told


def test_build_classifier_builds_what_was_asked_for():
    names = {0: "cat", 1: "dog", 2: "cow"}
    model = build_classifier("ViT", "tiny", (24, 32), (8, 4), num_channels=1, num_labels=99, id2label=names)
    assert model(torch.zeros(2, 1, 24, 32)).logits.shape == (2, 3) and model.config.label2id["cow"] == 2
    assert PatchView(model).grid == (3, 8)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == VIT_SIZES["tiny"][:2] == (64, 4)
    assert VIT_SIZES["base"] == (768, 12, 12, 3072) and CONVNEXT_SIZES["base"][0] == (96, 192, 384, 768)
    convnext = build_classifier("convnext", "tiny", 32, 4, num_channels=1, num_labels=7)
    assert convnext(torch.zeros(2, 1, 32, 32)).logits.shape == (2, 7)


def test_mimetic_start_is_that_of_the_paper():
    model = build_classifier(image_size=(12, 20), patch_size=4)
    width, heads = 64, 4
    size, identity = width // heads, torch.eye(width)
    before = model.vit.embeddings.position_embeddings[0, 0].clone()
    torch.manual_seed(3)
    mimetic_start(model)
    torch.manual_seed(3)
    for layer in model.vit.layers:
        attention = layer.attention
        for head in range(heads):
            target = 0.7 * (torch.randn(width, width) / 8 + identity)
            left, scale, right = torch.linalg.svd(target)
            best = left[:, :size] @ scale[:size].diag() @ right[:size]  # Eckart–Young
            rows = slice(head * size, (head + 1) * size)
            ours = attention.q_proj.weight[rows].T @ attention.k_proj.weight[rows]
            assert torch.allclose(ours, best, atol=1e-4)
        mixed = attention.v_proj.weight.T @ attention.o_proj.weight.T  # what a row vector goes through
        assert torch.allclose(mixed, 0.4 * (torch.randn(width, width) / 8 - identity), atol=1e-4)
    positions = model.vit.embeddings.position_embeddings[0]
    grid = positions[1:].view(3, 5, width)
    assert torch.equal(positions[0], before)
    assert torch.equal(grid[..., :32], grid[:, :1, :32].expand(3, 5, 32))  # half of it says which row …
    assert torch.equal(grid[..., 32:], grid[:1, :, 32:].expand(3, 5, 32))  # … half which column
    assert len(grid.flatten(0, 1).unique(dim=0)) == 15
    angle = torch.arange(3)[:, None] * 10_000 ** -(torch.arange(16) / 16)
    assert torch.allclose(grid[:, 0, :32], torch.cat([angle.sin(), angle.cos()], 1), atol=1e-6)


def test_mimetic_start_can_be_trained(toy):
    model = build_classifier(image_size=12, patch_size=4, id2label=toy.id2label)
    mimetic_start(model)
    batch, optimizer = toy.batch(range(96)), torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        losses.append(model(batch["pixel_values"], labels=batch["labels"]).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# ---------------------------------------------------------------- another image size


def test_positions_are_stretched_over_the_new_grid():
    model = randomize(build_classifier(image_size=12, patch_size=4))
    larger = with_image_size(model, (12, 24))
    old, new = model.vit.embeddings.position_embeddings[0], larger.vit.embeddings.position_embeddings[0]
    assert larger.config.image_size == [12, 24] and PatchView(larger).grid == (3, 6) and new.shape == (19, 64)
    assert torch.equal(new[0], old[0])  # [CLS] has no place
    plane = new[1:].view(3, 6, 64)
    pairs = (plane[:, 0::2] + plane[:, 1::2]) / 2  # both columns that stand where one stood
    assert torch.corrcoef(torch.stack([pairs.flatten(), old[1:].flatten()]))[0, 1] > 0.98
    same, pictures = with_image_size(model, 12), torch.randn(2, 3, 12, 12)
    assert torch.allclose(same(pictures).logits, model(pictures).logits, atol=1e-5)
    assert larger(torch.randn(2, 3, 12, 24)).logits.shape == (2, 10) and model.config.image_size == 12


def test_positions_are_repeated_in_the_cells_of_a_grid():
    model = randomize(build_classifier(image_size=12, patch_size=4))
    larger = with_image_size(model, 24, cells=2)
    old, new = model.vit.embeddings.position_embeddings[0], larger.vit.embeddings.position_embeddings[0]
    assert torch.equal(new[0], old[0])
    cells = new[1:].view(2, 3, 2, 3, 64).transpose(1, 2)  # [2, 2, 3, 3, d]
    offset = cells - old[1:].view(3, 3, 64)
    assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-6), "one offset for a whole cell"
    first, *others = offset[:, :, 0, 0].flatten(0, 1)
    assert 0.015 < first.std() < 0.025 and all((first - other).abs().max() > 0.01 for other in others)
    # of another size it is stretched as ever
    plain = with_image_size(model, 16, cells=2).vit.embeddings.position_embeddings
    assert torch.equal(plain, with_image_size(model, 16).vit.embeddings.position_embeddings)


def test_a_classifier_of_another_size_is_ready_and_of_the_same_precision():
    larger = with_image_size(build_classifier(image_size=12, patch_size=4).to(torch.bfloat16), 24)
    assert not larger.training and larger.dtype == torch.bfloat16
