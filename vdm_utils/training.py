"""Both training jobs, thin over `transformers.Trainer`: the classifier, and the DiffMask that explains it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pandas as pd
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, default_collate
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import rotate_checkpoints

from vdm_utils.checkpoints import (
    STATE,
    check_writable,
    guard_saving,
    last_checkpoint,
    save_classifier,
    verify_checksums,
    write_checksums,
    write_whole,
)
from vdm_utils.data import AUGMENTATIONS, DATASETS, SPLITS, Pictures
from vdm_utils.diffmask import DiffMaskOutput, VisionDiffMask, VisionDiffMaskConfig, check_numbers
from vdm_utils.errors import VDMError, unknown_name
from vdm_utils.vit import PatchView, as_pair, load_classifier

# A layer counts as settled when its class is kept this often with this fraction of patches (De Cao et al. 2020's code);
# with --weighted_layer_distribution it is then drawn ten times less often.
SETTLED_ACCURACY, SETTLED_L0, SETTLED_WEIGHT = 0.75, 0.1, 0.1


# A cell or an object part fills several patches. Gates that decide for one patch at a time can get stuck at dropping the same
# part of each; deciding for squares of so many patches a side first, then for single ones, they do not (measured on digits_QA).
BLOCK = 2

# name: (lowest allowed, first not allowed)
LIMITS = {
    "batch_size": (1, 2**20), "num_workers": (0, 1024), "num_epochs": (1e-9, 1e9), "log_every_n_steps": (1, 2**32),
    "warmup_steps": (0, 2**32), "gate_warmup_steps": (0, 2**32), "patience": (1, 2**32), "lr": (0, 1e3), "weight_decay": (0, 1e3),
    "sample_images": (0, 2**20), "refine": (0, 2**20), "shortcut": (0, 1.001), "patch_dropout": (0, 1), "patch_masking": (0, 1.001), "adam_beta2": (0, 1), "lr_decay": (0, 1.001), "last_layer_share": (0, 1.001), "block_share": (0, 1.001),
}  # fmt: skip


def option(default, text: str):
    """A settings field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class DataSettings:
    """Which pictures; the reference's names and defaults where it has them."""

    dataset: Literal[DATASETS] = option(
        "toy", "task; a name with _QA counts a class in grids of that dataset's pictures"
    )
    data_dir: str = option(
        "data/", "where MNIST, CIFAR10 and ImageNet are looked for before $VDM_DATA_DIR; for folder: the folder itself"
    )
    image_size: int | None = option(None, "side of the square picture in pixels; default: the dataset's own")
    grid_size: int = option(3, "cells per side of a counting grid (2-8)")
    class_idx: int = option(3, "class that is counted")
    shortcut: float = option(0.0, "share of shapes training pictures with a coloured tag that gives the class away")
    skip_unreadable: bool = option(False, "leave damaged image files out instead of stopping")
    seed: int = option(123, "random seed of weights, data order and sampling")
    output_dir: str | None = option(None, "where the run is written; default: a folder under runs/")
    recipe: Literal["reference", "quick", "pictures", "paper"] = option(
        "reference", "named set of defaults; flags win over it"
    )

    def data_options(self) -> dict:
        """Keyword arguments for `load_data`."""
        names = ("data_dir", "image_size", "grid_size", "class_idx", "shortcut", "skip_unreadable", "seed")
        return {name: getattr(self, name) for name in names}

    def validate(self) -> None:
        """Raise `VDMError` for a value that no run can use."""
        for name, kind in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal and value not in choices:
                raise _out_of_range(name, ", ".join(map(str, choices)), value)
            if kind is int and type(value) is not int:
                raise _out_of_range(name, "a whole number", value)
            if kind is float and (isinstance(value, bool) or not isinstance(value, Real)):
                raise _out_of_range(name, "a number", value)
            if kind is float:  # NaN is in no interval
                low, high = LIMITS.get("lr" if name in ("lr_placeholder", "lr_alpha") else name, (-1e9, 1e9))
            elif kind is int:
                low, high = LIMITS.get(name, (-(2**32), 2**32))
            else:
                continue
            if not low <= value < high:
                raise _out_of_range(name, f"{low} <= {name} < {high}", value)


