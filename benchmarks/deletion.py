"""The paper's deletion curves on a shipped pair: `python benchmarks/deletion.py cifar10 --images 500`.

Patches of test images are replaced by uniform noise in the order of each method, important ones first or last; every number is
the mean over 29 points of the curve and over the images, with the half-width of a 95 % bootstrap interval over images.
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

DATASETS = {"cifar10": "CIFAR10", "shapes": "shapes", "digits": "digits"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=DATASETS)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--table", type=Path, help="CSV to write")
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    diffmask = VisionDiffMask.from_pretrained(checkpoint(wanted.task, "diffmask"))
    data = load_data(DATASETS[wanted.task], "test")
    chosen = torch.linspace(0, len(data) - 1, min(wanted.images, len(data))).long().tolist()  # spread over the classes
    methods = {
        "DiffMask": lambda x: diffmask.explain(x, check=False).scores,
        "Grad-CAM": lambda x: grad_cam(diffmask.base, x),
        "rollout": lambda x: attention_rollout(diffmask.base, x),
        "random": lambda x: torch.rand(len(x), *diffmask.view.grid, generator=torch.Generator().manual_seed(0)),
    }
    rows = []
    for name, method in methods.items():
        row = {"method": name}
        for direction in ("first", "last"):
            parts = []
            for batch in torch.tensor(chosen).split(100):
                pictures = data.batch(batch.tolist())["pixel_values"]
                curves = deletion_curves(diffmask.base, pictures, method(pictures), direction == "first")
                parts.append(torch.stack([curve.mean(1) for curve in curves]))
            probability, kl = torch.cat(parts, 1)
            for measure, values in (("acc", probability), ("KL", kl)):
                mean, low, high = bootstrap(values)
                row |= {f"{measure} {direction}": mean, f"{measure} {direction} ±": (high - low) / 2}
        rows.append(row)
    table = pd.DataFrame(rows).set_index("method")
    print(table.round(3).to_string())
    if wanted.table:
        table.to_csv(wanted.table, float_format="%.4f")


if __name__ == "__main__":
    main()
