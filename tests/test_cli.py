"""The command line: every job end to end, the reference's flags and defaults, and mistakes without a traceback."""

import dataclasses
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import words as split
from PIL import Image
from safetensors.torch import load_file

from vdm_utils import data
from vdm_utils.__main__ import JOBS, main, output_folder, parse
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.plots import send_to_trackers
from vdm_utils.runs import check_fit
from vdm_utils.training import ClassifierSettings, DiffMaskSettings, ExplainSettings, evaluate_classifier
from vdm_utils.vit import build_classifier, fingerprint, load_classifier

TINY = split("--dataset toy --image_size 12 --batch_size 8 --num_workers 0 --max_steps 2 --log_every_n_steps 1")
COMMON = {
    "enable_progress_bar": False, "num_epochs": 5, "seed": 123, "log_every_n_steps": 200, "base_model": "ViT",
    "batch_size": 32, "num_workers": 4, "class_idx": 3, "grid_size": 3, "data_dir": "data/", "recipe": "reference",
    "add_noise": False, "add_rotation": False, "add_blur": False, "output_dir": None,
}  # fmt: skip
REFERENCE = {
    "train": COMMON | {
        "dataset": "CIFAR10", "from_pretrained": "tanlq/vit-base-patch16-224-in21k-finetuned-cifar10", "alpha": 20.0,
        "lr": 2e-5, "eps": 0.1, "lr_placeholder": 1e-3, "lr_alpha": 0.3, "mul_activation": 15.0, "add_activation": 8.0,
        "weighted_layer_distribution": False, "no_placeholder": False, "sample_images": 8, "diffmask_checkpoint": None,
    },
    "train-base": COMMON | {"dataset": "toy", "lr": 5e-5, "optimizer": "AdamW", "weight_decay": 1e-2, "checkpoint": None},
    "eval-base": COMMON | {"dataset": "toy", "checkpoint": None, "from_pretrained": None},
}  # fmt: skip


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(capsys, *words):
    """(exit code, what was printed as JSON, what was complained about)"""
    capsys.readouterr()
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:  # argparse
        code = stop.code
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if code == 0 else printed.out, printed.err


# ---------------------------------------------------------------- the reference's command line


def test_the_command_line_of_the_reference_is_understood_unchanged():
    line = """--enable_progress_bar --num_epochs 20 --base_model ViT --dataset CIFAR10
              --from_pretrained tanlq/vit-base-patch16-224-in21k-finetuned-cifar10"""  # from its README
    chosen = parse(DiffMaskSettings, "train", line.split())
    changed = {name: value for name, value in vars(chosen).items() if value != getattr(DiffMaskSettings(), name)}
    assert changed == {"enable_progress_bar": True, "num_epochs": 20}  # the rest are defaults already


@pytest.mark.parametrize("dataset", ["MNIST", "CIFAR10", "CIFAR10_QA", "toy"])
def test_every_launch_option_of_the_reference_at_once(dataset):
    shared = f"""--enable_progress_bar --seed 1 --base_model ViT --from_pretrained a/b --dataset {dataset} --data_dir d
                 --batch_size 4 --add_noise --add_rotation --add_blur --num_workers 2 --class_idx 1 --grid_size 2 """
    base = shared + "--checkpoint c "
    train = parse(
        ClassifierSettings, "train-base", split(base + "--num_epochs 2 --optimizer RAdam --weight_decay 0.1 --lr 0.1")
    )
    assert (train.optimizer, train.weight_decay, train.augmentations()) == ("RAdam", 0.1, ("rotation", "blur", "noise"))
    assert parse(ClassifierSettings, "eval-base", split(base)).checkpoint == "c"
    own = """--num_epochs 2 --sample_images 3 --log_every_n_steps 7 --alpha 1 --lr 0.1 --eps 0.2 --no_placeholder
             --lr_placeholder 0.3 --lr_alpha 0.4 --mul_activation 5 --add_activation 6 --weighted_layer_distribution
             --diffmask_checkpoint m"""
    chosen = parse(DiffMaskSettings, "train", split(shared + own))
    assert (chosen.num_epochs, chosen.sample_images, chosen.lr_placeholder, chosen.add_activation) == (2, 3, 0.3, 6)
    assert chosen.no_placeholder and chosen.weighted_layer_distribution and chosen.diffmask_checkpoint == "m"


