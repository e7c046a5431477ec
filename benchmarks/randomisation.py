"""New gates for a classifier that forgot what it had learned: `python benchmarks/randomisation.py`

Adebayo et al. 2018 (arXiv 1810.03292) as it should be asked of a *trained* explanation. The classifier of shapes is drawn anew
from its head down, part after part, and a DiffMask is trained for each, with one recipe; the gates that were trained for the
classifier as it is are laid on it as well. What they keep, at what KL, and the rank correlation with the masks of the classifier
as it is. The first row repeats the training around that one with another seed, which says how alike two right answers are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from shipped import promise
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from vdm_utils.data import load_data
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.notebook import checkpoint
from vdm_utils.sanity import likeness, randomised, same_gates
from vdm_utils.training import DiffMaskSettings, settings, train_diffmask
from vdm_utils.vit import load_classifier


def train_gates(model: PreTrainedModel, steps: int, seed: int) -> VisionDiffMask:
    """A DiffMask of shapes for `model`, with the recipe of the one that ships."""
    chosen = settings(
        DiffMaskSettings, "pictures", dataset="shapes", max_steps=steps, log_every_n_steps=steps, seed=seed
    )
    diffmask = VisionDiffMask.for_classifier(model, **chosen.config())
    with TemporaryDirectory() as folder:
        train_diffmask(diffmask, *(load_data("shapes", split) for split in ("train", "validation")), chosen, folder)
    return diffmask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--down_to", nargs="+", default=["head", "layer 2", "embeddings"])
    parser.add_argument("--draws", type=int, default=2, help="of fresh weights; every one trains gates of its own")
    parser.add_argument("--table", type=Path, help="CSV to write")
    wanted = parser.parse_args()
    transformers_logging.disable_progress_bar()
    base = load_classifier(checkpoint("shapes", "base"))
    pictures, rows = load_data("shapes", "test").batch(range(wanted.images))["pixel_values"], []
    trained = train_gates(base, wanted.steps, 0)
    before = trained.explain(pictures)

    def note(weights: str, draw: int, gates: str, diffmask: VisionDiffMask) -> None:
        shown = diffmask.explain(pictures)
        facts = promise(shown, diffmask.config.eps).mean().to_dict()
        alike = likeness(before.scores, shown.scores)
        rows.append({"fresh weights": weights, "draw": draw, "gates": gates} | facts | {"rank correlation": alike})
        print(rows[-1], flush=True)

    note("none", 0, "trained for it", trained)
    note("none", 1, "trained for it", train_gates(base, wanted.steps, 1))
    for part in wanted.down_to:
        for draw in range(wanted.draws):
            model = randomised(base, part, draw)
            note(f"down to {part}", draw, "trained for it", train_gates(model, wanted.steps, draw))
            alike = likeness(before.scores, same_gates(trained)(model, pictures))
            rows.append(
                {"fresh weights": f"down to {part}", "draw": draw, "gates": "as before", "rank correlation": alike}
            )
            print(rows[-1], flush=True)
    if wanted.table:
        pd.DataFrame(rows).to_csv(wanted.table, float_format="%.4f", index=False)


if __name__ == "__main__":
    main()
