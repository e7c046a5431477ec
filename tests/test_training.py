"""Both training jobs: each player gets its own step, and the base is left alone."""

import copy
import dataclasses
import inspect
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import same
from safetensors.torch import load_file
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from vdm_utils import training
from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask, VisionDiffMaskConfig
from vdm_utils.errors import VDMError
from vdm_utils.training import (
    RECIPES,
    ClassifierSettings,
    DiffMaskSettings,
    DiffMaskTrainer,
    dropped_patches,
    evaluate_classifier,
    evaluate_diffmask,
    masked_patches,
    settings,
    train_classifier,
    train_diffmask,
)
from vdm_utils.vit import build_classifier, fingerprint

# ---------------------------------------------------------------- the DiffMask


class Recorder(TrainerCallback):
    """What the optimizer is about to do at every step."""

    def __init__(self):
        self.rates, self.alpha, self.clipping = [], [], None

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.alpha.append(model.multiplier.value.clone())
        self.clipping = args.max_grad_norm


def run_diffmask(base, toy, folder, resume=None, **changes):
    """12 short steps; (DiffMask, its metrics, what was recorded)."""
    options = {"max_steps": 12, "log_every_n_steps": 6, "batch_size": 16, "kl_quantile": 0.0, "add_activation": 0.0}
    chosen = settings(DiffMaskSettings, "quick", **options | changes)
    torch.manual_seed(0)
    diffmask, recorder = VisionDiffMask.for_classifier(base, **chosen.config()), Recorder()
    return diffmask, train_diffmask(diffmask, toy, toy, chosen, folder, resume, (recorder,)), recorder


@pytest.mark.parametrize("log_multiplier", [True, False])
@pytest.mark.parametrize(("eps", "rises"), [(1e-5, True), (50.0, False)])
def test_multipliers_rise_while_the_constraint_is_broken(base, toy, tmp_path, eps, rises, log_multiplier):
    diffmask, _, recorder = run_diffmask(base, toy, tmp_path, eps=eps, log_multiplier=log_multiplier, lr_alpha=0.3)
    moved = diffmask.multiplier.value - recorder.alpha[0]
    moved = moved[moved != 0]  # of the layers that were drawn
    assert len(moved) > 2 and ((moved > 0) == rises).all()
    table = pd.read_csv(tmp_path / "metrics.csv").dropna(subset=["loss"])
    assert table["alpha_mean"].is_monotonic_increasing if rises else table["alpha_mean"].is_monotonic_decreasing


@pytest.mark.parametrize(("eps", "bound"), [(1e-5, 12.0), (50.0, 8.0)])
def test_multipliers_stop_at_their_bounds(base, toy, tmp_path, eps, bound):
    changes = {"alpha_min": 8.0, "alpha": 10.0, "alpha_max": 12.0, "lr_alpha": 5.0, "max_steps": 24}
    diffmask, _, recorder = run_diffmask(base, toy, tmp_path, eps=eps, **changes)
    assert set(diffmask.multiplier.value.round(decimals=3).tolist()) | {10.0} == {10.0, bound}  # 10: never drawn
    assert all(alpha.min() >= 8 - 1e-4 and alpha.max() <= 12 + 1e-4 for alpha in recorder.alpha)  # after every step


