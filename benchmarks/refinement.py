"""What refining a mask for one picture gains and costs: `python benchmarks/refinement.py cifar10`, and `shapes`.

Refined with every ε and with several seeds, on the same test images: what is kept, at what KL, and how much the masks of the
seeds agree (patch IoU, beside that of masks of the same sizes at random places, and the rank correlation of their orders). Where
the object is known (shapes), the IoU with the patches that touch it too. The first rows are what the gate networks say.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pandas as pd
from shipped import DATASETS, promise, shipped
from transformers.utils import logging as transformers_logging

from vdm_utils.diffmask import Explanation
from vdm_utils.metrics import on_grid, patch_iou
from vdm_utils.refine import refine
from vdm_utils.sanity import likeness, seed_stability


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=DATASETS)
    parser.add_argument("--part", default="diffmask", help="which DiffMask of the task the searches start from")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--from_nothing", action="store_true", help="the gates have no say")
    parser.add_argument("--steps", type=int, default=50, help="of every search")
    parser.add_argument("--eps", type=float, nargs="+", default=[0.03, 0.1, 0.3])
    parser.add_argument("--seeds", type=int, default=5, help="refinements with the ε of the gate networks")
    parser.add_argument("--table", type=Path, help="CSV to write; the agreement of the seeds goes to …_seeds.csv")
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    diffmask, chosen, batch = shipped(wanted.task, wanted.images, wanted.part)
    pictures, usual = batch["pixel_values"], diffmask.config.eps
    facts, masks, scores = [], [], []

    def note(masks: str, eps: float, seed: int, shown: Explanation) -> None:
        row = pd.DataFrame({"masks": masks, "ε": eps, "seed": seed, "picture": chosen}).join(promise(shown, eps))
        if "truth" in batch:
            touched = on_grid(batch["truth"], diffmask.view.grid) > 0
            row["IoU"] = patch_iou(shown.mask, touched.float())
        facts.append(row)
        print(f"{masks}, ε {eps}, seed {seed}:", facts[-1].drop(columns=["masks", "ε", "seed", "picture"]).mean().round(3).to_dict(), flush=True)  # fmt: skip

    note("gates", usual, 0, diffmask.explain(pictures))
    for seed in range(wanted.seeds):
        shown = refine(diffmask, pictures, wanted.steps, seed=seed, from_nothing=wanted.from_nothing)
        note("refined", usual, seed, shown)
        masks.append(shown.mask)
        scores.append(shown.scores)
    for eps in wanted.eps:
        if eps != usual:
            note("refined", eps, 0, refine(diffmask, pictures, wanted.steps, eps=eps, from_nothing=wanted.from_nothing))
    if wanted.table:
        pd.concat(facts).to_csv(wanted.table, float_format="%.4f", index=False)
    if len(masks) < 2:
        return
    agreement = seed_stability(masks).table
    agreement["rank correlation"] = [likeness(*pair) for pair in itertools.combinations(scores, 2)]
    print(agreement.mean().round(3).to_string())
    if wanted.table:
        agreement.to_csv(wanted.table.with_stem(wanted.table.stem + "_seeds"), float_format="%.4f", index_label="seeds")


if __name__ == "__main__":
    main()
