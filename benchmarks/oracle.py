"""What does the *true* mask cost a classifier? `python benchmarks/oracle.py toy shapes digits-count cifar10-count`

A mask can only be expected to be the truth where the truth keeps the promise. So the mask is given (a patch is kept when any of
its pixels is true), and nothing but the placeholder is learned, for this mask alone. KL in nats and the share of unseen test
pictures with KL ≤ ε and with the same class, of all and of those that are classified right; beside it the same with zeros, and
with what the classifier sees in an empty, mid-grey patch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from shipped import promise
from transformers.utils import logging as transformers_logging

from vdm_utils.data import Pictures, load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.explorers import with_mask
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


def true_mask(batch: dict[str, torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """1 on every patch that has a true pixel, [B, rows, cols]."""
    return (on_grid(batch["truth"], grid) > 0).float()


def learn_placeholder(diffmask: VisionDiffMask, pictures: Pictures, steps: int) -> None:
    """Fit the placeholder, and nothing else, to the true masks of `steps` batches of 32."""
    optimizer = torch.optim.Adam([diffmask.placeholder], lr=1e-2, betas=(0.9, 0.95))
    for step in range(steps):
        batch = pictures.batch(range(32 * step, 32 * step + 32))
        states = diffmask.view.encode(batch["pixel_values"])
        masked = diffmask.masked_logits(batch["pixel_values"], states, true_mask(batch, states.grid))
        optimizer.zero_grad()
        kl_divergence(states.logits, masked).mean().backward()
        optimizer.step()


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
        for fill in ("zeros", "grey", "learned placeholder"):
            torch.manual_seed(0)
            diffmask = VisionDiffMask.for_classifier(base, no_placeholder=fill == "zeros")
            if fill == "grey":
                diffmask.start_grey()
            elif fill != "zeros":
                learn_placeholder(diffmask, train, wanted.steps)
            facts = []
            for at in range(0, wanted.images, 50):
                batch = test.batch(range(at, at + 50))
                shown = diffmask.explain(batch["pixel_values"], check=False)
                shown = with_mask(diffmask, batch["pixel_values"], shown, true_mask(batch, diffmask.view.grid))
                right = shown.logits.argmax(-1) == batch["labels"]
                facts.append(promise(shown, wanted.eps).assign(right=right))
            facts = pd.concat(facts)
            for pictures, chosen in (("all", facts), ("right", facts[facts["right"]])):
                means = chosen[["KL", "KL ≤ ε", "same class"]].mean()
                rows.append({"task": task, "fill": fill, "pictures": pictures} | means.to_dict())
                print(f"{task}, {fill}, {pictures}:", means.round(3).to_dict(), flush=True)
    if wanted.table:
        pd.DataFrame(rows).to_csv(wanted.table, float_format="%.4f", index=False)


if __name__ == "__main__":
    main()
