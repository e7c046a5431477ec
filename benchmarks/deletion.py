"""The paper's deletion curves on a shipped pair: `python benchmarks/deletion.py cifar10 --images 500 --refine 100`.

Patches of test images are replaced by uniform noise in the order of each method, important ones first or last; every number is
the mean over 29 points of the curve and over the images, with the half-width of a 95 % bootstrap interval over images. Refined
masks are made with the placeholder and judged by noise; what they keep, and at what KL, is printed as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from transformers.utils import logging as transformers_logging

from vdm_utils.attributions import attention_rollout, grad_cam
from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.faithfulness import bootstrap
from vdm_utils.metrics import deletion_curves
from vdm_utils.notebook import checkpoint
from vdm_utils.refine import refine

DATASETS = {"cifar10": "CIFAR10", "shapes": "shapes", "digits": "digits"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=DATASETS)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--refine", type=int, default=0, help="steps of refinement for each image; 0: not measured")
    parser.add_argument(
        "--table", type=Path, help="CSV to write; what every mask keeps goes beside it, to …_pictures.csv"
    )
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    diffmask = VisionDiffMask.from_pretrained(checkpoint(wanted.task, "diffmask"))
    data = load_data(DATASETS[wanted.task], "test")
    chosen = torch.linspace(0, len(data) - 1, min(wanted.images, len(data))).long().tolist()  # spread over the classes
    batch = data.batch(chosen)
    pictures, labels = batch["pixel_values"], batch["labels"]
    parts = pictures.split(100)
    shown = {"DiffMask": [diffmask.explain(part) for part in parts]}
    if wanted.refine:
        shown["DiffMask, refined"] = [refine(diffmask, part, wanted.refine) for part in parts]
    facts = []
    for name, explained in shown.items():
        kept, kl, before, after = (
            torch.cat([getattr(one, field) for one in explained]) for field in ("kept", "kl", "logits", "masked_logits")
        )
        before, after = before.argmax(-1), after.argmax(-1)
        facts.append(pd.DataFrame({"method": name, "picture": chosen, "label": labels, "predicted": before, "kept": kept, "KL": kl,
                                   "KL ≤ ε": (kl <= diffmask.config.eps).int(), "same class": (before == after).int()}))  # fmt: skip
    facts = pd.concat(facts)
    print(facts.groupby("method")[["kept", "KL", "KL ≤ ε", "same class"]].mean().round(3).to_string(), flush=True)
    scores = {name: torch.cat([one.scores for one in explained]) for name, explained in shown.items()}
    scores["Grad-CAM"] = torch.cat([grad_cam(diffmask.base, part) for part in parts])
    scores["rollout"] = torch.cat([attention_rollout(diffmask.base, part) for part in parts])
    scores["random"] = torch.rand(len(pictures), *diffmask.view.grid, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, order in scores.items():
        row = {"method": name}
        for direction in ("first", "last"):
            curves = deletion_curves(diffmask.base, pictures, order, direction == "first")
            for measure, curve in zip(("acc", "KL"), curves):
                mean, low, high = bootstrap(curve.mean(1))
                row |= {f"{measure} {direction}": mean, f"{measure} {direction} ±": (high - low) / 2}
        rows.append(row)
    table = pd.DataFrame(rows).set_index("method")
    print(table.round(3).to_string())
    if wanted.table:
        table.to_csv(wanted.table, float_format="%.4f")
        facts.to_csv(wanted.table.with_stem(wanted.table.stem + "_pictures"), float_format="%.4f", index=False)


if __name__ == "__main__":
    main()
