"""What can be asked of a run: the options of the command line with their defaults, and named sets of them (recipes)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Literal, get_args, get_origin, get_type_hints

from transformers.integrations import get_available_reporting_integrations

from vdm_utils.data import AUGMENTATIONS, DATASETS, SPLITS
from vdm_utils.diffmask import VisionDiffMaskConfig, check_numbers
from vdm_utils.errors import VDMError, unknown_name

# name: (lowest allowed, first not allowed)
LIMITS = {
    "seed": (0, 2**32), "batch_size": (1, 2**20), "num_gates": (0, 10**6), "num_workers": (0, 1024), "num_epochs": (1e-9, 1e9), "log_every_n_steps": (1, 2**32),
    "warmup_steps": (0, 2**32), "gate_warmup_steps": (0, 2**32), "patience": (1, 2**32), "lr": (0, 1e3), "weight_decay": (0, 1e3),
    "sample_images": (0, 2**20), "refine": (0, 2**20), "fit": (0, 10**4), "block_size": (1, 2**10), "shortcut": (0, 1.001), "patch_dropout": (0, 1), "patch_masking": (0, 1.001), "empty_cells": (0, 1.001), "adam_beta2": (0, 1), "lr_decay": (0, 1.001), "last_layer_share": (0, 1.001), "block_share": (0, 1.001),
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
    add_stretch: bool = option(False, "augment training images: width and height by ±15 %, slanted by up to 15 %")
    augment_cells: bool = option(False, "flip, shift, rotate and stretch every picture of a grid, not the whole grid")
    batch_size: int = option(32, "images per step and device")
    num_workers: int = option(4, "processes that load data; 0 loads in the main process")
    bf16: bool = option(False, "multiply matrices in bfloat16, where the processor can")
    num_epochs: float = option(5, "passes over the training data")
    max_steps: int = option(-1, "stop after this many steps; -1: after num_epochs")
    log_every_n_steps: int = option(
        200,
        "steps between log lines, evaluations and checkpoints; "
        "without --max_steps train-base evaluates and saves after every epoch",
    )
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
    empty_cells: float = option(
        0.0, "share of the training grids with some cells left empty; the label counts what is left"
    )
    mimetic_start: bool = option(False, "start the attention of a ViT trained from scratch where trained ones end up")
    patience: int = option(5, "stop after this many evaluations without a better validation accuracy")

    def data_options(self) -> dict:
        """Keyword arguments for `load_data`."""
        return super().data_options() | {"empty_cells": self.empty_cells}


@dataclass
class DiffMaskSettings(RunSettings):
    """Settings of `train`."""

    dataset: Literal[DATASETS] = option("CIFAR10", "task to train on")
    base_model: Literal["ViT"] = option("ViT", "architecture of the base")
    from_pretrained: str = option(
        "tanlq/vit-base-patch16-224-in21k-finetuned-cifar10", "Hub name or folder of the classifier to explain"
    )
    diffmask_checkpoint: str | None = option(None, "checkpoint folder of an interrupted run to resume, or 'last'")
    start_from: str | None = option(
        None, "folder of another DiffMask to start from, of a base of the same shape: gates, placeholder, multipliers"
    )
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
    num_gates: int = option(0, "gates, on the first so many hidden states; 0: one on each")
    herding_layer: int = option(
        -1, "hidden state in which patches are ranked by kernel herding, for the gates from there on; -1: no ranks"
    )
    keep_class: bool = option(
        False, "hold the KL below what could change the class, where that is less than eps; gates see how much it is"
    )
    no_placeholder: bool = option(False, "replace dropped patches by zeros instead of a learned placeholder")
    grey_start: bool = option(False, "start the placeholder as the embedding of an empty, mid-grey patch, not as noise")
    last_layer_share: float = option(
        0.0, "share of the steps spent on the last gate, whose mask is the one that is shown"
    )
    block_share: float = option(0.0, "first share of the steps in which squares of patches share one gate")
    block_size: int = option(2, "patches per side of such a square")
    shared_noise: bool = option(False, "draw one random number per gate for all patches of an image, not one for each")
    weighted_layer_distribution: bool = option(False, "draw layers that are already accurate and sparse less often")

    def config(self) -> dict:
        """Keyword arguments for `VisionDiffMask.for_classifier`."""
        names = ("alpha", "alpha_min", "alpha_max", "log_multiplier", "eps", "kl_quantile", "mul_activation", "add_activation",
                 "normalize", "zero_start", "herding_layer", "keep_class", "no_placeholder")  # fmt: skip
        return {name: getattr(self, name) for name in names} | ({"num_gates": self.num_gates} if self.num_gates else {})

    def validate(self) -> None:
        """Raise `VDMError` for a number that no training run can use."""
        super().validate()
        unknown = {"num_gates": 10**6}  # how many there can be depends on the base: that is checked with it
        check_numbers(VisionDiffMaskConfig(**unknown | self.config()), "training settings")


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
    fit: int = option(0, "try so many sizes of mask, and show the smallest that keeps the promise; 0: do not")
    refine: int = option(
        0, "search from the gates on, eight times so many steps, for each picture by itself; 0: show what the gates say"
    )
    from_nothing: bool = option(
        False, "search from equal chances, not from the gates: for an order where many masks do; needs --refine"
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
    known = {one.name for one in fields(kind)}
    for name in changes:
        if name not in known:
            raise unknown_name("setting", name, known, "settings")
    return kind(**{"recipe": recipe, **RECIPES[recipe].get(kind, {}), **changes})


def _out_of_range(name, expected, got) -> VDMError:
    return VDMError(
        f"{name} is out of range", where="training settings", expected=expected, got=got, fix=f"change {name}"
    )
