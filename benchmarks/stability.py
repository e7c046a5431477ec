"""Do gates that differ in their seed alone keep the same patches of a photograph? `python benchmarks/stability.py`

DiffMasks of the CIFAR-10 classifier, trained with the command of its card and one seed each (six minutes apiece; an
interrupted one goes on from its last checkpoint, a finished one is loaded). What each keeps and breaks, and for every pair the
IoU of their masks, as shown and cut to fit, beside that of random masks of the same sizes, and the rank correlation of their scores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pandas as pd
from shipped import promise, shipped
from transformers.utils import logging as transformers_logging

from vdm_utils.__main__ import parse
from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.notebook import checkpoint, finished
from vdm_utils.refine import cut_to_fit
from vdm_utils.sanity import likeness, seed_stability
from vdm_utils.settings import DiffMaskSettings
from vdm_utils.training import train_diffmask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--runs", type=Path, default=Path("runs/stability"), help="where the DiffMasks are, or will be")
    parser.add_argument("--table", type=Path, help="CSV to write")
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    diffmask, _, batch = shipped("cifar10", wanted.images)
    card = json.loads(Path(checkpoint("cifar10", "diffmask"), "card.json").read_text())
    words = shlex.split(card["command"][0].partition(" train ")[2])
    base, pictures, found, rows = diffmask.base, batch["pixel_values"], [], []
    for seed in range(wanted.seeds):
        folder = wanted.runs / f"seed-{seed}"
        if not finished(folder):
            chosen = replace(parse(DiffMaskSettings, "train", words), seed=seed)
            fresh, data = VisionDiffMask.for_classifier(base, **chosen.config()), ("train", "validation")
            train_diffmask(fresh, *(load_data("CIFAR10", split) for split in data), chosen, folder, resume="last")
        trained = VisionDiffMask.from_pretrained(folder, base=base)
        shown, fit = trained.explain(pictures), cut_to_fit(trained, pictures)
        found.append({"as shown": shown.mask, "cut to fit": fit.mask, "scores": shown.scores})
        facts = promise(shown, trained.config.eps).mean().to_dict()
        rows.append({"seeds": seed + 1} | facts | {"cut to fit, kept": fit.kept.mean().item()})
        print(rows[-1], flush=True)
    for way in ("as shown", "cut to fit"):
        for pair, row in seed_stability([masks[way] for masks in found]).table.iterrows():
            rows.append({"seeds": pair, "masks": way} | row.to_dict())
    for one, two in itertools.combinations(range(wanted.seeds), 2):
        alike = likeness(found[one]["scores"], found[two]["scores"])
        rows.append({"seeds": f"{one + 1} and {two + 1}", "masks": "scores", "rank correlation": alike})
    table = pd.DataFrame(rows)
    print(table.groupby("masks")[["IoU", "at random", "rank correlation"]].mean().round(3).to_string())
    if wanted.table:
        wanted.table.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(wanted.table, float_format="%.4f", index=False)


if __name__ == "__main__":
    main()