def test_training_leaves_the_base_as_it_was(base, toy, tmp_path):
    model = copy.deepcopy(base).train()
    model.classifier.weight.requires_grad_(False)
    before = fingerprint(model), [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    diffmask, metrics, _ = run_diffmask(model, toy, tmp_path)
    after = fingerprint(model), [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    assert after == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert metrics["eval_kl"] == pytest.approx(evaluate_diffmask(diffmask, toy)["kl"])
    loaded = VisionDiffMask.from_pretrained(tmp_path)  # the base that was never saved is inside
    pictures = toy.batch(range(8))["pixel_values"]
    assert torch.equal(loaded.explain(pictures).kl, diffmask.explain(pictures).kl)
    assert fingerprint(loaded.base) == before[0] and not diffmask.training


def test_only_the_gates_warm_up(base, toy, tmp_path):
    changes = {"lr_decay": 0.0, "gate_warmup_steps": 10, "lr": 1e-2, "lr_placeholder": 2e-2, "lr_alpha": 0.5}
    _, _, recorder = run_diffmask(base, toy, tmp_path, **changes)
    gates, placeholder, alpha = zip(*recorder.rates)
    assert gates == pytest.approx([min(1, n / 10) * 1e-2 for n in range(1, 13)])
    assert set(placeholder) == {2e-2} and set(alpha) == {0.5} and recorder.clipping == 0


def test_gates_and_placeholder_slow_down_to_a_stop(base, toy, tmp_path):
    changes = {"lr_decay": 0.5, "gate_warmup_steps": 0, "lr": 1e-2, "lr_placeholder": 2e-2, "lr_alpha": 0.5}
    _, _, recorder = run_diffmask(base, toy, tmp_path, **changes)
    gates, placeholder, alpha = zip(*recorder.rates)
    slower = [min(1, (12 - n) / 6) for n in range(12)]  # of 12 steps the last 6
    assert gates == pytest.approx([1e-2 * factor for factor in slower]) and set(alpha) == {0.5}
    assert placeholder == pytest.approx([2e-2 * factor for factor in slower])


@pytest.mark.parametrize("no_placeholder", [False, True])
def test_optimizer_groups(base, no_placeholder):
    chosen = settings(DiffMaskSettings, no_placeholder=no_placeholder, adam_beta2=0.9)
    diffmask = VisionDiffMask.for_classifier(base, **chosen.config())
    groups = DiffMaskTrainer.make_optimizer(diffmask, chosen).param_groups
    assert [group["lr"] for group in groups] == [2e-5, *([] if no_placeholder else [1e-3]), 0.3]
    assert [group["maximize"] for group in groups] == [False] * (len(groups) - 1) + [True]
    assert all(group["betas"] == (0.9, 0.9) and group["weight_decay"] == 0 for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(list(diffmask.parameters()))  # nobody left out


def test_cost_of_a_step(base, toy, tmp_path, monkeypatch):
    passes, backward, forward = [], torch.Tensor.backward, base.forward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: passes.append("backward") or backward(*a, **k))
    monkeypatch.setattr(base, "forward", lambda *a, **k: passes.append("forward") or forward(*a, **k))
    run_diffmask(base, toy, tmp_path, max_steps=3, log_every_n_steps=50)
    # per step one pass on the whole images, one on the masked and one back, for both players; 2 for each evaluation
    assert passes == ["forward", "forward", "backward"] * 3 + ["forward"] * passes[9:].count("forward")
    assert len(passes[9:]) in (2, 4)


@pytest.mark.parametrize("weighted", [True, False])
def test_settled_layers_are_drawn_ten_times_less_often(base, tmp_path, weighted):
    diffmask = VisionDiffMask.for_classifier(base)
    chosen = settings(DiffMaskSettings, weighted_layer_distribution=weighted)
    trainer = DiffMaskTrainer(diffmask, TrainingArguments(str(tmp_path), report_to="none"), chosen)
    accuracy, l0 = [0.9, 0.9, 0.7, 0.0, 1.0, 0.5], [0.05, 0.2, 0.05, 1.0, 0.01, 0.5]
    diffmask.running.copy_(torch.tensor([accuracy, l0]))
    torch.manual_seed(0)
    share = torch.tensor([trainer.draw_layer() for _ in range(6000)]).bincount(minlength=6) / 6000
    expected = torch.tensor([0.1, 1, 1, 1, 0.1, 1] if weighted else [1.0] * 6)  # accurate *and* sparse
    assert torch.allclose(share, expected / expected.sum(), atol=0.02)


def test_steps_can_be_spent_on_the_last_gate(base, tmp_path):
    diffmask = VisionDiffMask.for_classifier(base)
    chosen = settings(DiffMaskSettings, last_layer_share=0.4)
    trainer = DiffMaskTrainer(diffmask, TrainingArguments(str(tmp_path), report_to="none"), chosen)
    torch.manual_seed(0)
    share = torch.tensor([trainer.draw_layer() for _ in range(6000)]).bincount(minlength=6) / 6000
    assert torch.allclose(share, torch.tensor([0.1] * 5 + [0.5]), atol=0.02)


@pytest.mark.parametrize(("options", "side"), [({}, 2), ({"block_size": 3}, 3)])
def test_squares_of_patches_share_a_gate_in_the_first_steps(base, toy, tmp_path, monkeypatch, options, side):
    seen, forward = [], VisionDiffMask.forward
    monkeypatch.setattr(VisionDiffMask, "forward", lambda *a, **k: seen.append(k["block"]) or forward(*a, **k))
    run_diffmask(base, toy, tmp_path, max_steps=10, log_every_n_steps=50, block_share=0.4, **options)
    assert seen == [side] * 4 + [1] * 6


def test_running_averages_follow_the_layer_that_was_drawn(base, toy, tmp_path, monkeypatch):
    diffmask = VisionDiffMask.for_classifier(base, add_activation=0.0, mul_activation=3.0)
    assert diffmask.running.tolist() == [[0.0] * 6, [1.0] * 6]  # nothing is settled before it was seen
    trainer = DiffMaskTrainer(diffmask, TrainingArguments(str(tmp_path), report_to="none"), settings(DiffMaskSettings))
    monkeypatch.setattr(trainer, "draw_layer", lambda: 4)
    _, output = trainer.compute_loss(diffmask, toy.batch(range(16)), return_outputs=True)
    seen = torch.stack([output.unchanged.mean(), output.l0.mean()])
    assert torch.allclose(diffmask.running[:, 4], torch.tensor([0.0, 0.9]) + 0.1 * seen)
    assert diffmask.running[:, [0, 1, 2, 3, 5]].unique().tolist() == [0, 1]


def test_metrics_file(diffmask_run, base_run):
    table = pd.read_csv(diffmask_run / "metrics.csv")
    columns = "step epoch loss learning_rate train_kl train_l0 alpha_mean alpha_last eval_kl eval_feasible eval_unchanged eval_kept"
    assert set(columns.split()) <= set(table)
    assert table.dropna(subset=["loss"])["step"].tolist() == [4, 8, 12]
    assert table.dropna(subset=["eval_kl"])["step"].tolist() == [4, 8, 12, 12]
    assert table["eval_kl"].notna().any() and table["train_l0"].max() <= 1
    assert {"step", "loss", "eval_accuracy", "eval_loss"} <= set(pd.read_csv(base_run / "metrics.csv"))


def test_evaluation_by_hand(base, diffmask, toy):
    batch = toy.batch(range(96))
    shown = diffmask.explain(batch["pixel_values"])
    expected = {
        "kl": shown.kl,
        "feasible": shown.kl <= diffmask.config.eps,
        "unchanged": shown.masked_logits.argmax(-1) == shown.logits.argmax(-1),
        "kept": shown.mask,
    }
    expected = {name: value.float().mean().item() for name, value in expected.items()}
    assert 0.1 < expected["feasible"] < 0.9 and 0.1 < expected["unchanged"] < 1
    for batch_size in (96, 7):
        assert evaluate_diffmask(diffmask, toy, batch_size) == pytest.approx(expected, rel=1e-3)
    probability = shown.logits.softmax(-1)
    accuracy = (probability.argmax(-1) == batch["labels"]).float().mean().item()
    confidence = probability.amax(-1).mean().item()
    assert evaluate_classifier(base, toy, 7) == pytest.approx({"accuracy": accuracy, "confidence": confidence})


# ---------------------------------------------------------------- the classifier


def run_classifier(toy, folder, resume=None, data=None, **changes):
    options = {"max_steps": 4, "log_every_n_steps": 2, "batch_size": 16, "warmup_steps": 0}
    chosen = settings(ClassifierSettings, "quick", **options | changes)
    torch.manual_seed(0)
    model = build_classifier(image_size=12, patch_size=4, id2label=toy.id2label)
    return model, train_classifier(model, data or toy, toy, chosen, folder, resume)


def test_classifier_learns(toy, tmp_path):
    data = load_data("toy", "train", image_size=12, length=96)
    model, metrics = run_classifier(toy, tmp_path, data=data, max_steps=30, log_every_n_steps=10, lr=3e-3)
    table = pd.read_csv(tmp_path / "metrics.csv")
    losses = table["eval_loss"].dropna().tolist()
    assert losses[-1] < losses[0] and metrics["eval_loss"] == losses[-1]
    assert evaluate_classifier(model, toy)["accuracy"] == pytest.approx(metrics["eval_accuracy"])
    assert data.epoch == 4  # the Trainer told the data: 6 steps per epoch, so augmentation differs each time
    assert model.name_or_path == str(tmp_path) and not model.training


@pytest.mark.parametrize(
    ("scores", "best", "last"),
    [
        ([0.1, 0.9, 0.3, 0.2, 0.9], 2, 4),  # two evaluations without a better one are enough
        ([0.5, 0.5 + 4e-6, 0.5 + 8e-6, 0.6, 0.7], 3, 3),  # nor does a trace of the loss count as progress
        ([0.1, 0.2, 0.1, 0.3, 0.2], 4, 5),
    ],
)
def test_the_best_weights_are_kept_and_training_stops_in_time(toy, tmp_path, monkeypatch, scores, best, last):
    given = iter([*scores[:last], 0.0])  # the last for the final evaluation
    monkeypatch.setattr(training, "_accuracy_and_score", lambda prediction: {"accuracy": 0.0, "score": next(given)})
    run_classifier(toy, tmp_path, lr=1e-2, max_steps=5, log_every_n_steps=1, patience=2)
    assert pd.read_csv(tmp_path / "metrics.csv")["step"].max() == last
    kept, others = load_file(tmp_path / "model.safetensors"), tmp_path.glob("checkpoint-*")
    equal = {path.name: same(kept, load_file(path / "model.safetensors")) for path in others}
    assert equal.pop(f"checkpoint-{best}") and not any(equal.values())


def test_of_equally_accurate_weights_the_surest_are_best():
    labels = np.arange(300) % 3

    def score(sureness, wrong=0):
        logits = sureness * np.eye(3)[labels]
        logits[:wrong] *= -0.01
        return training._accuracy_and_score(EvalPrediction(logits, labels))["score"]

    assert score(9.0) > score(1.0) > score(0.01) > score(9.0, wrong=1) > score(9.0, wrong=2)


def test_seed_decides_the_order_of_the_data(toy, tmp_path):
    first, same_seed, other = (
        run_classifier(toy, tmp_path / name, seed=seed)[0] for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert fingerprint(first) == fingerprint(same_seed) != fingerprint(other)  # all three started from the same weights


def test_a_resumed_run_augments_as_the_uninterrupted_one(toy, tmp_path):
    data = load_data("toy", "train", image_size=12, length=80, augment=["noise"])  # 5 steps per epoch
    changes = {"data": data, "max_steps": 12, "log_every_n_steps": 4, "lr": 1e-2}
    run_classifier(toy, tmp_path / "whole", **changes)
    run_classifier(toy, tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-8"), **changes)
    first, second = (tmp_path / name / "checkpoint-12" / "model.safetensors" for name in ("whole", "resumed"))
    assert same(load_file(first), load_file(second))


@pytest.mark.parametrize(
    ("optimizer", "schedule", "warmup", "expected"),
    [
        ("AdamW", "constant", 0, [1, 1, 1, 1]),
        ("AdamW", "constant", 2, [0.0, 0.5, 1, 1]),
        ("AdamW", "linear", 0, [1, 0.75, 0.5, 0.25]),
        ("AdamW", "cosine", 2, [0.0, 0.5, 1, 0.5]),
        ("RAdam", "constant", 0, [1, 1, 1, 1]),
    ],
)
def test_learning_rate_of_the_classifier(toy, tmp_path, optimizer, schedule, warmup, expected):
    changes = {"optimizer": optimizer, "lr_schedule": schedule, "warmup_steps": warmup, "log_every_n_steps": 1}
    run_classifier(toy, tmp_path, lr=0.01, **changes)
    rates = pd.read_csv(tmp_path / "metrics.csv")["learning_rate"].dropna().tolist()
    assert rates == pytest.approx([0.01 * share for share in expected])


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, 4), (0.3, 6), (0.999, 1)])
def test_dropped_patches_are_left_out_while_training(base, pictures, fraction, kept):
    model, seen = copy.deepcopy(base), []
    layer = model.vit.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    whole = model.vit.embeddings(pictures)
    with pytest.raises(ZeroDivisionError), dropped_patches(model, fraction):
        model.train()(pictures), model(pictures), model.eval()(pictures)
        raise ZeroDivisionError
    model.train()(pictures)
    assert [tokens.shape[1] for tokens in seen] == [
        1 + kept,
        1 + kept,
        10,
        10,
    ]  # evaluation is whole, so is what follows
    first, second = seen[:2]
    assert torch.equal(first[:, 0], whole[:, 0]) and not torch.equal(first, second)  # [CLS] stays; drawn anew
    sources = (first[:, 1:, None] == whole[:, None, 1:]).all(-1)  # [B, kept, N]
    assert (sources.sum(2) == 1).all() and (sources.sum(1) <= 1).all()  # each of them one patch, with its position
    assert len({tuple(row.nonzero()[:, 1].tolist()) for row in sources}) > 1  # others in every picture


def test_masked_patches_are_blank_while_training(base, pictures):
    model, seen = copy.deepcopy(base), []
    projection = model.vit.embeddings.patch_embeddings
    whole = projection(pictures)
    with pytest.raises(ZeroDivisionError), masked_patches(model, 0.8):
        # registered last, so that it sees what the model gets
        handle = projection.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
        model.train()(pictures.repeat(200, 1, 1, 1)), model.eval()(pictures)
        raise ZeroDivisionError
    model.train()(pictures)
    handle.remove()
    many, *others = seen
    assert all(torch.equal(one, whole) for one in others)  # evaluation is whole, so is what follows
    blank = (many == 0).all(-1)  # [1600, N]
    assert torch.equal(many[~blank], whole.repeat(200, 1, 1)[~blank])
    share = blank.float().mean(1)  # uniform on 0..0.8 per picture, then rounded up to ninths
    assert abs(share.mean() - (0.4 + 0.5 / 9)) < 0.02 and abs(share.var() - 0.8**2 / 12) < 0.01
    assert len(blank.unique(dim=0)) > 50


def test_masked_patches_are_specks_and_regions():
    """Two patches side by side go together more often than two that are far apart, and how often depends on the draw."""
    model = build_classifier(image_size=32, patch_size=4).train()
    projection, together = model.vit.embeddings.patch_embeddings, set()
    with masked_patches(model, 1.0):
        for _ in range(20):
            blank = (projection(torch.randn(500, 3, 32, 32)) == 0).all(-1).float().view(-1, 8, 8)
            beside = (blank[:, :, 1:] == blank[:, :, :-1]).float().mean() - (blank[:, 0] == blank[:, -1]).float().mean()
            together.add(round(beside.item(), 1))
    assert 0.0 in together and max(together) >= 0.2 and len(together) >= 3


@pytest.mark.parametrize("option", ["patch_dropout", "patch_masking"])
def test_a_run_with_missing_patches_leaves_no_hook(toy, tmp_path, option):
    model, _ = run_classifier(toy, tmp_path, **{option: 0.5})
    assert not any(module._forward_hooks for module in model.modules())
    with dropped_patches(model, 0.0), masked_patches(model, 0.0):
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "run", [run_classifier, lambda toy, folder, resume: run_diffmask(resume[0], toy, folder, resume[1])]
)
def test_a_folder_without_a_checkpoint_cannot_be_resumed(base, toy, tmp_path, run):
    wrong = str(tmp_path / "checkpoint-3")
    with pytest.raises(VDMError, match="nothing to resume"):
        run(toy, tmp_path, wrong if run is run_classifier else (base, wrong))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("kind", [ClassifierSettings, DiffMaskSettings])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_defaults_that_changes_win_over(kind, recipe):
    made, plain = settings(kind, recipe), kind()
    made.validate()
    assert made.recipe == recipe
    changed = {name for name, value in vars(made).items() if value != getattr(plain, name)} - {"recipe"}
    assert changed == {name for name, value in RECIPES[recipe][kind].items() if value != getattr(plain, name)}
    assert bool(changed) == (recipe != "reference")
    other = settings(kind, recipe, lr=0.125, batch_size=3)
    assert (other.lr, other.batch_size, other.eps if kind is DiffMaskSettings else 0.1) == (0.125, 3, 0.1)


