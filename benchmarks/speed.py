"""What a DiffMask training step and an explanation cost, in forward passes of the base measured in the same process.

    python benchmarks/speed.py            # ViT-B/16 at 224×224, batch 4, random weights (speed does not depend on them)
    python benchmarks/speed.py --size small --image_size 32 --patch_size 4 --batch_size 64 --methods all   # CIFAR-10's

Medians over the rounds of `in_passes` are printed. The bounds are those of the project: at most 3.3 for a step (reference: 5.9), 1.15 for a mask
(reference: 2.2). Attention rollout and Grad-CAM stand beside them, or with `--methods all` every method that the notebooks
compare.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from vdm_utils.attributions import METHODS, diffmask_method
from vdm_utils.diffmask import VisionDiffMask
from vdm_utils.training import DiffMaskSettings, DiffMaskTrainer, settings
from vdm_utils.vit import build_classifier

FEW = ("Attention rollout", "Grad-CAM")
BOUNDS = {"training step": "; bound 3.3, reference 5.9", "Vision DiffMask": "; bound 1.15, reference 2.2"}


def seconds(job: Callable[[], object]) -> float:
    """The processor time of one call, which does not count the turns of other programs."""
    start = time.process_time()
    job()
    return time.process_time() - start


def in_passes(
    forward: Callable[[], object], jobs: dict[str, Callable[[], object]], rounds: int, dear: Collection[str] = ()
) -> dict[str, list[float]]:
    """What each job costs in calls of `forward`, round by round, after one round that warms up.

    Every round gives each job its turn between two forward passes, by whose mean its time is divided: a drift of the
    machine's speed cancels. `dear` jobs, which average over dozens of passes by themselves, have three rounds.
    """
    ratios: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(rounds + 1):
        before = seconds(forward)
        for name, job in jobs.items():
            if name in dear and round_ not in (1, 2, 3):
                continue
            spent, after = seconds(job), seconds(forward)
            if round_:
                ratios[name].append(2 * spent / (before + after))
            before = after
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "small", "base"))
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", default="few", choices=("few", "all"))
    parser.add_argument("--table", type=Path, help="CSV to write, with the passes that each method counts")
    wanted = parser.parse_args()
    model = build_classifier("vit", wanted.size, wanted.image_size, wanted.patch_size).eval()
    chosen = settings(DiffMaskSettings, "quick")
    diffmask = VisionDiffMask.for_classifier(model, **chosen.config())
    optimizer = DiffMaskTrainer.make_optimizer(diffmask, chosen)
    pixels = torch.randn(wanted.batch_size, 3, wanted.image_size, wanted.image_size)

    @torch.no_grad()
    def forward():
        model(pixels)

    def step():
        layer = int(torch.randint(diffmask.config.num_gates, ()))
        diffmask(pixels, layer).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    mask = diffmask_method(diffmask)  # explain(check=False)
    methods = {"Vision DiffMask": mask, **(METHODS if wanted.methods == "all" else {n: METHODS[n] for n in FEW})}
    jobs = {"training step": step, **{name: partial(method, model, pixels) for name, method in methods.items()}}
    dear = {name for name, method in methods.items() if sum(method.passes(model)) > 10}
    ratios = in_passes(forward, jobs, wanted.rounds, dear)
    print(f"{wanted.size}, {wanted.image_size}×{wanted.image_size}, batch {wanted.batch_size}")
    for name, found in ratios.items():
        print(f"{name:<22} {statistics.median(found):.2f} base forwards "
              f"(min {min(found):.2f}, max {max(found):.2f}{BOUNDS.get(name, '')})")  # fmt: skip
    if wanted.table:
        table = pd.DataFrame({n: [statistics.median(r), min(r), max(r), len(r)] for n, r in ratios.items()}).T
        table.columns = ["base forwards", "min", "max", "rounds"]
        passes = {name: method.passes(model) for name, method in methods.items()}
        counted = pd.DataFrame(passes, index=["forward passes", "backward passes"]).T
        table.join(counted).astype({"rounds": int}).to_csv(wanted.table, float_format="%.4g", index_label="method")


if __name__ == "__main__":
    main()