@dataclass
class RunSettings(DataSettings):
    """What both training jobs share; the reference's names and defaults where it has them."""

    add_noise: bool = option(False, "augment training images with Gaussian noise, std 1")
    add_rotation: bool = option(False, "augment training images with rotations of ±20 degrees")
    add_blur: bool = option(False, "augment training images with a Gaussian blur, kernel 3")
    add_flip: bool = option(False, "augment training images with left-right flips")
    add_shift: bool = option(False, "augment training images with shifts of up to 1/8 of the side")
    augment_cells: bool = option(False, "flip, shift and rotate every picture of a grid, not the grid as a whole")
    batch_size: int = option(32, "images per step and device")
    num_workers: int = option(4, "processes that load data; 0 loads in the main process")
    num_epochs: float = option(5, "passes over the training data")
    max_steps: int = option(-1, "stop after this many steps; -1: after num_epochs")
    log_every_n_steps: int = option(200, "steps between log lines, evaluations and checkpoints")
    enable_progress_bar: bool = option(False, "show a progress bar")
    report_to: str = option("none", "tracker: none, tensorboard, trackio, wandb; metrics.csv is always written")

    def augmentations(self) -> tuple[str, ...]:
        """The chosen names from `data.AUGMENTATIONS`."""
        return tuple(name for name in AUGMENTATIONS if getattr(self, f"add_{name}"))

    def data_options(self) -> dict:
        """Keyword arguments for `load_data`."""
        return super().data_options() | {"augment": self.augmentations(), "augment_cells": self.augment_cells}

    def validate(self) -> None:
        """Raise `VDMError` for a value that no training run can use."""
        super().validate()
        trackers = ["none", "all", *get_available_reporting_integrations()]
        if self.report_to not in trackers:
            raise _out_of_range("report_to", "one of the installed trackers: " + ", ".join(trackers), self.report_to)


@dataclass
class ClassifierSettings(RunSettings):
    """Settings of `train-base`."""

    base_model: Literal["ViT", "ConvNeXt"] = option("ViT", "architecture of a base trained from scratch")
    size: Literal["tiny", "small", "base"] = option("tiny", "size of a base trained from scratch")
    patch_size: int | None = option(None, "patch side in pixels of a base trained from scratch; default: the dataset's")
    from_pretrained: str | None = option(None, "Hub name or folder of a classifier to start from")
    checkpoint: str | None = option(None, "checkpoint folder of an interrupted run to resume, or 'last'")
    optimizer: Literal["AdamW", "RAdam"] = option("AdamW", "optimizer")
    weight_decay: float = option(1e-2, "weight decay")
    lr: float = option(5e-5, "learning rate")
    lr_schedule: Literal["constant", "linear", "cosine"] = option("constant", "learning rate after warm-up")
    warmup_steps: int = option(0, "steps of linear warm-up")
    patch_dropout: float = option(0.0, "fraction of patches left out of every training image; saves as much time")
    patch_masking: float = option(0.0, "blank up to this fraction of the patches of a training image, anew each time")
    mimetic_start: bool = option(False, "start the attention of a ViT trained from scratch where trained ones end up")
    bf16: bool = option(False, "multiply matrices in bfloat16, where the processor can")
    patience: int = option(5, "stop after this many evaluations without a better validation accuracy")