def test_quick_recipe_is_the_measured_one():
    quick = settings(DiffMaskSettings, "quick")
    assert quick.log_multiplier and quick.normalize and quick.zero_start and quick.adam_beta2 == 0.95
    assert (quick.alpha_min, quick.alpha, quick.alpha_max, quick.add_activation) == (1.0, 10.0, 200.0, 2.0)
    assert quick.config()["log_multiplier"] and set(quick.config()) <= set(vars(quick))


def test_settings_reach_the_data():
    chosen = settings(ClassifierSettings, add_blur=True, add_flip=True, class_idx=1, grid_size=2, seed=9, image_size=8)
    data = load_data("toy", "train", length=5, **chosen.data_options())
    assert data.augment == ("flip", "blur") and (data.class_idx, data.grid_size, data.seed) == (1, 2, 9)
    assert data.image_size == (8, 8)


def test_one_process_uses_one_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self.__dict__.get("_n_gpu", 4)))
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))
    chosen = settings(ClassifierSettings, max_steps=1)
    assert training.training_arguments(chosen, tmp_path, "steps").n_gpu == 1


def test_models_are_left_where_they_were(diffmask, toy, tmp_path, monkeypatch):
    """Trainer takes a model to the GPU where there is one, and leaves it there."""
    moves, to = [], VisionDiffMask.to
    monkeypatch.setattr(
        VisionDiffMask, "to", lambda self, *where, **how: moves.append(where) or to(self, *where, **how)
    )
    training.train_diffmask(
        diffmask, toy, toy, settings(DiffMaskSettings, max_steps=1, num_workers=0), tmp_path / "mask"
    )
    assert moves[-1] == (torch.device("cpu"),)
    model, moves = build_classifier(image_size=12, patch_size=4, id2label=toy.id2label), []
    monkeypatch.setattr(model, "to", lambda *where, **how: moves.append(where) or model)
    training.train_classifier(
        model, toy, toy, settings(ClassifierSettings, max_steps=1, num_workers=0), tmp_path / "base"
    )
    assert moves[-1] == (torch.device("cpu"),)