@pytest.mark.parametrize(
    ("job", "kind", "line", "option"),
    [
        ("train", DiffMaskSettings, "--no_placeholder --lr_placeholder 0.1", "lr_placeholder"),
        ("train", DiffMaskSettings, "--grid_size 2", "grid_size"),
        ("train", DiffMaskSettings, "--start_from mask --alpha 5", "alpha"),
        ("train", DiffMaskSettings, "--dataset digits --class_idx=2", "class_idx"),
        ("train-base", ClassifierSettings, "--from_pretrained x --patch_size 4", "patch_size"),
        ("train-base", ClassifierSettings, "--from_pretrained x --mimetic_start", "mimetic_start"),
        ("train-base", ClassifierSettings, "--from_pretrained x --mimetic-start", "mimetic_start"),
        ("train-base", ClassifierSettings, "--skip_unreadable", "skip_unreadable"),
        ("explain", ExplainSettings, "--images a.png --split train", "split"),
        ("explain", ExplainSettings, "--dataset shapes --shortcut 0.5", "shortcut"),
        ("eval-base", ClassifierSettings, "--from_pretrained x --lr 0.1", "lr"),
        ("eval-base", ClassifierSettings, "--from_pretrained x --num_workers=2", "num_workers"),
        ("eval-base", ClassifierSettings, "--from_pretrained x --add_noise", "add_noise"),
        ("eval-base", ClassifierSettings, "--from_pretrained x --size base", "size"),
        ("eval-base", ClassifierSettings, "--dataset shapes --shortcut 0.5", "shortcut"),
        ("eval-base", ClassifierSettings, "--from_pretrained x --base_model ViT --batch_size 4 --seed 3", None),
        ("explain", ExplainSettings, "--dataset shapes --shortcut 0.5 --split train", None),
        ("train", DiffMaskSettings, "--dataset toy --grid_size 2 --lr_placeholder 0.1", None),
        ("train-base", ClassifierSettings, "--dataset CIFAR10_QA --class_idx 1 --size small --from_pretrained=", None),
    ],
)
def test_an_option_without_effect_is_pointed_out(caplog, job, kind, line, option):
    parse(kind, job, split(line))
    if option is None:
        assert not caplog.records
    else:
        assert [r.message.split()[0] for r in caplog.records] == [f"--{option}"]


