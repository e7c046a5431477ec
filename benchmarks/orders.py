"""Is there a rule for these masks? `python benchmarks/orders.py cifar10`, and `shapes`.

A gate network is one rule for all pictures. What would simple rules cost? The best 30, 50 and 70 % of the patches of 500 test
pictures are kept, by several orders, some of which never look at the picture (every other patch, from the centre out). KL in
nats, and the share of pictures with KL ≤ ε and with the same class, under the fill of the DiffMask that ships. The last rows are
that DiffMask's own masks, and those refined for one picture at a time, with what they keep.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from shipped import DATASETS, promise, shipped
from transformers.utils import logging as transformers_logging

from vdm_utils.attributions import METHODS
from vdm_utils.explorers import with_mask
from vdm_utils.faithfulness import top_fractions
from vdm_utils.refine import refine


def fixed_orders(count: int, rows: int, cols: int) -> dict[str, torch.Tensor]:
    """Scores [count, rows, cols] that no picture had a say in; equal ones are put in a random order."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, rows, cols, generator=generator)
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    distance = (row - (rows - 1) / 2).square() + (col - (cols - 1) / 2).square()
    return {
        "random": noise,
        "every other patch": (row + col) % 2 + 0.5 * noise,
        "from the centre out": 1e-3 * noise - distance,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=DATASETS)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--refine", type=int, default=100, help="steps of the refined masks; 0 leaves them out")
    parser.add_argument("--table", type=Path, help="CSV to write")
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    diffmask, _, batch = shipped(wanted.task, wanted.images)
    parts, eps, rows = batch["pixel_values"].split(100), diffmask.config.eps, {}

    def note(order: str, kept: str, costs: list[pd.DataFrame]) -> None:
        rows[order, kept] = pd.concat(costs).mean()
        print(f"{order}, {kept}:", rows[order, kept].round(3).to_dict(), flush=True)

    shown = [diffmask.explain(part) for part in parts]
    scores = {name: list(order.split(100)) for name, order in fixed_orders(wanted.images, *diffmask.view.grid).items()}
    for name in ("Attention rollout", "Grad-CAM"):
        scores[name] = [METHODS[name](diffmask.base, part) for part in parts]
    scores["Vision DiffMask"] = [one.scores for one in shown]
    for name, order in scores.items():
        for share in (0.3, 0.5, 0.7):
            masks = [top_fractions(part, [share])[:, 0].float() for part in order]
            costs = [promise(with_mask(diffmask, *three), eps) for three in zip(parts, shown, masks)]
            note(name, f"{share:.0%}", costs)
    note("Vision DiffMask", "as shown", [promise(one, eps) for one in shown])
    if wanted.refine:
        note("refined", "as shown", [promise(refine(diffmask, part, wanted.refine), eps) for part in parts])
    if wanted.table:
        pd.DataFrame.from_dict(rows, orient="index").rename_axis(["order", "patches"]).to_csv(
            wanted.table, float_format="%.4f"
        )


if __name__ == "__main__":
    main()