@dataclass
class DiffMaskSettings(RunSettings):
    """Settings of `train`."""

    dataset: Literal[DATASETS] = option("CIFAR10", "task to train on")
    base_model: Literal["ViT"] = option("ViT", "architecture of the base")
    from_pretrained: str = option(
        "tanlq/vit-base-patch16-224-in21k-finetuned-cifar10", "Hub name or folder of the classifier to explain"
    )
    diffmask_checkpoint: str | None = option(None, "checkpoint folder of an interrupted run to resume, or 'last'")
    sample_images: int = option(8, "images of the picture grid that is drawn at every evaluation")
    alpha: float = option(20.0, "start of the Lagrange multipliers")
    alpha_min: float = option(0.0, "lower bound of the multipliers")
    alpha_max: float = option(200.0, "upper bound of the multipliers")
    log_multiplier: bool = option(False, "learn log(alpha) instead of alpha")
    eps: float = option(0.1, "KL divergence in nats that a masked image may cost")
    kl_quantile: float = option(0.0, "quantile of a batch's KL that is held at eps; 0: its mean, as in the paper")
    lr: float = option(2e-5, "learning rate of the gates")
    lr_placeholder: float = option(1e-3, "learning rate of the placeholder")
    lr_alpha: float = option(0.3, "learning rate of the multipliers (of their logarithm with log_multiplier)")
    lr_decay: float = option(0.0, "last share of the steps in which gates and placeholder slow down linearly to a stop")
    gate_warmup_steps: int = option(1200, "steps of linear warm-up of the gates")
    adam_beta2: float = option(0.999, "second-moment decay of Adam")
    mul_activation: float = option(15.0, "log_alpha = mul · tanh(·) + add")
    add_activation: float = option(8.0, "log_alpha = mul · tanh(·) + add")
    normalize: bool = option(False, "LayerNorm, without weights, on the inputs of the gates")
    zero_start: bool = option(False, "start the last layer of every gate at zero")
    no_placeholder: bool = option(False, "replace dropped patches by zeros instead of a learned placeholder")
    last_layer_share: float = option(
        0.0, "share of the steps spent on the last gate, whose mask is the one that is shown"
    )
    block_share: float = option(0.0, "first share of the steps in which squares of 2 × 2 patches share one gate")
    shared_noise: bool = option(False, "draw one random number per gate for all patches of an image, not one for each")
    weighted_layer_distribution: bool = option(False, "draw layers that are already accurate and sparse less often")

    def config(self) -> dict:
        """Keyword arguments for `VisionDiffMask.for_classifier`."""
        names = ("alpha", "alpha_min", "alpha_max", "log_multiplier", "eps", "kl_quantile", "mul_activation", "add_activation",
                 "normalize", "zero_start", "no_placeholder")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def validate(self) -> None:
        """Raise `VDMError` for a number that no training run can use."""
        super().validate()
        check_numbers(VisionDiffMaskConfig(**self.config()), "training settings")


@dataclass
class ExplainSettings(DataSettings):
    """Settings of `explain`."""

    dataset: Literal[DATASETS] = option("CIFAR10", "task whose pictures are explained")
    diffmask_checkpoint: str | None = option(None, "folder of a trained DiffMask")
    split: Literal[SPLITS] = option("test", "part of the dataset")
    images: list[str] = field(
        default_factory=list, metadata={"help": "picture files to explain, instead of a dataset's"}
    )
    sample_images: int = option(8, "number of pictures of the dataset that are explained, from the first on")
    layer: int | None = option(None, "show the mask after this gate; default: the last")
    refine: int = option(
        0, "go on from the gates for so many steps, for each picture by itself; 0: show what the gates say"
    )


# from scratch on two CPU cores; measured in benchmarks/toy_recovery.py
_QUICK = {"lr": 2e-3, "lr_placeholder": 1e-2, "lr_alpha": 0.03, "adam_beta2": 0.95, "gate_warmup_steps": 0,
          "alpha": 10.0, "alpha_min": 1.0, "log_multiplier": True, "add_activation": 2.0, "normalize": True,
          "zero_start": True, "max_steps": 800, "lr_decay": 0.3, "kl_quantile": 0.95, "num_workers": 0, "dataset": "toy"}  # fmt: skip
# 64 patches of a photograph are not 9 cells: a start that drops half of them makes α soar, and every gate closes at "keep"
# for good. So start with nearly all kept and a low price, and spend most steps on the mask that is shown.
_PICTURES = {"alpha": 1.0, "add_activation": 4.0, "kl_quantile": 0.0, "last_layer_share": 0.7, "max_steps": 2500,
             "dataset": "CIFAR10"}  # fmt: skip
