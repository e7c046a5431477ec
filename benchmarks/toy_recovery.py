"""Does Vision DiffMask find the truth on the toy task, for every seed? And what breaks when a part is missing?

    python benchmarks/toy_recovery.py --seeds 10                     # the recipe, ten bases, ten DiffMasks
    python benchmarks/toy_recovery.py --seeds 10 --without all       # every ablation as well
    python benchmarks/toy_recovery.py --seeds 2 --grid_size 5 --class_idx 1

A base and a DiffMask are trained from every seed; the table is measured on the 1,000 images of the test split, which
nothing was trained or tuned on. Grids above 3×3 have a base and a recipe of their own (`RECIPES`). Rows are appended to a
CSV, so an interrupted run goes on where it stopped. Seconds are processor time of the DiffMask's training: on one thread
what an idle machine takes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from transformers import TrainerCallback, ViTForImageClassification, set_seed
from transformers.utils import logging as transformers_logging

from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.metrics import truth_report
from vdm_utils.training import (
    ClassifierSettings,
    DiffMaskSettings,
    evaluate_classifier,
    settings,
    train_classifier,
    train_diffmask,
)
from vdm_utils.vit import build_classifier, load_classifier


class WrongSign(TrainerCallback):
    """The reference's bug: the multiplier descends where it should ascend."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["maximize"] = False


@dataclass(frozen=True)
class Recipe:
    """A base's attention heads, training steps per row and share of grids with empty cells; how its DiffMask is trained."""

    heads: int
    steps_per_row: int
    empty_cells: float
    name: str
    changes: dict = field(default_factory=dict)


SMALL = Recipe(heads=4, steps_per_row=200, empty_cells=0.0, name="quick")
# A classifier of 16 cells and more counts right long before it is sure where all distractors look alike, as they do behind a
# perfect mask: then the truth itself breaks the promise. One head and more steps help; grids with empty cells, among those it
# learns from, settle it. And random masks that drop half of so many cells cost so much KL that α soars, and gates close at "keep"
# for a whole distractor colour: start with nearly all kept and a low price instead.
LARGE = Recipe(
    heads=1, steps_per_row=500, empty_cells=0.5, name="pictures", changes={"max_steps": 1000, "dataset": "toy"}
)
# On 4×4 with a price of at least 3 and a faster placeholder: below, counted cells stay a little open to the end, every batch drops
# one of them, and the placeholder may follow these few grids instead of all (chosen on seeds 103–116).
FOUR = replace(LARGE, changes=LARGE.changes | {"alpha": 3.0, "alpha_min": 3.0, "lr_placeholder": 0.02})
RECIPES = {2: SMALL, 3: SMALL, 4: FOUR}  # by rows; above, LARGE

# name: (changes to the recipe, callbacks)
ABLATIONS = {
    "recipe": ({}, ()),
    "dual sign wrong": ({}, (WrongSign(),)),
    "α from 0.1, floor 0.01": ({"alpha": 0.1, "alpha_min": 0.01}, ()),
    "α from 0.1, floor 0.01, dual sign wrong": ({"alpha": 0.1, "alpha_min": 0.01}, (WrongSign(),)),
    "no slow-down at the end": ({"lr_decay": 0.0}, ()),
    "mean KL held at ε": ({"kl_quantile": 0.0}, ()),
    "no LayerNorm, no zero start": ({"normalize": False, "zero_start": False}, ()),
    "add 8": ({"add_activation": 8.0}, ()),
    "placeholder lr 1e-3": ({"lr_placeholder": 1e-3}, ()),
    "Adam β2 0.999": ({"adam_beta2": 0.999}, ()),
    "plain α, lr 0.3": ({"log_multiplier": False, "lr_alpha": 0.3}, ()),
    "no floor on α": ({"alpha_min": 1e-4}, ()),
    "gate range 6": ({"mul_activation": 6.0}, ()),
}


