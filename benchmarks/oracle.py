"""What does the *true* mask cost a classifier? `python benchmarks/oracle.py toy shapes digits-count cifar10-count`

A mask can only be expected to be the truth where the truth keeps the promise. So the mask is given (a patch is kept when any of
its pixels is true), and nothing but the placeholder is learned, for this mask alone. KL in nats and the share of unseen test
pictures with KL ≤ ε and with the same class, of all and of those that are classified right; beside it the same with zeros.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from transformers.utils import logging as transformers_logging

from vdm_utils.data import Pictures, load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.metrics import on_grid
from vdm_utils.notebook import checkpoint
from vdm_utils.objective import kl_divergence
from vdm_utils.vit import load_classifier

TASKS = {
    "toy": {"name": "toy"},
    "shapes": {"name": "shapes"},
    "digits-count": {"name": "digits_QA"},
    "cifar10-count": {"name": "CIFAR10_QA", "grid_size": 2, "class_idx": 1},
}


def cost(diffmask: VisionDiffMask, pictures: Pictures, chosen: range) -> tuple[torch.Tensor, ...]:
    """KL under the true mask, whether the class stays, and whether it was right: each [len(chosen)]."""
    batch = pictures.batch(chosen)
    states = diffmask.view.encode(batch["pixel_values"])
    mask = (on_grid(batch["truth"], states.grid) > 0).float()
    masked = diffmask.masked_logits(batch["pixel_values"], states, mask)
    before = states.logits.argmax(-1)
    return kl_divergence(states.logits, masked), before == masked.argmax(-1), before == batch["labels"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--base", help="folder of a classifier; default: the one that ships for the task")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--table", type=Path, help="CSV to write")
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    rows = []
    for task in wanted.tasks:
        base = load_classifier(wanted.base or checkpoint(task, "base"))
        train, test = (load_data(**TASKS[task], split=split) for split in ("train", "test"))
        for fill in ("zeros", "learned placeholder"):
            torch.manual_seed(0)
            diffmask = VisionDiffMask.for_classifier(base, no_placeholder=fill == "zeros")
            if fill != "zeros":
                optimizer = torch.optim.Adam([diffmask.placeholder], lr=1e-2, betas=(0.9, 0.95))
                for step in range(wanted.steps):
                    optimizer.zero_grad()
                    cost(diffmask, train, range(32 * step, 32 * step + 32))[0].mean().backward()
                    optimizer.step()
            with torch.no_grad():
                parts = [cost(diffmask, test, range(at, at + 50)) for at in range(0, wanted.images, 50)]
            kl, same, right = map(torch.cat, zip(*parts))
            for pictures, which in (("all", torch.ones_like(right)), ("right", right)):
                share = {
                    "KL": kl[which],
                    "KL ≤ ε": (kl[which] <= wanted.eps).float(),
                    "same class": same[which].float(),
                }
                rows.append(
                    {"task": task, "fill": fill, "pictures": pictures} | {k: v.mean().item() for k, v in share.items()}
                )
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    if wanted.table:
        pd.DataFrame(rows).to_csv(wanted.table, float_format="%.4f", index=False)


if __name__ == "__main__":
    main()
