"""What is kept of a classifier that cheats? `python benchmarks/shortcut.py [runs/seed-1 ...]`: the DiffMask that ships, and others.

On 1,000 held-out `shapes` with the tag that gives the class away: how often the classifier is right, and how often on the same
pictures without; what each DiffMask keeps, in patches, of the tag (which is one of the 64), for the class that needs its tag least
and for the one of the nine others that needs it least, and of all else; and what the masks cost.
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch
from shipped import promise
from transformers.utils import logging as transformers_logging

from vdm_utils.attributions import METHODS
from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.metrics import mass_accuracy, on_grid
from vdm_utils.notebook import checkpoint


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("diffmasks", nargs="*", help="folders of more, of this or other classifiers with 8×8 patches")
    parser.add_argument("--images", type=int, default=1000)
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    tagged, plain = (
        load_data("shapes", "validation", shortcut=share).batch(range(wanted.images)) for share in (1.0, 0.0)
    )
    pixel_values, labels = tagged["pixel_values"], tagged["labels"]
    differs = (pixel_values != plain["pixel_values"]).any(1).float()
    table = {}
    for folder in [checkpoint("shapes-tagged", "diffmask"), *wanted.diffmasks]:
        diffmask = VisionDiffMask.from_pretrained(folder)
        names = diffmask.base.config.id2label
        shown = diffmask.explain(pixel_values)
        tag = (on_grid(differs, shown.mask.shape[-2:]) > 0).float()
        without = diffmask.base(plain["pixel_values"]).logits.argmax(-1)
        of_tag = pd.Series((shown.mask * tag).sum((1, 2))).groupby(labels.numpy()).mean().sort_values()
        table[str(folder)[-24:]] = {
            "right": (shown.logits.argmax(-1) == labels).float().mean().item(),
            "right without tags": (without == labels).float().mean().item(),
            "says most without": names[without.mode().values.item()],
            "patches kept": shown.mask.sum((1, 2)).mean().item(),
            "of the tag, class that keeps it least": f"{of_tag.iloc[0]:.2f} ({names[of_tag.index[0]]})",
            "of the tag, least of the others": of_tag.iloc[1],
            "of all else": (shown.mask * (1 - tag)).sum((1, 2)).mean().item(),
            **promise(shown, diffmask.config.eps).drop(columns="kept").mean(),
        }
        for name in ("Attention rollout", "Grad-CAM") if len(table) == 1 else ():
            scores = METHODS[name](diffmask.base, pixel_values)
            flat, filled = scores.flatten(1), scores.amax((1, 2)) > scores.amin((1, 2))
            first = tag.flatten(1).gather(1, flat.argmax(1, keepdim=True))[:, 0]
            mass = mass_accuracy(scores - scores.amin((1, 2), keepdim=True), tag).nanmean().item()
            print(f"{name}: mass on the tag {mass:.2f}, largest there on {(first * filled).mean().item():.1%}, "
                  f"empty on {1 - filled.float().mean().item():.1%}")  # fmt: skip
    print(pd.DataFrame(table).map(lambda value: value if isinstance(value, str) else f"{value:.3f}").to_string())


if __name__ == "__main__":
    main()
