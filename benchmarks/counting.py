"""Does a mask lie on what was counted? `python benchmarks/counting.py cifar10-count`, and `digits-count`.

On test grids, in columns: all of them, those that are counted right and have something to count, and of these the ones that also
have something else. How many are exact; the share of the mass on counted cells of the shipped DiffMask, of rollout, of Grad-CAM,
and of a map that is 1 everywhere; what the DiffMask keeps, and what that costs; what it keeps by count, where that is right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from oracle import TASKS
from shipped import promise
from torch.utils.data import Subset
from transformers.utils import logging as transformers_logging

from vdm_utils.attributions import METHODS
from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.metrics import mass_accuracy
from vdm_utils.notebook import checkpoint
from vdm_utils.training import evaluate_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[task for task in TASKS if task.endswith("-count")])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--exact", type=int, default=4000, help="grids on which the classifier alone is measured")
    parser.add_argument("--table", type=Path, help="CSV to write")
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    diffmask = VisionDiffMask.from_pretrained(checkpoint(wanted.task, "diffmask"))
    data = load_data(**TASKS[wanted.task], split="test", length=max(wanted.exact, wanted.images))
    facts = []
    for at in range(0, wanted.images, 50):
        batch = data.batch(range(at, min(at + 50, wanted.images)))
        pixel_values, labels = batch["pixel_values"], batch["labels"]
        shown = diffmask.explain(pixel_values)
        maps = {"Vision DiffMask": shown.mask, "every patch": torch.ones_like(shown.mask)}
        maps |= {name: METHODS[name](diffmask.base, pixel_values) for name in ("Attention rollout", "Grad-CAM")}
        mass = {f"mass: {name}": mass_accuracy(scores, batch["truth"]) for name, scores in maps.items()}
        right = shown.logits.argmax(-1) == labels
        facts.append(promise(shown, diffmask.config.eps).assign(**mass, right=right, count=labels))
    facts = pd.concat(facts)
    some = facts["right"] & (facts["count"] > 0)
    columns = {"all": slice(None), "right": some, "mixed": some & (facts["count"] < facts["count"].max())}
    table = pd.DataFrame(
        {name: facts[chosen].drop(columns=["right", "count"]).mean() for name, chosen in columns.items()}
    )
    for count, kept in facts[facts["right"]].groupby("count")["kept"].mean().items():
        table.loc[f"kept, {count} counted", "right"] = kept
    exact = evaluate_classifier(diffmask.base, Subset(data, range(wanted.exact)))["accuracy"]
    table.loc["exact", "all"] = exact
    print(table.round(3).to_string())
    if wanted.table:
        table.rename_axis("measure").to_csv(wanted.table, float_format="%.4f")


if __name__ == "__main__":
    main()