_SCRATCH = {"lr": 1e-3, "lr_schedule": "cosine", "warmup_steps": 100, "batch_size": 64, "num_workers": 0}
# Named sets of defaults. `reference` is the dataclass itself.
RECIPES: dict[str, dict[type, dict]] = {
    "reference": {ClassifierSettings: {}, DiffMaskSettings: {}},
    "quick": {ClassifierSettings: _SCRATCH, DiffMaskSettings: _QUICK},
    "pictures": {ClassifierSettings: _SCRATCH, DiffMaskSettings: _QUICK | _PICTURES},
    # the paper's run: 20 epochs at 224×224 on a GPU
    "paper": {
        ClassifierSettings: {"dataset": "CIFAR10", "image_size": 224, "size": "base", "patch_size": 16, "num_epochs": 20},
        DiffMaskSettings: {"image_size": 224, "num_epochs": 20},
    },
}  # fmt: skip


def settings(kind: type, recipe: str = "reference", **changes) -> DataSettings:
    """The settings of a recipe with `changes` on top: `settings(DiffMaskSettings, "quick", eps=0.05)`."""
    if recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES, "settings")
    return kind(**{"recipe": recipe, **RECIPES[recipe].get(kind, {}), **changes})


def _out_of_range(name, expected, got) -> VDMError:
    return VDMError(
        f"{name} is out of range", where="training settings", expected=expected, got=got, fix=f"change {name}"
    )


# ---------------------------------------------------------------- what both jobs share


class TellEpoch(TrainerCallback):
    """Tells the training data its epoch; Trainer does so too, but not for the rest of the epoch in which a run resumes."""

    def __init__(self, data: Pictures):
        self.data = data

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.data.set_epoch(int(state.epoch))


class MetricsFile(TrainerCallback):
    """Writes everything that was logged to `metrics.csv`; a resumed run keeps the rows from before."""

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_whole(Path(args.output_dir, "metrics.csv"), pd.DataFrame(state.log_history).to_csv(index=False))


class Checksums(TrainerCallback):
    """Puts checksums beside every checkpoint, once its last file is written: a damaged one is never resumed.

    Only then older ones are deleted, but for `keep` of them, the best included: one that is whole is always left.
    """

    def __init__(self, keep: int):
        self.keep = keep

    def on_save(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.distributed.barrier()  # every process writes its own random state
        if state.is_world_process_zero:
            write_checksums(Path(args.output_dir, f"checkpoint-{state.global_step}"))
            rotate_checkpoints(args.output_dir, self.keep, state.best_model_checkpoint, use_mtime=True)


def check_fit(model: PreTrainedModel, data: Pictures, job: str, classes: bool = True) -> None:
    """Raise `VDMError` unless the classifier takes this dataset's pictures and, with `classes`, predicts its classes."""

    def describe(labels: dict, channels: int, size: tuple[int, int]) -> str:
        named = f"{len(labels)} classes ({labels[0]}, …), " if classes else ""
        return f"{named}{channels} channel{'s' * (channels > 1)}, {size[0]}×{size[1]} pixels"

    config = getattr(model.config, "vision_config", model.config)
    # a ConvNeXt takes any size, and so has a size that means nothing
    size = data.image_size if hasattr(config, "depths") else as_pair(config.image_size)
    fits = (config.num_channels, tuple(size)) == (data.num_channels, tuple(data.image_size))
    if classes:
        fits &= model.config.num_labels == data.num_labels
        # what a grid's classes count is in their names only; those of photographs are spelled differently by everyone
        names = dict(model.config.id2label)
        fits &= not data.has_truth or names[0].startswith("LABEL_") or names == dict(data.id2label)
    if not fits:
        raise VDMError("the classifier was not trained for this dataset", where=job,
                       expected=describe(data.id2label, data.num_channels, data.image_size),
                       got=describe(model.config.id2label, config.num_channels, size),
                       fix="train one with train-base, or change the data options or --from_pretrained")  # fmt: skip


def _arguments(chosen: RunSettings, output_dir: Path, optimizer: str, **more) -> TrainingArguments:
    check_writable(output_dir)
    return TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=chosen.batch_size,
        per_device_eval_batch_size=max(chosen.batch_size, 128),
        num_train_epochs=chosen.num_epochs,
        max_steps=chosen.max_steps,
        learning_rate=chosen.lr,
        optim=optimizer,
        logging_steps=chosen.log_every_n_steps,
        dataloader_num_workers=chosen.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not chosen.enable_progress_bar,
        report_to=chosen.report_to,
        seed=chosen.seed,
        use_cpu=not torch.accelerator.is_available(),  # Trainer wants to be told before it computes in bfloat16 there
        **more,
    )


