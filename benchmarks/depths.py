"""How deep does a mask have to look? Every depth's mask of a shipped DiffMask, and what it costs to leave the classifier there.

    python benchmarks/depths.py shapes cifar10 --table runs/depths.csv

Costs are forward passes of the same 64 pictures, medians of rounds in which everything takes its turn; attention rollout and
Grad-CAM stand beside them. Test pictures; nothing is trained.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from shipped import DATASETS, promise, shipped
from speed import seconds

from vdm_utils.attributions import attention_rollout, grad_cam
from vdm_utils.refine import cut_to_fit


def in_passes(jobs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median time of each job, in that of the job "pass" in the same round; the first round warms up."""
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            spent[name].append(seconds(job))
    return {n: statistics.median(t / f for t, f in zip(s[1:], spent["pass"][1:])) for n, s in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=sorted(DATASETS))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", type=Path, help="CSV to write")
    wanted, tables = parser.parse_args(), []
    for task in wanted.tasks:
        diffmask, _, batch = shipped(task, wanted.images)
        pictures, model, gates = batch["pixel_values"], diffmask.base, range(diffmask.config.num_gates)
        some = pictures[:64]

        @torch.no_grad()
        def whole(model=model, some=some):
            model(some)

        def early(layer: int, diffmask=diffmask, some=some):
            return lambda: diffmask.explain(some, layer=layer, check=False, stop_early=True)

        jobs = {"pass": whole, **{f"depth {k}": early(k) for k in gates}}
        jobs |= {"mask": lambda d=diffmask, s=some: d.explain(s, check=False)}
        jobs |= {
            "rollout": lambda m=model, s=some: attention_rollout(m, s),
            "Grad-CAM": lambda m=model, s=some: grad_cam(m, s),
        }
        table = pd.DataFrame({"cost": in_passes(jobs, wanted.rounds)})
        for k in gates:
            shown = diffmask.explain(pictures, layer=k)
            for name, value in promise(shown, diffmask.config.eps).mean().items():
                table.loc[f"depth {k}", name] = value
            fit = cut_to_fit(diffmask, pictures, scores=shown.scores)
            table.loc[f"depth {k}", "cut to fit, kept"] = fit.kept.mean().item()
        print(task, table.drop(index="pass").round(3).to_string(), sep="\n", flush=True)
        tables.append(table.assign(task=task).set_index("task", append=True).swaplevel())
    if wanted.table:
        wanted.table.parent.mkdir(parents=True, exist_ok=True)
        pd.concat(tables).to_csv(wanted.table, float_format="%.4f", index_label=["task", "what"])


if __name__ == "__main__":
    main()
