"""How deep does a mask have to look? Every depth's mask of a shipped DiffMask, and what it costs to leave the classifier there.

    python benchmarks/depths.py shapes cifar10 --table runs/depths.csv

A DiffMask whose gates are told how sure the answer is needs the whole pass: of CIFAR-10 it is the one whose gates are told nothing.
Costs are forward passes of the same 64 pictures, medians over the rounds of `speed.in_passes`; attention rollout and Grad-CAM
stand beside them, and the Grad-CAM of the grad-cam library, which computes the gradients of all layers and weights; ours stops
where the map is. Test pictures; nothing is trained.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from pytorch_grad_cam import GradCAM
from shipped import DATASETS, promise, shipped
from speed import in_passes
from transformers import PreTrainedModel

from vdm_utils.attributions import LogitsOnly, attention_rollout, grad_cam, to_grid
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.notebook import checkpoint
from vdm_utils.refine import cut_to_fit
from vdm_utils.vit import PatchView


def library_grad_cam(model: PreTrainedModel, pictures: torch.Tensor) -> None:
    """The map of `grad_cam` as the library computes it."""
    view = PatchView(model)
    with GradCAM(LogitsOnly(model), [view.layers[-2]], lambda tokens: to_grid(tokens, view).permute(0, 3, 1, 2)) as cam:
        cam(pictures, None)
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=sorted(DATASETS))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", type=Path, help="CSV to write")
    wanted, tables = parser.parse_args(), []
    for task in wanted.tasks:
        diffmask, _, batch = shipped(task, wanted.images)
        told = partial(diffmask.explain, batch["pixel_values"][:64], check=False)
        if diffmask.config.keep_class:
            diffmask = VisionDiffMask.from_pretrained(checkpoint(task, "diffmask-votes"), base=diffmask.base)
        pictures, model, gates = batch["pixel_values"], diffmask.base, range(diffmask.config.num_gates)
        some = pictures[:64]

        @torch.no_grad()
        def whole(model=model, some=some):
            model(some)

        mask = partial(diffmask.explain, some, check=False)
        jobs = {f"depth {k}": partial(mask, layer=k, stop_early=True) for k in gates}
        jobs |= {
            "mask": mask,
            "mask that ships": told,
            "rollout": partial(attention_rollout, model, some),
            "Grad-CAM": partial(grad_cam, model, some),
            "Grad-CAM of the library": partial(library_grad_cam, model, some),
        }
        cost = in_passes(whole, jobs, wanted.rounds)
        table = pd.DataFrame({"cost": {name: statistics.median(found) for name, found in cost.items()}})
        for k in gates:
            shown = diffmask.explain(pictures, layer=k)
            for name, value in promise(shown, diffmask.config.eps).mean().items():
                table.loc[f"depth {k}", name] = value
            fit = cut_to_fit(diffmask, pictures, scores=shown.scores)
            table.loc[f"depth {k}", "cut to fit, kept"] = fit.kept.mean().item()
        print(task, table.round(3).to_string(), sep="\n", flush=True)
        tables.append(table.assign(task=task).set_index("task", append=True).swaplevel())
    if wanted.table:
        wanted.table.parent.mkdir(parents=True, exist_ok=True)
        pd.concat(tables).to_csv(wanted.table, float_format="%.4f", index_label=["task", "what"])


if __name__ == "__main__":
    main()