@pytest.mark.parametrize(("kind", "rhythm"), [(ClassifierSettings, {3, 6}), (DiffMaskSettings, {2, 4, 6})])
def test_when_runs_are_evaluated_is_what_the_help_says(diffmask, toy, tmp_path, kind, rhythm):
    """Without --max_steps a base is saved after every epoch, here of three steps, whatever --log_every_n_steps is."""
    chosen = settings(kind, batch_size=32, num_epochs=2, log_every_n_steps=2, num_workers=0)
    if kind is DiffMaskSettings:
        training.train_diffmask(diffmask, toy, toy, chosen, tmp_path)
    else:
        model = build_classifier(image_size=12, patch_size=4, id2label=toy.id2label)
        training.train_classifier(model, toy, toy, chosen, tmp_path)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    logged = [row["step"] for row in history if "loss" in row]
    evaluated = {row["step"] for row in history if any(name.startswith("eval_") for name in row)}
    assert logged == [2, 4, 6] and evaluated == rhythm
    text = next(field for field in dataclasses.fields(kind) if field.name == "log_every_n_steps").metadata["help"]
    assert "without --max_steps train-base evaluates and saves after every epoch" in text


def test_a_training_that_diverged_is_not_saved(toy, tmp_path, monkeypatch):
    model = build_classifier(image_size=12, patch_size=4, id2label=toy.id2label)
    chosen = settings(ClassifierSettings, max_steps=2, log_every_n_steps=2, num_workers=0)
    monkeypatch.setattr(
        training.ClassifierTrainer, "evaluate", lambda self, **how: {"eval_loss": float("nan"), "eval_score": 0.0}
    )
    with pytest.raises(VDMError, match="has diverged"):
        training.train_classifier(model, toy, toy, chosen, tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_misspelt_setting_is_named():
    with pytest.raises(VDMError, match="did you mean 'eps'"):
        settings(DiffMaskSettings, "quick", epss=1)


def test_no_option_is_lost_on_its_way():
    """What a command line and the settings of a DiffMask, or the arguments of `load_data`, share by name reaches them."""
    config = VisionDiffMaskConfig().to_dict()
    chosen = {name for name in vars(settings(DiffMaskSettings)) if name in config}
    assert set(settings(DiffMaskSettings, num_gates=2).config()) == chosen and "kl_quantile" in chosen
    assert set(settings(DiffMaskSettings).config()) == chosen - {"num_gates"}  # 0: as many as the classifier has states
    for kind in (ClassifierSettings, DiffMaskSettings):
        wanted = {name for name in inspect.signature(load_data).parameters if hasattr(settings(kind), name)}
        assert wanted <= set(settings(kind).data_options()) and "shortcut" in wanted


def test_log_lines_tell_kl_and_l0_since_the_last_one(diffmask, monkeypatch):
    told = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time=None: told.append(logs))
    trainer = DiffMaskTrainer.__new__(DiffMaskTrainer)
    trainer.model, trainer.recent = diffmask, [torch.tensor([1.0, 0.5]), torch.tensor([3.0, 0.7])]
    with torch.no_grad():
        diffmask.multiplier.parameter.copy_(torch.arange(6.0))
    trainer.log({"loss": 0.0})
    assert (told[0]["train_kl"], told[0]["alpha_last"], told[0]["alpha_mean"]) == (2.0, 5.0, 2.5)
    assert told[0]["train_l0"] == pytest.approx(0.6) and trainer.recent == []