def base_for(seed: int, grid_size: int, class_idx: int, folder: Path, steps: int, heads: int, empty_cells: float):
    """The classifier of a seed, trained once, its data and its accuracy: (model, train, validation, test, accuracy)."""
    options = {"grid_size": grid_size, "class_idx": class_idx, "seed": seed}
    train, validation, test = (load_data("toy", split, **options) for split in ("train", "validation", "test"))
    if not (folder / "config.json").exists():
        set_seed(seed)
        model = build_classifier("vit", "tiny", train.image_size, train.patch_size, id2label=train.id2label)
        if heads != model.config.num_attention_heads:
            model.config.num_attention_heads = heads
            set_seed(seed)
            model = ViTForImageClassification(model.config)
        # no early stop: long after the last error it still grows surer
        chosen = settings(
            ClassifierSettings, "quick", max_steps=steps, log_every_n_steps=100, patience=steps, seed=seed
        )
        schooling = load_data("toy", "train", empty_cells=empty_cells, **options)
        train_classifier(model, schooling, validation, chosen, folder)
    model = load_classifier(str(folder))
    return model, train, validation, test, evaluate_classifier(model, test)["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--grid_size", type=int, default=3)
    parser.add_argument("--class_idx", type=int, default=3)
    parser.add_argument("--base_heads", type=int, help="attention heads of the classifier; default: by grid size")
    parser.add_argument("--base_steps", type=int, help="training steps of the classifier; default: by grid size")
    parser.add_argument(
        "--empty_cells", type=float, help="share of the classifier's grids with empty cells; default: by grid size"
    )
    parser.add_argument("--without", nargs="*", default=["recipe"], help=f"'all' or names from {list(ABLATIONS)}")
    parser.add_argument("--set", nargs="*", default=[], help="further changes to the recipe, name=number")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output_dir", type=Path, default=Path("runs/toy_recovery"))
    parser.add_argument(
        "--table", type=Path, default=None, help="CSV to write; default: table.csv in the output folder"
    )
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    names = list(ABLATIONS) if wanted.without == ["all"] else wanted.without
    changes = {
        name: float(value) if "." in value or "e" in value else int(value)
        for name, value in (s.split("=") for s in wanted.set)
    }
    table = wanted.table or wanted.output_dir / "table.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES.get(wanted.grid_size, LARGE)
    usual = (recipe.heads, recipe.steps_per_row * wanted.grid_size, recipe.empty_cells)
    given = (wanted.base_heads, wanted.base_steps, wanted.empty_cells)
    heads, steps, empty = (own if asked is None else asked for own, asked in zip(usual, given, strict=True))
    base = "" if (heads, steps, empty) == usual else f", base with {heads} head(s), {steps} steps and {empty} empty"
    task = f"grid{wanted.grid_size}-class{wanted.class_idx}{base.replace(' ', '-')}"
    for seed in range(wanted.first_seed, wanted.first_seed + wanted.seeds):
        folder = wanted.output_dir / task / f"seed{seed}"
        model, train, validation, test, accuracy = base_for(
            seed, wanted.grid_size, wanted.class_idx, folder / "base", steps, heads, empty
        )
        for name in names:
            what = name + base + "".join(f", {change}" for change in wanted.set)
            key = {"without": what, "grid": wanted.grid_size, "class": wanted.class_idx, "seed": seed}
            rows = pd.read_csv(table).to_dict("records") if table.exists() else []
            if any(all(row[k] == v for k, v in key.items()) for row in rows):
                continue
            own, callbacks = ABLATIONS[name]
            own = recipe.changes | own | changes
            chosen = settings(DiffMaskSettings, recipe.name, seed=seed, log_every_n_steps=100_000, **own)
            set_seed(seed)
            diffmask = VisionDiffMask.for_classifier(model, **chosen.config())
            start = time.process_time()
            train_diffmask(diffmask, train, validation, chosen, folder / name.replace(" ", "-"), callbacks=callbacks)
            seconds = time.process_time() - start
            row = key | {"base_accuracy": accuracy} | truth_report(diffmask, test)
            row |= {"alpha_last": diffmask.multiplier.value[-1].item(), "seconds": seconds}
            pd.DataFrame([row]).to_csv(table, mode="a", header=not table.exists(), index=False, float_format="%.5g")
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