def _finish(trainer: Trainer, chosen: RunSettings, resume: str | None) -> None:
    """Run a Trainer from the start or from a checkpoint; `resume` is a folder, 'last' or None."""
    trainer.remove_callback(PrinterCallback)  # metrics go to metrics.csv, not to stdout
    trainer.add_callback(MetricsFile)
    # Trainer would delete an old checkpoint while the new one still lacks its checksums
    trainer.add_callback(Checksums(keep=trainer.args.save_total_limit))
    trainer.args.save_total_limit = None
    trainer.add_callback(TellEpoch(trainer.train_dataset))
    guard_saving(trainer)
    if resume == "last":
        resume = last_checkpoint(Path(trainer.args.output_dir))
    elif resume is not None and not Path(resume, STATE).is_file():
        raise VDMError("nothing to resume", where="training", expected="a checkpoint-N folder of an earlier run", got=resume,
                       fix="name one, or leave it out to start anew")  # fmt: skip
    if resume is not None:
        verify_checksums(Path(resume))
    if resume is None or _steps_left(trainer, Path(resume)):
        trainer.train(resume_from_checkpoint=resume and str(resume))
    trainer.save_state()


def _steps_left(trainer: Trainer, checkpoint: Path) -> bool:
    """Whether a run goes on after a checkpoint. Where it does not, its state and best weights are loaded.

    Trainer (5.23) would take a step too many from a checkpoint at the end of `max_steps`, and would count the evaluations
    without progress, for early stopping, from zero again.
    """
    state, stopped = TrainerState.load_from_json(str(checkpoint / STATE)), False
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            vars(callback).update(state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {}))
            stopped = callback.early_stopping_patience_counter >= callback.early_stopping_patience
    args = trainer.args
    epochs = args.num_train_epochs * len(trainer.get_train_dataloader())
    if not stopped and state.global_step < (args.max_steps if args.max_steps > 0 else math.ceil(epochs)):
        return True
    state.is_world_process_zero, trainer.state = trainer.is_world_process_zero(), state
    best = state.best_model_checkpoint
    trainer._load_from_checkpoint(best if best and Path(best).is_dir() else str(checkpoint))
    return False


def _load_weights(model: PreTrainedModel, saved: PreTrainedModel, checkpoint: str) -> None:
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise VDMError("the checkpoint is of another model", where="training", expected=type(model).__name__, got=f"{checkpoint} ({error})",
                       fix="give the options of the interrupted run") from error  # fmt: skip