def test_a_run_without_a_number_of_steps_takes_its_epochs(toy, tmp_path):
    run_classifier(toy, tmp_path, max_steps=-1, num_epochs=2, batch_size=32)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["step"].max() == 6 and table.dropna(subset=["eval_score"])["step"].tolist()[:2] == [3, 6]


def test_evaluation_turns_dropout_off(base, toy):
    model = copy.deepcopy(base).train()
    model.vit.embeddings.dropout.p = 0.5
    assert evaluate_classifier(model, toy) == pytest.approx(evaluate_classifier(base, toy))


def test_weights_decay(toy, tmp_path):
    plain, decayed = (run_classifier(toy, tmp_path / str(d), weight_decay=d, lr=1e-2)[0] for d in (0.0, 50.0))
    norm = [sum(p.abs().sum() for n, p in m.named_parameters() if "fc1.weight" in n) for m in (plain, decayed)]
    assert norm[1] < 0.7 * norm[0]


def test_radam_decays_apart_from_its_gradient(toy, tmp_path, monkeypatch):
    made, create = [], Trainer.create_optimizer
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self, *a: made.append(create(self, *a)) or made[-1])
    run_classifier(toy, tmp_path, optimizer="RAdam", weight_decay=0.25, max_steps=1, log_every_n_steps=1)
    groups = made[0].param_groups
    assert type(made[0]) is torch.optim.RAdam and all(g["decoupled_weight_decay"] for g in groups)
    assert {g["weight_decay"] for g in groups} == {0.25, 0.0}
