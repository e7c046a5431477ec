"""The paper's deletion curves on a shipped pair: `python benchmarks/deletion.py cifar10 --refine 50 --fills all`.

Patches of test images are replaced, by uniform noise as in the paper, in the order of each method, important ones first or
last; every number is the mean over 29 points of the curve and over the images, with the half-width of a 95 % bootstrap interval
over images. With more fills the methods are compared picture by picture as well: a win is one that holds under every fill.
Refined masks are made with the placeholder, so it is the other fills that judge them; their searches begin with the gates, and
with nothing (`--starts`). What the masks keep, and at what KL, is printed too, also of those that are cut to fit. A mask is a set
and not an order; `--dial` makes one of the sets of every ε that ships for the task: their log-probabilities are added up.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from shipped import DATASETS, promise, shipped
from transformers.utils import logging as transformers_logging

from vdm_utils.attributions import attention_rollout, grad_cam
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.faithfulness import compare, paired_comparison, perturbation_areas
from vdm_utils.metrics import FILLS
from vdm_utils.notebook import checkpoint
from vdm_utils.refine import cut_to_fit, refine

MEASURES, DIRECTIONS = {"probability": "acc", "kl": "KL"}, {"important first": "first", "unimportant first": "last"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=DATASETS)
    parser.add_argument("--part", default="diffmask", help="which DiffMask of the task, as diffmask-votes")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--refine", type=int, default=0, help="steps of every search of a refinement; 0: not measured")
    parser.add_argument(
        "--starts", nargs="+", default=["gates", "nothing"], choices=["gates", "nothing"], help="of the refinement"
    )
    parser.add_argument("--dial", action="store_true", help="also the order that all ε together give")
    parser.add_argument("--fills", nargs="+", default=["noise"], choices=[*FILLS, "all"])
    parser.add_argument("--table", type=Path, help="CSV to write; …_pictures.csv and …_paired.csv go beside it")
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    diffmask, chosen, batch = shipped(wanted.task, wanted.images, wanted.part)
    pictures, labels = batch["pixel_values"], batch["labels"]
    parts = pictures.split(100)
    shown = {"DiffMask": [diffmask.explain(part) for part in parts]}
    for start in wanted.starts if wanted.refine else []:
        name = "DiffMask, refined" + " from nothing" * (start == "nothing")
        shown[name] = [refine(diffmask, part, wanted.refine, from_nothing=start == "nothing") for part in parts]
    ours = list(shown)[1:] or ["DiffMask"]
    facts = []
    # these have the order of the gates, so only what they keep is new
    cut = {"DiffMask, cut to fit": [cut_to_fit(diffmask, part) for part in parts]}
    for name, explained in (shown | cut).items():
        kept = pd.concat([promise(one, diffmask.config.eps) for one in explained], ignore_index=True)
        predicted = torch.cat([one.logits for one in explained]).argmax(-1)
        facts.append(
            pd.DataFrame({"method": name, "picture": chosen, "label": labels, "predicted": predicted}).join(kept)
        )
    facts = pd.concat(facts)
    print(facts.groupby("method")[["kept", "KL", "KL ≤ ε", "same class"]].mean().round(3).to_string(), flush=True)
    scores = {name: torch.cat([one.scores for one in explained]) for name, explained in shown.items()}
    if wanted.dial:
        others = [checkpoint(wanted.task, f"diffmask-eps-{eps}") for eps in (0.03, 0.3)]
        every = [diffmask, *(VisionDiffMask.from_pretrained(other, base=diffmask.base) for other in others)]
        scores["DiffMask, every ε"] = torch.cat([sum(one.explain(part).scores for one in every) for part in parts])
    scores["Grad-CAM"] = torch.cat([grad_cam(diffmask.base, part) for part in parts])
    scores["rollout"] = torch.cat([attention_rollout(diffmask.base, part) for part in parts])
    fills = FILLS if "all" in wanted.fills else wanted.fills
    areas = perturbation_areas(diffmask, pictures, scores, fills)
    table = compare(areas[areas["fill"] == fills[-1]])
    table["name"] = table["measure"].map(MEASURES) + " " + table["direction"].map(DIRECTIONS)
    table["±"] = (table["high"] - table["low"]) / 2
    wide = table.pivot(index="method", columns="name", values=["area", "±"]).reindex([*scores, "random"])
    wide.columns = [name + " ±" * (kind == "±") for kind, name in wide.columns]
    wide = wide[sorted(wide.columns, key=lambda name: (name.split()[1], name))]
    print(f"fill: {fills[-1]}\n{wide.round(3).to_string()}")
    paired = pd.concat(
        [
            paired_comparison(areas, method, other).assign(method=method, other=other)
            for method in ours + ["DiffMask, every ε"] * wanted.dial
            for other in ("Grad-CAM", "rollout", "random")
        ]
    )
    print(f"method against other, positive where it is better\n{paired.round(4).to_string(index=False)}")
    if wanted.table:
        wide.to_csv(wanted.table, float_format="%.4f")
        for part, rows in (("_pictures", facts), ("_paired", paired)):
            rows.to_csv(wanted.table.with_stem(wanted.table.stem + part), float_format="%.4f", index=False)


if __name__ == "__main__":
    main()