@contextmanager
def dropped_patches(model: PreTrainedModel, fraction: float) -> Iterator[None]:
    """While training, leave a random `fraction` of the patches out of every image, after positions are added.

    The transformer then works on the rest: at 0.5 a step costs half. Liu et al. 2023 (arXiv 2208.07220) report no loss
    of accuracy, and the model learns to live with missing patches.
    """
    if not fraction:
        yield
        return
    embeddings = next(
        m for n, m in model.named_modules() if n.endswith("embeddings") and hasattr(m, "patch_embeddings")
    )

    def drop(module: nn.Module, inputs, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        batch, tokens, _ = output.shape
        patches = module.patch_embeddings.num_patches
        prefix, kept = tokens - patches, max(1, round(patches * (1 - fraction)))
        order = torch.rand(batch, patches, device=output.device).argsort(dim=1)[:, :kept] + prefix  # [B, kept]
        index = torch.cat([torch.arange(prefix, device=output.device).expand(batch, -1), order], dim=1)
        return output.gather(1, index.unsqueeze(-1).expand(-1, -1, output.shape[-1]))

    handle = embeddings.register_forward_hook(drop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def masked_patches(model: PreTrainedModel, most: float) -> Iterator[None]:
    """While training, blank (zero) the embeddings of a random share of the patches, drawn per image from 0 to `most`.

    A classifier that never saw a missing patch answers to its absence with a class of its own ("missingness bias", Jain
    et al. 2022, arXiv 2204.08945); one that did can be asked what it does without. Masks leave whole regions out, so regions
    are blanked as often as specks: the patches that go are the lowest of noise drawn on a grid 1, 2 or 4 times coarser.
    """
    if not most:
        yield
        return
    view = PatchView(model)
    projection, (rows, cols) = view.projection, view.grid

    def blank(module: nn.Module, inputs, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        coarser = 2 ** int(torch.randint(3, ()))
        noise = torch.rand(len(output), 1, max(2, rows // coarser), max(2, cols // coarser), device=output.device)
        noise = nn.functional.interpolate(noise, size=(rows, cols), mode="bicubic").flatten(1)  # [B, N]
        share = most * torch.rand(len(output), 1, device=output.device)
        stays = noise.argsort(1).argsort(1) >= share * rows * cols  # [B, N]
        # a projection puts out [B, N, d], or [B, d, rows, cols] where it is a bare convolution
        return output * (stays.unsqueeze(-1) if output.dim() == 3 else stays.view(-1, 1, rows, cols))

    handle = projection.register_forward_hook(blank)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------- the classifier


class ClassifierTrainer(Trainer):
    """A Trainer that really loads what it saved.

    `save_pretrained` writes a ViT under its published weight names, and Trainer (5.23) reads a checkpoint back with
    `load_state_dict(strict=False)`, which skips every renamed weight: a resumed run would go on from whatever was in
    memory. `from_pretrained` knows the names.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        _load_weights(self.model, load_classifier(resume_from_checkpoint), resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


# far below 1/number of validation images, so that it decides between equal accuracies only
TIE_BREAK = 1e-5


def _accuracy_and_score(prediction: EvalPrediction) -> dict[str, float]:
    """`accuracy`, and `score`: the accuracy, less a trace of the loss.

    A small task reaches 100 % long before training ends. By accuracy alone the *first* such weights would be kept, which are
    still unsure; a mask has to preserve the whole output, so an unsure classifier is hard to explain.
    """
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    loss = nn.functional.cross_entropy(logits.float(), labels).item()
    return {"accuracy": accuracy, "score": accuracy - TIE_BREAK * min(loss, 1.0)}


def train_classifier(
    model: PreTrainedModel,
    train_data: Pictures,
    eval_data: Pictures,
    chosen: ClassifierSettings,
    output_dir: str | Path,
    resume: str | None = None,
) -> dict[str, float]:
    """Train `model` in place, keep the best validation accuracy (of equal ones the lowest loss), and save it to `output_dir`.

    Returns the validation metrics of the kept weights (`eval_accuracy` in 0..1, `eval_loss` in nats).
    """
    chosen.validate()
    check_fit(model, train_data, "train_classifier")
    output_dir = Path(output_dir)
    steps = (
        {"eval_strategy": "steps", "save_strategy": "steps"}
        if chosen.max_steps > 0
        else {"eval_strategy": "epoch", "save_strategy": "epoch"}
    )
    arguments = _arguments(
        chosen, output_dir, "adamw_torch", bf16=chosen.bf16, weight_decay=chosen.weight_decay, lr_scheduler_type=chosen.lr_schedule if not chosen.warmup_steps or chosen.lr_schedule != "constant" else "constant_with_warmup",
        warmup_steps=chosen.warmup_steps, eval_steps=chosen.log_every_n_steps, save_steps=chosen.log_every_n_steps,
        save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True, **steps,
    )  # fmt: skip
    trainer = ClassifierTrainer(
        model,
        arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=default_collate,
        compute_metrics=_accuracy_and_score,
        # no name of Trainer's stands for RAdam with decoupled weight decay
        optimizer_cls_and_kwargs=(torch.optim.RAdam, {"lr": chosen.lr, "decoupled_weight_decay": True})
        if chosen.optimizer == "RAdam"
        else None,
        callbacks=[EarlyStoppingCallback(chosen.patience, early_stopping_threshold=TIE_BREAK)],
    )
    with dropped_patches(model, chosen.patch_dropout), masked_patches(model, chosen.patch_masking):
        _finish(trainer, chosen, resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_checksums(output_dir)
    model.name_or_path = str(output_dir)
    model.eval()
    return trainer.evaluate()


@torch.no_grad()
def evaluate_classifier(model: PreTrainedModel, data: Pictures, batch_size: int = 128) -> dict[str, float]:
    """`accuracy` (0..1) and mean `confidence` of the predicted class (0..1) over a dataset."""
    model.eval()
    right, confidence = [], []
    for batch in DataLoader(data, batch_size):
        probability = model(batch["pixel_values"].to(model.device)).logits.softmax(-1).cpu()
        top = probability.max(-1)
        right.append(top.indices == batch["labels"])
        confidence.append(top.values)
    return {"accuracy": torch.cat(right).float().mean().item(), "confidence": torch.cat(confidence).mean().item()}


# ---------------------------------------------------------------- the DiffMask


class DiffMaskTrainer(Trainer):
    """One random layer per step, one backward pass for both players of the min–max game."""

    def __init__(self, diffmask: VisionDiffMask, arguments: TrainingArguments, chosen: DiffMaskSettings, **kwargs):
        super().__init__(diffmask, arguments, data_collator=default_collate, **kwargs)
        self.chosen = chosen
        self.recent: list[torch.Tensor] = []  # (KL, L0) of the steps since the last log line

    @staticmethod
    def make_optimizer(diffmask: VisionDiffMask, chosen: DiffMaskSettings) -> torch.optim.Optimizer:
        """One Adam with up to three groups: gates, placeholder (both descend) and multipliers (ascend)."""
        groups = [{"params": list(diffmask.gates.parameters()), "lr": chosen.lr}]
        if diffmask.placeholder is not None:
            groups.append({"params": [diffmask.placeholder], "lr": chosen.lr_placeholder})
        # the other player: maximize=True makes this group *ascend* the gradient of the same backward pass
        groups.append({"params": list(diffmask.multiplier.parameters()), "lr": chosen.lr_alpha, "maximize": True})
        return torch.optim.Adam(groups, betas=(0.9, chosen.adam_beta2), fused=True)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved = VisionDiffMask.from_pretrained(resume_from_checkpoint, base=self.model.base)
        _load_weights(self.model, saved, resume_from_checkpoint)

    def create_optimizer(self, model=None):
        self.optimizer = self.make_optimizer(self.model, self.chosen)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        warmup, decay = self.chosen.gate_warmup_steps, self.chosen.lr_decay * num_training_steps

        def warm_up(step: int) -> float:
            return min(1.0, (step + 1) / warmup) if warmup else 1.0

        def slow_down(step: int) -> float:
            # Adam divides by the size of the gradient, so a placeholder with nothing left to learn walks at full speed
            return min(1.0, (num_training_steps - step) / decay) if decay else 1.0

        rules = [lambda step: warm_up(step) * slow_down(step)]
        if self.model.placeholder is not None:
            rules.append(slow_down)
        rules.append(lambda step: 1.0)  # the multipliers keep watch to the end
        self.lr_scheduler = LambdaLR(self.optimizer, rules)
        return self.lr_scheduler

    def draw_layer(self) -> int:
        """The depth of this step: uniform, but for `last_layer_share`, and by weight when settled layers are to be drawn
        less often."""
        count = self.model.config.num_gates
        if self.chosen.last_layer_share and torch.rand(()) < self.chosen.last_layer_share:
            return count - 1
        weight = torch.ones(count)
        if self.chosen.weighted_layer_distribution:
            accuracy, l0 = self.model.running.cpu()
            weight[(accuracy > SETTLED_ACCURACY) & (l0 < SETTLED_L0)] = SETTLED_WEIGHT
        return int(torch.multinomial(weight, 1))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        layer = self.draw_layer()
        blocks = self.state.global_step < self.chosen.block_share * self.state.max_steps
        block, shared = BLOCK if blocks else 1, self.chosen.shared_noise
        output: DiffMaskOutput = model(inputs["pixel_values"], layer=layer, block=block, shared_noise=shared)
        self.recent.append(torch.stack([output.kl.mean(), output.l0.mean()]))
        with torch.no_grad():  # running averages over about 10 visits of the layer
            seen = torch.stack([output.unchanged.mean(), output.l0.mean()])
            self.model.running[:, layer] += 0.1 * (seen - self.model.running[:, layer])
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.recent and "loss" in logs:
            kl, l0 = torch.stack(self.recent).mean(0).tolist()
            alpha = self.model.multiplier.value
            logs |= {"train_kl": kl, "train_l0": l0, "alpha_mean": alpha.mean().item(), "alpha_last": alpha[-1].item()}
            self.recent.clear()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = evaluate_diffmask(self.model, eval_dataset or self.eval_dataset, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class ClampMultiplier(TrainerCallback):
    """Keeps the multipliers in their interval after every optimizer step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        getattr(model, "module", model).multiplier.clamp_()


@dataclass(frozen=True)
class MaskRecord:
    """The shown masks of B pictures at one training step.

    mask: [B, rows, cols].  kl: [B] in nats.  kept: [B].  alpha: the last gate's multiplier.  eps: the KL allowed.
    """

    step: int
    mask: torch.Tensor
    kl: torch.Tensor
    kept: torch.Tensor
    alpha: float
    eps: float


class MaskRecorder(TrainerCallback):
    """Keeps the shown masks of a few pictures [B, C, H, W] before the first step, after every `every` steps and after the
    last: `records`, for `replay_explorer`. A loop of your own calls `record`. Nothing random is drawn: the training stays
    the same."""

    def __init__(self, pixel_values: torch.Tensor, every: int = 20):
        self.pixel_values, self.every, self.records = pixel_values, every, []

    def record(self, diffmask: VisionDiffMask, step: int) -> None:
        """Explain the pictures with the present gates and remember what they show."""
        shown = diffmask.explain(self.pixel_values.to(diffmask.device))
        alpha, eps = diffmask.multiplier.value[-1].item(), diffmask.config.eps
        self.records.append(MaskRecord(step, shown.mask.cpu(), shown.kl.cpu(), shown.kept.cpu(), alpha, eps))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.records = []
        self.record(model, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.record(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.records[-1].step != state.global_step:
            self.record(model, state.global_step)


def train_diffmask(
    diffmask: VisionDiffMask,
    train_data: Pictures,
    eval_data: Pictures,
    chosen: DiffMaskSettings,
    output_dir: str | Path,
    resume: str | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> dict[str, float]:
    """Train gates, placeholder and multipliers in place and save them to `output_dir`.

    Returns `evaluate_diffmask` on `eval_data`, with an `eval_` before every name.
    """
    chosen.validate()
    output_dir = Path(output_dir)
    if not diffmask.config.base_name_or_path:  # a base that was never saved goes with the run
        save_classifier(diffmask.base, output_dir / "base")
        diffmask.config.base_name_or_path = str(output_dir / "base")
    # weights do not depend on what ran before in this process
    set_seed(chosen.seed)
    arguments = _arguments(
        chosen, output_dir, "adamw_torch", max_grad_norm=0.0, eval_strategy="steps", eval_steps=chosen.log_every_n_steps,
        save_strategy="steps", save_steps=chosen.log_every_n_steps, save_total_limit=2, remove_unused_columns=False,
        ddp_find_unused_parameters=True,
    )  # fmt: skip
    trainer = DiffMaskTrainer(
        diffmask, arguments, chosen, train_dataset=train_data, eval_dataset=eval_data,
        callbacks=[ClampMultiplier(), *callbacks],
    )  # fmt: skip
    _finish(trainer, chosen, resume)
    trainer.save_model()
    diffmask.eval()
    return trainer.evaluate()


@torch.no_grad()
def evaluate_diffmask(diffmask: VisionDiffMask, data: Pictures, batch_size: int = 128) -> dict[str, float]:
    """Facts about the *shown* masks over a dataset.

    `kl`: mean in nats. `feasible`: share of images with KL ≤ ε. `unchanged`: share whose predicted class stays.
    `kept`: mean of the mask. On tasks with a known truth also `iou` and `js` (see `metrics`).
    """
    parts = []
    for batch in DataLoader(data, batch_size):
        shown = diffmask.explain(batch["pixel_values"].to(diffmask.device))
        unchanged = shown.masked_logits.argmax(-1) == shown.logits.argmax(-1)
        parts.append(torch.stack([shown.kl, (shown.kl <= diffmask.config.eps).float(), unchanged.float(), shown.kept]))
    return dict(zip(("kl", "feasible", "unchanged", "kept"), torch.cat(parts, 1).mean(1).tolist(), strict=True))
