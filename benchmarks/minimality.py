"""Is the learned mask as small as it can be? Enumerate all 512 masks of 3×3 grids with the learned placeholder.

    python benchmarks/minimality.py data/checkpoints/toy/diffmask

For every image: the smallest number of kept patches with KL ≤ ε, against the size of the learned mask (> 0.5), and
whether a smallest mask differs from the truth.
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers.utils import logging as transformers_logging

from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.metrics import smallest_masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("diffmask")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--class_idx", type=int, default=3)
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    diffmask = VisionDiffMask.from_pretrained(wanted.diffmask)
    batch = load_data("toy", "test", class_idx=wanted.class_idx).batch(range(wanted.images))
    learned = (diffmask.explain(batch["pixel_values"]).mask > 0.5).flatten(1)
    true = batch["truth"].flatten(1) > 0.5
    smallest, number = [], []
    truth_is_smallest = 0
    for pixels, truth in zip(batch["pixel_values"], true):
        masks = smallest_masks(diffmask, pixels)  # [M, N], all of the smallest size
        smallest.append(int(masks[0].sum()))
        number.append(len(masks))
        truth_is_smallest += bool((masks == truth).all(1).any())
    size = torch.tensor(smallest)
    excess = (learned.sum(1) - size).float()
    print(json.dumps({
        "images": wanted.images,
        "mean learned size": learned.sum(1).float().mean().item(),
        "mean smallest size": size.float().mean().item(),
        "mean excess": excess.mean().item(),
        "share with excess": (excess > 0).float().mean().item(),
        "share where the truth is a smallest mask": truth_is_smallest / wanted.images,
        "share where the smallest mask is smaller than the truth": (size < true.sum(1)).float().mean().item(),
        "mean number of smallest masks": sum(number) / len(number),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