@pytest.mark.parametrize("job", JOBS)
def test_help_fits_in_100_columns(capsys, job):
    with pytest.raises(SystemExit, match="0"):
        main([job, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and lines[0] == f"usage: python -m vdm_utils {job} [options]"
    names = [line.split()[0][2:] for line in lines if line.startswith("  --")]
    kind = {"train": DiffMaskSettings, "explain": ExplainSettings}.get(job, ClassifierSettings)
    assert sorted(names) == sorted([*vars(kind()), "help"])  # every option once


# ---------------------------------------------------------------- jobs


def test_explain_leaves_a_figure_the_facts_and_the_masks(capsys, diffmask_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["explain", "--diffmask_checkpoint", diffmask_run, "--dataset", "digits", "--sample_images", 3]
    code, printed, _ = run(capsys, *words, "--output_dir", "out")
    assert code == 0 and printed["pictures"] == 3
    facts = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert [fact["picture"] for fact in facts] == [f"digits/test/{n}" for n in range(3)]
    diffmask = VisionDiffMask.from_pretrained(diffmask_run)
    pictures = data.load_data("digits", "test").batch(range(3))["pixel_values"]
    shown = diffmask.explain(pictures)
    saved = load_file(tmp_path / "out" / "masks.safetensors")
    assert torch.allclose(saved["mask"], shown.mask) and torch.allclose(saved["scores"], shown.scores)
    assert [fact["kl"] for fact in facts] == pytest.approx(shown.kl.tolist(), abs=1e-4)
    assert [fact["class"] for fact in facts] == [str(c) for c in shown.logits.argmax(-1).tolist()]
    assert printed["kept"] == pytest.approx(shown.kept.mean().item())
    assert (tmp_path / "out" / "explanations.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["sample_images"] == 3
    assert run(capsys, *words, "--output_dir", "out")[0] == 2  # never written over


@pytest.mark.parametrize("way", ["--refine", "--fit"])
def test_explain_shows_masks_that_were_checked(capsys, diffmask_run, tmp_path, way):
    words = ["explain", "--diffmask_checkpoint", diffmask_run, "--dataset", "digits", "--sample_images", 3, way, 4]
    code, printed, _ = run(capsys, *words, "--output_dir", tmp_path / "out")
    assert code == 0 and printed["feasible"] == 1
    assert set(load_file(tmp_path / "out" / "masks.safetensors")["mask"].unique().tolist()) <= {0.0, 1.0}


def test_explain_tells_the_class_of_the_masked_picture_and_passes_its_seed_on(
    capsys, diffmask_run, tmp_path, monkeypatch
):
    passed = []

    def other_class(diffmask, pixel_values, steps, seed, from_nothing):
        passed.append((steps, seed, from_nothing))
        shown = diffmask.explain(pixel_values)
        return dataclasses.replace(shown, masked_logits=shown.logits.roll(1, -1))

    monkeypatch.setattr("vdm_utils.__main__.refine", other_class)
    words = [
        "explain",
        "--diffmask_checkpoint",
        diffmask_run,
        "--dataset",
        "digits",
        "--sample_images",
        3,
        "--refine",
        4,
    ]
    assert run(capsys, *words, "--seed", 9, "--output_dir", tmp_path / "out")[0] == 0
    assert run(capsys, *words, "--from_nothing", "--output_dir", tmp_path / "other")[0] == 0
    assert passed == [(4, 9, False), (4, 123, True)]
    for fact in json.loads((tmp_path / "out" / "explanations.json").read_text()):
        assert int(fact["class_of_masked"]) == (int(fact["class"]) + 1) % 10


def test_a_mimetic_start_is_one(capsys, tmp_path):
    words = ["train-base", *TINY, "--lr", 0, "--patch_size", 4]
    for name, more in (("usual", []), ("mimetic", ["--mimetic_start"])):
        assert run(capsys, *words, *more, "--output_dir", tmp_path / name)[0] == 0
    query, key = (
        load_classifier(tmp_path / "mimetic").vit.layers[0].attention.get_submodule(f"{name}_proj").weight
        for name in "qk"
    )
    plain = [
        load_classifier(tmp_path / "usual").vit.layers[0].attention.get_submodule(f"{name}_proj").weight
        for name in "qk"
    ]
    assert (query.T @ key).diagonal().mean() > 0.3 > abs((plain[0].T @ plain[1]).diagonal().mean())


def test_a_full_disk_leaves_no_part_of_a_picture(capsys, diffmask_run, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(self, content):
        if len(content) > 2000:
            write(self, content[:2000])
            raise OSError(28, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    words = ["explain", "--diffmask_checkpoint", diffmask_run, "--dataset", "digits", "--sample_images", 2]
    code, _, error = run(capsys, *words, "--output_dir", tmp_path / "out")
    assert code == 2 and "No space left" in error
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["settings.json"]


def test_explain_takes_picture_files(capsys, diffmask_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digit = data.load_data("digits", "test").images[5, 0].numpy()
    Image.fromarray(digit).save("small.png")
    Image.fromarray(digit).resize((64, 64), Image.Resampling.NEAREST).convert("RGBA").save("large.png")
    words = ["explain", "--diffmask_checkpoint", diffmask_run, "--layer", 2, "--images", "small.png", "large.png"]
    assert run(capsys, *words, "--output_dir", "out")[0] == 0
    small, large = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert small["picture"] == "small.png" and small["class"] == large["class"]
    assert small["kept"] == pytest.approx(large["kept"], abs=0.05)
    diffmask = VisionDiffMask.from_pretrained(diffmask_run)
    expected = diffmask.explain(data.load_data("digits", "test").batch([5])["pixel_values"], layer=2)
    assert small["kept"] == pytest.approx(expected.kept.item(), abs=1e-3)


def test_a_base_can_be_fine_tuned_at_another_size(capsys, base_run, tmp_path):
    words = split("train-base --dataset digits_QA --grid_size 2 --image_size 32 --batch_size 8 --num_workers 0")
    words += split("--max_steps 1 --log_every_n_steps 1 --lr 0")
    code, _, _ = run(capsys, *words, "--from_pretrained", base_run, "--output_dir", tmp_path / "out")
    larger = load_classifier(tmp_path / "out")
    assert code == 0 and larger.config.image_size == 32 and larger.config.num_labels == 5
    before = load_classifier(base_run).vit
    assert torch.equal(larger.vit.layers[0].attention.q_proj.weight, before.layers[0].attention.q_proj.weight)


def test_a_convnext_is_fine_tuned_at_any_size(capsys, tmp_path):
    words = ["train-base", "--base_model", "ConvNeXt", *TINY]
    assert run(capsys, *words, "--output_dir", tmp_path / "small")[0] == 0
    words += ["--image_size", 24, "--from_pretrained", tmp_path / "small", "--output_dir", tmp_path / "larger"]
    assert run(capsys, *words)[0] == 0


def test_a_base_is_evaluated_in_batches_of_the_size_asked_for(capsys, base_run, monkeypatch):
    sizes, words = [], ["eval-base", "--dataset", "digits", "--from_pretrained", base_run]
    forward = transformers.ViTForImageClassification.forward

    def note(self, pixel_values, **kwargs):
        sizes.append(len(pixel_values))
        return forward(self, pixel_values, **kwargs)

    monkeypatch.setattr(transformers.ViTForImageClassification, "forward", note)
    by_seven, by_default = (run(capsys, *words, *more)[1] for more in (["--batch_size", 7], []))
    assert set(sizes) == {7, 449 % 7, 32, 449 % 32} and by_seven == pytest.approx(by_default)


@pytest.mark.parametrize("job", ["train-base", "eval-base"])
@pytest.mark.parametrize(("typed", "held"), [("ConvNeXt", "TOY"), ("ViT", "CONVNEXT")])
def test_the_architecture_asked_for_is_the_one_that_is_loaded(capsys, toy_base, tmp_path, job, typed, held):
    labels = load_classifier(toy_base).config.id2label
    build_classifier("convnext", image_size=12, patch_size=2, id2label=labels).save_pretrained(tmp_path / "convnext")
    folder = {"TOY": toy_base, "CONVNEXT": tmp_path / "convnext"}[held]
    words = [job, *TINY, "--from_pretrained", folder, "--output_dir", tmp_path / "out"]
    code, _, error = run(capsys, *words, "--base_model", typed)
    assert code == 2 and "--base_model" in error and typed in error and str(folder) in error
    assert not (tmp_path / "out").exists()
    assert run(capsys, *words)[0] == 0  # a default contradicts nothing


def test_both_jobs_can_multiply_in_half_precision(capsys, tmp_path, monkeypatch):
    kinds, fused = [], []
    forward, attention = torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention

    def linear(*args):
        output = forward(*args)
        kinds.append(output.dtype)
        return output

    def fused_attention(query, *args, **options):
        fused.append((query.dtype, torch.is_grad_enabled()))
        return attention(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
    base = ["train-base", *TINY, "--patch_size", 4]
    mask = ["train", *TINY, "--recipe", "quick", "--sample_images", 0, "--from_pretrained", tmp_path / "full base"]
    for name, line in (("full", ""), ("half", "--bf16")):
        for job, words in (("base", base), ("mask", mask)):
            kinds.clear(), fused.clear()
            assert run(capsys, *words, *split(line), "--output_dir", tmp_path / f"{name} {job}")[0] == 0
            assert (torch.bfloat16 in kinds) == (name == "half"), job
            kind = torch.bfloat16 if name == "half" else torch.float32
            # in half precision its backward pass is slow on a CPU
            assert ((kind, True) in fused) == (name == "full"), job
        assert load_classifier(tmp_path / f"{name} base").config._attn_implementation == "sdpa"
        trained = VisionDiffMask.from_pretrained(tmp_path / f"{name} mask")
        assert {p.dtype for p in [*trained.parameters(), *trained.base.parameters()]} == {torch.float32}


def test_pictures_reach_the_trackers(tmp_path, monkeypatch):
    sent = []

    class Tracker:
        Image = staticmethod(lambda file: ("image", file))
        log = staticmethod(lambda values, step: sent.append((values, step)))

    monkeypatch.setitem(sys.modules, "wandb", Tracker)
    monkeypatch.setitem(sys.modules, "trackio", Tracker)
    file = tmp_path / "samples-4.png"
    send_to_trackers(["wandb", "trackio", "csv"], file, 4)
    assert sent == [({"samples": ("image", str(file))}, 4)] * 2
    send_to_trackers([], file, 4)
    assert len(sent) == 2


def test_from_nothing_to_an_explanation(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train-base", *TINY, "--patch_size", 4, "--recipe", "quick"]
    code, printed, _ = run(capsys, *words, "--output_dir", "base")
    assert code == 0 and printed["output_dir"] == "base" and 0 <= printed["eval_accuracy"] <= 1
    assert {"config.json", "model.safetensors", "metrics.csv", "settings.json"} <= {
        p.name for p in (tmp_path / "base").iterdir()
    }
    base = load_classifier("base")
    assert base.config.id2label[2] == "2 yellow" and base.config.image_size == 12 and base.config.patch_size == 4

    code, printed, _ = run(capsys, "eval-base", "--from_pretrained", "base", "--dataset", "toy")
    expected = evaluate_classifier(base, data.load_data("toy", "test", image_size=12))  # at the size of the base
    assert code == 0 and printed.pop("split") == "test" and printed.pop("dataset") == "toy"
    assert printed.pop("checkpoint") == "base" and printed == pytest.approx(expected)

    words = ["train", *TINY, "--from_pretrained", "base", "--sample_images", 2]
    code, printed, _ = run(capsys, *words, "--output_dir", "mask", "--eps", 0.05)
    assert code == 0 and set(printed) == {"output_dir", "eval_kl", "eval_feasible", "eval_unchanged", "eval_kept"}
    written = {path.name for path in (tmp_path / "mask").iterdir()}
    assert {"config.json", "model.safetensors", "metrics.csv", "samples-1.png", "samples-2.png"} <= written
    assert (tmp_path / "mask" / "samples-2.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    chosen = json.loads((tmp_path / "mask" / "settings.json").read_text())
    assert (chosen["eps"], chosen["max_steps"], chosen["lr"], chosen["sample_images"]) == (0.05, 2, 2e-5, 2)
    diffmask = VisionDiffMask.from_pretrained("mask")
    assert diffmask.config.eps == 0.05 and fingerprint(diffmask.base) == fingerprint(base)

    torch.rand(9)  # a seed decides, not what ran before in this process
    for folder, more, equal in (("again", [], True), ("other", ["--seed", 5, "--sample_images", 0], False)):
        assert run(capsys, *words, "--output_dir", folder, *more)[0] == 0
        weights = load_file(f"{folder}/model.safetensors")
        assert all(torch.equal(weights[n], w) for n, w in load_file("mask/model.safetensors").items()) == equal
    assert not list((tmp_path / "other").glob("*.png"))

    still = [
        "--lr",
        0,
        "--lr_placeholder",
        0,
        "--lr_alpha",
        0,
        "--seed",
        5,
        "--sample_images",
        0,
        "--start_from",
        "mask",
    ]
    assert run(capsys, *words, *still, "--output_dir", "same")[0] == 0
    learned = [name for name in load_file("mask/model.safetensors") if name != "running"]  # averages of what was seen
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("mask", "same"))
    assert all(torch.equal(before[name], after[name]) for name in learned)
    code, _, error = run(capsys, *words, "--no_placeholder", *still[6:], "--output_dir", "no")
    assert code == 2 and "--start_from" in error and "mask" in error and not (tmp_path / "no").exists()

    assert run(capsys, *words, "--grey_start", "--lr_placeholder", 0, "--output_dir", "grey")[0] == 0
    found = VisionDiffMask.from_pretrained("grey")
    empty = found.view.encode(torch.zeros(1, 3, 12, 12)).embeddings[0, 0]
    torch.testing.assert_close(found.placeholder.detach(), empty)
    code, _, error = run(capsys, *words, "--grey_start", "--no_placeholder", "--output_dir", "no")
    assert code == 2 and "no placeholder to start" in error and not (tmp_path / "no").exists()


def test_a_base_can_be_fine_tuned_for_another_task(capsys, base_run, tmp_path):
    words = split(
        "train-base --dataset digits_QA --grid_size 2 --image_size 16 --max_steps 1 --log_every_n_steps 1 --lr 0"
    )
    words += ["--num_workers", 0, "--from_pretrained", base_run, "--output_dir", tmp_path / "fine"]
    assert run(capsys, *words)[0] == 0
    base, fine = load_classifier(base_run), load_classifier(tmp_path / "fine")
    assert fine.config.id2label == {n: f"{n} × 3" for n in range(5)} and fine.classifier.out_features == 5
    assert fingerprint(fine.vit) == fingerprint(base.vit)  # lr 0: only the head is new


def test_a_run_is_resumed_from_its_last_checkpoint(capsys, base_run, tmp_path):
    shutil.copytree(base_run, tmp_path / "run")
    words = split(
        "train-base --dataset digits --patch_size 8 --patience 9 --batch_size 256 --num_workers 0 --max_steps 13"
    )
    words += ["--log_every_n_steps", 4, "--output_dir", tmp_path / "run", "--checkpoint", "last", "--seed", 9]
    assert run(capsys, *words)[0] == 0
    before, after = (json.loads((f / "trainer_state.json").read_text()) for f in (base_run, tmp_path / "run"))
    losses, kept = ([row["loss"] for row in state["log_history"] if "loss" in row] for state in (before, after))
    assert kept == losses and after["global_step"] == 13  # with this seed a run from the start would have other losses


def test_a_run_cannot_change_what_its_numbers_mean(capsys, base_run, diffmask_run, tmp_path):
    """Resumed with another recipe, log α would be read as α, and gates trained on normalised states would see raw ones."""
    shutil.copytree(base_run, tmp_path / "base")
    shutil.copytree(diffmask_run, tmp_path / "diffmask")
    words = split("train --dataset digits --recipe quick --num_workers 0 --max_steps 14 --diffmask_checkpoint last")
    words += ["--from_pretrained", tmp_path / "base", "--output_dir", tmp_path / "diffmask"]
    code, _, error = run(capsys, *words)
    assert code == 2 and "normalize False, not True" in error and "log_multiplier False, not True" in error
    assert not (tmp_path / "diffmask" / "checkpoint-14").exists()


def test_an_interrupted_run_is_not_started_over_in_its_place(capsys, base_run, tmp_path):
    shutil.copytree(base_run / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    code, _, error = run(capsys, "train-base", *TINY, "--output_dir", tmp_path / "run")
    assert code == 2 and "already holds a run" in error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_is_trained_in_full(capsys, base_run, tmp_path, dtype):
    load_classifier(base_run).to(dtype).save_pretrained(tmp_path / "half")
    words = split(
        "train-base --dataset digits --num_workers 0 --max_steps 2 --log_every_n_steps 2 --lr 1e-3 --batch_size 8"
    )
    assert run(capsys, *words, "--from_pretrained", tmp_path / "half", "--output_dir", tmp_path / "out")[0] == 0
    assert load_classifier(tmp_path / "out").dtype == torch.float32


def test_a_siglip_knows_its_own_size(capsys, tmp_path):
    vision = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=24, patch_size=8
    )
    transformers.SiglipForImageClassification(transformers.SiglipConfig(vision_config=vision)).save_pretrained(
        tmp_path / "siglip"
    )
    words = split(
        "train-base --dataset toy --num_workers 0 --max_steps 1 --log_every_n_steps 1 --batch_size 8 --image_size 24"
    )
    assert run(capsys, *words, "--from_pretrained", tmp_path / "siglip", "--output_dir", tmp_path / "out")[0] == 0
    code, printed, _ = run(capsys, "eval-base", "--dataset", "toy", "--from_pretrained", tmp_path / "out")
    assert code == 0 and 0 <= printed["accuracy"] <= 1


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("job", REFERENCE)
def test_help_lists_the_reference_flags_and_defaults(capsys, job):
    with pytest.raises(SystemExit, match="0"):
        main([job, "--help"])
    entries = re.split(r"\n  --", capsys.readouterr().out)
    help_of = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    for flag, default in REFERENCE[job].items():
        shown = re.search(r"\(default: (.*)\)$", help_of[flag])
        assert (shown and shown.group(1)) == (str(default) if default not in (None, False) else None), flag


def test_defaults_are_those_of_the_reference():
    for job, kind in (("train", DiffMaskSettings), ("train-base", ClassifierSettings)):
        chosen = vars(parse(kind, job, []))
        assert {name: chosen[name] for name in REFERENCE[job]} == REFERENCE[job]


@pytest.mark.parametrize("words", ["--lr 0.5 --recipe quick", "--recipe=quick --lr=0.5", "--recipe quick --lr 0.5"])
def test_a_flag_wins_over_the_recipe(words):
    chosen = parse(DiffMaskSettings, "train", split(words))
    assert (chosen.lr, chosen.lr_placeholder, chosen.log_multiplier, chosen.recipe) == (0.5, 1e-2, True, "quick")
    off = parse(DiffMaskSettings, "train", [*split(words), "--normalize", "false", "--max_steps", "-1"])
    assert not off.normalize and off.max_steps == -1


def test_a_number_of_epochs_wins_over_the_steps_of_a_recipe():
    assert parse(DiffMaskSettings, "train", split("--recipe quick")).max_steps == 800
    assert parse(DiffMaskSettings, "train", split("--recipe quick --num_epochs 2")).max_steps == -1
    assert parse(DiffMaskSettings, "train", split("--recipe quick --num_epochs 2 --max_steps 5")).max_steps == 5


def test_flags_are_written_out():
    with pytest.raises((ValueError, SystemExit)):  # what is unique today may not be tomorrow
        parse(ClassifierSettings, "train-base", ["--patien", "4"])


def test_usage_lists_the_jobs(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert all(f"  {job} " in printed for job in JOBS)


# ---------------------------------------------------------------- where a run is written


@pytest.mark.parametrize("job", JOBS)
def test_a_finished_run_is_not_written_over(capsys, base_run, diffmask_run, job):
    folder = diffmask_run if job == "train" else base_run
    before = contents(folder)
    words = [job, *TINY, "--from_pretrained", base_run, "--output_dir", folder]
    if job == "explain":
        words = [job, "--diffmask_checkpoint", diffmask_run, "--output_dir", folder]
    if job == "eval-base":
        words[words.index("toy")] = "digits"
        words[words.index("12")] = "16"
    code, out, error = run(capsys, *words)
    assert code == 2 and out == "" and error.startswith("error: the output folder already holds a run")
    assert contents(folder) == before


def test_runs_without_a_folder_get_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = parse(ClassifierSettings, "train-base", ["--seed", "7"])
    for name in ("runs/train-base-toy-seed7", "runs/train-base-toy-seed7-2", "runs/train-base-toy-seed7-3"):
        folder = output_folder(chosen, "train-base")
        assert str(folder) == name
        folder.mkdir(parents=True)
    (tmp_path / "runs/x/checkpoint-8").mkdir(parents=True)
    for name in ("trainer_state.json", "SHA256SUMS"):
        (tmp_path / "runs/x/checkpoint-8" / name).write_text("")
    assert (
        str(output_folder(chosen, "train-base", "runs/x/checkpoint-8")) == "runs/x"
    )  # a resumed one stays where it is


# ---------------------------------------------------------------- mistakes

DIGITS = ["--dataset", "digits", "--num_workers", "0", "--max_steps", "1", "--from_pretrained", "DIGITS"]
MISTAKES = {  # name: (words, what the message has to contain)
    "unknown job": (["trian"], "did you mean 'train'"),
    "unknown flag": (["train", "--learning_rate", "1"], "--learning_rate"),
    "stray word": (["train-base", "toy"], "toy"),
    "unknown dataset": (["train-base", "--dataset", "toi"], "'toi'"),
    "unknown recipe": (["train", "--recipe", "fast"], "'fast'"),
    "not a number": (["train", "--lr", "high"], "'high'"),
    "negative lr": (["train", "--lr", "-1"], "lr is out of range"),
    "eps zero": (["train", "--eps", "0"], "eps is out of range"),
    "negative batch": (["train-base", "--batch_size", "-4"], "batch_size is out of range"),
    "grid too large": (["train-base", "--grid_size", "9"], "grid_size is out of range"),
    "patches that do not tile": (["train-base", *TINY, "--patch_size", "5"], "do not tile"),
    "shortcut in toy": (["train-base", "--shortcut", "0.5"], "shortcut does not fit"),
    "no such base": (["train", *TINY, "--from_pretrained", "nowhere"], "cannot load the classifier"),
    "a DiffMask is no base": (["train", *TINY, "--from_pretrained", "MASK"], "cannot load the classifier"),
    "base for other channels": (["train", *TINY, "--from_pretrained", "DIGITS"], "not trained for this dataset"),
    "base for other classes": (["train", *TINY, "--grid_size", "2", "--from_pretrained", "TOY"], "5 classes"),
    "base for other sizes": (["train", *TINY, "--image_size", "24", "--from_pretrained", "TOY"], "12×12"),
    "base that counts something else": (["train", *TINY, "--class_idx", "0", "--from_pretrained", "TOY"], "red"),
    "base for other channels, fine-tuned": (
        ["train-base", "--dataset", "toy", "--from_pretrained", "DIGITS"],
        "1 channel",
    ),
    "base whose patches do not fit": (
        ["train-base", *TINY, "--image_size", "18", "--from_pretrained", "TOY"],
        "another image size",
    ),
    "nothing to explain with": (["explain"], "diffmask_checkpoint"),
    "no such DiffMask": (["explain", "--diffmask_checkpoint", "nowhere"], "cannot load the DiffMask"),
    "refined at a layer": (
        ["explain", "--diffmask_checkpoint", "MASK", "--dataset", "digits", "--layer", "2", "--refine", "5"],
        "--refine 5 --layer 2",
    ),
    "cut and refined": (
        ["explain", "--diffmask_checkpoint", "MASK", "--dataset", "digits", "--fit", "8", "--refine", "5"],
        "these do not go together",
    ),
    "from nothing, and no search": (
        ["explain", "--diffmask_checkpoint", "MASK", "--dataset", "digits", "--fit", "8", "--from_nothing"],
        "nothing is searched for",
    ),
    "no such picture": (["explain", "--diffmask_checkpoint", "MASK", "--images", "none.png"], "none.png"),
    "not a picture": (["explain", "--diffmask_checkpoint", "MASK", "--images", "file"], "cannot be read"),
    "no such layer": (
        ["explain", "--diffmask_checkpoint", "MASK", "--dataset", "digits", "--layer", "6"],
        "no such layer",
    ),
    "DiffMask of another task": (["explain", "--diffmask_checkpoint", "MASK", "--dataset", "toy"], "not trained for"),
    "negative layer": (
        ["explain", "--diffmask_checkpoint", "MASK", "--dataset", "digits", "--layer", "-1"],
        "no such layer",
    ),
    "base for other channels, evaluated": (
        ["eval-base", "--dataset", "toy", "--from_pretrained", "DIGITS"],
        "1 channel",
    ),
    "base for other classes, evaluated": (["eval-base", "--grid_size", "2", "--from_pretrained", "TOY"], "5 classes"),
    "nothing to evaluate": (["eval-base"], "nothing to evaluate"),
    "nothing to resume": (["train-base", *TINY, "--checkpoint", "nowhere"], "nothing to resume"),
    "start of a ConvNeXt": (["train-base", "--base_model", "ConvNeXt", "--mimetic_start"], "leave --mimetic_start out"),
    "output is a file": (["train-base", *TINY, "--output_dir", "file"], "file"),
    "a finished run is no checkpoint": (["train", *DIGITS, "--diffmask_checkpoint", "MASK"], "nothing to resume"),
    "the last of which run": (["train-base", *TINY, "--checkpoint", "last"], "--output_dir"),
    "start of another kind": (["train", *DIGITS, "--recipe", "quick", "--start_from", "MASK"], "other settings"),
    "negative seed": (["train-base", *TINY, "--seed", "-1"], "seed is out of range"),
    "unknown tracker": (["train-base", *TINY, "--report_to", "nobody"], "nobody"),
    "negative workers": (["train-base", *TINY, "--num_workers", "-1"], "num_workers"),
}


@pytest.fixture(scope="session")
def toy_base(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "base"
    base.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(capsys, base_run, toy_base, diffmask_run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("something")
    words, expected = MISTAKES[name]
    known = {"DIGITS": base_run, "TOY": toy_base, "MASK": diffmask_run}
    code, out, error = run(capsys, *(known.get(word, word) for word in words))
    assert code == 2 and out == "" and expected in error and "Traceback" not in error
    if not error.startswith("usage:"):  # argparse shows its own first
        assert error.startswith("error: ") and len(error.splitlines()) <= 5
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_module_exits_with_the_code_of_the_job(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vdm_utils", "eval-base"])
    monkeypatch.delitem(sys.modules, "vdm_utils.__main__")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("vdm_utils", run_name="__main__")


def test_classes_of_photographs_may_be_spelled_otherwise():
    named = {n: f"number {n}" for n in range(10)}
    check_fit(
        build_classifier(image_size=16, patch_size=8, num_channels=1, id2label=named),
        data.load_data("digits", "test"),
        "explain",
    )
